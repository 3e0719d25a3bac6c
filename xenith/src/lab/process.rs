//! The lab's processes: started apart from the command that starts them, found again by what they are.
//!
//! A daemon is known by its command line, which ends in `controller|agent --config FILE`; a domain by working in its
//! directory below the agent's state and carrying its VM's uuid, as the agent itself knows it. So nothing goes stale: there is no pid file to trust, a
//! process that somebody else ended is simply not there, and one that an interrupted command left behind is found. A
//! process is held by a pidfd taken *before* its command line is looked at again, so a signal cannot reach a stranger to
//! whom the number was given in between.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How long a process that was started may take to be seen as what it is.
const SEEN_LIMIT: Duration = Duration::from_secs(2);

/// Which of a host's two daemons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    /// Raft member and API.
    Controller,
    /// Domains.
    Agent,
}

impl Daemon {
    /// The subcommand that runs it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Agent => "agent",
        }
    }
}

/// A process that was found, for as long as it is held: its number cannot come to mean another one.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    handle: OwnedFd,
}

/// The daemon that runs with this configuration file, if it runs.
pub fn daemon(daemon: Daemon, config: &Path) -> Option<Process> {
    let tail = [daemon.name().as_bytes(), b"--config", config.as_os_str().as_encoded_bytes()];
    find(|_, arguments| arguments.len() > tail.len() && arguments.ends_with(&tail)).pop()
}

/// The domains that the agent with this state directory runs.
pub fn domains(agent_state: &Path) -> Vec<Process> {
    let homes = agent_state.join("domains");
    find(|pid, arguments| {
        let Ok(home) = std::fs::read_link(format!("/proc/{pid}/cwd")) else { return false };
        let home = home.to_string_lossy();
        // The directory of a domain that is being destroyed may have gone before it.
        let home = Path::new(home.trim_end_matches(" (deleted)"));
        home.parent() == Some(&homes) && home.file_name().is_some_and(|vm| arguments.contains(&vm.as_encoded_bytes()))
    })
}

fn find(wanted: impl Fn(i32, &[&[u8]]) -> bool) -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let is_wanted = |pid: i32| {
        let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return false };
        // A process that has ended but was not waited for has no command line left: it is not found.
        let line = line.strip_suffix(&[0]).unwrap_or(&line);
        wanted(pid, &line.split(|byte| *byte == 0).collect::<Vec<_>>())
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| is_wanted(*pid))
        .filter_map(|number| {
            let pid = Pid::from_raw(number)?;
            let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
            is_wanted(number).then_some(Process { pid, handle })
        })
        .collect()
}

impl Process {
    /// Its number, for people.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether it is stopped (SIGSTOP): each of its threads, for they stop one after the other.
    pub fn is_stopped(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.pid())) else { return false };
        let mut states = threads.flatten().filter_map(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
            // The second field is the program's name in brackets and may hold anything; the state follows the last one.
            stat.rsplit(')').next()?.trim_start().chars().next()
        });
        states.all(|state| matches!(state, 'T' | 't'))
    }

    /// Sends a signal; that the process has ended already is no error.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        match pidfd_send_signal(&self.handle, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot signal process {}", self.pid())),
        }
    }

    /// Waits until it has ended; false when that takes longer than the limit.
    pub fn wait_end(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.handle, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

/// Starts a daemon in a process group of its own, so that neither the end of this command nor a terminal's Ctrl-C ends it.
pub fn spawn(daemon: Daemon, config: &Path, log: &Path) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot tell which program this is")?;
    let lines = OpenOptions::new().create(true).append(true).mode(0o600).open(log);
    let lines = lines.with_context(|| format!("cannot write {}", log.display()))?;
    let again = lines.try_clone().with_context(|| format!("cannot write {}", log.display()))?;
    let mut started = Command::new(&program)
        .args([daemon.name(), "--config"])
        .arg(config)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(lines)
        .stderr(again)
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    // The kernel lets this process go on a moment before the new one's command line can be read. Who looked for the
    // daemon in that moment would take it for ended.
    let limit = Instant::now() + SEEN_LIMIT;
    while self::daemon(daemon, config).is_none() && Instant::now() < limit && matches!(started.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Child;

    use super::*;

    /// A stand-in with the given arguments at the end of its command line; it ends with the test, whose pipe it reads.
    fn stub(name: &str, arguments: &[&str]) -> Child {
        let mut command = Command::new("sh");
        command.arg0(name).args(["-c", "read line; :", "sh"]).args(arguments);
        command.stdin(Stdio::piped()).spawn().unwrap()
    }

    fn eventually<T>(found: impl Fn() -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(found) = found() {
                return found;
            }
            assert!(Instant::now() < deadline, "was not seen in ten seconds");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_daemon_is_found_by_its_configuration_alone_and_only_it_is_signalled() {
        let dir = tempfile::tempdir().unwrap();
        let (mine, other) = (dir.path().join("host1/agent.toml"), dir.path().join("host2/agent.toml"));
        let mut first = stub("xenith", &["agent", "--config", mine.to_str().unwrap()]);
        let mut second = stub("xenith", &["agent", "--config", other.to_str().unwrap()]);
        let found = eventually(|| daemon(Daemon::Agent, &mine));
        eventually(|| daemon(Daemon::Agent, &other));
        assert_eq!(found.pid(), first.id() as i32);
        assert!(daemon(Daemon::Controller, &mine).is_none());

        found.signal(Signal::STOP).unwrap();
        eventually(|| found.is_stopped().then_some(()));
        found.signal(Signal::CONT).unwrap();
        eventually(|| (!found.is_stopped()).then_some(()));
        assert!(!found.wait_end(Duration::from_millis(1)));
        found.signal(Signal::KILL).unwrap();
        assert!(found.wait_end(Duration::from_secs(10)));
        assert!(daemon(Daemon::Agent, &mine).is_none(), "an ended process that nobody waited for counts as gone");
        found.signal(Signal::KILL).unwrap();
        first.wait().unwrap();
        assert!(second.try_wait().unwrap().is_none(), "the neighbour lives");
        second.kill().unwrap();
        second.wait().unwrap();
    }

    #[test]
    fn a_domain_is_what_works_in_its_directory_and_carries_its_uuid() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().canonicalize().unwrap().join("host1/agent");
        let home = state.join("domains/1f0c");
        std::fs::create_dir_all(&home).unwrap();
        let started = |arguments: &[&str], home: &Path| {
            let mut command = Command::new("sh");
            command.args(["-c", "read line; :", "sh"]).args(arguments).current_dir(home);
            command.stdin(Stdio::piped()).spawn().unwrap()
        };
        let mut children = [
            started(&["-uuid", "1f0c"], &home),
            started(&["-uuid", "somebody"], &home),
            started(&["-uuid", "1f0c"], dir.path()),
        ];
        let found = eventually(|| domains(&state).pop());
        assert_eq!(found.pid(), children[0].id() as i32);
        assert_eq!(domains(&state).len(), 1);
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
