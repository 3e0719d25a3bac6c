//! `xenith controller`: a host's part in the pool, wired from store, controller and gateway.
//!
//! ```text
//!   peers ──mutual TLS──► Raft service, forward service
//!   clients ──TLS, HTTP, Unix socket──► gateway ─► controller ─► store
//! ```
//!
//! It ends in the order that costs least: mastership is handed over while everything still works, then clients are let
//! go, then the chores end, then the store closes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use controller::{Agents, Clock, Controller, ControllerConfig as Rules, Guest, InitialMember, SystemClock, WrongClock};
use gateway::{Calls, ForwardClient, Gateway, GatewayConfig, TlsFiles, forward_service};
use raft_store::{PeerTls, Store, StoreConfig};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use super::{on_runtime, room, signals};
use crate::cli::Daemon;
use crate::config::{self, ControllerConfig, Member};
use crate::telemetry;

/// Bytes that a call's body may have.
const LARGEST_BODY: usize = 4 << 20;
/// Client connections at once.
const CONNECTIONS: usize = 4096;
/// A peer that is gone without a word is noticed after this long.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// How long the chores may take to end, and then the store to close.
const FAREWELL: Duration = Duration::from_secs(3);

/// Runs the controller until it is told to end.
pub fn controller(flags: &Daemon) -> anyhow::Result<()> {
    let config: ControllerConfig = config::load(&flags.config)?;
    if flags.check {
        eprintln!("{} is in order", flags.config.display());
        return Ok(());
    }
    on_runtime(async {
        let host = config.host_uuid.to_string();
        let telemetry = telemetry::start("xenith-controller", &host, &config.log, flags.log_format, &config.traces)?;
        let ending = signals::until_told_to_end()?;
        let outcome = serve(config, ending).await;
        telemetry.finish();
        outcome
    })
}

async fn serve(config: ControllerConfig, ending: CancellationToken) -> anyhow::Result<()> {
    let tls =
        PeerTls { ca: read(&config.tls.ca)?, certificate: read(&config.tls.certificate)?, key: read(&config.tls.key)? };
    tokio::select! {
        enough = room::wait(&config.data_dir) => enough?,
        () = ending.cancelled() => return Ok(()),
    }
    let store = open_store(&config, tls.clone()).await?;
    // The parts end after the handover, so they have a token of their own.
    let stopping = CancellationToken::new();
    let agents = Agents::grpc(tls.clone());
    let rules = rules(&config, &tls)?;
    let clock: Arc<dyn Clock> = match &config.clock_offset {
        None => Arc::new(SystemClock),
        Some(path) => Arc::new(WrongClock::new(path.clone())),
    };
    let controller = Controller::new(store.clone(), agents, rules, clock, stopping.clone());
    let calls: Arc<dyn Calls> = Arc::new(controller.clone());
    let mut peers = listen_to_peers(&config, &tls, &store, Arc::clone(&calls))?;
    if let Some(founding) = config.founding.as_ref().filter(|founding| founding.initialize) {
        let members: Vec<_> = founding.members.iter().filter(|member| member.replica).map(store_member).collect();
        store.initialize(&members).await.context("cannot start consensus")?;
    }
    let gateway = Gateway::start(gateway_config(&config), calls, ForwardClient::new(tls), stopping.clone()).await?;
    let chores = tokio::spawn(async move { controller.run().await });
    tracing::info!(node = config.node_id, api = ?gateway.tls, peers = %config.peers.listen, "the controller serves");

    let outcome = tokio::select! {
        () = ending.cancelled() => Ok(()),
        why = store.failed() => Err(anyhow!("the store cannot go on: {why}")),
        ended = &mut peers => match ended {
            Ok(Err(error)) => Err(error).context("peers can no longer reach this host"),
            _ => bail!("peers can no longer reach this host"),
        },
    };
    store.hand_over().await;
    stopping.cancel();
    gateway.ended().await;
    if timeout(FAREWELL, chores).await.is_err() {
        tracing::warn!("the chores did not end in time");
    }
    if timeout(FAREWELL, store.shutdown()).await.is_err() {
        tracing::warn!("the store did not close in time; nothing that was acknowledged is lost");
    }
    peers.abort();
    tracing::info!("the controller has ended");
    outcome
}

