//! What was measured on: without it no number means anything.

use std::io::{Seek, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::Context;

use super::load::quantile;

const SYNCS: usize = 200;

/// The machine, as far as it matters here.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Cores that this process may use.
    pub cores: usize,
    /// What the processor calls itself.
    pub processor: String,
    /// Memory in GiB.
    pub memory_gib: f64,
    /// Version of Linux.
    pub kernel: String,
    /// File system that both peers' data are on.
    pub file_system: String,
    /// Milliseconds that 4 KiB take to the disk: p50 and p99.
    pub sync: [f64; 2],
}

impl Machine {
    /// Looks at it. The disk is tried in that directory.
    pub fn look(dir: &Path) -> anyhow::Result<Self> {
        let processors = std::fs::read_to_string("/proc/cpuinfo")?;
        let memory = std::fs::read_to_string("/proc/meminfo")?;
        let kib: f64 = value(&memory, "MemTotal").trim_end_matches(" kB").parse().context("no memory size")?;
        Ok(Self {
            cores: std::thread::available_parallelism()?.get(),
            processor: value(&processors, "model name"),
            memory_gib: kib / f64::from(1 << 20),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            file_system: file_system(&std::fs::read_to_string("/proc/self/mounts")?, &dir.canonicalize()?),
            sync: sync_times(dir)?,
        })
    }
}

fn value(lines: &str, key: &str) -> String {
    let pairs = lines.lines().filter_map(|line| line.split_once(':'));
    pairs
        .into_iter()
        .find(|(name, _)| name.trim() == key)
        .map_or_else(|| "unknown".into(), |(_, value)| value.trim().into())
}

/// Type of the file system whose mount point is the longest above the directory.
fn file_system(mounts: &str, dir: &Path) -> String {
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?, words.next()?))
    });
    let above = mounts.filter(|(point, _)| dir.starts_with(point));
    // Of two mounts on one point the later one is seen.
    above.max_by_key(|(point, _)| point.len()).map_or_else(|| "unknown".into(), |(_, kind)| kind.into())
}

/// As logs are written: one block after the other, into space that the file has already.
fn sync_times(dir: &Path) -> anyhow::Result<[f64; 2]> {
    let mut file = tempfile::tempfile_in(dir)?;
    let block = [0x5a; 4096];
    file.write_all(&block.repeat(SYNCS))?;
    file.sync_all()?;
    file.rewind()?;
    let mut times = Vec::with_capacity(SYNCS);
    for _ in 0..SYNCS {
        let started = Instant::now();
        file.write_all(&block)?;
        file.sync_data()?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok([quantile(&times, 0.5), quantile(&times, 0.99)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_system_is_that_of_the_nearest_mount() {
        let mounts = "/dev/a / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/b /tmp/x xfs rw 0 0\n";
        for (dir, kind) in [("/home", "ext4"), ("/tmp/y", "tmpfs"), ("/tmp/x/deep", "xfs"), ("/tmpfiles", "ext4")] {
            assert_eq!(file_system(mounts, Path::new(dir)), kind, "{dir}");
        }
    }

    #[test]
    fn a_look_at_this_machine_finds_all_of_it() {
        let machine = Machine::look(&std::env::temp_dir()).unwrap();
        assert!(machine.cores > 0 && machine.memory_gib > 0.1 && machine.sync[0] > 0.0, "{machine:?}");
        assert_ne!(machine.file_system, "unknown");
    }
}
