//! How fast virtual machines start: what the pool adds, and what QEMU takes by itself.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::pool::{Pool, call};
use super::wire::Wire;
use crate::client::Client;
use crate::lab::Lab;

/// How many clients start VMs at once.
const CLIENTS: usize = 16;
/// A guest under emulation takes its time on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Starts of simulated VMs, from calls to answers.
#[derive(Clone, Debug, Default)]
pub struct Starts {
    /// Hosts of the pool.
    pub hosts: u8,
    /// Clients at once.
    pub clients: usize,
    /// `VM.start` answered per second, of each round.
    pub rates: Vec<f64>,
    /// Milliseconds of each call.
    pub calls: Vec<f64>,
}

/// Starts so many VMs in each round, over hosts whose driver is simulated: an answer means that the VM runs.
pub async fn starts(program: &Path, dir: &Path, hosts: u8, vms: usize, rounds: usize) -> anyhow::Result<Starts> {
    eprintln!("starts: {hosts} simulated hosts, {vms} VMs");
    let lab = Lab::with(program, dir, hosts, "sim", &["--replicas", "3", "--wait", "140"]).await?;
    let mut pool = Pool::over(lab).await?;
    pool.make_vms(vms).await?;
    on_all(&pool, vms, "VM.provision", &[]).await?;
    let mut starts = Starts { hosts, clients: CLIENTS, ..Starts::default() };
    for _ in 0..rounds {
        let began = Instant::now();
        let calls = on_all(&pool, vms, "VM.start", &[json!(false), json!(false)]).await?;
        starts.rates.push(vms as f64 / began.elapsed().as_secs_f64());
        starts.calls.extend(calls);
        let all =
            pool.client().call("VM.get_all_records_where", json!(["field \"power_state\" = \"Running\""])).await?;
        let running = all.as_object().into_iter().flatten().filter(|(_, vm)| vm["is_control_domain"] == false).count();
        ensure!(running == vms, "{running} of {vms} VMs run");
        on_all(&pool, vms, "VM.hard_shutdown", &[]).await?;
    }
    Ok(starts)
}

/// Calls a method on each of the pool's VMs, each client with its share; the milliseconds of each call.
async fn on_all(pool: &Pool, vms: usize, method: &'static str, more: &[Value]) -> anyhow::Result<Vec<f64>> {
    let mut clients = JoinSet::new();
    for (client, wire) in pool.wires(CLIENTS).await?.into_iter().enumerate() {
        let mut bodies = Vec::new();
        for place in (client..vms).step_by(CLIENTS) {
            let mut arguments = vec![json!(pool.session()), json!(pool.vm(place)?)];
            arguments.extend_from_slice(more);
            bodies.push(call(method, &Value::Array(arguments)));
        }
        clients.spawn(one_by_one(wire, bodies));
    }
    let mut calls = Vec::with_capacity(vms);
    while let Some(share) = clients.join_next().await {
        calls.extend(share??);
    }
    Ok(calls)
}

