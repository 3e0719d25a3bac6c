//! One RocksDB, one writer.
//!
//! Votes, log entries, truncation, purge and rows all go through one thread with a bounded queue. It
//! takes all that is waiting, writes it as one batch in the order it came, and syncs once if anything
//! in it asked for that: group commit. The order is what Raft needs (a vote before the entries it
//! allows; rows before the purge of the entries that made them), and the sync of a log entry carries
//! every row written before it.

mod ahead;
#[cfg(test)]
mod contract;
mod damage;
mod engine;
mod memory;
mod open;
mod place;
mod promises;
mod rocks;
mod writer;

pub use damage::is_of_a_database;
pub(crate) use damage::{Opened, open};
pub(crate) use engine::Change;
pub use engine::{Change as DiskChange, Column, Engine, KeyValue, Scan};
pub use memory::Memory;
pub use open::OpenError;
pub(crate) use open::{Disk, PURGED, RowLoader, STATE, Stored, VOTE};
pub use place::Folder;
pub use place::Place;
pub use promises::Promise;
pub(crate) use rocks::Rocks;
pub(crate) use writer::{Flushed, Job, Writer};
