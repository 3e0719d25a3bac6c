//! What clients saw of a pool, and whether one pool can have shown it to all of them.
//!
//! [`load`] lets clients loose on a pool and writes down every call: when it began and ended, and what became of it. The
//! other modules look at what was written down, each at one promise:
//!
//! | module | promise |
//! | --- | --- |
//! | [`register`] | a field behaves as if each call on it happened at one instant between its begin and its end |
//! | [`growing`] | what was added is there from then on, what was refused is not, and all readers agree on the order |
//! | [`making`] | a call that is repeated under its key is done once, and always answers the same |
//! | [`watching`] | an event watcher misses nothing, hears nothing twice, and nothing out of order |
//!
//! A call whose answer was lost may have been done or not, and at any time after it began: nothing is assumed of it, but
//! what others saw of it must fit together.

pub mod growing;
pub mod load;
pub mod making;
pub mod register;
pub mod watching;

use std::time::Duration;

/// When a call was under way, on the test's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Before its first byte was sent.
    pub begun: Duration,
    /// After its last byte was read.
    pub ended: Duration,
}

/// What became of a change that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was acknowledged.
    Done,
    /// The pool said that it was not done.
    Refused,
    /// Nobody said.
    Unknown,
}

/// A promise that was not kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A value was seen that nobody wrote.
    #[error("{object}: {value:?} was read and never written")]
    NeverWritten {
        /// Where.
        object: String,
        /// What.
        value: String,
    },
    /// A change was seen that the pool had refused.
    #[error("{object}: {value:?} was refused and is there all the same")]
    Refused {
        /// Where.
        object: String,
        /// What.
        value: String,
    },
    /// A change was seen before anybody had asked for it.
    #[error("{object}: {value:?} was read before it was written")]
    TooEarly {
        /// Where.
        object: String,
        /// What.
        value: String,
    },
    /// A reader was told what another value had replaced already.
    #[error("{object}: {old:?} was read after {new:?} had replaced it")]
    Stale {
        /// Where.
        object: String,
        /// The value that was gone.
        old: String,
        /// The value that was there.
        new: String,
    },
    /// An acknowledged change is not there.
    #[error("{object}: {value:?} was acknowledged and is missing")]
    Lost {
        /// Where.
        object: String,
        /// What.
        value: String,
    },
    /// Two readers saw changes in different orders.
    #[error("{object}: one reader saw {one:?} without {other:?}, another the other way round")]
    Order {
        /// Where.
        object: String,
        /// The one.
        one: String,
        /// The other.
        other: String,
    },
    /// What was asked once was done twice.
    #[error("{object} was done {times} times")]
    Twice {
        /// What.
        object: String,
        /// How often.
        times: usize,
    },
    /// A watcher was told something that cannot follow on what it had been told before.
    #[error("watcher {watcher}: {what}")]
    Watch {
        /// Which one.
        watcher: String,
        /// What.
        what: String,
    },
}

/// Fails with every violation, a line each.
pub fn must_be_kept(violations: &[Violation]) -> anyhow::Result<()> {
    const SHOWN: usize = 20;
    if violations.is_empty() {
        return Ok(());
    }
    let lines: Vec<_> = violations.iter().take(SHOWN).map(ToString::to_string).collect();
    anyhow::bail!("{} promises were broken:\n{}", violations.len(), lines.join("\n"))
}
