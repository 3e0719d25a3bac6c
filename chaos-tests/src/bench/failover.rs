//! How long nobody can write after the leader is killed.
//!
//! The client knows all members and has an open connection to the leader. It tries one member after the other, each for
//! a short while, until somebody acknowledges its write. Both peers get the same client in this respect.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

use super::etcd::{self, Etcd};
use super::etcdserverpb::PutRequest;
use super::etcdserverpb::kv_client::KvClient;
use super::pool::Pool;
use super::{Operation, description};
use crate::client::Client;
use crate::lab::What;

/// How long one member is given for one try. Long enough for any healthy write, and short enough that a request which was
/// sent on to the dead leader does not hide the new one.
const TRY_LIMIT: Duration = Duration::from_millis(100);
const FAILOVER_LIMIT: Duration = Duration::from_secs(30);
/// Between two tries that were refused at once.
const TRY_AGAIN: Duration = Duration::from_millis(2);
/// From a member's return to the next kill.
const SETTLE: Duration = Duration::from_millis(1_500);
const CATCH_UP_LIMIT: Duration = Duration::from_secs(30);
/// Where these writes' numbers start.
const NUMBERS: u64 = 1 << 61;

/// Milliseconds from SIGKILL of the master's host to the first acknowledged write.
pub async fn of_pool(pool: &mut Pool, round: u64) -> anyhow::Result<f64> {
    pool.make_vms(1).await?;
    let vm = pool.vm(0)?.to_owned();
    let state = pool.lab().status().await?;
    let master = state.master()?.clone();
    let mut client = Client::new(state.endpoints()?, state.credentials()).with_call_limit(TRY_LIMIT);
    client.set_session(pool.session());
    client.call("VM.set_name_description", json!([vm, description(NUMBERS + 2 * round)])).await?;

    let write = json!([vm, description(NUMBERS + 2 * round + 1)]);
    let pids = [master.controller_pid, master.agent_pid].map(|pid| pid.map(Pid::from_raw));
    let killed = Instant::now();
    for pid in pids {
        kill(pid.context("the master does not run")?, Signal::SIGKILL)?;
    }
    client.persist(FAILOVER_LIMIT, "VM.set_name_description", write).await.context("nobody took the write")?;
    let taken = killed.elapsed();

    pool.lab().start(&master.name, What::Host).await?;
    let mut returned = pool.lab().client_at(&master)?;
    let login = json!([state.user, state.password]);
    let deadline = Instant::now() + CATCH_UP_LIMIT;
    // It has heard from the leader when it knows who that is.
    loop {
        match returned.plain("session.login_with_password", &login).await {
            Err(error) if error.is("HOST_IS_SLAVE") => break,
            Ok(_) => break,
            Err(error) if Instant::now() > deadline => return Err(error).context("the killed host does not come back"),
            Err(_) => sleep(TRY_AGAIN).await,
        }
    }
    sleep(SETTLE).await;
    Ok(taken.as_secs_f64() * 1e3)
}

/// Milliseconds from SIGKILL of etcd's leader to the first acknowledged put.
pub async fn of_etcd(cluster: &mut Etcd, round: u64) -> anyhow::Result<f64> {
    let leader = cluster.leader(CATCH_UP_LIMIT).await?;
    let mut endpoints = cluster.endpoints();
    endpoints.rotate_left(leader);
    let channel = etcd::connect(*endpoints.first().context("no member")?).await?;
    etcd::Put::new(channel.clone(), "/failover").run(NUMBERS + 2 * round).await?;

    let put = PutRequest { key: b"/failover".to_vec(), value: description(NUMBERS + 2 * round + 1).into_bytes() };
    let killed = Instant::now();
    cluster.signal(leader)?;
    persist(&endpoints, channel, &put).await?;
    let taken = killed.elapsed();

    cluster.kill(leader).await?;
    cluster.restart(leader)?;
    cluster.leader(CATCH_UP_LIMIT).await?;
    sleep(SETTLE).await;
    Ok(taken.as_secs_f64() * 1e3)
}

async fn persist(endpoints: &[SocketAddr], first: Channel, put: &PutRequest) -> anyhow::Result<()> {
    let deadline = Instant::now() + FAILOVER_LIMIT;
    let mut channels: Vec<Option<Channel>> = vec![None; endpoints.len()];
    if let Some(channel) = channels.first_mut() {
        *channel = Some(first);
    }
    for position in (0..endpoints.len()).cycle() {
        if Instant::now() > deadline {
            break;
        }
        let attempt = timeout(TRY_LIMIT, async {
            let channel = match channels.get(position).cloned().flatten() {
                Some(channel) => channel,
                None => etcd::connect(*endpoints.get(position).context("no member")?).await?,
            };
            KvClient::new(channel.clone()).put(put.clone()).await?;
            anyhow::Ok(channel)
        });
        match attempt.await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(_)) | Err(_) => {
                if let Some(channel) = channels.get_mut(position) {
                    *channel = None;
                }
            }
        }
        sleep(TRY_AGAIN).await;
    }
    bail!("nobody took the put")
}
