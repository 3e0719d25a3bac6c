//! One QEMU process: its end is noticed at once, and a signal never hits another process with the same number.
//!
//! Both come from a pidfd, which works alike for a child of this agent and for one of its predecessor.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A process that can be waited for and killed.
#[derive(Debug)]
pub(super) struct Process {
    pid: i32,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Holds on to a process.
    pub fn open(pid: i32) -> io::Result<Self> {
        let wanted = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        let fd = pidfd_open(wanted, PidfdFlags::NONBLOCK)?;
        // Deprecated because a type could lie about its descriptor; one that owns it cannot. The successor is `unsafe`.
        #[expect(deprecated)]
        let fd = AsyncFd::with_interest(fd, Interest::READABLE)?;
        Ok(Self { pid, fd })
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Returns when the process has ended, whether or not its parent has taken notice.
    pub async fn ended(&self) {
        // A pidfd becomes readable at the end and stays so. An error could only come from the runtime's own end.
        let _ = self.fd.readable().await;
    }

    /// Ends it by force. That it is gone already is no error.
    pub fn kill(&self) {
        if let Err(error) = pidfd_send_signal(self.fd.get_ref(), Signal::KILL)
            && error != rustix::io::Errno::SRCH
        {
            tracing::error!(pid = self.pid, %error, "cannot kill QEMU");
        }
    }
}

/// All processes that work in a directory under `domains`, by that directory, whether it is still there or not.
///
/// QEMU is started in the directory of its domain and stays there: that, unlike a pid in a file, is true at any time.
pub(super) fn living_in(domains: &Path) -> io::Result<HashMap<PathBuf, Vec<i32>>> {
    let domains = fs::canonicalize(domains)?;
    let mut found: HashMap<PathBuf, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(entry) = entry else { continue };
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // Processes of other users, and such that have just ended, say nothing.
        let Ok(directory) = fs::read_link(entry.path().join("cwd")) else {
            continue;
        };
        let text = directory.to_string_lossy();
        let directory = PathBuf::from(text.strip_suffix(" (deleted)").unwrap_or(&text));
        let Some(vm) = directory.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if directory.parent() == Some(domains.as_path()) && has_argument(&entry.path(), vm) {
            found.entry(directory).or_default().push(pid);
        }
    }
    Ok(found)
}

/// Somebody's shell may stand in the directory too: only who carries the VM's uuid is its domain.
fn has_argument(process: &Path, wanted: &str) -> bool {
    fs::read(process.join("cmdline"))
        .is_ok_and(|line| line.split(|byte| *byte == 0).any(|argument| argument == wanted.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;
    use tokio::process::Command;

    #[tokio::test]
    async fn only_the_process_that_carries_the_uuid_is_found_and_its_end_is_seen() {
        let dir = tempfile::tempdir().expect("directory");
        let home = dir.path().join("vm-one");
        fs::create_dir(&home).expect("directory");
        let spawn = |script: &str, name: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script, name]).current_dir(&home).stdin(Stdio::piped()).kill_on_drop(true);
            command.spawn().expect("spawn")
        };
        let mut domain = spawn("read line; exit", "vm-one");
        let bystander = spawn("read line; exit", "somebody");
        let home = fs::canonicalize(&home).expect("path");
        let pid = i32::try_from(domain.id().expect("pid")).expect("pid");
        let process = Process::open(pid).expect("open");
        let found = living_in(dir.path()).expect("scan");
        assert_eq!(found.get(&home), Some(&vec![pid]));
        process.kill();
        process.ended().await;
        domain.wait().await.expect("reaped");
        process.kill();
        assert_eq!(living_in(dir.path()).expect("scan").get(&home), None);
        drop(bystander);
    }
}
