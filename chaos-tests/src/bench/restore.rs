//! A large pool's database, fetched and put back while clients write.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http::Method;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::description;
use super::pool::{Pool, call};
use super::wire::Wire;
use crate::client::{Connection, Endpoint};
use crate::lab::Lab;

/// What it gave.
#[derive(Clone, Debug)]
pub struct Restored {
    /// VMs in the pool.
    pub vms: usize,
    /// Bytes of the dump.
    pub bytes: usize,
    /// Seconds from asking for the dump to its last byte.
    pub dump: f64,
    /// Seconds of a restore that only looks whether it could be done.
    pub dry_run: f64,
    /// Seconds of a restore that changes every VM, from its first byte to its answer.
    pub restore: f64,
    /// Milliseconds of the longest pause between two writes of one client, while nothing else is done.
    pub pause_at_rest: f64,
    /// The same during the restore.
    pub pause: f64,
    /// Whether another host became master over it.
    pub same_master: bool,
}

const WRITERS: usize = 4;
const LIMIT: Duration = Duration::from_secs(300);
/// How long writers write before and after what is measured.
const AROUND: Duration = Duration::from_secs(2);
const PATH: &str = "/pool/xmldbdump";
/// How dumps name the VMs of benchmarks, and what they are turned into.
const NAMES: (&str, &str) = ("\"name_label\":\"benchmark\"", "\"name_label\":\"restored!\"");

/// Measures it in a pool of three simulated hosts.
pub async fn alone(program: &Path, dir: &Path, vms: usize) -> anyhow::Result<Restored> {
    let mut pool = Pool::over(Lab::of(program, dir, 3, "sim").await?).await?;
    eprintln!("restore: {vms} VMs");
    pool.make_vms(vms).await?;
    measure(&mut pool, vms).await
}

/// Measures it in a pool that has so many VMs.
pub async fn measure(pool: &mut Pool, vms: usize) -> anyhow::Result<Restored> {
    let master = pool.master().await?;
    let path = format!("{PATH}?session_id={}", pool.session());
    let mut connection = Connection::open(&Endpoint::Https(master), LIMIT).await?;
    let started = Instant::now();
    let answer = connection.request(Method::GET, &path, &[], "", LIMIT).await?;
    let dump = started.elapsed().as_secs_f64();
    ensure!(answer.status.is_success() && answer.body.ends_with(b"</database>\n"), "no dump: {}", answer.status);
    let text = std::str::from_utf8(&answer.body)?.replace(NAMES.0, NAMES.1);
    let bytes = answer.body.len();
    drop(answer);
    let changed = Bytes::from(text);

    eprintln!("restore: a dry run of {:.0} MB", bytes as f64 / 1e6);
    let dry_run = put(&mut connection, &format!("{path}&dry_run=true"), changed.clone()).await?;
    let (_, pause_at_rest) = beside_writers(pool, sleep(AROUND)).await?;
    eprintln!("restore: the database");
    let (restore, pause) = beside_writers(pool, put(&mut connection, &path, changed)).await?;
    let restore = restore?;
    let label = pool.vm(0)?.to_owned();
    let label = pool.client().call("VM.get_name_label", json!([label])).await?;
    ensure!(label == "restored!", "a VM is called {label}");
    let same_master = pool.master().await? == master;
    Ok(Restored { vms, bytes, dump, dry_run, restore, pause_at_rest, pause, same_master })
}

/// Seconds until it was answered.
async fn put(connection: &mut Connection, path: &str, dump: Bytes) -> anyhow::Result<f64> {
    let started = Instant::now();
    let answer = connection.request(Method::PUT, path, &[], dump, LIMIT).await?;
    if !answer.status.is_success() || !answer.body.is_empty() {
        bail!("{path}: {} {}", answer.status, String::from_utf8_lossy(&answer.body));
    }
    Ok(started.elapsed().as_secs_f64())
}

/// Does it while clients write, and tells the longest time that one of them waited between two acknowledgements, in ms.
async fn beside_writers<T>(pool: &mut Pool, work: impl Future<Output = T>) -> anyhow::Result<(T, f64)> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for (place, wire) in pool.wires(WRITERS).await?.into_iter().enumerate() {
        writers.spawn(write(wire, pool.session().to_owned(), pool.vm(place)?.to_owned(), Arc::clone(&stop)));
    }
    sleep(AROUND).await;
    let done = work.await;
    sleep(AROUND).await;
    stop.store(true, Ordering::Relaxed);
    let mut longest = Duration::ZERO;
    while let Some(pause) = writers.join_next().await {
        longest = longest.max(pause.context("a writer has ended")??);
    }
    Ok((done, longest.as_secs_f64() * 1e3))
}

async fn write(mut wire: Wire, session: String, vm: String, stop: Arc<AtomicBool>) -> anyhow::Result<Duration> {
    let (mut longest, mut last) = (Duration::ZERO, Instant::now());
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let body = call("VM.set_name_description", &json!([session, vm, description(number)]));
        wire.post(body.as_bytes()).await?.success()?;
        longest = longest.max(last.elapsed());
        last = Instant::now();
        // A client that writes as fast as it can would take the cores from the restore.
        sleep(Duration::from_millis(2)).await;
    }
    Ok(longest)
}
