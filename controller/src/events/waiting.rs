//! Who waits for which changes: an entry wakes those whom it concerns, and nobody else.
//!
//! Hundreds of clients wait, and most of what happens concerns few of them. One task follows the log and looks up who
//! asked for what has changed; a waiter that is not meant sleeps on and costs nothing. While nobody waits, as on every host
//! but the master, that task rests: it would wake a thread of this runtime for every entry.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use datamodel::{ClassId, OpaqueRef};
use parking_lot::Mutex;
use raft_store::{LogIndex, State};
use tokio::sync::Notify;

use crate::controller::Shared;

/// What somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Interest {
    /// Any object that events are told of.
    Everything,
    /// Any object of a class.
    Class(ClassId),
    /// One object.
    Object(ClassId, OpaqueRef),
}

/// Everybody who waits.
#[derive(Default)]
pub(crate) struct Waiting {
    waiters: Mutex<Waiters>,
    begun: Notify,
}

#[derive(Default)]
struct Waiters {
    next: u64,
    by_interest: HashMap<Interest, BTreeMap<u64, Arc<Notify>>>,
    /// Someone waits since the log was at this index, if it is followed.
    followed_from: Option<LogIndex>,
}

/// One who waits; dropped when it has what it wanted.
pub(crate) struct Waiter<'a> {
    waiting: &'a Waiting,
    number: u64,
    interests: Vec<Interest>,
    woken: Arc<Notify>,
}

impl Waiting {
    /// Joins those who wait. A change that is in no state read before this call wakes the new one: whoever joins first
    /// and looks then misses nothing. `now` is an index that is applied already.
    pub(crate) fn join(&self, interests: Vec<Interest>, now: LogIndex) -> Waiter<'_> {
        let woken = Arc::new(Notify::new());
        let mut waiters = self.waiters.lock();
        let number = waiters.next;
        waiters.next += 1;
        for interest in &interests {
            waiters.by_interest.entry(*interest).or_default().insert(number, Arc::clone(&woken));
        }
        if waiters.followed_from.is_none() {
            waiters.followed_from = Some(now);
            self.begun.notify_one();
        }
        drop(waiters);
        Waiter { waiting: self, number, interests, woken }
    }

    /// Waits until somebody does; the index since which.
    async fn begun(&self) -> LogIndex {
        loop {
            let since = self.waiters.lock().followed_from;
            if let Some(since) = since {
                return since;
            }
            self.begun.notified().await;
        }
    }

    /// Whether nobody waits any more. From then on the log is not followed until somebody does.
    fn over(&self) -> bool {
        let mut waiters = self.waiters.lock();
        let over = waiters.by_interest.is_empty();
        if over {
            waiters.followed_from = None;
        }
        over
    }

    /// Wakes who waits for anything that changed after `told`.
    fn tell(&self, state: &State, told: LogIndex) {
        let waiters = self.waiters.lock();
        if waiters.by_interest.is_empty() {
            return;
        }
        for change in state.changes_since(told) {
            let (class, object) = (Interest::Class(change.class), Interest::Object(change.class, change.reference));
            let everything = change.class.def().emits_events.then_some(Interest::Everything);
            let meant = [Some(class), Some(object), everything].into_iter().flatten();
            for woken in meant.filter_map(|interest| waiters.by_interest.get(&interest)).flat_map(BTreeMap::values) {
                woken.notify_one();
            }
        }
    }
}

impl Waiter<'_> {
    /// Waits until something of interest has changed since the last time.
    pub(crate) async fn woken(&self) {
        self.woken.notified().await;
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut waiters = self.waiting.waiters.lock();
        for interest in &self.interests {
            if let Some(others) = waiters.by_interest.get_mut(interest) {
                others.remove(&self.number);
                if others.is_empty() {
                    waiters.by_interest.remove(interest);
                }
            }
        }
    }
}

/// Follows the log and wakes who waits for what it brings, until shutdown.
pub(crate) async fn follow(shared: &Shared) {
    loop {
        let mut told = tokio::select! {
            since = shared.waiting.begun() => since,
            () = shared.shutdown.cancelled() => return,
        };
        let mut applied = shared.store.applied();
        loop {
            let state = shared.store.state();
            shared.waiting.tell(&state, told);
            told = state.applied;
            if shared.waiting.over() {
                break;
            }
            let goes_on = tokio::select! {
                changed = applied.changed() => changed.is_ok(),
                () = shared.shutdown.cancelled() => false,
            };
            if !goes_on {
                return;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use datamodel::{ClassKind as _, Session, Vm};
    use futures::FutureExt as _;

    use super::{Interest, Waiting};
    use crate::tests::{Pool, text};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_change_wakes_whom_it_concerns_and_nobody_else() {
        let pool = Pool::start().await;
        let (mine, another) = (pool.vm("mine").await, pool.vm("another").await);
        let waiting = Waiting::default();
        let interests = [
            Interest::Object(Vm::ID, mine.opaque()),
            Interest::Object(Vm::ID, another.opaque()),
            Interest::Class(Vm::ID),
            Interest::Class(Session::ID),
            Interest::Everything,
        ];
        let now = pool.store().state().applied;
        let waiters = interests.map(|interest| waiting.join(vec![interest], now));
        let woken = || waiters.each_ref().map(|waiter| waiter.woken().now_or_never().is_some());
        let before = pool.store().state().applied;
        pool.ask("VM.set_name_label", vec![text(mine.to_string()), text("renamed")]).await.unwrap();
        waiting.tell(&pool.store().state(), before);
        assert_eq!(woken(), [true, false, true, false, true]);
        assert_eq!(woken(), [false; 5], "once");

        // A new session is an object of a class that is kept from events.
        let before = pool.store().state().applied;
        pool.login().await;
        waiting.tell(&pool.store().state(), before);
        assert_eq!(woken(), [false, false, false, true, false]);

        assert!(!waiting.over());
        drop(waiters);
        assert!(waiting.over() && waiting.waiters.lock().by_interest.is_empty());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_log_is_followed_from_where_the_first_one_joined() {
        let pool = Pool::start().await;
        let vm = pool.vm("a machine").await;
        let waiting = Waiting::default();
        assert!(waiting.begun().now_or_never().is_none(), "nobody waits");
        let now = pool.store().state().applied;
        let waiter = waiting.join(vec![Interest::Everything], now);
        // What changes before the follower has woken up is told, too.
        pool.ask("VM.set_name_label", vec![text(vm.to_string()), text("renamed")]).await.unwrap();
        let since = waiting.begun().now_or_never().unwrap();
        assert_eq!(since, now);
        waiting.tell(&pool.store().state(), since);
        assert!(waiter.woken().now_or_never().is_some());
        drop(waiter);
        assert!(waiting.over() && waiting.begun().now_or_never().is_none(), "it rests again");
    }
}
