//! Mistakes made on purpose, to see that the simulation finds them. Nothing but a test of the tests plants one.

/// A mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planted {
    /// Entries count as written before they are synced.
    AcknowledgesBeforeSync,
    /// Whoever believes to lead answers reads, without a proof.
    ReadsWhileDeposed,
    /// Who has asked another node to take the lead goes on answering reads from its lease.
    KeepsItsLease,
    /// Deletions are forgotten after a few entries, and tokens from before them still accepted.
    ForgetsTombstones,
    /// Who has lost its database gives its votes all the same.
    VotesBehindItsFence,
    /// An answer counts as one to the newest request, whichever it answers.
    BelievesOldAnswers,
    /// A member that only learns is counted where a quorum's word proves the lead.
    CountsLearners,
    /// Reads are answered from the lease until its last moment, as if all clocks ran at one speed.
    TrustsAllClocks,
}