async fn one_by_one(mut wire: Wire, bodies: Vec<String>) -> anyhow::Result<Vec<f64>> {
    let mut calls = Vec::with_capacity(bodies.len());
    for body in bodies {
        let started = Instant::now();
        timeout(LIMIT, wire.post(body.as_bytes())).await.context("a call never ended")??.success()?;
        calls.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(calls)
}

/// Starts of a real guest, in milliseconds.
#[derive(Clone, Debug, Default)]
pub struct Boots {
    /// `VM.start`, from the call to its answer.
    pub through_the_pool: Vec<f64>,
    /// The same QEMU with the same command line, from its start to its word that the machine runs.
    pub bare: Vec<f64>,
}

/// Starts one VM again and again, by turns through the pool and as a QEMU of nobody's.
pub async fn boots(program: &Path, dir: &Path, rounds: usize) -> anyhow::Result<Boots> {
    eprintln!("starts: QEMU, {rounds} times");
    let lab = Lab::of(program, dir, 1, "qemu").await?;
    let mut client = lab.client().await?.with_call_limit(LIMIT);
    let vm = guest(&mut client).await?;
    let mut boots = Boots::default();
    for _ in 0..rounds {
        let started = Instant::now();
        client.call("VM.start", json!([vm, false, false])).await?;
        boots.through_the_pool.push(started.elapsed().as_secs_f64() * 1e3);
        let line = command_line(lab.dir())?;
        client.call("VM.hard_shutdown", json!([vm])).await?;
        boots.bare.push(bare(&line, dir).await?);
    }
    Ok(boots)
}

/// A halted VM of the lab's small Linux, without disks.
async fn guest(client: &mut Client) -> anyhow::Result<String> {
    let templates = client.call("VM.get_by_name_label", json!(["Xenith guest"])).await?;
    let template = templates.as_array().and_then(|all| all.first()).context("the lab has no guest")?.clone();
    let vm = client.call("VM.clone", json!([template, "started again and again"])).await?;
    client.call("VM.provision", json!([vm])).await?;
    Ok(vm.as_str().context("VM.clone answered no reference")?.to_owned())
}

/// How the one QEMU of a lab was started.
fn command_line(lab: &Path) -> anyhow::Result<Vec<OsString>> {
    let pid_file = found(lab, "qemu.pid").context("no QEMU runs")?;
    let pid = std::fs::read_to_string(pid_file)?;
    let line = std::fs::read(format!("/proc/{}/cmdline", pid.trim()))?;
    let words = line.strip_suffix(b"\0").unwrap_or(&line).split(|byte| *byte == 0);
    Ok(words.map(|word| OsString::from_vec(word.to_vec())).collect())
}

/// The first file of that name below a directory.
pub(super) fn found(dir: &Path, name: &str) -> Option<PathBuf> {
    for entry in std::fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if let Some(file) = found(&path, name) {
                return Some(file);
            }
        } else if path.file_name().is_some_and(|file| file == name) {
            return Some(path);
        }
    }
    None
}

/// Milliseconds until a QEMU of that command line says that its machine runs. Its files are in a directory of its own.
async fn bare(line: &[OsString], parent: &Path) -> anyhow::Result<f64> {
    let (program, arguments) = line.split_first().context("an empty command line")?;
    let dir = tempfile::Builder::new().prefix("xenith-bare-").tempdir_in(parent)?;
    let log = std::fs::File::create(dir.path().join("qemu.log"))?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(dir.path()).kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let started = Instant::now();
    let mut machine = command.spawn()?;
    let running = async {
        let mut words = loop {
            match UnixStream::connect(dir.path().join("qmp")).await {
                Ok(stream) => break BufReader::new(stream),
                Err(_) if machine.try_wait()?.is_none() => sleep(LOOK_AGAIN).await,
                Err(error) => return Err(error).context("QEMU ended"),
            }
        };
        told(&mut words, "QMP").await?;
        for command in ["qmp_capabilities", "cont"] {
            words.write_all(format!("{{\"execute\":\"{command}\"}}\n").as_bytes()).await?;
            told(&mut words, "return").await?;
        }
        words.write_all(b"{\"execute\":\"query-status\"}\n").await?;
        let status = told(&mut words, "return").await?;
        ensure!(status["return"]["status"] == "running", "{status}");
        Ok(started.elapsed().as_secs_f64() * 1e3)
    };
    let took = timeout(LIMIT, running).await.context("QEMU does not start")??;
    machine.kill().await?;
    Ok(took)
}

/// The next message that has this member; events are passed over.
async fn told(words: &mut BufReader<UnixStream>, member: &str) -> anyhow::Result<Value> {
    let mut line = String::new();
    loop {
        line.clear();
        if words.read_line(&mut line).await? == 0 {
            bail!("QEMU hung up");
        }
        let message: Value = serde_json::from_str(&line)?;
        if message.get(member).is_some() {
            return Ok(message);
        }
        ensure!(message.get("error").is_none(), "{message}");
    }
}
