//! A host of the simulated pool: a disk that stays, and a process that comes and goes.

use std::sync::Arc;
use std::time::Duration;

use controller::{
    Controller, ControllerConfig, Guest, InitialMember, Refusal, Reply, Request, SystemClock, VoterPolicy,
};
use parking_lot::Mutex;
use raft_store::{CommitError, LogIndex, Member, NotLeader, PeerTls, Planted, State, Store, StoreConfig, Transaction};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::ServiceExt as _;

use crate::agents::{self, Hosts};
use crate::disk::Disk;
use crate::network::{Incoming, Network, Place};
use crate::process::Process;
use crate::tell;
use crate::trace::Trace;

/// What a client asks of a node.
#[derive(Clone)]
pub enum Ask {
    /// To commit a transaction.
    Commit(Transaction),
    /// A state that holds every write acknowledged before.
    Read,
    /// The state as this node has it.
    Look,
    /// To hand the lead to another node.
    Transfer(u64),
    /// To answer a call of the API.
    Call(Request),
}

/// What a node answers.
#[derive(Clone)]
pub enum Told {
    /// The transaction's index, or why it has none.
    Committed(Result<LogIndex, CommitError>),
    /// The state, or who has it.
    State(Result<Arc<State>, NotLeader>),
    /// The lead has moved, or not.
    Transferred,
    /// The call's answer, or who has it.
    Reply(Result<Reply, Refusal>),
}

struct Asked {
    ask: Ask,
    answer: Box<dyn FnOnce(Told) + Send>,
}

/// How clients reach the nodes.
#[derive(Clone, Default)]
pub struct Doors(Arc<Mutex<std::collections::BTreeMap<Place, mpsc::UnboundedSender<Asked>>>>);

impl Doors {
    /// Asks a node over the network. Whoever gets no answer in time does not know whether there will have been one.
    pub async fn ask(&self, network: &Network, from: Place, to: Place, ask: Ask, limit: Duration) -> Option<Told> {
        let (tell, told) = oneshot::channel();
        let (doors, back) = (self.clone(), network.clone());
        network.post(from, to, move || {
            let answer = Box::new(move |answer| {
                back.post(to, from, move || drop(tell.send(answer)));
            });
            if let Some(door) = doors.0.lock().get(&to) {
                let _ = door.send(Asked { ask, answer });
            }
        });
        tokio::time::timeout(limit, told).await.ok()?.ok()
    }
}

/// What is the same for every node of a pool.
#[derive(Clone)]
pub struct Setting {
    /// The network between them.
    pub network: Network,
    /// Where clients knock.
    pub doors: Doors,
    /// The story.
    pub trace: Trace,
    /// Who founds the pool.
    pub members: Vec<Member>,
    /// A mistake that the simulation is to find.
    pub planted: Option<Planted>,
    /// A snapshot is taken after so many entries.
    pub snapshot_every: u64,
    /// The hosts' agents, where controllers run on the stores.
    pub hosts: Option<Hosts>,
}

/// A host.
pub struct Node {
    /// Its id, and its place on the network.
    pub id: u64,
    /// What stays when the process goes.
    pub disk: Arc<Disk>,
    setting: Setting,
    /// The process, while there is one.
    pub process: Option<Process>,
    store: Arc<Mutex<Option<Store>>>,
    /// It is stopped until then.
    pub paused_until: Option<i64>,
    /// It is started again then.
    pub start_at: Option<i64>,
    /// Its wall clock is off by so much, in nanoseconds.
    pub wall_error: i64,
    /// The newest entry that was seen in its state.
    pub seen: LogIndex,
}

impl Node {
    /// A host whose process is not started yet.
    #[must_use]
    pub fn new(id: u64, disk: Arc<Disk>, setting: Setting) -> Self {
        Self {
            id,
            disk,
            setting,
            process: None,
            store: Arc::default(),
            paused_until: None,
            start_at: None,
            wall_error: 0,
            seen: LogIndex(0),
        }
    }

    /// Starts the process.
    pub fn start(&mut self) {
        tell!(self.setting.trace, "node {} starts", self.id);
        let process = Process::start();
        let (door, asked) = mpsc::unbounded_channel();
        self.setting.doors.0.lock().insert(self.id, door);
        let arrivals = self.setting.network.listen(self.id);
        let program = Program {
            id: self.id,
            setting: self.setting.clone(),
            disk: Arc::clone(&self.disk),
            store: Arc::clone(&self.store),
            process: process.watch(),
        };
        process.spawn(program.run(asked, arrivals));
        self.process = Some(process);
        self.start_at = None;
        self.paused_until = None;
    }

