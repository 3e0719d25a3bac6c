//! `xenith controller --witness`: the third vote of a pool of two hosts.
//!
//! It replicates and votes, and does nothing else: it has no API, no agent, and no chores. It stands for election last,
//! and where it has to lead, because it alone has the newest entries, it hands the lead on as soon as another voter has
//! them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use controller::{Home as _, Newcomer, told_to_have};
use gateway::{HttpsAbroad, members_service};
use raft_store::{Leadership, PeerTls, Store, StoreConfig};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use super::controller::{FAREWELL, begin_again, serve_peers};
use super::seat::Seats;
use super::{on_runtime, signals};
use crate::cli::ControllerFlags;
use crate::config::{self, WitnessConfig};
use crate::telemetry;

/// A witness waits for so many times as long as a host before it stands for election.
const PATIENCE: u32 = 4;
const HAND_ON_AGAIN: Duration = Duration::from_millis(50);
/// Port of the API at a master whose address does not name one.
const API_PORT: u16 = 443;

/// Runs the witness until it is told to end.
pub fn witness(flags: &ControllerFlags) -> anyhow::Result<()> {
    let config: WitnessConfig = config::load(&flags.daemon.config)?;
    if flags.daemon.check {
        eprintln!("{} is in order", flags.daemon.config.display());
        return Ok(());
    }
    let ended = on_runtime(async {
        let name = config.uuid.to_string();
        let format = flags.daemon.log_format;
        let telemetry = telemetry::start("xenith-witness", &name, &config.log, format, &config.traces)?;
        let ending = signals::until_told_to_end()?;
        let outcome = serve(config, flags.join.as_deref(), ending).await;
        telemetry.finish();
        outcome
    })?;
    match ended {
        Ended::Told => Ok(()),
        Ended::ForOtherCertificates => begin_again(),
    }
}

/// Why a witness's life is over.
enum Ended {
    Told,
    /// The next one begins at once, with those.
    ForOtherCertificates,
}

/// Ends when the pool has told this witness to have other certificates, and its files are those.
async fn renew(store: &Store, seats: &Seats, tls: &PeerTls) -> anyhow::Result<()> {
    let mut applied = store.applied();
    loop {
        if let Some((ca, certificate)) = told_to_have(&store.state(), store.node_id(), &tls.ca, &tls.certificate) {
            tracing::info!("this witness's certificates are others now: starting anew on them");
            return seats.renew(&ca, &certificate).await.context("the witness's new certificates cannot be written");
        }
        applied.changed().await.context("the store has ended")?;
    }
}

async fn serve(config: WitnessConfig, master: Option<&str>, ending: CancellationToken) -> anyhow::Result<Ended> {
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("cannot make the directory {}", config.data_dir.display()))?;
    let seats = Seats::new(&config.data_dir);
    let (database, seat) = match (seats.current()?, master) {
        (Some(current), _) => current,
        (None, Some(master)) => {
            enrol(&config, &seats, master).await?;
            seats.current()?.context("the seat that was taken is not there")?
        }
        (None, None) => bail!("this witness is of no pool yet: name its master with --join"),
    };
    let tls = PeerTls { ca: seat.ca, certificate: seat.identity.certificate, key: seat.identity.key };
    let millis = |millis: u64| Duration::from_millis(millis) * PATIENCE;
    let settings = StoreConfig {
        heartbeat: Duration::from_millis(config.raft.heartbeat_ms),
        election: (millis(config.raft.election_min_ms), millis(config.raft.election_max_ms)),
        ..StoreConfig::new(database, seat.node_id, tls.clone())
    };
    let store = Store::open(settings).await.context("cannot open the database")?;
    let members = members_service(None, tls.clone(), None);
    let services = |server: &mut Server| server.add_service(store.service()).add_service(members);
    let mut peers = serve_peers(config.listen, &tls, services)?;
    tracing::info!(node = seat.node_id, peers = %config.listen, "the witness votes");
    let outcome = tokio::select! {
        () = ending.cancelled() => Ok(Ended::Told),
        () = hand_on(&store) => Ok(Ended::Told),
        renewed = renew(&store, &seats, &tls) => renewed.map(|()| Ended::ForOtherCertificates),
        why = store.failed() => Err(anyhow::anyhow!("the store cannot go on: {why}")),
        _ = &mut peers => Err(anyhow::anyhow!("the hosts can no longer reach this witness")),
    };
    if tokio::time::timeout(FAREWELL, store.shutdown()).await.is_err() {
        tracing::warn!("the store did not close in time; nothing that was acknowledged is lost");
    }
    peers.abort();
    outcome
}

/// Leads no longer than it must.
async fn hand_on(store: &Store) {
    let mut leadership = store.leadership();
    while leadership.wait_for(|now| matches!(now, Leadership::Leader { .. })).await.is_ok() {
        tracing::info!("a witness leads no pool: handing on");
        store.hand_over().await;
        tokio::time::sleep(HAND_ON_AGAIN).await;
    }
}

/// Asks the pool's master for a vote.
async fn enrol(config: &WitnessConfig, seats: &Seats, master: &str) -> anyhow::Result<()> {
    let password = config::root_password(None)?;
    let abroad = Arc::new(HttpsAbroad::new(API_PORT));
    let newcomer = Newcomer { uuid: config.uuid, address: config.listen };
    let seat = controller::enrol_witness(abroad, &newcomer, master, "root", &password).await;
    let seat = seat.map_err(|error| anyhow::anyhow!("{master} does not take this witness: {error}"))?;
    let place = seats.begin().await.context("cannot write to the data directory")?;
    seats.take(Path::new(&place), &seat).await.context("cannot write to the data directory")
}
