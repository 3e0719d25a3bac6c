//! Labs for tests and benchmarks: real processes on loopback addresses, made by the same `xenith lab` that people use.
//!
//! Whatever becomes of the test, its lab ends: a guard process reads from a pipe that only the test holds, and runs
//! `lab down` when that pipe closes: by [`Lab`]'s drop, by a panic, or because the test itself was killed.

use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::timeout;

use crate::client::{Client, Credentials, Endpoint};

/// How long one lab command may take; `up` has its own, shorter limit.
const COMMAND_LIMIT: Duration = Duration::from_secs(150);
/// How often another address is tried when one is taken.
const MOST_BASES: u32 = 8;

/// One lab at a time in one process: labs share the machine, and a test's timing is not another test's business.
/// Between processes the test runner sees to it.
static TURN: LazyLock<Arc<Mutex<()>>> = LazyLock::new(|| Arc::new(Mutex::new(())));

/// The lab as its commands print it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// In order of their names.
    pub hosts: Vec<Host>,
    /// Name of the master, while there is one.
    pub master: Option<String>,
    /// Who may log in.
    pub user: String,
    /// Its password.
    pub password: String,
}

/// A host as lab commands print it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// `host1` and so on.
    pub name: String,
    /// Its uuid in the pool.
    pub uuid: String,
    /// Its IP address.
    pub address: String,
    /// Where clients reach it.
    pub url: String,
    /// Its Unix socket.
    pub socket: PathBuf,
    /// Null when it does not run.
    pub controller_pid: Option<i32>,
    /// Null when it does not run.
    pub agent_pid: Option<i32>,
    /// `running`, `paused`, `partial` or `dead`.
    pub state: String,
    /// Uuid of the pool that it says it belongs to.
    pub pool: Option<String>,
}

impl Host {
    /// Where clients reach it, over TLS.
    pub fn endpoint(&self) -> anyhow::Result<Endpoint> {
        let address = self.url.strip_prefix("https://").with_context(|| format!("{} is no https URL", self.url))?;
        Ok(Endpoint::Https(address.trim_end_matches('/').parse()?))
    }

    /// Its Unix socket.
    pub fn local(&self) -> Endpoint {
        Endpoint::Unix(self.socket.clone())
    }
}

impl State {
    /// The host of that name.
    pub fn host(&self, name: &str) -> anyhow::Result<&Host> {
        self.hosts.iter().find(|host| host.name == name).with_context(|| format!("the lab has no host {name}"))
    }

    /// The master.
    pub fn master(&self) -> anyhow::Result<&Host> {
        self.host(self.master.as_deref().context("the lab has no master")?)
    }

    /// All but the master.
    pub fn others(&self) -> Vec<&Host> {
        self.hosts.iter().filter(|host| Some(&host.name) != self.master.as_ref()).collect()
    }

    /// Who logs in.
    pub fn credentials(&self) -> Credentials {
        Credentials { user: self.user.clone(), password: self.password.clone() }
    }

    /// Every host's endpoint, the master's first.
    pub fn endpoints(&self) -> anyhow::Result<Vec<Endpoint>> {
        let (mut first, rest): (Vec<_>, Vec<_>) =
            self.hosts.iter().partition(|host| Some(&host.name) == self.master.as_ref());
        first.extend(rest);
        first.into_iter().map(Host::endpoint).collect()
    }
}

/// What is killed, paused or started of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Both daemons and every domain: a power cut.
    Host,
    /// The controller alone.
    Controller,
    /// The agent alone.
    Agent,
}

impl What {
    fn flag(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Controller => "controller",
            Self::Agent => "agent",
        }
    }
}

/// A lab of one's own. Dropped, it is down.
pub struct Lab {
    program: PathBuf,
    dir: Option<TempDir>,
    base: Ipv4Addr,
    made: State,
    guard: Guard,
    _turn: Option<OwnedMutexGuard<()>>,
}

