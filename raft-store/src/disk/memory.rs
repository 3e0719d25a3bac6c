//! An engine in memory that knows what a disk would forget.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;

use super::engine::{Change, Column, Engine, Scan};

type Contents = BTreeMap<(Column, Vec<u8>), Bytes>;

/// Keys and values in memory: what a reader sees, and what a crash would leave.
#[derive(Default)]
pub struct Memory {
    inner: Mutex<Inner>,
}

#[derive(Default, Clone)]
struct Inner {
    seen: Contents,
    synced: Contents,
    /// Batches since the last sync, oldest first.
    unsynced: Vec<Vec<Change>>,
}

fn make(contents: &mut Contents, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Put(column, key, value) => {
                contents.insert((*column, key.clone()), Bytes::from(value.clone()));
            }
            Change::Delete(column, key) => {
                contents.remove(&(*column, key.clone()));
            }
            Change::DeleteRange(column, from, to) => {
                let doomed: Vec<_> = contents
                    .range((*column, from.clone())..(*column, to.clone()))
                    .map(|(key, _)| key.clone())
                    .collect();
                for key in doomed {
                    contents.remove(&key);
                }
            }
        }
    }
}

impl Memory {
    /// Makes the changes where readers see them; a crash forgets them until they are synced.
    pub fn change(&self, batch: Vec<Change>) {
        let mut inner = self.inner.lock();
        make(&mut inner.seen, &batch);
        inner.unsynced.push(batch);
    }

    /// All changes so far survive a crash from now on.
    pub fn sync(&self) {
        let inner = &mut *self.inner.lock();
        for batch in inner.unsynced.drain(..) {
            make(&mut inner.synced, &batch);
        }
    }

    /// How many batches a crash could forget.
    #[must_use]
    pub fn unsynced(&self) -> usize {
        self.inner.lock().unsynced.len()
    }

    /// A crash: of the batches that were not synced the first `kept` happen to be there. One that was torn is not.
    pub fn crash(&self, kept: usize) {
        let inner = &mut *self.inner.lock();
        for batch in inner.unsynced.drain(..).take(kept) {
            make(&mut inner.synced, &batch);
        }
        inner.seen = inner.synced.clone();
    }

    /// Another one with the same contents.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self { inner: Mutex::new(self.inner.lock().clone()) }
    }
}

impl Engine for Memory {
    fn get(&self, column: Column, key: &[u8]) -> io::Result<Option<Bytes>> {
        Ok(self.inner.lock().seen.get(&(column, key.to_vec())).cloned())
    }

    fn scan<'a>(&'a self, column: Column, from: &[u8]) -> Scan<'a> {
        let mut next = Bound::Included((column, from.to_vec()));
        Box::new(std::iter::from_fn(move || {
            let inner = self.inner.lock();
            let (place, value) = inner.seen.range((next.clone(), Bound::Unbounded)).next()?;
            if place.0 != column {
                return None;
            }
            next = Bound::Excluded(place.clone());
            Some(Ok((place.1.clone().into_boxed_slice(), value.clone())))
        }))
    }

    fn last(&self, column: Column) -> io::Result<Option<Bytes>> {
        let inner = self.inner.lock();
        let last = inner.seen.range(..=(column, vec![0xff; 64])).next_back();
        Ok(last.filter(|(place, _)| place.0 == column).map(|(_, value)| value.clone()))
    }

    fn write(&self, batch: Vec<Change>, sync: bool) -> BoxFuture<'_, io::Result<()>> {
        self.change(batch);
        if sync {
            self.sync();
        }
        Box::pin(std::future::ready(Ok(())))
    }
}
