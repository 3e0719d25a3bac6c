//! A large pool: many hosts, very many VMs, many watchers.
//!
//! Every host has an agent of its own; three of them keep the pool's state. That many controllers on one small machine
//! would measure its scheduler.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::load::{Rounds, quantile, round};
use super::pool::{Pool, call};
use super::restore::{self, Restored};
use super::wire::Wire;
use super::{bulk, description};
use crate::lab::{Lab, What};

/// What is asked of a large pool.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Hosts, three of them with a copy of the state.
    pub hosts: u8,
    /// VMs.
    pub vms: usize,
    /// Clients that wait in `event.from` for every VM.
    pub watchers: usize,
    /// Changes a second while they do.
    pub changes: usize,
    /// Seconds of each measurement.
    pub seconds: f64,
}

/// What it gave.
#[derive(Clone, Debug)]
pub struct Scale {
    /// What was asked.
    pub size: Size,
    /// VMs made per second.
    pub making: f64,
    /// Bytes by which the master grew for each VM, before anybody read it.
    pub bytes_per_vm: f64,
    /// Bytes of a VM's JSON.
    pub encoding: f64,
    /// The first answer of `VM.get_all_records`, in ms: every encoding is made.
    pub first_read: f64,
    /// Later ones.
    pub read: bulk::Bulk,
    /// Writes of 64 clients.
    pub writes: Rounds,
    /// The same while another client reads all records again and again.
    pub writes_beside_reads: Rounds,
    /// Seconds from starting a host's controller to its serving.
    pub restart: f64,
    /// Seconds from starting a host's controller without its database to its having all again.
    pub catch_up: f64,
    /// The database fetched and put back.
    pub restored: Restored,
    /// While every watcher follows every VM.
    pub by_all: Watched,
    /// While each watcher follows VMs of its own.
    pub by_one: Watched,
}

/// Events while many watch.
#[derive(Clone, Debug)]
pub struct Watched {
    /// Milliseconds from the start of a write to its event at a watcher.
    pub events: Vec<f64>,
    /// Changes a second that the writers made meanwhile.
    pub changed: f64,
}

/// Whom watchers follow.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Follow {
    /// All VMs, as a client does that shows a whole pool.
    All,
    /// A few of those that change, as a client does that waits for its own.
    Own,
}

const WRITERS: usize = 64;
const WARM: Duration = Duration::from_millis(500);
const PACED: usize = 32;
/// VMs that change while watchers watch: more than change within one answer, so that each change is told.
const CHANGING: usize = 1000;
const NUMBERS: u64 = 1 << 20;
/// Rows reach the disk, and what was copied for it is given back.
const SETTLE: Duration = Duration::from_secs(3);
/// What a host's log says when it has all again that it lost.
const WHOLE: &str = "all that this node had lost is there again";
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// Measures it.
pub async fn measure(program: &Path, dir: &Path, size: Size) -> anyhow::Result<Scale> {
    eprintln!("scale: {} hosts", size.hosts);
    let lab = Lab::with(program, dir, size.hosts, "sim", &["--replicas", "3", "--wait", "140"]).await?;
    let mut pool = Pool::over(lab).await?;
    let master = master_pid(&pool).await?;
    let before = resident(master)?;
    let started = Instant::now();
    eprintln!("scale: {} VMs", size.vms);
    pool.make_vms(size.vms).await?;
    let making = size.vms as f64 / started.elapsed().as_secs_f64();
    sleep(SETTLE).await;
    let bytes_per_vm = (resident(master)?.saturating_sub(before)) as f64 / size.vms as f64;

    let measured = Duration::from_secs_f64(size.seconds);
    let mut writes = Rounds::default();
    writes.add(round(pool.writers(WRITERS).await?, 1, WARM, measured).await?.0);
    let started = Instant::now();
    let all = call("VM.get_all_records", &json!([pool.session()]));
    pool.wire().await?.post(all.as_bytes()).await?.success()?;
    let first_read = started.elapsed().as_secs_f64() * 1e3;
    let read = bulk::measure(&mut pool, size.vms, 5).await?;
    eprintln!("scale: writes beside reads");
    let mut writes_beside_reads = Rounds::default();
    let reader = tokio::spawn(read_all(pool.wire().await?, all));
    writes_beside_reads.add(round(pool.writers(WRITERS).await?, 2, WARM, measured).await?.0);
    reader.abort();

    eprintln!("scale: {} watchers", size.watchers);
    let by_all = watched(&mut pool, size, Follow::All).await?;
    let by_one = watched(&mut pool, size, Follow::Own).await?;

    let other = pool.lab().status().await?;
    let name = other.others().iter().find(|host| host.controller_pid.is_some()).context("no second copy")?.name.clone();
    pool.lab().kill(&name, What::Controller).await?;
    let started = Instant::now();
    pool.lab().start(&name, What::Controller).await?;
    let restart = started.elapsed().as_secs_f64();
    eprintln!("scale: a host without its database");
    let catch_up = caught_up(&pool, &name).await?;
    let restored = restore::measure(&mut pool, size.vms).await?;
    Ok(Scale {
        size,
        making,
        bytes_per_vm,
        encoding: read.bytes as f64 / size.vms as f64,
        first_read,
        read,
        writes,
        writes_beside_reads,
        restart,
        catch_up,
        restored,
        by_all,
        by_one,
    })
}

