//! Programs that do the work: each has a limit, and dies with the task that waits for it.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::timeout;

use crate::step::{Reason, Refusal};

/// For what only touches a few blocks.
pub(super) const SHORT: Duration = Duration::from_secs(60);
/// For what reads or writes everything there is.
pub(super) const LONG: Duration = Duration::from_secs(24 * 3600);
/// As much of what a program says is kept.
const KEPT: usize = 1024 * 1024;

/// Where programs are: in a directory of their own, for tests, or on the path.
#[derive(Debug, Clone, Default)]
pub(crate) struct Programs {
    dir: Option<PathBuf>,
}

/// What a program said, and how it ended.
#[derive(Debug)]
pub(super) struct Ran {
    /// None: killed.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Programs {
    /// Those of a directory go before those on the path.
    pub fn new(dir: Option<PathBuf>) -> Self {
        Self { dir }
    }

    fn find(&self, name: &str) -> PathBuf {
        let own = self.dir.as_ref().map(|dir| dir.join(name)).filter(|path| path.exists());
        own.unwrap_or_else(|| PathBuf::from(name))
    }

    /// Runs a program to its end, in a directory; `heard` gets what it writes to its standard output as it comes.
    pub(super) async fn run_in<A: AsRef<OsStr>>(
        &self,
        dir: &Path,
        name: &str,
        arguments: &[A],
        limit: Duration,
        heard: impl FnMut(&str) + Send,
    ) -> Result<Ran, Refusal> {
        let mut child = Command::new(self.find(name))
            .args(arguments)
            .current_dir(dir)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Refusal::failed(format!("{name} does not run: {error}")))?;
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let work = async {
            let (stdout, stderr, status) = tokio::join!(read(out, heard), read(err, |_: &str| {}), child.wait());
            status.map(|status| Ran { code: status.code(), stdout, stderr })
        };
        match timeout(limit, work).await {
            Ok(Ok(ran)) => Ok(ran),
            Ok(Err(error)) => Err(Refusal::failed(format!("{name}: {error}"))),
            Err(_) => Err(Refusal::new(Reason::TimedOut, format!("{name} took longer than {} s", limit.as_secs()))),
        }
    }

    /// Runs a program that has to succeed; gives its standard output.
    pub async fn run<A: AsRef<OsStr>>(
        &self,
        dir: &Path,
        name: &str,
        arguments: &[A],
        limit: Duration,
    ) -> Result<String, Refusal> {
        self.run_in(dir, name, arguments, limit, |_| {}).await?.succeeded(name)
    }
}

impl Ran {
    /// Its standard output, or what its failure means.
    pub fn succeeded(self, name: &str) -> Result<String, Refusal> {
        if self.code == Some(0) { Ok(self.stdout) } else { Err(meaning(name, &self.stderr)) }
    }
}

async fn read(pipe: Option<impl AsyncRead + Unpin>, mut heard: impl FnMut(&str)) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    let Some(mut pipe) = pipe else { return String::new() };
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        heard(&String::from_utf8_lossy(&buffer[..count]));
        if kept.len() < KEPT {
            kept.extend_from_slice(&buffer[..count]);
        }
    }
    String::from_utf8_lossy(&kept).trim().to_owned()
}

/// What a failed program's words mean. They are looked at in one place, and what is not known is simply a failure.
pub(super) fn meaning(name: &str, stderr: &str) -> Refusal {
    let has = |words: &[&str]| words.iter().any(|word| stderr.contains(word));
    let reason = if has(&["No space left", "insufficient free space", "Insufficient free space", "File too large"]) {
        Reason::NoSpace
    } else if has(&["Failed to get", "Is another process using", "busy", "in use"]) {
        Reason::InUse
    } else if has(&["not in qcow2 format", "Image is corrupt", "corrupt; ", "marked corrupt", "Invalid argument: L1"]) {
        Reason::Damaged
    } else {
        Reason::Failed
    };
    let said = stderr.lines().next_back().unwrap_or("it said nothing");
    Refusal::new(reason, format!("{name}: {said}"))
}

/// What the failure of a file operation means.
pub(super) fn trouble(what: &Path, error: &io::Error) -> Refusal {
    let reason = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Reason::NoSpace,
        io::ErrorKind::ResourceBusy => Reason::InUse,
        _ => Reason::Failed,
    };
    Refusal::new(reason, format!("{}: {error}", what.display()))
}

/// Does what may block where it blocks nobody.
pub(super) async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.map_err(Refusal::failed)?
}
