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
pub(crate) struct Promise {
    /// The last entry that was acknowledged.
    pub(crate) last: u64,
    /// The term of the newest vote.
    pub(crate) term: u64,
    /// For whom.
    pub(crate) candidate: u64,
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

    /// Before the log is cut.
    pub(crate) fn cut(&self, last: Option<u64>) -> io::Result<()> {
        self.change(|promise| promise.last = promise.last.min(last.unwrap_or(u64::MAX)))
    }

    /// After a sync, before anybody is told of it.
    pub(crate) fn promised(&self, last: Option<u64>, vote: Option<(u64, u64)>) -> io::Result<()> {
        self.change(|promise| {
            promise.last = last.unwrap_or(promise.last);
            (promise.term, promise.candidate) = vote.unwrap_or((promise.term, promise.candidate));
        })
    }

    fn change(&self, change: impl FnOnce(&mut Promise)) -> io::Result<()> {
        let mut promise = self.promise.lock();
        let before = *promise;
        change(&mut promise);
        if *promise == before { Ok(()) } else { self.file.write_all_at(&encode(*promise), 0) }
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
        promises.promised(Some(7), None).unwrap();
        promises.promised(None, Some((3, 2))).unwrap();
        let known = Promises::open(dir.path()).unwrap();
        assert_eq!(known.promise(), Promise { last: 7, term: 3, candidate: 2 });
        known.cut(None).unwrap();
        known.cut(Some(9)).unwrap();
        known.cut(Some(5)).unwrap();
        assert_eq!(Promises::open(dir.path()).unwrap().promise().last, 5);
    }

    #[test]
    fn a_torn_file_proves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        Promises::open(dir.path()).unwrap().promised(Some(7), None).unwrap();
        let path = dir.path().join(FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[15] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(Promises::open(dir.path()).unwrap().promise(), Promise::default());
    }
}
