//! Room on the disk: a host whose disk is full stays away from the pool until there is some again.
//!
//! A store whose disk refuses a write ends at once, and its process with it, so that nothing is acknowledged which is
//! not on disk; the pool goes on with its other hosts. Started again it waits here.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use nix::sys::statvfs::statvfs;

/// A database is not opened with less: its write-ahead log alone may grow to two thirds of this.
const ENOUGH: u64 = 96 << 20;
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Returns when there is enough room for a database in that folder.
pub async fn wait(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut told = false;
    loop {
        let there = statvfs(dir).with_context(|| format!("cannot look at the disk of {}", dir.display()))?;
        let room = there.blocks_available().saturating_mul(there.fragment_size());
        if room >= ENOUGH {
            return Ok(());
        }
        if !told {
            tracing::error!(
                dir = %dir.display(),
                "the disk is full: {} MiB are left of it and {} are needed; this host waits for room",
                room >> 20,
                ENOUGH >> 20
            );
            told = true;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
