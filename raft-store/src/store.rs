//! The store's handle: commit, read, follow the log, change the members.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::BoxFuture;
use openraft::async_runtime::WatchReceiver as _;
use openraft::{ServerState, SnapshotPolicy};
use proto::raft::raft_server::RaftServer;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use crate::disk::{self, Disk, OpenError, Opened, Place, Writer};
use crate::fence::{Fence, Stage};
use crate::format::{self, Formats, NEWEST, OLDEST, TooNew};
use crate::leadership::{self, Announcements, Leadership};
use crate::log::LogStore;
use crate::machine::{Machine, PERSIST_EVERY, StateMachine};
use crate::offload;
use crate::peer::{Acknowledged, Dial, Heard, PeerFactory, PeerService, PeerTls};
use crate::planted::Planted;
use crate::proposer::{self, Proposal, Unanswered};
use crate::readmit;
use crate::row::LogIndex;
use crate::stand_down;
use crate::state::{History, State};
use crate::transaction::{Conflict, Transaction};
use crate::types::{PeerNode, Raft};

/// What a node needs to know to start.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Where the database lives; made if missing.
    pub dir: PathBuf,
    /// This node. Never reused, not even for the same host after it left.
    pub node_id: u64,
    /// What peers are shown.
    pub tls: PeerTls,
    /// How often the leader says that it is there.
    pub heartbeat: Duration,
    /// A follower campaigns after the lease (the longer of the two) plus a random time between the two.
    pub election: (Duration, Duration),
    /// A snapshot is taken after so many entries.
    pub snapshot_every: u64,
    /// So many entries stay in the log behind a snapshot, for peers that are a little behind.
    pub keep_entries: u64,
    /// How long deletions are remembered; the same on every member, or they come to differ.
    pub history: History,
    /// A commit whose fate is not known after this long is answered so.
    pub commit_limit: Duration,
    /// A mistake that a test of the tests wants to be found; else none.
    pub planted: Option<Planted>,
    /// The newest format that is read, if that is not to be this version's: then this node is as one of the version
    /// that had it, and holds the pool back at it.
    pub reads: Option<u32>,
}

impl StoreConfig {
    fn reads(&self) -> u32 {
        self.reads.unwrap_or(NEWEST).clamp(OLDEST, NEWEST)
    }

    /// The defaults: fail-over in well under a second on a local network.
    #[must_use]
    pub fn new(dir: PathBuf, node_id: u64, tls: PeerTls) -> Self {
        Self {
            dir,
            node_id,
            tls,
            heartbeat: Duration::from_millis(50),
            election: (Duration::from_millis(150), Duration::from_millis(300)),
            snapshot_every: 20_000,
            keep_entries: 10_000,
            history: History::default(),
            commit_limit: Duration::from_secs(10),
            planted: None,
            reads: None,
        }
    }
}

/// A node of the pool, as the others reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub node_id: u64,
    /// `ip:port` of its peer listener.
    pub peer_address: String,
    /// The address clients reach it by, without a port.
    pub api_address: String,
}

impl Member {
    pub(crate) fn new(node_id: u64, node: &PeerNode) -> Self {
        Self { node_id, peer_address: node.peer_address.clone(), api_address: node.api_address.clone() }
    }

    pub(crate) fn node(&self) -> PeerNode {
        PeerNode { peer_address: self.peer_address.clone(), api_address: self.api_address.clone() }
    }
}

/// This node does not lead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this node does not lead")]
pub struct NotLeader {
    /// Who does, if that is known.
    pub leader: Option<Member>,
}

