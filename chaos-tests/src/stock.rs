//! Other people's XenAPI clients, at the versions that `deploy/clients` names, and the scripts that put them to work.
//!
//! A script talks to the test line by line: it prints one JSON object for each thing it has done, and reads one line
//! when it is told to go on. So a test can do things to the pool while the client is connected, without the client being
//! told.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

/// Installing them from nothing.
const INSTALL_LIMIT: Duration = Duration::from_secs(300);

/// A stock client at work.
pub struct Stock {
    name: String,
    process: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Stock {
    /// XenAPI.py from PyPI.
    pub async fn python(script: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        let clients = installed("python").await?;
        Self::start(&clients.join("python/bin/python"), &clients, script, arguments)
    }

    /// xen-api from npm.
    pub async fn node(script: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        let clients = installed("node").await?;
        Self::start(Path::new("node"), &clients, script, arguments)
    }

    fn start(program: &Path, clients: &Path, script: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        let script = home().join("clients").join(script);
        let mut process = Command::new(program)
            .arg(&script)
            .args(arguments)
            .env("XENITH_CLIENTS", clients)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot run {} {}", program.display(), script.display()))?;
        let input = process.stdin.take().context("no way to write to the client")?;
        let output = process.stdout.take().context("no way to read from the client")?;
        let name = script.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, process, input, lines: BufReader::new(output).lines() })
    }

    /// What the client did next. Its `did` must be the thing expected.
    pub async fn did(&mut self, expected: &str, limit: Duration) -> anyhow::Result<Value> {
        let line = timeout(limit, self.lines.next_line()).await;
        let line = line.with_context(|| format!("{}: no {expected:?} within {} s", self.name, limit.as_secs()))??;
        let line = line.with_context(|| format!("{} ended before {expected:?}", self.name))?;
        let value: Value = serde_json::from_str(&line).with_context(|| format!("{} printed {line:?}", self.name))?;
        if value["did"] != expected {
            bail!("{} did {line} where {expected:?} was expected", self.name);
        }
        Ok(value)
    }

    /// Tells the client to go on.
    pub async fn go_on(&mut self) -> anyhow::Result<()> {
        self.input.write_all(b"go on\n").await?;
        Ok(self.input.flush().await?)
    }

    /// The client has nothing more to do, and found nothing wrong.
    pub async fn end(mut self, limit: Duration) -> anyhow::Result<()> {
        drop(self.input);
        let status = timeout(limit, self.process.wait()).await;
        let status = status.with_context(|| format!("{} does not end", self.name))??;
        if !status.success() {
            bail!("{} ended with {status}", self.name);
        }
        Ok(())
    }
}

/// This crate's folder, as cargo says when it runs tests: two checkouts may share what is built, and then what was compiled
/// in is the other's.
fn home() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// Where the clients are: `XENITH_CLIENTS`, or what `deploy/clients/install.sh` says after it has put them there.
async fn installed(which: &str) -> anyhow::Result<PathBuf> {
    if let Some(named) = std::env::var_os("XENITH_CLIENTS") {
        return Ok(named.into());
    }
    let script = home().join("../deploy/clients/install.sh");
    let install = Command::new(&script).arg(which).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = timeout(INSTALL_LIMIT, install).await.context("installing the stock clients takes too long")?;
    let output = output.with_context(|| format!("cannot run {}", script.display()))?;
    if !output.status.success() {
        bail!("{} {which} failed", script.display());
    }
    Ok(String::from_utf8(output.stdout)?.trim().into())
}
