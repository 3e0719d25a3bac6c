//! A host of the simulated pool: a disk that stays, and a process that comes and goes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use controller::{
    Controller, ControllerConfig, Guest, InitialMember, Refusal, Reply, Request, SystemClock, VoterPolicy,
};
use parking_lot::Mutex;
use raft_store::{
    CommitError, History, LogIndex, Member, NotLeader, PeerTls, Planted, State, Store, StoreConfig, Transaction,
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::ServiceExt as _;

use crate::agents::{self, Hosts};
use crate::chance::Chance;
use crate::disk::{Disk, Shelf};
use crate::kernel;
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
    /// To change who is a member, and who votes.
    Change(Change),
    /// To answer a call of the API.
    Call(Request),
}

/// A change of members.
#[derive(Debug, Clone)]
pub enum Change {
    /// This one learns from now on.
    Learner(Member),
    /// These vote, and no others.
    Voters(BTreeSet<u64>),
    /// This one is a member no more.
    Remove(u64),
}

/// What a node answers.
#[derive(Clone)]
pub enum Told {
    /// The transaction's index, or why it has none.
    Committed(Result<LogIndex, CommitError>),
    /// The state, or who has it.
    State(Result<Arc<State>, NotLeader>),
    /// The lead has moved, or not; the members are others, or not.
    Tried,
    /// The call's answer, or who has it.
    Reply(Result<Reply, Refusal>),
}

struct Asked {
    ask: Ask,
    answer: Box<dyn FnOnce(Told) + Send>,
}

/// How clients reach the nodes: every host that has an address, and who answers there now.
#[derive(Clone, Default)]
pub struct Doors(Arc<Mutex<BTreeMap<Place, Option<mpsc::UnboundedSender<Asked>>>>>, Arc<AtomicU64>);

impl Doors {
    /// Some host, there or not.
    pub fn any(&self, chance: &mut Chance) -> Place {
        let doors = self.0.lock();
        let at = chance.index(doors.len());
        doors.keys().nth(at).copied().unwrap_or(1)
    }

    /// The newest entry that any host has applied.
    pub fn newest(&self) -> LogIndex {
        LogIndex(self.1.load(Ordering::Relaxed))
    }

    /// A host has applied that entry.
    pub fn applied(&self, index: LogIndex) {
        self.1.fetch_max(index.0, Ordering::Relaxed);
    }

    /// Nobody knows that address any more.
    pub fn forget(&self, place: Place) {
        self.0.lock().remove(&place);
    }

    /// Asks a node over the network. Whoever gets no answer in time does not know whether there will have been one.
    pub async fn ask(&self, network: &Network, from: Place, to: Place, ask: Ask, limit: Duration) -> Option<Told> {
        let (tell, told) = oneshot::channel();
        let (doors, back) = (self.clone(), network.clone());
        network.post(from, to, move || {
            let answer = Box::new(move |answer| {
                back.post(to, from, move || drop(tell.send(answer)));
            });
            if let Some(Some(door)) = doors.0.lock().get(&to) {
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
    /// How long deletions are remembered.
    pub history: History,
    /// The hosts' agents, where controllers run on the stores.
    pub hosts: Option<Hosts>,
    /// How their pool chooses who votes.
    pub voters: VoterPolicy,
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
    /// Its clocks run too fast by so many millionths.
    pub rate: i64,
    /// So its monotonic clock is ahead by so much, in nanoseconds.
    pub drift: i64,
    /// Its disk was damaged, and it has not been made up for yet.
    pub damaged: bool,
    /// It never comes back.
    pub lost: bool,
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
            rate: 0,
            drift: 0,
            damaged: false,
            lost: false,
            seen: LogIndex(0),
        }
    }

    /// Starts the process.
    pub fn start(&mut self) {
        tell!(self.setting.trace, "node {} starts", self.id);
        let process = self.timed(|_| Process::start());
        let (door, asked) = mpsc::unbounded_channel();
        self.setting.doors.0.lock().insert(self.id, Some(door));
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

    /// Stops the process until then: it finds all that came meanwhile.
    pub fn pause(&mut self, until: i64) {
        self.paused_until = Some(until);
        self.setting.network.stop(self.id);
    }

    /// Lets a stopped process go on.
    pub fn go_on(&mut self) {
        if self.paused_until.take().is_some() {
            tell!(self.setting.trace, "node {} wakes", self.id);
            self.setting.network.go_on(self.id);
        }
    }

    /// Something that happens while this host's clocks are the ones that are looked at.
    pub fn timed<T>(&self, happens: impl FnOnce(&Self) -> T) -> T {
        kernel::set_clock(kernel::now(), self.drift, self.wall_error);
        let out = happens(self);
        kernel::set_clock(kernel::now(), 0, 0);
        out
    }

    /// Ends the process between two moves of its tasks; with `power` the disk forgets what it may.
    pub fn crash(&mut self, power: bool) {
        let Some(process) = self.process.take() else { return };
        tell!(self.setting.trace, "node {} {}", self.id, if power { "loses its power" } else { "is killed" });
        self.setting.doors.0.lock().entry(self.id).and_modify(|door| *door = None);
        self.setting.network.crash(self.id, power);
        *self.store.lock() = None;
        drop(process);
        self.disk.crash(power);
        self.paused_until = None;
    }

    /// This host as its peers reach it.
    #[must_use]
    pub fn member(&self) -> Member {
        member(self.id)
    }

    /// The store, where the process has opened it.
    #[must_use]
    pub fn store(&self) -> Option<Store> {
        self.store.lock().clone()
    }
}

/// A node as its peers reach it.
#[must_use]
pub fn member(node_id: u64) -> Member {
    Member { node_id, peer_address: format!("peer-{node_id}"), api_address: format!("127.0.0.{node_id}") }
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
        config.history = self.setting.history;
        let peers = self.setting.network.dial_from(self.id);
        let store = match Store::open_in(config, Arc::new(Shelf(Arc::clone(&self.disk))), peers).await {
            Ok(store) => store,
            // The daemon's process ends, and waits for room when it is started again.
            Err(error) if self.disk.is_full() => {
                tell!(self.setting.trace, "node {}: {error}", self.id);
                self.process.kill();
                return;
            }
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
        voters: setting.voters,
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
            Told::Tried
        }
        Ask::Change(change) => {
            // It is told in the store's own log why it was not.
            let _ = match change {
                Change::Learner(member) => store.add_learner(&member).await,
                Change::Voters(voters) => store.set_voters(voters).await,
                Change::Remove(node) => store.remove(node).await,
            };
            Told::Tried
        }
    }
}
