//! RocksDB as the engine.

use std::io;
use std::path::Path;

use bytes::Bytes;
use futures::future::BoxFuture;
use rocksdb::{ColumnFamily, ColumnFamilyDescriptor, DB, Direction, IteratorMode, Options, WriteBatch, WriteOptions};

use super::engine::{Change, Column, Engine, Scan};
use super::open::OpenError;
use super::promises::{Promise, Promises, Promising};

/// A database in a folder.
pub(crate) struct Rocks {
    db: DB,
    promises: Promises,
}

impl Rocks {
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let promises = std::fs::create_dir_all(path).and_then(|()| Promises::open(path));
        let promises = promises.map_err(|error| OpenError::Consensus(format!("{}: {error}", path.display())))?;
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_max_background_jobs(2);
        options.set_max_total_wal_size(64 << 20);
        options.set_keep_log_file_num(3);
        // A torn tail of the write-ahead log is an entry that nobody was told of; damage before it is refused.
        options.set_wal_recovery_mode(rocksdb::DBRecoveryMode::TolerateCorruptedTailRecords);
        let columns = Column::ALL.map(|column| {
            let mut options = Options::default();
            options.set_write_buffer_size(16 << 20);
            ColumnFamilyDescriptor::new(column.name(), options)
        });
        // Opening makes tables of what the write-ahead log has, and syncs them (RocksDB's `avoid_flush_during_recovery` stays
        // false): what is found was not synced if the last process was killed before it did that.
        let db = DB::open_cf_descriptors(&options, path, columns)
            .map_err(|source| OpenError::Database { path: path.display().to_string(), source })?;
        Ok(Self { db, promises })
    }

    /// What was promised by it.
    pub(crate) fn promise(&self) -> Promise {
        self.promises.promise()
    }

    fn column(&self, column: Column) -> io::Result<&ColumnFamily> {
        self.db.cf_handle(column.name()).ok_or_else(|| io::Error::other(format!("no column family {}", column.name())))
    }

    fn write_now(&self, changes: Vec<Change>, sync: bool) -> io::Result<()> {
        let promising = Promising::of(&changes)?;
        let mut batch = WriteBatch::default();
        for change in changes {
            match change {
                Change::Put(column, key, value) => batch.put_cf(self.column(column)?, key, value),
                Change::Delete(column, key) => batch.delete_cf(self.column(column)?, key),
                Change::DeleteRange(column, from, to) => batch.delete_range_cf(self.column(column)?, from, to),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.promises.cut(&promising)?;
        self.db.write_opt(batch, &options).map_err(io::Error::other)?;
        self.promises.keep(&promising)
    }
}

impl Engine for Rocks {
    fn get(&self, column: Column, key: &[u8]) -> io::Result<Option<Bytes>> {
        Ok(self.db.get_cf(self.column(column)?, key).map_err(io::Error::other)?.map(Bytes::from))
    }

    fn scan<'a>(&'a self, column: Column, from: &[u8]) -> Scan<'a> {
        match self.column(column) {
            Ok(family) => Box::new(
                self.db
                    .iterator_cf(family, IteratorMode::From(from, Direction::Forward))
                    .map(|item| item.map(|(key, value)| (key, Bytes::from(value))).map_err(io::Error::other)),
            ),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    }

    fn last(&self, column: Column) -> io::Result<Option<Bytes>> {
        let last = self.db.iterator_cf(self.column(column)?, IteratorMode::End).next();
        Ok(last.transpose().map_err(io::Error::other)?.map(|(_, value)| Bytes::from(value)))
    }

    fn write(&self, batch: Vec<Change>, sync: bool) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(std::future::ready(self.write_now(batch, sync)))
    }
}
