//! What a store asks of its disk, so that a simulation can have one that forgets.

use std::io;

use bytes::Bytes;
use futures::future::BoxFuture;

/// A family of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Column {
    /// Log index → entry.
    Log,
    /// Vote, purge mark, state head.
    Meta,
    /// (class, reference) → row.
    Rows,
    /// (index, class, reference) → tombstone.
    Tombstones,
    /// Sequence → remembered outcome.
    Outcomes,
}

impl Column {
    /// Every one.
    pub const ALL: [Self; 5] = [Self::Log, Self::Meta, Self::Rows, Self::Tombstones, Self::Outcomes];

    /// Its name on disk.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Meta => "meta",
            Self::Rows => "rows",
            Self::Tombstones => "tombstones",
            Self::Outcomes => "outcomes",
        }
    }
}

/// One change of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A key has this value.
    Put(Column, Vec<u8>, Vec<u8>),
    /// A key is gone.
    Delete(Column, Vec<u8>),
    /// All keys from the first up to and without the second are gone.
    DeleteRange(Column, Vec<u8>, Vec<u8>),
}

impl Change {
    /// All keys of a column are gone. No key here is as long as 64 bytes of `0xff`.
    pub(crate) fn clear(column: Column) -> Self {
        Self::DeleteRange(column, Vec::new(), vec![0xff; 64])
    }
}

/// A key and its value.
pub type KeyValue = (Box<[u8]>, Bytes);

/// Keys and values in the order of keys; may be read on another thread.
pub type Scan<'a> = Box<dyn Iterator<Item = io::Result<KeyValue>> + Send + 'a>;

/// Ordered keys and values in columns, changed batch by batch.
///
/// After a crash some number of the first batches is there, each of them whole, and at least all up to the last that
/// was synced.
pub trait Engine: Send + Sync + 'static {
    /// The value of a key.
    ///
    /// # Errors
    /// What the disk says.
    fn get(&self, column: Column, key: &[u8]) -> io::Result<Option<Bytes>>;

    /// Keys from `from` on, in order, with their values.
    fn scan<'a>(&'a self, column: Column, from: &[u8]) -> Scan<'a>;

    /// The value of the last key.
    ///
    /// # Errors
    /// What the disk says.
    fn last(&self, column: Column) -> io::Result<Option<Bytes>>;

    /// Makes the changes, in their order and all or none; where `sync` is asked for, it and every batch before it
    /// survive a crash once this has answered.
    fn write(&self, batch: Vec<Change>, sync: bool) -> BoxFuture<'_, io::Result<()>>;
}
