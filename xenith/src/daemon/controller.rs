//! `xenith controller`: a host's part in the pool, wired from store, controller and gateway.
//!
//! ```text
//!   peers ──mutual TLS──► Raft service, forward service
//!   clients ──TLS, HTTP, Unix socket──► gateway ─► controller ─► store
//! ```
//!
//! It ends in the order that costs least: mastership is handed over while everything still works, then clients are let
//! go, then the chores end, then the store closes.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use controller::certificates::Issued;
use controller::{
    Agents, Clock, Controller, ControllerConfig as Rules, Guest, InitialMember, Seat, Surroundings, SystemClock,
    VoterPolicy, WrongClock,
};
use gateway::{
    ApiCertificate, Calls, ForwardClient, Gateway, GatewayConfig, HttpsAbroad, PeersByGrpc, TlsFiles, forward_service,
    members_service,
};
use raft_store::{PeerTls, Store, StoreConfig};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};

use super::seat::Seats;
use super::{RUNTIME_LIMIT, consensus_runtime, on_runtime, room, signals};
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
pub(super) const FAREWELL: Duration = Duration::from_secs(3);

/// Why the controller ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// It was told to.
    Told,
    /// Its host has taken another seat: it begins anew there.
    ForAnotherSeat,
}

/// Runs the controller until it is told to end.
pub fn controller(flags: &Daemon) -> anyhow::Result<()> {
    let config: ControllerConfig = config::load(&flags.config)?;
    if flags.check {
        eprintln!("{} is in order", flags.config.display());
        return Ok(());
    }
    let consensus = consensus_runtime()?;
    let ended = on_runtime(async {
        let host = config.host_uuid.to_string();
        let telemetry = telemetry::start("xenith-controller", &host, &config.log, flags.log_format, &config.traces)?;
        let ending = signals::until_told_to_end()?;
        let outcome = serve(config, ending, consensus.handle()).await;
        telemetry.finish();
        outcome
    });
    consensus.shutdown_timeout(RUNTIME_LIMIT);
    let ended = ended?;
    match ended {
        Ended::Told => Ok(()),
        Ended::ForAnotherSeat => begin_again(),
    }
}

/// The same program with the same arguments, in this process: nothing of the old pool is left in memory.
pub(super) fn begin_again() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    let failed = std::process::Command::new("/proc/self/exe").arg0(name).args(arguments).exec();
    Err(failed).context("cannot start anew; the next start goes on where this one ends")
}

/// What this life of the controller is on: where its database is, who it is, and what it founds if need be.
struct Place {
    database: PathBuf,
    node_id: u64,
    tls: PeerTls,
    founding: Option<FirstSeat>,
}

/// A pool that is not there yet.
struct FirstSeat {
    initialize: bool,
    members: Vec<Member>,
    password_hash: String,
    ca_key: String,
}

impl Place {
    /// The seat that was taken last, or what the configuration says.
    fn of(config: &ControllerConfig, seats: &Seats) -> anyhow::Result<Self> {
        let Some((database, seat)) = seats.current()? else { return Self::configured(config, seats) };
        let tls = PeerTls { ca: seat.ca, certificate: seat.identity.certificate, key: seat.identity.key };
        let founding = match seat.alone {
            None => None,
            Some(alone) => {
                let mut me = this(config).context("founding.members does not have this host")?.clone();
                (me.node_id, me.replica) = (seat.node_id, true);
                let (password_hash, ca_key) = (alone.password_hash, alone.ca_key);
                Some(FirstSeat { initialize: true, members: vec![me], password_hash, ca_key })
            }
        };
        Ok(Self { database, node_id: seat.node_id, tls, founding })
    }

    fn configured(config: &ControllerConfig, seats: &Seats) -> anyhow::Result<Self> {
        let tls = PeerTls {
            ca: read(&config.tls.ca)?,
            certificate: read(&config.tls.certificate)?,
            key: read(&config.tls.key)?,
        };
        let founding = match &config.founding {
            None => None,
            Some(founding) => {
                let password = config::root_password(founding.root_password_file.as_deref()).context("founding")?;
                Some(FirstSeat {
                    initialize: founding.initialize,
                    members: founding.members.clone(),
                    password_hash: controller::password::hash(&password)?,
                    ca_key: founding.ca_key.as_deref().map(read).transpose()?.unwrap_or_default(),
                })
            }
        };
        seats.has(&Seat {
            node_id: config.node_id,
            ca: tls.ca.clone(),
            identity: Issued { certificate: tls.certificate.clone(), key: tls.key.clone() },
            alone: None,
        });
        Ok(Self { database: config.data_dir.clone(), node_id: config.node_id, tls, founding })
    }
}

/// This host as others reach it.
fn this(config: &ControllerConfig) -> Option<&Member> {
    config.founding.iter().flat_map(|founding| &founding.members).find(|member| member.host_uuid == config.host_uuid)
}