impl Lab {
    /// Three simulated hosts.
    pub async fn sim() -> anyhow::Result<Self> {
        Self::up(3, "sim").await
    }

    /// So many hosts with that driver, in a directory and at addresses of their own.
    pub async fn up(hosts: u8, driver: &str) -> anyhow::Result<Self> {
        Self::of(&program()?, &std::env::temp_dir(), hosts, driver).await
    }

    /// The same, of that program and below that directory.
    pub async fn of(program: &Path, parent: &Path, hosts: u8, driver: &str) -> anyhow::Result<Self> {
        Self::with(program, parent, hosts, driver, &["--wait", "60"]).await
    }

    /// The same with more flags of `lab up`.
    pub async fn with(program: &Path, parent: &Path, hosts: u8, driver: &str, more: &[&str]) -> anyhow::Result<Self> {
        let turn = Arc::clone(&TURN).lock_owned().await;
        Self::raised(program, parent, hosts, driver, more, Some(turn)).await
    }

    /// Three simulated hosts while this process has another lab: for what gives them work by turns.
    pub async fn beside(program: &Path, parent: &Path) -> anyhow::Result<Self> {
        Self::raised(program, parent, 3, "sim", &["--wait", "60"], None).await
    }

    async fn raised(
        program: &Path,
        parent: &Path,
        hosts: u8,
        driver: &str,
        more: &[&str],
        turn: Option<OwnedMutexGuard<()>>,
    ) -> anyhow::Result<Self> {
        for attempt in 1.. {
            let dir = tempfile::Builder::new().prefix("xenith-test-").tempdir_in(parent)?;
            let base = next_base();
            let guard = Guard::new(program, dir.path())?;
            let (hosts, base_text) = (hosts.to_string(), base.to_string());
            let mut flags = vec!["--hosts", &hosts, "--driver", driver, "--base", &base_text];
            flags.extend(more);
            match run(program, "up", dir.path(), &flags).await {
                Ok(made) => {
                    return Ok(Self { program: program.to_owned(), dir: Some(dir), base, made, guard, _turn: turn });
                }
                Err(error) if error.to_string().contains("is in use") && attempt < MOST_BASES => {}
                Err(error) => {
                    let kept = dir.keep();
                    return Err(error.context(format!("the lab did not come up; its logs are in {}", kept.display())));
                }
            }
        }
        bail!("no attempt was made")
    }

    /// The lab as it was when it came up. Addresses and names stay; process ids and the master may not.
    pub fn made(&self) -> &State {
        &self.made
    }

    /// The lab's directory.
    pub fn dir(&self) -> &Path {
        self.dir.as_ref().map_or(Path::new(""), TempDir::path)
    }

    /// The program the lab runs.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The first host's address.
    pub fn base(&self) -> Ipv4Addr {
        self.base
    }

    /// `lab up` once more.
    pub async fn up_again(&self, flags: &[&str]) -> anyhow::Result<State> {
        run(&self.program, "up", self.dir(), flags).await
    }

    /// The lab as of now.
    pub async fn status(&self) -> anyhow::Result<State> {
        run(&self.program, "status", self.dir(), &[]).await
    }

    /// SIGKILL.
    pub async fn kill(&self, host: &str, what: What) -> anyhow::Result<State> {
        run(&self.program, "kill", self.dir(), &[host, "--what", what.flag()]).await
    }

    /// SIGSTOP.
    pub async fn pause(&self, host: &str, what: What) -> anyhow::Result<State> {
        run(&self.program, "pause", self.dir(), &[host, "--what", what.flag()]).await
    }

    /// SIGCONT.
    pub async fn resume(&self, host: &str, what: What) -> anyhow::Result<State> {
        run(&self.program, "resume", self.dir(), &[host, "--what", what.flag()]).await
    }

    /// Starts what is dead of a host, and returns when it answers.
    pub async fn start(&self, host: &str, what: What) -> anyhow::Result<State> {
        run(&self.program, "start", self.dir(), &[host, "--what", what.flag()]).await
    }

