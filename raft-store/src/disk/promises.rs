//! A second memory of what this node has promised: how far its log reached, and how it voted.
//!
//! The database checks what it reads, but a log that has lost its tail looks like one whose last write was torn by a
//! crash, and that is no damage. The difference is whether somebody was told. So after every sync, and before anybody
//! is told, the end of the log and the vote go into a file of their own, which is not synced: it never says more than
//! is on disk, and says everything unless the machine itself went down. A database that has less than it says has lost
//! what others rely on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use parking_lot::Mutex;
use prost::Message;
use proto::raft as wire;

use super::engine::{Change, Column};
use super::open::VOTE;

/// Beside the database's own files.
pub(crate) const FILE: &str = "promises";
const VERSION: u64 = 1;
const LENGTH: usize = 40;

/// What was promised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Promise {
    /// The last entry that was acknowledged.
    pub last: u64,
    /// The term of the newest vote.
    pub term: u64,
    /// For whom.
    pub candidate: u64,
}

impl Promise {
    /// Before a batch is written: it may cut the log.
    ///
    /// # Errors
    /// A vote in it cannot be read.
    pub fn before(&mut self, batch: &[Change]) -> io::Result<()> {
        self.cut(&Promising::of(batch)?);
        Ok(())
    }

    /// After a batch was synced, before anybody is told of it.
    ///
    /// # Errors
    /// A vote in it cannot be read.
    pub fn after(&mut self, batch: &[Change]) -> io::Result<()> {
        self.keep(&Promising::of(batch)?);
        Ok(())
    }

    fn cut(&mut self, promising: &Promising) {
        self.last = self.last.min(promising.cut.unwrap_or(u64::MAX));
    }

    fn keep(&mut self, promising: &Promising) {
        self.last = promising.last.unwrap_or(self.last);
        (self.term, self.candidate) = promising.vote.unwrap_or((self.term, self.candidate));
    }
}

/// What a batch of changes promises.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Promising {
    /// The log is cut after this entry.
    pub(crate) cut: Option<u64>,
    /// It ends with this one.
    pub(crate) last: Option<u64>,
    /// A vote of this term for this candidate.
    pub(crate) vote: Option<(u64, u64)>,
}

impl Promising {
    pub(crate) fn of(changes: &[Change]) -> io::Result<Self> {
        let index = |key: &[u8]| key.try_into().map(u64::from_be_bytes).ok();
        let mut out = Self::default();
        for change in changes {
            match change {
                Change::Put(Column::Log, key, _) => out.last = index(key).or(out.last),
                Change::DeleteRange(Column::Log, from, to) if index(to) == Some(u64::MAX) => {
                    let last = index(from).unwrap_or(0).saturating_sub(1);
                    out.cut = Some(out.cut.map_or(last, |cut| cut.min(last)));
                    out.last = Some(last);
                }
                Change::Put(Column::Meta, key, value) if key == VOTE => {
                    let ballot = wire::Ballot::decode(value.as_slice()).map_err(io::Error::other)?;
                    out.vote = Some((ballot.term, ballot.node_id));
                }
                _ => {}
            }
        }
        Ok(out)
    }
}

/// The file.
pub(crate) struct Promises {
    file: File,
    promise: Mutex<Promise>,
}

impl Promises {
    /// Opens it, or begins one. A file that says nothing sensible is begun anew: it proves nothing.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(dir.join(FILE))?;
        let mut bytes = [0; LENGTH];
        let promise = match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => decode(&bytes),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => return Err(error),
        };
        Ok(Self { file, promise: Mutex::new(promise.unwrap_or_default()) })
    }

    pub(crate) fn promise(&self) -> Promise {
        *self.promise.lock()
    }

    /// Before the log is cut. This is synced, as nothing else here: a power failure that brought the older promise back
    /// would make damage of a log that was cut as it should be.
    pub(crate) fn cut(&self, promising: &Promising) -> io::Result<()> {
        if self.change(|promise| promise.cut(promising))? { self.file.sync_data() } else { Ok(()) }
    }

    /// After a sync, before anybody is told of it.
    pub(crate) fn keep(&self, promising: &Promising) -> io::Result<()> {
        self.change(|promise| promise.keep(promising)).map(drop)
    }

    fn change(&self, change: impl FnOnce(&mut Promise)) -> io::Result<bool> {
        let mut promise = self.promise.lock();
        let before = *promise;
        change(&mut promise);
        let changed = *promise != before;
        if changed {
            self.file.write_all_at(&encode(*promise), 0)?;
        }
        Ok(changed)
    }
}

fn encode(promise: Promise) -> [u8; LENGTH] {
    let words = [VERSION, promise.last, promise.term, promise.candidate];
    let mut bytes = [0; LENGTH];
    for (place, word) in words.into_iter().chain([mixed(words)]).enumerate() {
        bytes[place * 8..][..8].copy_from_slice(&word.to_be_bytes());
    }
    bytes
}

fn decode(bytes: &[u8; LENGTH]) -> Option<Promise> {
    let word = |place: usize| bytes[place * 8..][..8].try_into().map(u64::from_be_bytes).unwrap_or_default();
    let words = [word(0), word(1), word(2), word(3)];
    let sound = words[0] == VERSION && word(4) == mixed(words);
    sound.then_some(Promise { last: words[1], term: words[2], candidate: words[3] })
}

/// FNV-1a over the words: enough to tell a torn write from a whole one.
fn mixed(words: [u64; 4]) -> u64 {
    words.iter().fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ word).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_was_promised_is_known_again() {
        let dir = tempfile::tempdir().unwrap();
        let promises = Promises::open(dir.path()).unwrap();
        assert_eq!(promises.promise(), Promise::default());
        promises.keep(&Promising { last: Some(7), ..Promising::default() }).unwrap();
        promises.keep(&Promising { vote: Some((3, 2)), ..Promising::default() }).unwrap();
        let known = Promises::open(dir.path()).unwrap();
        assert_eq!(known.promise(), Promise { last: 7, term: 3, candidate: 2 });
        for cut in [None, Some(9), Some(5)] {
            known.cut(&Promising { cut, ..Promising::default() }).unwrap();
        }
        assert_eq!(Promises::open(dir.path()).unwrap().promise().last, 5);
    }

    #[test]
    fn a_torn_file_proves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let promising = Promising { last: Some(7), ..Promising::default() };
        Promises::open(dir.path()).unwrap().keep(&promising).unwrap();
        let path = dir.path().join(FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[15] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(Promises::open(dir.path()).unwrap().promise(), Promise::default());
    }
}
