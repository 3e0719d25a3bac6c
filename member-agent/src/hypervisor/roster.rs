//! All domains of a host, in one place, for every driver.
//!
//! The roster keeps three promises. A VM has at most one domain, also while it is being built. The memory of
//! all domains, built and being built, never exceeds what the host may give. And a watcher that takes a feed
//! gets every domain as it is, then each change once and in order, because both come under one lock.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::domain::{DomainState, Reason, Refusal};

/// How many changes a slow watcher may be behind before it is shown everything anew.
const BACKLOG: usize = 1024;

/// The domains of this host.
#[derive(Debug)]
pub struct Roster {
    inner: Mutex<Inner>,
    changes: broadcast::Sender<DomainState>,
    settled: watch::Sender<()>,
    /// Bytes for all domains together.
    capacity: u64,
}

#[derive(Debug, Default)]
struct Inner {
    domains: HashMap<Uuid, DomainState>,
    building: HashMap<Uuid, Building>,
}

#[derive(Debug)]
struct Building {
    memory: u64,
    cancel: CancellationToken,
}

/// Every domain as it is, and the changes from there on.
#[derive(Debug)]
pub struct Feed {
    /// The domains, in no order.
    pub all: Vec<DomainState>,
    /// What changes next.
    pub changes: broadcast::Receiver<DomainState>,
}

/// What the host may give to domains, and what is left of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Bytes for all domains together.
    pub capacity: u64,
    /// Bytes not given away.
    pub free: u64,
}

/// The right to build a domain: name and memory are held until it is settled or dropped.
#[derive(Debug)]
pub struct Reservation {
    roster: Arc<Roster>,
    vm: Uuid,
    cancel: CancellationToken,
    open: bool,
}

impl Roster {
    /// An empty roster with `capacity` bytes to give.
    pub fn new(capacity: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::default(),
            changes: broadcast::Sender::new(BACKLOG),
            settled: watch::Sender::new(()),
            capacity,
        })
    }

    /// Holds name and memory for a domain that is to be built.
    pub fn reserve(self: &Arc<Self>, vm: Uuid, memory: u64) -> Result<Reservation, Refusal> {
        let mut inner = self.inner.lock();
        if inner.domains.contains_key(&vm) || inner.building.contains_key(&vm) {
            return Err(Refusal::new(Reason::DomainExists, vm.to_string()));
        }
        let free = self.capacity.saturating_sub(inner.given());
        if memory > free {
            return Err(Refusal::memory(memory, free));
        }
        let cancel = CancellationToken::new();
        inner.building.insert(vm, Building { memory, cancel: cancel.clone() });
        Ok(Reservation { roster: Arc::clone(self), vm, cancel, open: true })
    }

    /// Stops the building of this VM's domain, if there is one, and waits until it has ended one way or the other.
    pub async fn cancel_building(&self, vm: Uuid, limit: Duration) -> Result<(), Refusal> {
        let mut settled = self.settled.subscribe();
        match self.inner.lock().building.get(&vm) {
            Some(building) => building.cancel.cancel(),
            None => return Ok(()),
        }
        let gone = async { settled.wait_for(|()| !self.inner.lock().building.contains_key(&vm)).await.is_ok() };
        match tokio::time::timeout(limit, gone).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Refusal::new(Reason::TimedOut, "the start of this domain does not end")),
        }
    }

    /// Whether this VM's domain is being built.
    pub fn is_building(&self, vm: Uuid) -> bool {
        self.inner.lock().building.contains_key(&vm)
    }

    /// The domain of a VM, once nobody is building it.
    pub async fn built(&self, vm: Uuid, limit: Duration) -> Option<DomainState> {
        let mut settled = self.settled.subscribe();
        let at_rest = settled.wait_for(|()| !self.is_building(vm));
        // One that is still being built then is not there.
        let _ = tokio::time::timeout(limit, at_rest).await;
        self.get(vm)
    }

    /// Takes in a domain that was there before this agent.
    pub fn adopt(&self, state: DomainState) {
        self.publish(state);
    }

    /// A domain's new state.
    pub fn publish(&self, state: DomainState) {
        let mut inner = self.inner.lock();
        inner.domains.insert(state.vm, state.clone());
        // No receiver is no error: nobody watches.
        let _ = self.changes.send(state);
    }

    /// Holds memory for a domain that is to grow to `target`, or lets it shrink to that.
    pub fn retarget(&self, vm: Uuid, target: u64) -> Result<DomainState, Refusal> {
        let mut inner = self.inner.lock();
        let free = self.capacity.saturating_sub(inner.given());
        let state = inner.domains.get_mut(&vm).ok_or_else(|| Refusal::no_such_domain(vm))?;
        let more = target.saturating_sub(state.taken());
        if more > free {
            return Err(Refusal::memory(more, free));
        }
        state.memory_target = target;
        Ok(state.clone())
    }

    /// A domain is gone; `last` says how.
    pub fn remove(&self, last: DomainState) {
        let mut inner = self.inner.lock();
        if inner.domains.remove(&last.vm).is_some() {
            let _ = self.changes.send(last);
        }
    }

    /// The domain of a VM.
    pub fn get(&self, vm: Uuid) -> Option<DomainState> {
        self.inner.lock().domains.get(&vm).cloned()
    }

    /// All domains.
    pub fn list(&self) -> Vec<DomainState> {
        self.inner.lock().domains.values().cloned().collect()
    }

    /// All domains, and every change after that.
    pub fn feed(&self) -> Feed {
        let inner = self.inner.lock();
        Feed { all: inner.domains.values().cloned().collect(), changes: self.changes.subscribe() }
    }

    /// Memory to give and left.
    pub fn memory(&self) -> Memory {
        let given = self.inner.lock().given();
        Memory { capacity: self.capacity, free: self.capacity.saturating_sub(given) }
    }
}