/// Why a commit did not answer with an index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// It had no effect: something it expected does not hold.
    #[error("conflict: {0}")]
    Conflict(#[from] Conflict),
    /// It was not accepted and will never be applied.
    #[error(transparent)]
    NotLeader(#[from] NotLeader),
    /// The lead was lost on the way: it may have been applied or not. The same transaction may be committed again.
    #[error("the outcome is not known")]
    Unknown,
    /// The queue is full.
    #[error("too many commits are waiting")]
    Overloaded,
    /// It takes a format that not every member reads yet.
    #[error("it takes format {0}, which not every member reads yet")]
    NotYet(u32),
}

/// A member of the pool's replicated state.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    node_id: u64,
    raft: Raft,
    service: PeerService,
    machine: Arc<Machine>,
    fence: Arc<Fence>,
    disk: Disk,
    writer: Arc<Writer>,
    proposals: mpsc::Sender<Proposal>,
    leadership: watch::Receiver<Leadership>,
    /// Why consensus has stopped.
    stopped: watch::Receiver<Option<String>>,
    lease: leadership::Lease,
    commit_limit: Duration,
    planted: Option<Planted>,
    tasks: parking_lot::Mutex<JoinSet<()>>,
}

const WAITING_COMMITS: usize = 8192;
const READ_LIMIT: Duration = Duration::from_secs(2);