/// How long a host that lost its database is no part of any majority.
async fn caught_up(pool: &Pool, name: &str) -> anyhow::Result<f64> {
    let home = pool.lab().dir().join(name);
    let told = || Ok::<_, anyhow::Error>(std::fs::read_to_string(home.join("controller.log"))?.matches(WHOLE).count());
    pool.lab().kill(name, What::Controller).await?;
    for file in std::fs::read_dir(home.join("controller"))? {
        let file = file?.path();
        // The promises stay, or the host would be a stranger.
        if file.is_file() && !file.ends_with("promises") {
            std::fs::remove_file(file)?;
        }
    }
    let before = told()?;
    let started = Instant::now();
    pool.lab().start(name, What::Controller).await?;
    while told()? == before {
        if started.elapsed() > ANSWER_LIMIT {
            bail!("{name} does not catch up");
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(started.elapsed().as_secs_f64())
}

async fn read_all(mut wire: Wire, body: String) -> anyhow::Result<()> {
    loop {
        wire.post(body.as_bytes()).await?.success()?;
    }
}

async fn master_pid(pool: &Pool) -> anyhow::Result<i32> {
    pool.lab().status().await?.master()?.controller_pid.context("the master does not run")
}

/// Bytes of memory that a process has.
fn resident(pid: i32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}

/// Changes VMs at a steady rate while watchers watch: every event's delay, and the rate that was kept.
async fn watched(pool: &mut Pool, size: Size, follow: Follow) -> anyhow::Result<Watched> {
    let token = pool.client().call("event.from", json!([["vm"], "", 0.0])).await?;
    let token = token["token"].as_str().context("event.from gave no token")?.to_owned();
    let wires = (pool.wires(size.watchers).await?, pool.wires(PACED).await?);
    let epoch = Instant::now();
    let counting = epoch + Duration::from_secs(2);
    let end = counting + Duration::from_secs_f64(size.seconds);
    let mut watchers = JoinSet::new();
    for (watcher, wire) in wires.0.into_iter().enumerate() {
        let wire = wire.keeping(8 << 20);
        let own = (watcher..CHANGING.min(size.vms)).step_by(size.watchers);
        let classes = match follow {
            Follow::All => vec!["vm".to_owned()],
            Follow::Own => own.map(|place| Ok(format!("vm/{}", pool.vm(place)?))).collect::<anyhow::Result<_>>()?,
        };
        let watched = (pool.session().to_owned(), classes, token.clone());
        watchers.spawn(watch(wire, watched, epoch, counting, end));
    }
    let mut writers = JoinSet::new();
    let pace = Duration::from_secs_f64(PACED as f64 / size.changes as f64);
    for (first, wire) in wires.1.into_iter().enumerate() {
        let places = (first..CHANGING.min(size.vms).max(first + 1)).step_by(PACED);
        let vms: Vec<String> = places.map(|place| pool.vm(place).map(str::to_owned)).collect::<anyhow::Result<_>>()?;
        let paced = Paced { wire, session: pool.session().to_owned(), vms, pace };
        writers.spawn(paced.write(epoch, counting, end));
    }
    let mut changed = 0;
    while let Some(count) = writers.join_next().await {
        changed += count??;
    }
    let mut delays = Vec::new();
    while let Some(heard) = watchers.join_next().await {
        delays.extend(heard??);
    }
    Ok(Watched { events: delays, changed: changed as f64 / size.seconds })
}

/// Changes its VMs by turns, one every `pace`.
struct Paced {
    wire: Wire,
    session: String,
    vms: Vec<String>,
    pace: Duration,
}

impl Paced {
    /// How many it changed in the counted time.
    async fn write(mut self, epoch: Instant, counting: Instant, end: Instant) -> anyhow::Result<usize> {
        let mut ticks = interval(self.pace);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut count = 0;
        for vm in self.vms.iter().cycle() {
            ticks.tick().await;
            let now = Instant::now();
            if now >= end {
                break;
            }
            let text = description(NUMBERS + (now - epoch).as_micros() as u64);
            let body = call("VM.set_name_description", &json!([self.session, vm, text]));
            self.wire.post(body.as_bytes()).await?.success()?;
            count += usize::from(now >= counting);
        }
        Ok(count)
    }
}

/// Follows VMs; the delays in ms of the events of writes that began in the counted time.
async fn watch(
    mut wire: Wire,
    (session, classes, mut token): (String, Vec<String>, String),
    epoch: Instant,
    counting: Instant,
    end: Instant,
) -> anyhow::Result<Vec<f64>> {
    const MARK: &[u8] = b"\"name_description\":\"";
    let finder = memchr::memmem::Finder::new(MARK);
    let tokens = memchr::memmem::FinderRev::new(b"\"token\":\"");
    let digits = description(0).find(' ').context("a description begins with its number")?;
    let mut delays = Vec::new();
    loop {
        if Instant::now() >= end {
            return Ok(delays);
        }
        let body = call("event.from", &json!([session, classes, token, 1.0]));
        let answer = timeout(ANSWER_LIMIT, wire.post(body.as_bytes())).await.context("a watcher waits in vain")??;
        let answer = answer.success()?;
        let now = Instant::now();
        if answer.first.len() != answer.length {
            bail!("an answer of {} bytes is longer than a watcher keeps", answer.length);
        }
        for found in finder.find_iter(answer.first) {
            let text = answer.first.get(found + MARK.len()..found + MARK.len() + digits).unwrap_or_default();
            let Ok(number) = std::str::from_utf8(text).unwrap_or_default().parse::<u64>() else { continue };
            let Some(micros) = number.checked_sub(NUMBERS) else { continue };
            let written = epoch + Duration::from_micros(micros);
            if written >= counting && written < end {
                delays.push(now.saturating_duration_since(written).as_secs_f64() * 1e3);
            }
        }
        let at = tokens.rfind(answer.first).context("event.from gave no token")? + b"\"token\":\"".len();
        let rest = answer.first.get(at..).unwrap_or_default();
        let length = rest.iter().position(|byte| *byte == b'"').context("the token has no end")?;
        token = String::from_utf8_lossy(&rest[..length]).into_owned();
    }
}

impl Watched {
    /// Milliseconds that this share of the events did not exceed.
    pub fn event(&self, share: f64) -> f64 {
        quantile(&self.events, share)
    }
}