impl Inner {
    fn given(&self) -> u64 {
        let built: u64 = self.domains.values().map(DomainState::taken).sum();
        let building: u64 = self.building.values().map(|building| building.memory).sum();
        built + building
    }
}

impl Reservation {
    /// Ends when somebody wants the domain gone before it is there.
    pub async fn cancelled(&self) {
        self.cancel.cancelled().await;
    }

    /// The domain is there.
    pub fn settle(mut self, state: DomainState) {
        self.open = false;
        let mut inner = self.roster.inner.lock();
        inner.building.remove(&self.vm);
        inner.domains.insert(self.vm, state.clone());
        let _ = self.roster.changes.send(state);
        drop(inner);
        self.roster.settled.send_replace(());
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.open {
            self.roster.inner.lock().building.remove(&self.vm);
            self.roster.settled.send_replace(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::domain::{MIB, Power};

    fn running(vm: Uuid, memory: u64) -> DomainState {
        DomainState { power: Power::Running, domid: 1, memory_actual: memory, ..DomainState::halted(vm, "", "") }
    }

    #[test]
    fn memory_is_given_once_and_comes_back() {
        let roster = Roster::new(100 * MIB);
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let reservation = roster.reserve(one, 60 * MIB).expect("room");
        assert_eq!(roster.reserve(two, 41 * MIB).expect_err("full"), Refusal::memory(41 * MIB, 40 * MIB));
        reservation.settle(running(one, 60 * MIB));
        assert_eq!(roster.memory().free, 40 * MIB);
        drop(roster.reserve(two, 40 * MIB).expect("room"));
        roster.remove(running(one, 0).gone(Power::Halted, "", ""));
        assert_eq!(roster.memory().free, 100 * MIB);
    }

    #[test]
    fn a_domain_that_is_to_grow_has_its_memory_first_and_one_that_shrinks_keeps_it_until_it_has() {
        let roster = Roster::new(100 * MIB);
        let vm = Uuid::from_u128(1);
        roster.adopt(DomainState { memory_target: 60 * MIB, ..running(vm, 60 * MIB) });
        assert_eq!(roster.retarget(vm, 101 * MIB).expect_err("full"), Refusal::memory(41 * MIB, 40 * MIB));
        roster.retarget(vm, 90 * MIB).expect("room");
        assert_eq!(roster.memory().free, 10 * MIB);
        let state = roster.retarget(vm, 20 * MIB).expect("less");
        assert_eq!(roster.memory().free, 40 * MIB);
        roster.publish(DomainState { memory_actual: 20 * MIB, ..state });
        assert_eq!(roster.memory().free, 80 * MIB);
    }

    #[test]
    fn a_vm_has_one_domain_even_while_it_is_built() {
        let roster = Roster::new(100 * MIB);
        let vm = Uuid::from_u128(1);
        let reservation = roster.reserve(vm, MIB).expect("room");
        assert_eq!(roster.reserve(vm, MIB).expect_err("twice").reason, Reason::DomainExists);
        reservation.settle(running(vm, MIB));
        assert_eq!(roster.reserve(vm, MIB).expect_err("twice").reason, Reason::DomainExists);
    }

    #[test]
    fn a_feed_never_shows_an_older_state_after_a_newer_one() {
        let roster = Roster::new(100 * MIB);
        let vm = Uuid::from_u128(1);
        roster.adopt(running(vm, MIB));
        let mut feed = roster.feed();
        assert_eq!(feed.all, vec![running(vm, MIB)]);
        assert!(feed.changes.try_recv().is_err());
        roster.remove(running(vm, MIB).gone(Power::Crashed, "", "killed"));
        assert_eq!(feed.changes.try_recv().expect("change").power, Power::Crashed);
    }

    #[tokio::test]
    async fn who_wants_a_domain_gone_waits_for_the_end_of_its_start() {
        let roster = Roster::new(100 * MIB);
        let vm = Uuid::from_u128(1);
        let reservation = roster.reserve(vm, MIB).expect("room");
        let starter = tokio::spawn(async move { reservation.cancelled().await });
        roster.cancel_building(vm, Duration::from_secs(5)).await.expect("ended");
        starter.await.expect("starter");
        assert_eq!(roster.memory().free, 100 * MIB);
    }
}