async fn serve(config: ControllerConfig, ending: CancellationToken, consensus: &Handle) -> anyhow::Result<Ended> {
    let seats = Seats::new(&config.data_dir);
    let place = Place::of(&config, &seats)?;
    let tls = place.tls.clone();
    tokio::select! {
        enough = room::wait(&place.database) => enough?,
        () = ending.cancelled() => return Ok(Ended::Told),
    }
    let store = open_store(&config, &place, consensus).await?;
    // The parts end after the handover, so they have a token of their own.
    let stopping = CancellationToken::new();
    let agents = Agents::grpc(tls.clone());
    let rules = rules(&config, &place, &seats)?;
    let clock: Arc<dyn Clock> = match &config.clock_offset {
        None => Arc::new(SystemClock),
        Some(path) => Arc::new(WrongClock::new(path.clone())),
    };
    let controller = Controller::new(store.clone(), agents, rules, clock, stopping.clone());
    let calls: Arc<dyn Calls> = Arc::new(controller.clone());
    let forwarded = forward_service(Arc::clone(&calls));
    let shown = ApiCertificate::of(tls_files(&config));
    let members = members_service(Some(controller.clone()), tls.clone(), Some(shown.clone()));
    let services =
        |server: &mut Server| server.add_service(store.service()).add_service(forwarded).add_service(members);
    let mut peers = {
        let _entered = consensus.enter();
        serve_peers(config.peers.listen, &tls, services)?
    };
    if let Some(founding) = place.founding.as_ref().filter(|founding| founding.initialize) {
        let members: Vec<_> = founding.members.iter().filter(|member| member.replica).map(store_member).collect();
        store.initialize(&members).await.context("cannot start consensus")?;
    }
    let gateway =
        Gateway::start(gateway_config(&config, shown), calls, ForwardClient::new(tls), stopping.clone()).await?;
    let chores = tokio::spawn(async move { controller.run().await });
    tracing::info!(node = place.node_id, api = ?gateway.tls, peers = %config.peers.listen, "the controller serves");

    let outcome = tokio::select! {
        () = ending.cancelled() => Ok(Ended::Told),
        () = seats.again().cancelled() => Ok(Ended::ForAnotherSeat),
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

/// Serves peers at an address, with mutual TLS.
pub(super) fn serve_peers(
    address: SocketAddr,
    tls: &PeerTls,
    services: impl FnOnce(&mut Server) -> Router,
) -> anyhow::Result<JoinHandle<Result<(), tonic::transport::Error>>> {
    let incoming = TcpIncoming::bind(address).with_context(|| format!("cannot listen on {address} for peers"))?;
    let mut server = Server::builder()
        .tls_config(tls.server())
        .context("the host's certificates do not make an identity")?
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE));
    Ok(tokio::spawn(services(&mut server).serve_with_incoming(incoming.with_nodelay(Some(true)))))
}

fn tls_files(config: &ControllerConfig) -> TlsFiles {
    let api = &config.api;
    let named = api.listen.iter().map(|address| address.ip()).filter(|address| !address.is_unspecified());
    let mut addresses: Vec<_> = this(config).map(|member| member.api_address).into_iter().chain(named).collect();
    addresses.dedup();
    TlsFiles {
        certificate: api.certificate.clone(),
        key: api.key.clone(),
        addresses,
        hostname: nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned(),
    }
}

fn gateway_config(config: &ControllerConfig, certificate: ApiCertificate) -> GatewayConfig {
    let api = &config.api;
    GatewayConfig {
        tls: api.listen.clone(),
        plain: api.plain_http.clone(),
        socket: api.socket.clone(),
        certificate,
        largest_body: LARGEST_BODY,
        connections: CONNECTIONS,
    }
}

/// Opens the store where all of its tasks will run.
async fn open_store(config: &ControllerConfig, place: &Place, consensus: &Handle) -> anyhow::Result<Store> {
    let raft = &config.raft;
    let settings = StoreConfig {
        heartbeat: Duration::from_millis(raft.heartbeat_ms),
        election: (Duration::from_millis(raft.election_min_ms), Duration::from_millis(raft.election_max_ms)),
        snapshot_every: raft.snapshot_every,
        keep_entries: raft.keep_entries,
        reads: config.store.format_limit,
        ..StoreConfig::new(place.database.clone(), place.node_id, place.tls.clone())
    };
    let opened = consensus.spawn(Store::open(settings)).await.context("the database was not opened to the end")?;
    opened.with_context(|| format!("cannot open the database in {}", place.database.display()))
}

/// What the founding hosts start with; a host of a pool that is there already has no use for it.
fn rules(config: &ControllerConfig, place: &Place, seats: &Seats) -> anyhow::Result<Rules> {
    let founding = place.founding.as_ref();
    let port = config.api.listen.first().map_or(443, |address| address.port());
    let abroad = HttpsAbroad::new(port);
    let surroundings = this(config).map(|member| Surroundings {
        this: initial_member(member),
        home: Arc::new(seats.clone()),
        abroad: Arc::new(abroad),
        peers: Arc::new(PeersByGrpc(place.tls.clone())),
    });
    Ok(Rules {
        initial_members: founding.iter().flat_map(|founding| &founding.members).map(initial_member).collect(),
        initial_password_hash: founding.map(|founding| founding.password_hash.clone()).unwrap_or_default(),
        guest: config.guest.as_ref().map(guest).unwrap_or_default(),
        election_wait: Duration::from_millis(config.api.election_wait_ms),
        redirect_sessions: config.api.redirect_sessions,
        ca_certificate: place.tls.ca.clone(),
        certificate: place.tls.certificate.clone(),
        ca_key: founding.map(|founding| founding.ca_key.clone()).unwrap_or_default(),
        surroundings,
        voters: VoterPolicy {
            most: usize::from(config.membership.voters),
            replace_after: Duration::from_millis(config.membership.replace_after_ms),
        },
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
        replica: member.replica,
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