    /// Ends the process between two moves of its tasks; with `power` the disk forgets what it may.
    pub fn crash(&mut self, power: bool) {
        let Some(process) = self.process.take() else { return };
        tell!(self.setting.trace, "node {} {}", self.id, if power { "loses its power" } else { "is killed" });
        self.setting.doors.0.lock().remove(&self.id);
        self.setting.network.crash(self.id, power);
        *self.store.lock() = None;
        drop(process);
        self.disk.crash(power);
        self.paused_until = None;
    }

    /// The store, where the process has opened it.
    #[must_use]
    pub fn store(&self) -> Option<Store> {
        self.store.lock().clone()
    }
}

/// What runs in a node's process.
struct Program {
    id: u64,
    setting: Setting,
    disk: Arc<Disk>,
    store: Arc<Mutex<Option<Store>>>,
    process: crate::process::Watch,
}

impl Program {
    async fn run(self, mut asked: mpsc::UnboundedReceiver<Asked>, mut arrivals: mpsc::UnboundedReceiver<Incoming>) {
        let tls = PeerTls { ca: String::new(), certificate: String::new(), key: String::new() };
        let mut config = StoreConfig::new(std::path::PathBuf::new(), self.id, tls);
        config.snapshot_every = self.setting.snapshot_every;
        config.keep_entries = self.setting.snapshot_every / 4;
        config.planted = self.setting.planted;
        let peers = self.setting.network.dial_from(self.id);
        let store = match Store::open_on(config, self.disk, peers).await {
            Ok(store) => store,
            Err(error) => {
                crate::broken!(self.setting.trace, "node {} does not open its store: {error}", self.id);
                return;
            }
        };
        if self.id == 1
            && let Err(error) = store.initialize(&self.setting.members).await
        {
            tell!(self.setting.trace, "node 1 does not found the pool: {error}");
        }
        *self.store.lock() = Some(store.clone());
        let controller = self.setting.hosts.as_ref().map(|hosts| control(&self.setting, hosts, self.id, &store));
        let service = store.service();
        loop {
            tokio::select! {
                // A store that has stopped ends its process, as the daemon's does.
                why = store.failed() => {
                    tell!(self.setting.trace, "node {}: consensus has stopped: {why}", self.id);
                    self.process.kill();
                    return;
                }
                Some(Asked { ask, answer }) = asked.recv() => {
                    let (store, controller) = (store.clone(), controller.clone());
                    tokio::spawn(async move { answer(obey(&store, controller.as_ref(), ask).await) });
                }
                Some(mut incoming) = arrivals.recv() => {
                    let service = service.clone();
                    tokio::spawn(async move {
                        let request = std::mem::take(&mut incoming.request);
                        let Ok(response) = service.oneshot(request).await;
                        incoming.answer(response.map(Body::new)).await;
                    });
                }
                else => return,
            }
        }
    }
}

/// A controller on a store, at its chores.
fn control(setting: &Setting, hosts: &Hosts, id: u64, store: &Store) -> Controller {
    let founding = |member: &Member| InitialMember {
        node_id: member.node_id,
        host_uuid: agents::host_uuid(member.node_id),
        api_address: std::net::Ipv4Addr::from(0x7f00_0000 | u32::try_from(member.node_id).unwrap_or(0)).into(),
        peer_address: member.peer_address.clone(),
        agent_address: format!("agent-{}", member.node_id),
        replica: true,
    };
    let config = ControllerConfig {
        initial_members: setting.members.iter().map(founding).collect(),
        // Nobody logs in over the network.
        initial_password_hash: "none that fits".into(),
        guest: Guest::default(),
        election_wait: Duration::from_secs(5),
        redirect_sessions: false,
        ca_certificate: String::new(),
        certificate: String::new(),
        ca_key: String::new(),
        voters: VoterPolicy::default(),
        surroundings: None,
    };
    let agents = hosts.seen_from(&setting.network, id);
    let controller = Controller::new(store.clone(), agents, config, Arc::new(SystemClock), CancellationToken::new());
    let runs = controller.clone();
    tokio::spawn(async move { runs.run().await });
    controller
}

async fn obey(store: &Store, controller: Option<&Controller>, ask: Ask) -> Told {
    match ask {
        Ask::Call(request) => match controller {
            Some(controller) => Told::Reply(controller.call(request).await),
            None => Told::Reply(Err(Refusal::Retry)),
        },
        Ask::Commit(transaction) => Told::Committed(store.commit(transaction).await),
        Ask::Read => Told::State(store.read().await),
        Ask::Look => Told::State(Ok(store.state())),
        Ask::Transfer(to) => {
            let _ = store.transfer_leader(to).await;
            Told::Transferred
        }
    }
}