impl Store {
    /// Opens the database, brings the state back, and starts to follow or stand.
    ///
    /// # Errors
    /// [`OpenError`]: the database is damaged or of a newer version, or the configuration contradicts itself.
    pub fn open(config: StoreConfig) -> BoxFuture<'static, Result<Self, OpenError>> {
        Box::pin(async move {
            std::fs::create_dir_all(&config.dir)
                .map_err(|error| OpenError::Consensus(format!("{}: {error}", config.dir.display())))?;
            let place = Arc::new(disk::Folder::new(&config.dir));
            let peers = Arc::new(config.tls.clone());
            Self::open_in(config, place, peers).await
        })
    }

    /// Opens a store in a place and on a network that are given; its folder and certificates are not used.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_in(
        config: StoreConfig,
        place: Arc<dyn Place>,
        peers: Arc<dyn Dial>,
    ) -> BoxFuture<'static, Result<Self, OpenError>> {
        Box::pin(async move {
            let reads = config.reads();
            let opened = offload::blocking(move || disk::open(&place, reads)).await.map_err(stopped)??;
            Self::start(config, opened, peers).await
        })
    }

    async fn start(config: StoreConfig, opened: Opened, peers: Arc<dyn Dial>) -> Result<Self, OpenError> {
        let Opened { disk, stored, fence } = opened;
        let fence = Arc::new(fence.planted(config.planted));
        let leads = Arc::default();
        let writer = Arc::new(Writer::start(disk.engine(), Arc::clone(&leads)));
        let log = LogStore::open(disk.clone(), Arc::clone(&writer), config.planted).map_err(stopped)?;
        let machine = Arc::new(Machine::new(stored, config.history, Arc::clone(&writer), config.planted));
        let whole = fence.stage() == Stage::Lifted;
        let raft_config = Arc::new(openraft::Config { enable_elect: whole, ..raft_config(&config)? });
        let (telling, losses) = mpsc::channel(readmit::WAITING);
        let formats = Formats::new(config.reads(), Arc::clone(&machine));
        let acknowledged = Acknowledged::default();
        let network = PeerFactory {
            peers: Arc::clone(&peers),
            losses: telling,
            formats: formats.clone(),
            acknowledged: acknowledged.clone(),
            lease: config.election.1,
            planted: config.planted,
        };
        let raft = Raft::new(config.node_id, raft_config, network, log, StateMachine(Arc::clone(&machine)))
            .await
            .map_err(|error| OpenError::Consensus(error.to_string()))?;
        let heard = Heard::new();
        let service = PeerService {
            raft: Arc::new(OnceLock::new()),
            heard: heard.clone(),
            fence: Arc::clone(&fence),
            formats: formats.clone(),
        };
        let _ = service.raft.set(raft.clone());

        let mut tasks = JoinSet::new();
        let lease = leadership::Lease::new(&raft, acknowledged, config.election.1, config.planted);
        let (leading, leadership) = watch::channel(Leadership::Electing);
        let (failing, stopped) = watch::channel(None);
        let tell = Announcements { leadership: leading, stopped: failing, leads };
        tasks.spawn(leadership::follow(config.node_id, raft.clone(), Arc::clone(&machine), lease.clone(), heard, tell));
        let (proposals, queue) = mpsc::channel(WAITING_COMMITS);
        tasks.spawn(proposer::run(raft.clone(), Arc::clone(&machine), queue));
        tasks.spawn(format::raise(config.node_id, raft.clone(), formats));
        tasks.spawn(persist(Arc::clone(&machine)));
        tasks.spawn(readmit::run(raft.clone(), peers, losses));
        if !whole {
            tasks.spawn(readmit::lift(raft.clone(), Arc::clone(&machine), Arc::clone(&fence)));
        }
        let commit_limit = config.commit_limit;
        let shared = Shared {
            node_id: config.node_id,
            raft,
            service,
            machine,
            fence,
            disk,
            writer,
            proposals,
            leadership,
            stopped,
            lease,
            commit_limit,
            planted: config.planted,
            tasks: parking_lot::Mutex::new(tasks),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Founds a pool of these members; on exactly one node, once. Nothing happens where a pool is known already.
    ///
    /// # Errors
    /// What openraft says against it.
    pub fn initialize<'a>(&'a self, members: &'a [Member]) -> BoxFuture<'a, Result<(), OpenError>> {
        Box::pin(async move {
            if self.shared.fence.stage() != Stage::Lifted {
                return Ok(());
            }
            if self.shared.raft.is_initialized().await.map_err(|error| OpenError::Consensus(error.to_string()))? {
                return Ok(());
            }
            let nodes: BTreeMap<u64, PeerNode> = members.iter().map(|member| (member.node_id, member.node())).collect();
            self.shared.raft.initialize(nodes).await.map_err(|error| OpenError::Consensus(error.to_string()))
        })
    }

    /// Whether this node has lost its database and its peers have not yet made up for it.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        self.shared.fence.stage() != Stage::Lifted
    }

    /// The gRPC service that peers call; to be served with mutual TLS.
    #[must_use]
    pub fn service(&self) -> RaftServer<impl proto::raft::raft_server::Raft + Clone> {
        RaftServer::new(self.shared.service.clone())
            .max_decoding_message_size(64 << 20)
            .max_encoding_message_size(64 << 20)
    }

    /// This node's id.
    #[must_use]
    pub fn node_id(&self) -> u64 {
        self.shared.node_id
    }

    /// The state as this node has it: consistent, perhaps behind.
    #[must_use]
    pub fn state(&self) -> Arc<State> {
        self.shared.machine.state.load_full()
    }

    /// A state that holds every write acknowledged before this call, on the leader only.
    ///
    /// # Errors
    /// [`NotLeader`] also where this node thinks it leads and cannot prove it in time.
    pub async fn read(&self) -> Result<Arc<State>, NotLeader> {
        let leading = matches!(*self.shared.leadership.borrow(), Leadership::Leader { .. });
        let proven = self.shared.lease.is_fresh() || self.shared.planted == Some(Planted::ReadsWhileDeposed);
        if leading && proven {
            return Ok(self.state());
        }
        if !leading {
            return Err(self.not_leader());
        }
        match tokio::time::timeout(READ_LIMIT, self.proof()).await {
            Ok(true) => Ok(self.state()),
            Ok(false) => Err(self.not_leader()),
            Err(_) => {
                tracing::warn!(limit = ?READ_LIMIT, "a read is refused: no quorum has said in time that this node still leads");
                Err(self.not_leader())
            }
        }
    }

    /// Whether a quorum says that this node still leads.
    fn proof(&self) -> BoxFuture<'_, bool> {
        Box::pin(self.shared.lease.renewed(&self.shared.raft))
    }

    fn not_leader(&self) -> NotLeader {
        match &*self.shared.leadership.borrow() {
            Leadership::Follower { leader } => NotLeader { leader: Some(leader.clone()) },
            _ => NotLeader { leader: None },
        }
    }

    /// Commits a transaction: on the answer it is on the disks of a majority and in this node's state.
    ///
    /// Where the lead is lost on the way, the answer waits for the next leader's entries, which tell whether the
    /// transaction was applied ([`LogIndex`] or conflict) or never will be ([`CommitError::NotLeader`]). Only where
    /// none come within the limit is it [`CommitError::Unknown`]; the same transaction may then be committed again,
    /// here or on another node: it is applied once.
    ///
    /// # Errors
    /// [`CommitError`].
    pub async fn commit(&self, mut transaction: Transaction) -> Result<LogIndex, CommitError> {
        if !matches!(*self.shared.leadership.borrow(), Leadership::Leader { .. }) {
            return Err(self.not_leader().into());
        }
        if format::needed(&transaction) > self.format() {
            transaction = self.fitting(transaction).await?;
        }
        let deadline = Instant::now() + self.shared.commit_limit;
        let id = transaction.id();
        let (answer, outcome) = oneshot::channel();
        self.shared.proposals.try_send(Proposal { transaction, answer }).map_err(|_| CommitError::Overloaded)?;
        match tokio::time::timeout_at(deadline, outcome).await {
            Ok(Ok(Ok(index))) => Ok(index),
            Ok(Ok(Err(Unanswered::Known(error)))) => Err(error),
            Ok(Ok(Err(Unanswered::Open { term }))) => self.fate(id, term, deadline).await,
            Ok(Err(_)) | Err(_) => Err(CommitError::Unknown),
        }
    }

    /// A transaction with newer names, as the pool can write it.
    fn fitting(&self, transaction: Transaction) -> BoxFuture<'_, Result<Transaction, CommitError>> {
        Box::pin(async move {
            let mut fitted = transaction.clone();
            let Err(TooNew(format)) = format::fit(&mut fitted, self.format()) else { return Ok(fitted) };
            self.until_it_writes(format).await?;
            // All of it this time.
            fitted = transaction;
            format::fit(&mut fitted, self.format()).map_err(|TooNew(format)| CommitError::NotYet(format))?;
            Ok(fitted)
        })
    }

    /// Waits until the pool writes a format: not for long, and not where a member is known not to read it. On the leader
    /// only.
    ///
    /// # Errors
    /// [`CommitError::NotYet`], or [`CommitError::NotLeader`] where the lead was lost meanwhile.
    pub async fn until_it_writes(&self, format: u32) -> Result<(), CommitError> {
        if self.shared.service.formats.reached(&self.shared.raft, self.shared.node_id, format).await {
            return Ok(());
        }
        if matches!(*self.shared.leadership.borrow(), Leadership::Leader { .. }) {
            return Err(CommitError::NotYet(format));
        }
        Err(self.not_leader().into())
    }

    /// What became of a transaction whose entry was appended in `term` by a lead that was lost. Once an entry of a
    /// later term is applied, no entry of this one can follow.
    async fn fate(&self, id: Uuid, term: u64, deadline: Instant) -> Result<LogIndex, CommitError> {
        let mut office = self.shared.machine.office.subscribe();
        match tokio::time::timeout_at(deadline, office.wait_for(|(later, _)| *later > term)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return Err(CommitError::Unknown),
        }
        match self.shared.machine.outcome(id) {
            Some(outcome) => Ok(outcome?),
            None => Err(self.not_leader().into()),
        }
    }

    /// Waits until consensus has stopped because of a failure that it cannot survive, such as a disk that refuses a
    /// write, and says which. The process should end then: what the disk has is enough to start again.
    pub async fn failed(&self) -> String {
        let mut stopped = self.shared.stopped.clone();
        let why = stopped.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
        why.unwrap_or_else(|| "consensus has ended".to_owned())
    }

    /// The newest applied index; told after the state that holds it is there to be read.
    #[must_use]
    pub fn applied(&self) -> watch::Receiver<LogIndex> {
        self.shared.machine.applied.subscribe()
    }

    /// Who leads.
    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.shared.leadership.clone()
    }

    pub(crate) fn raft(&self) -> &Raft {
        &self.shared.raft
    }

    /// The format that the pool writes: the newest that all its members have read at some time.
    #[must_use]
    pub fn format(&self) -> u32 {
        self.state().format
    }

    pub(crate) fn disk(&self) -> &Disk {
        &self.shared.disk
    }

    pub(crate) fn term(&self) -> u64 {
        self.shared.raft.metrics().borrow_watched().current_term
    }

    /// Hands the lead to another voter and waits until this node has lost it.
    ///
    /// # Errors
    /// [`NotLeader`] where this node does not lead, or still leads after two seconds.
    pub fn transfer_leader(&self, node_id: u64) -> BoxFuture<'_, Result<(), NotLeader>> {
        Box::pin(async move {
            let mut leadership = self.leadership();
            if !matches!(*leadership.borrow(), Leadership::Leader { .. }) {
                return Err(self.not_leader());
            }
            if node_id == self.shared.node_id {
                return Ok(());
            }
            let term = self.term();
            if self.shared.planted != Some(Planted::KeepsItsLease) {
                self.shared.lease.give_up();
            }
            let refused = self.shared.raft.trigger().transfer_leader(node_id).await;
            if let Err(error) = refused {
                tracing::warn!(%error, "the lead cannot be handed over");
            }
            {
                let raft = self.shared.raft.clone();
                let mut tasks = self.shared.tasks.lock();
                while tasks.try_join_next().is_some() {}
                tasks.spawn(stand_down::if_nobody_took_the_lead(raft, node_id, term, READ_LIMIT));
            }
            let lost = leadership.wait_for(|leadership| !matches!(leadership, Leadership::Leader { .. }));
            match tokio::time::timeout(READ_LIMIT, lost).await {
                Ok(Ok(_)) => Ok(()),
                _ => Err(self.not_leader()),
            }
        })
    }

    /// Ends at once, as a crash would: nothing is handed over, nothing more is written. For tests of what survives.
    pub fn abandon(self) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            if let Err(error) = self.shared.raft.shutdown().await {
                tracing::debug!(%error, "consensus did not end cleanly");
            }
            let mut tasks = std::mem::take(&mut *self.shared.tasks.lock());
            tasks.shutdown().await;
            self.shared.writer.stop().await;
        })
    }

    /// Gives the lead, if this node has it, to the voter that has most of the log: before an end, so that the pool hardly
    /// notices.
    pub fn hand_over(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            if matches!(*self.shared.leadership.borrow(), Leadership::Leader { .. })
                && let Some(heir) = self.shared.lease.most_advanced_peer(self.shared.node_id)
                && self.transfer_leader(heir).await.is_err()
            {
                tracing::warn!(heir, "the lead could not be handed over");
            }
        })
    }

    /// Ends: hands the lead over if it has it, writes what is not written, closes the database.
    pub fn shutdown(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.hand_over().await;
            if let Err(error) = self.shared.raft.shutdown().await {
                tracing::warn!(%error, "consensus did not end cleanly");
            }
            let mut tasks = std::mem::take(&mut *self.shared.tasks.lock());
            tasks.shutdown().await;
            if let Err(error) = self.shared.machine.persist().await {
                tracing::warn!(%error, "the last rows were not written; the log brings them back");
            }
            self.shared.writer.stop().await;
        })
    }
}

