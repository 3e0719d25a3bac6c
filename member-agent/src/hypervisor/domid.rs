//! Domain ids: small numbers that are never given twice while the host is up.
//!
//! The file says below which number ids may have been given. It is moved ahead by blocks, so that an id costs
//! no write, and an agent that restarts goes on behind the block. A new boot begins with 1: nothing is left
//! from before.

use std::path::{Path, PathBuf};
use std::{fs, io};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::files::{self, Durability};

const BLOCK: i64 = 32;

/// Gives out domain ids.
#[derive(Debug)]
pub struct DomainIds {
    path: PathBuf,
    next: Mutex<Record>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    boot_id: String,
    #[serde(skip)]
    next: i64,
    /// Ids below this one may be in use.
    below: i64,
}

impl DomainIds {
    /// Goes on where the file says, if it is of this boot.
    pub fn open(state_dir: &Path, boot_id: &str) -> io::Result<Self> {
        let path = state_dir.join("domid.json");
        let kept = match fs::read(&path) {
            Ok(content) => serde_json::from_slice::<Record>(&content).ok(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let below = kept.filter(|record| record.boot_id == boot_id).map_or(1, |record| record.below.max(1));
        let next = Record { boot_id: boot_id.to_owned(), next: below, below };
        Ok(Self { path, next: Mutex::new(next) })
    }

    /// A number that no domain has had since the host came up.
    pub fn next(&self) -> io::Result<i64> {
        let mut record = self.next.lock();
        if record.next >= record.below {
            let ahead = Record { below: record.next + BLOCK, ..record.clone() };
            // Numbers need not survive a loss of power: that is a new boot.
            files::replace(&self.path, &serde_json::to_vec(&ahead)?, Durability::Process)?;
            *record = ahead;
        }
        record.next += 1;
        Ok(record.next - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_never_given_twice_in_one_boot() {
        let dir = tempfile::tempdir().expect("directory");
        let mut given = std::collections::HashSet::new();
        for _restart in 0..3 {
            let ids = DomainIds::open(dir.path(), "boot").expect("open");
            for _ in 0..40 {
                assert!(given.insert(ids.next().expect("id")));
            }
        }
        assert!(given.iter().all(|id| *id >= 1));
        let ids = DomainIds::open(dir.path(), "next boot").expect("open");
        assert_eq!(ids.next().expect("id"), 1);
    }
}