fn listen_to_peers(
    config: &ControllerConfig,
    tls: &PeerTls,
    store: &Store,
    calls: Arc<dyn Calls>,
) -> anyhow::Result<JoinHandle<Result<(), tonic::transport::Error>>> {
    let address = config.peers.listen;
    let incoming = TcpIncoming::bind(address).with_context(|| format!("cannot listen on {address} for peers"))?;
    let server = Server::builder()
        .tls_config(tls.server())
        .context("the files under [tls] do not make an identity")?
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .add_service(store.service())
        .add_service(forward_service(calls));
    Ok(tokio::spawn(server.serve_with_incoming(incoming.with_nodelay(Some(true)))))
}

fn gateway_config(config: &ControllerConfig) -> GatewayConfig {
    let api = &config.api;
    let this = config.founding.iter().flat_map(|it| &it.members).find(|member| member.node_id == config.node_id);
    let named = api.listen.iter().map(|address| address.ip()).filter(|address| !address.is_unspecified());
    let mut addresses: Vec<_> = this.map(|member| member.api_address).into_iter().chain(named).collect();
    addresses.dedup();
    GatewayConfig {
        tls: api.listen.clone(),
        plain: api.plain_http.clone(),
        socket: api.socket.clone(),
        certificate: TlsFiles {
            certificate: api.certificate.clone(),
            key: api.key.clone(),
            addresses,
            hostname: nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned(),
        },
        largest_body: LARGEST_BODY,
        connections: CONNECTIONS,
    }
}

async fn open_store(config: &ControllerConfig, tls: PeerTls) -> anyhow::Result<Store> {
    let raft = &config.raft;
    let settings = StoreConfig {
        heartbeat: Duration::from_millis(raft.heartbeat_ms),
        election: (Duration::from_millis(raft.election_min_ms), Duration::from_millis(raft.election_max_ms)),
        snapshot_every: raft.snapshot_every,
        keep_entries: raft.keep_entries,
        ..StoreConfig::new(config.data_dir.clone(), config.node_id, tls)
    };
    let place = || format!("cannot open the database in {}", config.data_dir.display());
    Store::open(settings).await.with_context(place)
}

/// What the founding hosts start with; a host of a pool that is there already has no use for it.
fn rules(config: &ControllerConfig, tls: &PeerTls) -> anyhow::Result<Rules> {
    let (initial_members, initial_password_hash) = match &config.founding {
        None => (Vec::new(), String::new()),
        Some(founding) => {
            let password = config::root_password(founding.root_password_file.as_deref()).context("founding")?;
            (founding.members.iter().map(initial_member).collect(), controller::password::hash(&password)?)
        }
    };
    Ok(Rules {
        initial_members,
        initial_password_hash,
        guest: config.guest.as_ref().map(guest).unwrap_or_default(),
        election_wait: Duration::from_millis(config.api.election_wait_ms),
        redirect_sessions: config.api.redirect_sessions,
        ca_certificate: tls.ca.clone(),
    })
}

fn store_member(member: &Member) -> raft_store::Member {
    raft_store::Member {
        node_id: member.node_id,
        peer_address: member.peer_address.to_string(),
        api_address: member.api_address.to_string(),
    }
}

fn initial_member(member: &Member) -> InitialMember {
    InitialMember {
        node_id: member.node_id,
        host_uuid: member.host_uuid,
        api_address: member.api_address,
        peer_address: member.peer_address.to_string(),
        agent_address: member.agent_address.to_string(),
    }
}

fn guest(guest: &config::Guest) -> Guest {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    Guest {
        kernel: text(&guest.kernel),
        ramdisk: guest.ramdisk.as_deref().map(text).unwrap_or_default(),
        args: guest.args.clone(),
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