fn stopped(error: std::io::Error) -> OpenError {
    OpenError::Consensus(error.to_string())
}

fn raft_config(config: &StoreConfig) -> Result<openraft::Config, OpenError> {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let raft = openraft::Config {
        cluster_name: "xenith".into(),
        heartbeat_interval: millis(config.heartbeat),
        election_timeout_min: millis(config.election.0),
        election_timeout_max: millis(config.election.1),
        install_snapshot_timeout: 30_000,
        max_payload_entries: 512,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_every),
        max_in_snapshot_log_to_keep: config.keep_entries,
        purge_batch_size: 1000,
        enable_pre_vote: Some(true),
        // A restarted leader stands for election like everybody: its lease may be over.
        enable_leader_restore: Some(false),
        ..openraft::Config::default()
    };
    raft.validate().map_err(|error| OpenError::Timings(error.to_string()))
}

/// Writes rows behind the log's back, a little later and many at once.
async fn persist(machine: Arc<Machine>) {
    loop {
        tokio::time::sleep(PERSIST_EVERY).await;
        if let Err(error) = machine.persist().await {
            tracing::error!(%error, "rows were not written; the log still has them");
            return;
        }
    }
}

/// Whether a server state leads; kept here so that openraft's enum is spelled in one place.
pub(crate) const fn leads(state: ServerState) -> bool {
    matches!(state, ServerState::Leader)
}
