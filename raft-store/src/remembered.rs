//! What transactions came to, so that a repeated one is answered and not applied again.
//!
//! Every transaction adds an outcome and, once there are enough of them, ends another. The outcomes are part of the
//! state, in the order in which they came: at its ends a persistent sequence costs next to nothing. Where in that order
//! an id stands is kept once for all states. Ids are random; in a persistent map each would lie on a path of its own, and
//! every transaction would copy two paths through a hundred thousand of them.

use std::collections::HashMap;

use imbl::Vector;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::state::Outcome;

/// So many outcomes are remembered.
pub(crate) const REMEMBERED_TRANSACTIONS: usize = 100_000;

/// The outcomes of one state, oldest first.
#[derive(Clone, Default)]
pub(crate) struct Remembered {
    order: Vector<(Uuid, Outcome)>,
    /// Place of the oldest. Places are counted from where this process, or the snapshot it was given, began.
    first: u64,
}

impl Remembered {
    /// Where the next one comes.
    pub(crate) fn end(&self) -> u64 {
        self.first + self.order.len() as u64
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }

    /// All of them, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &(Uuid, Outcome)> {
        self.order.iter()
    }

    /// The one that so many are older than.
    pub(crate) fn nth(&self, position: usize) -> Option<&(Uuid, Outcome)> {
        self.order.get(position)
    }

    /// Adds one that is known to be new.
    pub(crate) fn push(&mut self, id: Uuid, outcome: Outcome) {
        self.order.push_back((id, outcome));
    }

    fn at(&self, place: u64) -> Option<&(Uuid, Outcome)> {
        self.order.get(usize::try_from(place.checked_sub(self.first)?).ok()?)
    }

    fn forget_oldest(&mut self) -> Option<Uuid> {
        if self.order.len() <= REMEMBERED_TRANSACTIONS {
            return None;
        }
        let (id, _) = self.order.pop_front()?;
        self.first += 1;
        Some(id)
    }
}

/// Where each id stands, in the newest state and in those that it was made of.
#[derive(Default)]
pub(crate) struct Places(Mutex<HashMap<Uuid, u64>>);

impl Places {
    /// Those of a state that did not come from another.
    pub(crate) fn of(remembered: &Remembered) -> Self {
        Self(Mutex::new((remembered.first..).zip(remembered.iter()).map(|(place, (id, _))| (*id, place)).collect()))
    }

    /// Goes on with those of another state.
    pub(crate) fn become_those(&self, other: Self) {
        *self.0.lock() = other.0.into_inner();
    }

    /// What became of a transaction as of this state.
    pub(crate) fn find<'a>(&self, id: Uuid, remembered: &'a Remembered) -> Option<&'a Outcome> {
        let place = *self.0.lock().get(&id)?;
        // A state from before a snapshot came in has another order.
        remembered.at(place).filter(|(found, _)| *found == id).map(|(_, outcome)| outcome)
    }

    /// Remembers what a transaction came to that was not found.
    pub(crate) fn remember(&self, remembered: &mut Remembered, id: Uuid, outcome: Outcome) {
        let mut places = self.0.lock();
        places.insert(id, remembered.end());
        remembered.push(id, outcome);
        while let Some(oldest) = remembered.forget_oldest() {
            places.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::LogIndex;

    fn id(number: u64) -> Uuid {
        Uuid::from_u128(u128::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
    }

    #[test]
    fn the_newest_outcomes_are_found_and_older_ones_forgotten() {
        let (mut remembered, places) = (Remembered::default(), Places::default());
        let all = REMEMBERED_TRANSACTIONS as u64 + 3;
        for number in 0..all {
            assert_eq!(places.find(id(number), &remembered), None);
            places.remember(&mut remembered, id(number), Ok(LogIndex(number)));
        }
        assert_eq!((remembered.len(), remembered.end()), (REMEMBERED_TRANSACTIONS, all));
        for (number, known) in [(0, false), (2, false), (3, true), (all - 1, true)] {
            assert_eq!(places.find(id(number), &remembered), known.then_some(&Ok(LogIndex(number))), "{number}");
        }
        assert_eq!(places.0.lock().len(), REMEMBERED_TRANSACTIONS, "what is forgotten has no place");
    }

    #[test]
    fn an_older_state_does_not_know_what_came_after_it() {
        let (mut remembered, places) = (Remembered::default(), Places::default());
        places.remember(&mut remembered, id(1), Ok(LogIndex(1)));
        let older = remembered.clone();
        places.remember(&mut remembered, id(2), Ok(LogIndex(2)));
        assert_eq!(places.find(id(2), &older), None);
        assert_eq!(places.find(id(1), &older), Some(&Ok(LogIndex(1))));
    }

    #[test]
    fn a_state_that_came_as_a_snapshot_is_asked_by_its_own_places() {
        let (mut before, places) = (Remembered::default(), Places::default());
        places.remember(&mut before, id(1), Ok(LogIndex(1)));
        let (mut sent, its) = (Remembered::default(), Places::default());
        for number in 5..8 {
            its.remember(&mut sent, id(number), Ok(LogIndex(number)));
        }
        places.become_those(Places::of(&sent));
        assert_eq!(places.find(id(6), &sent), Some(&Ok(LogIndex(6))));
        assert_eq!(places.find(id(5), &before), None, "place 0 was another's there");
    }
}