    /// Stops everything; the directory stays, and the lab can be brought up again.
    pub async fn down(&self) -> anyhow::Result<State> {
        run(&self.program, "down", self.dir(), &[]).await
    }

    /// A client that is logged in.
    pub async fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::connect(self.made.endpoints()?, self.made.credentials()).await?)
    }

    /// A client that talks to this host and is not logged in.
    pub fn client_at(&self, host: &Host) -> anyhow::Result<Client> {
        Ok(Client::new(vec![host.endpoint()?], self.made.credentials()))
    }

    /// The reference of the host object of that name.
    pub async fn host_reference(&self, client: &mut Client, name: &str) -> anyhow::Result<String> {
        let uuid = &self.made.host(name)?.uuid;
        let reference = client.call("host.get_by_uuid", serde_json::json!([uuid])).await?;
        Ok(reference.as_str().context("host.get_by_uuid answered no reference")?.to_owned())
    }

    /// The name of the host that `pool.master` says.
    pub async fn master_by_pool(&self, client: &mut Client) -> anyhow::Result<String> {
        let pools = client.call("pool.get_all_records", Value::Null).await?;
        let pool = pools.as_object().and_then(|pools| pools.values().next()).context("there is no pool")?;
        let record = client.call("host.get_record", serde_json::json!([pool["master"]])).await?;
        let host = self.made.hosts.iter().find(|host| record["uuid"] == host.uuid.as_str());
        Ok(host.with_context(|| format!("pool.master is {}", record["uuid"]))?.name.clone())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.guard.end();
        if std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            eprintln!("the lab's directory is kept: {}", dir.keep().display());
        }
    }
}

/// The process that takes the lab down.
struct Guard {
    process: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    fn new(program: &Path, dir: &Path) -> anyhow::Result<Self> {
        let mut process = Command::new("sh")
            .args(["-c", r#"read -r _; [ ! -e "$1/lab.json" ] || exec "$0" lab down --dir "$1""#])
            .args([program, dir])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Out of reach of what is sent to the test and all its children.
            .process_group(0)
            .spawn()
            .context("cannot start the lab's guard")?;
        let pipe = process.stdin.take();
        Ok(Self { process, pipe })
    }

    fn end(&mut self) {
        if self.pipe.take().is_some() {
            match self.process.wait() {
                Ok(status) if status.success() => {}
                other => eprintln!("`lab down` ended with {other:?}"),
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.end();
    }
}

async fn run(program: &Path, verb: &str, dir: &Path, rest: &[&str]) -> anyhow::Result<State> {
    let mut command = tokio::process::Command::new(program);
    command.arg("lab").arg(verb).arg("--dir").arg(dir).args(rest).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(COMMAND_LIMIT, command.output()).await;
    let output = output.with_context(|| format!("`lab {verb}` took too long"))?;
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    if !output.status.success() {
        bail!("`lab {verb} {}` failed: {}", rest.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("`lab {verb}` printed {:?}", String::from_utf8_lossy(&output.stdout)))
}

/// The `xenith` program: `XENITH_BIN`, or what was built beside this test.
pub fn program() -> anyhow::Result<PathBuf> {
    if let Some(named) = std::env::var_os("XENITH_BIN") {
        return Ok(named.into());
    }
    let test = std::env::current_exe()?;
    test.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("xenith"))
        .find(|program| program.is_file())
        .context("the xenith program is not built: cargo build --release -p xenith, or name it in XENITH_BIN")
}

/// Addresses that no other lab is likely to have; when one has them after all, the next ones are tried.
fn next_base() -> Ipv4Addr {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = std::process::id().wrapping_add(COUNT.fetch_add(1, Ordering::Relaxed).wrapping_mul(7919));
    let [third, second] = [number % 250, number / 250 % 40].map(|part| part as u8);
    Ipv4Addr::new(127, 80 + second, 1 + third, 1)
}
