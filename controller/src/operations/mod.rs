//! Operations: written down before they act, so that the next master can finish or undo them.
//!
//! An operation is about one or several objects and has a row of the internal class `operation`. It begins with one
//! transaction, in which its kind's checks hold, that marks the objects (`current_operations`) and writes the row; it
//! ends with one that writes what came of it, unmarks them, settles the task and deletes the row. In between are its
//! steps, each sent to one agent under the row's uuid and its own number; the agent does it at most once and answers a
//! repetition with the first outcome. What a step came to is in the row before the next one begins, and so is how to
//! undo a step before it is done.
//!
//! A master that finds operations of an earlier one goes on where the row says, with the step that may or may not have
//! been done: that either finishes them or learns what became of them. One whose step fails is turned round, which the
//! row says too, and what it has done is undone, the last first. What cannot be undone for now, or need not be done before it
//! ends, stays in the journal as its debt, without holding anything, and is tried again (`debts`).
//!
//! A kind of operation is a type that says its word, its steps and what they mean ([`Kind`]), and a line in [`KINDS`].

mod adopt;
mod allowed;
mod begin;
mod checkpoint;
mod debts;
mod duplicate;
mod engine;
mod guest;
mod journal;
mod live;
mod power;
mod provision;
mod refusals;
mod revert;
mod shown;
mod step;
mod suspend;

use std::sync::Arc;
use std::time::Duration;

use datamodel::{ApiError, Value};
use futures::future::BoxFuture;
use proto::agent::Refusal;
use raft_store::{State, Transaction};

pub(crate) use self::adopt::adopt;
pub(crate) use self::allowed::refresh;
pub(crate) use self::begin::{Draft, run};
pub(crate) use self::checkpoint::checkpoint;
pub(crate) use self::debts::{forget_domains_at, may_run_at, owed_volumes};
pub(crate) use self::duplicate::{Asked, Duplicate, duplicate};
pub(crate) use self::engine::is_cancelled;
pub(crate) use self::journal::Journal;
pub(crate) use self::live::{Limits, send_sysrq, set_memory, set_vcpus};
pub(crate) use self::power::{Power, clean_shutdown, hard_shutdown, run_power, shutdown};
pub(crate) use self::provision::provision;
pub(crate) use self::refusals::OF_STORES;
pub(crate) use self::revert::revert;
pub(crate) use self::shown::{is_shown, show};
pub(crate) use self::step::Planned;
pub(crate) use self::suspend::{resume, suspend};
use crate::agent::Performed;
use crate::controller::Shared;
use crate::failure::{Served, refuse};

/// A step that takes longer than this is taken for lost; the agent's answer is then asked for again.
pub(crate) const STEP_LIMIT: Duration = Duration::from_secs(60);
/// A guest that was asked to end has this long.
pub(crate) const CLEAN_LIMIT: Duration = Duration::from_secs(1200);
/// A transaction that others are faster than is decided anew so often.
const ATTEMPTS: usize = 40;

/// What may be in the journal.
const KINDS: &[&[&[&dyn Kind]]] = &[
    &[power::KINDS, live::KINDS, suspend::KINDS, checkpoint::KINDS, revert::KINDS],
    &[duplicate::KINDS, provision::KINDS, crate::appliances::KINDS, crate::schedules::KINDS],
    crate::storage::KINDS,
];

fn kind(verb: &str) -> Option<&'static dyn Kind> {
    KINDS
        .iter()
        .flat_map(|of_module| of_module.iter())
        .flat_map(|kinds| kinds.iter())
        .find(|kind| kind.verb() == verb)
        .copied()
}

/// A kind of operation.
pub(crate) trait Kind: Send + Sync {
    /// Its word in the journal.
    fn verb(&self) -> &'static str;

    /// Its steps, from the journal and the rows: the same whenever it is asked, but for what earlier steps told.
    ///
    /// # Errors
    /// A row that it needs is gone.
    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>>;

    /// What it does when its steps are done, where it is made of other operations. Whoever adopts it begins this anew, so
    /// it looks at what is there and does what is left.
    fn work<'a>(&'a self, _shared: &'a Arc<Shared>, _journal: &'a Journal) -> Option<BoxFuture<'a, Served<()>>> {
        None
    }

    /// Writes what its success means; what its call answers.
    ///
    /// # Errors
    /// It cannot be recorded: the steps are undone.
    fn record(&self, end: &mut Ending<'_>) -> Served<Value>;

    /// Writes what its failure means, beyond that nothing is held any more.
    fn fail(&self, _end: &mut Ending<'_>, _error: &ApiError) {}

    /// The documented error of a step that its agent refused.
    fn refused(&self, seen: &Seen<'_>, step: &Planned, refusal: &Refusal) -> ApiError {
        refusals::error(seen.state, step, refusal)
    }

    /// Whether it waits until nothing is under way at its VM's drives, rather than be refused.
    fn waits_for_drives(&self) -> bool {
        false
    }

    /// Whether it is undone when its task is cancelled between two steps.
    fn cancellable(&self) -> bool {
        false
    }
}

/// What a kind of operation decides by.
pub(crate) struct Seen<'a> {
    pub(crate) state: &'a State,
    pub(crate) journal: &'a Journal,
}

/// The last transaction of an operation.
pub(crate) struct Ending<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) state: &'a State,
    pub(crate) journal: &'a Journal,
    pub(crate) change: &'a mut Transaction,
}

impl<'a> Ending<'a> {
    pub(crate) const fn seen(&self) -> Seen<'a> {
        Seen { state: self.state, journal: self.journal }
    }
}

impl Journal {
    /// The volume that a step answered with.
    pub(crate) fn volume(&self, number: usize) -> Served<&proto::agent::VolumeState> {
        match self.outcomes.get(number) {
            Some(Performed::Volume(volume)) => Ok(volume),
            _ => refuse(datamodel::errors::internal_error("the agent did not answer with a volume")),
        }
    }

    /// The store that a step answered with.
    pub(crate) fn store(&self, number: usize) -> Served<&proto::agent::StoreState> {
        match self.outcomes.get(number) {
            Some(Performed::Store(store)) => Ok(store),
            _ => refuse(datamodel::errors::internal_error("the agent did not answer with a store")),
        }
    }

    /// Whether a step was done, of those that may fail.
    pub(crate) fn was_done(&self, number: usize) -> bool {
        !matches!(self.outcomes.get(number), None | Some(Performed::Nothing))
    }

    /// The last domain that any step answered with.
    pub(crate) fn last_domain(&self) -> Option<&proto::agent::DomainState> {
        self.outcomes.iter().rev().find_map(|outcome| match outcome {
            Performed::Domain(domain) => Some(domain),
            _ => None,
        })
    }

    /// The domain that a step answered with.
    pub(crate) fn domain(&self, number: usize) -> Served<&proto::agent::DomainState> {
        match self.outcomes.get(number) {
            Some(Performed::Domain(domain)) => Ok(domain),
            _ => refuse(datamodel::errors::internal_error("the agent did not answer with a domain")),
        }
    }
}
