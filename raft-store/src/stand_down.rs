//! The way back from a hand-over that came to nothing.
//!
//! A leader that hands over proposes nothing more and cannot be told to stop that: it waits to be replaced. An heir that has
//! no vote any more cannot replace it, and where nobody else can either, the pool would stand still for good. So whoever
//! is still there after a while gives the lead up, by a vote for the heir in the next term that nobody asked for and
//! nobody is told of, and stands for election like everybody else.

use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use openraft::raft::VoteRequest;

use crate::store::leads;
use crate::types::{Raft, Vote};

/// Waits until a hand-over must have come to its end, and gives up the lead where it has not.
pub(crate) async fn if_nobody_took_the_lead(raft: Raft, heir: u64, term: u64, after: Duration) {
    tokio::time::sleep(after).await;
    let stuck = {
        let metrics = raft.metrics();
        let now = metrics.borrow_watched();
        leads(now.state) && now.current_term == term
    };
    if !stuck {
        return;
    }
    tracing::warn!(term, heir, "the lead was handed over and nobody took it: this node stands for election anew");
    let stood_down = async {
        let last_log_id = raft.with_raft_state(|state| state.log_ids.last().copied()).await?;
        // As in a hand-over, whose word counts against a lease.
        raft.vote(VoteRequest { vote: Vote::new(term + 1, heir), last_log_id, leadership_transfer: true }).await
    };
    if let Err(error) = stood_down.await {
        tracing::warn!(%error, "consensus has ended");
    }
}
