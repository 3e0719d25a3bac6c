//! Clients of the store: they write, read, make and delete objects, and follow the changes; and they remember what they
//! were told.

use std::collections::BTreeMap;
use std::sync::Arc;

use datamodel::fields::network;
use datamodel::{ClassId, ClassKind, OpaqueRef, Ref, Timestamp};
use parking_lot::Mutex;
use raft_store::{ChangeKind, CommitError, LogIndex, NewRow, NotLeader, State, Transaction};
use uuid::Uuid;

use crate::chance::Chance;
use crate::kernel;
use crate::network::{Network, Place};
use crate::node::{Ask, Doors, Told};
use crate::registers::{self, Operation};
use crate::trace::Trace;
use crate::{broken, tell};

/// The class whose objects are written: any would do.
type Object = datamodel::Network;
const CLASS: ClassId = <Object as ClassKind>::ID;
/// So many objects are written and read by everybody.
const REGISTERS: u128 = 4;
/// Where the clients are on the network.
pub(crate) const PLACE: Place = 1_000;

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Applied(LogIndex),
    Never,
    Unknown,
}

/// What clients were told.
#[derive(Default)]
pub struct Memory {
    registers: BTreeMap<u128, Vec<Operation>>,
    /// Objects that were made, with what became of that, and of their deletion if that was asked for.
    objects: BTreeMap<OpaqueRef, (Fate, Option<Fate>)>,
    acknowledged: u64,
}

/// The clients of a run.
#[derive(Clone)]
pub struct Clients {
    network: Network,
    doors: Doors,
    trace: Trace,
    nodes: u64,
    memory: Arc<Mutex<Memory>>,
    ends: i64,
}

fn register(number: u128) -> Ref<Object> {
    Ref::new(Uuid::from_u128(0x7e57 << 64 | number))
}

fn millis(from: i64) -> i64 {
    (kernel::now() - from) / 1_000_000
}

impl Clients {
    /// Clients that begin nothing new after `ends`.
    #[must_use]
    pub fn new(network: Network, doors: Doors, trace: Trace, nodes: u64, ends: i64) -> Self {
        Self { network, doors, trace, nodes, memory: Arc::default(), ends }
    }

    /// How many commits were acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.memory.lock().acknowledged
    }

    fn client(&self, name: u64, chance: Chance) -> Client {
        Client { all: self.clone(), name, chance, node: 1 + name % self.nodes, made: Vec::new() }
    }

    /// Makes the objects that everybody writes; ends when they are there.
    pub async fn found(self, mut chance: Chance) {
        let mut client = self.client(0, chance.fork());
        let mut transaction = client.transaction();
        for number in 0..REGISTERS {
            let row = NewRow::new(register(number), client.uuid()).with(network::NAME_LABEL, "0".to_owned());
            transaction.insert(row);
        }
        while !matches!(client.commit(transaction.clone(), true).await, Fate::Applied(_)) {}
    }

    /// Writes and reads until it is time to end.
    pub async fn write_and_read(self, name: u64, chance: Chance) {
        let mut client = self.client(name, chance);
        while kernel::now() < self.ends {
            tokio::time::sleep(client.chance.millis(1, 120)).await;
            match client.chance.below(10) {
                0..=3 => client.write().await,
                4..=6 => client.read().await,
                7..=8 => client.make().await,
                _ => client.delete().await,
            }
        }
    }

    /// Follows the changes until it is time to end; what it knows must always be what is there.
    pub async fn follow(self, name: u64, chance: Chance) {
        let mut client = self.client(name, chance);
        let mut token = LogIndex(0);
        let mut known: BTreeMap<OpaqueRef, (LogIndex, String)> = BTreeMap::new();
        while kernel::now() < self.ends {
            tokio::time::sleep(client.chance.millis(1, 400)).await;
            // A token means the same on every host, so that any of them will do; one that is behind is asked later.
            let ask = if client.chance.one_in(3) { Ask::Look } else { Ask::Read };
            let Some(Told::State(told)) = client.ask(ask).await else { continue };
            let Ok(state) = told else { continue };
            if state.applied < token {
                continue;
            }
            client.replay(&state, token, &mut known);
            token = state.applied;
        }
    }

    /// What must hold when all is over, of the state that everybody agrees on.
    pub fn judge(&self, state: &State) {
        let memory = self.memory.lock();
        for (number, history) in &memory.registers {
            let mut history = history.clone();
            let end = kernel::now();
            let Some(row) = state.row(register(*number)) else {
                broken!(self.trace, "register {number} is gone");
                continue;
            };
            history.push(Operation { began: end, ended: Some(end), value: row.name_label().into(), write: false });
            if let Err(why) = registers::linearizable("0", &history) {
                broken!(self.trace, "register {number} is not linearizable: {why}");
                for operation in &history {
                    tell!(self.trace, "  {operation:?}");
                }
            }
        }
        for (reference, (made, deleted)) in &memory.objects {
            let row = state.row_of(CLASS, *reference);
            match (made, deleted) {
                (Fate::Applied(index), None | Some(Fate::Never)) => match row {
                    Some(row) if row.created == *index => {}
                    Some(row) => broken!(self.trace, "{reference} was made at {index}, and again at {}", row.created),
                    None => broken!(self.trace, "{reference} was made at {index}, and is lost"),
                },
                (_, Some(Fate::Applied(index))) if row.is_some() => {
                    broken!(self.trace, "{reference} was deleted at {index}, and is there");
                }
                (Fate::Never, _) if row.is_some() => {
                    broken!(self.trace, "{reference} is there, and its maker was told that it never would be");
                }
                _ => {}
            }
        }
    }
}

/// One client.
struct Client {
    all: Clients,
    name: u64,
    chance: Chance,
    /// Whom it asks first.
    node: u64,
    made: Vec<OpaqueRef>,
}

impl Client {
    fn uuid(&mut self) -> Uuid {
        Uuid::from_u64_pair(self.chance.next(), self.chance.next())
    }

    fn transaction(&mut self) -> Transaction {
        Transaction::new(self.uuid(), Timestamp(kernel::WALL + kernel::now() / 1_000_000_000))
    }

    fn value(&mut self) -> String {
        format!("{}.{}", self.name, self.chance.next() & 0xffff_ffff)
    }

    async fn ask(&mut self, ask: Ask) -> Option<Told> {
        let limit = self.chance.millis(500, 12_000);
        let told = self.all.doors.ask(&self.all.network, PLACE, self.node, ask, limit).await;
        match &told {
            Some(
                Told::State(Err(NotLeader { leader }))
                | Told::Committed(Err(CommitError::NotLeader(NotLeader { leader }))),
            ) => {
                self.node = match leader {
                    Some(leader) => leader.node_id,
                    None => 1 + self.chance.below(self.all.nodes),
                };
            }
            None => self.node = 1 + self.chance.below(self.all.nodes),
            _ => {}
        }
        told
    }

    /// Commits; where the answer is lost, again, or not, as a client does.
    async fn commit(&mut self, transaction: Transaction, stubborn: bool) -> Fate {
        let mut fate = Fate::Never;
        let patience = self.chance.below(8);
        for attempt in 0.. {
            match self.ask(Ask::Commit(transaction.clone())).await {
                Some(Told::Committed(Ok(index))) => {
                    self.all.memory.lock().acknowledged += 1;
                    return Fate::Applied(index);
                }
                // It expects nothing that could fail, so that this can only be said of a deletion done already.
                Some(Told::Committed(Err(CommitError::Conflict(_)))) => return Fate::Unknown,
                Some(Told::Committed(Err(CommitError::NotLeader(_) | CommitError::Overloaded))) => {}
                Some(_) | None => fate = Fate::Unknown,
            }
            if !stubborn && attempt >= patience || kernel::now() > self.all.ends + 20_000_000_000 {
                return fate;
            }
            tokio::time::sleep(self.chance.millis(5, 100)).await;
        }
        fate
    }

    fn remember(&self, number: u128, began: i64, ended: Option<i64>, value: String, write: bool) {
        let operation = Operation { began, ended, value, write };
        self.all.memory.lock().registers.entry(number).or_default().push(operation);
    }

    async fn write(&mut self) {
        let number = u128::from(self.chance.next()) % REGISTERS;
        let value = self.value();
        let mut transaction = self.transaction();
        transaction.set(register(number), network::NAME_LABEL, value.clone());
        let began = kernel::now();
        let fate = self.commit(transaction, false).await;
        tell!(self.all.trace, "client {} wrote {value} to {number} in {} ms: {fate:?}", self.name, millis(began));
        match fate {
            Fate::Applied(_) => self.remember(number, began, Some(kernel::now()), value, true),
            // A write that never happened and is read all the same is found too: nobody wrote that value.
            Fate::Never => {}
            Fate::Unknown => self.remember(number, began, None, value, true),
        }
    }

    async fn read(&mut self) {
        let began = kernel::now();
        let Some(Told::State(Ok(state))) = self.ask(Ask::Read).await else { return };
        for number in 0..REGISTERS {
            let Some(row) = state.row(register(number)) else { continue };
            self.remember(number, began, Some(kernel::now()), row.name_label().to_owned(), false);
        }
    }

    async fn make(&mut self) {
        let reference: Ref<Object> = Ref::new(self.uuid());
        let mut transaction = self.transaction();
        let uuid = self.uuid();
        transaction.insert(NewRow::new(reference, uuid).with(network::NAME_LABEL, self.value()));
        let fate = self.commit(transaction, false).await;
        tell!(self.all.trace, "client {} made {reference}: {fate:?}", self.name);
        self.all.memory.lock().objects.insert(reference.opaque(), (fate, None));
        if matches!(fate, Fate::Applied(_)) {
            self.made.push(reference.opaque());
        }
    }

    async fn delete(&mut self) {
        let Some(reference) = self.made.pop() else { return };
        let mut transaction = self.transaction();
        transaction.delete_row(CLASS, reference);
        let fate = self.commit(transaction, false).await;
        tell!(self.all.trace, "client {} deleted {reference}: {fate:?}", self.name);
        if let Some(object) = self.all.memory.lock().objects.get_mut(&reference) {
            object.1 = Some(fate);
        }
    }

    /// Adds what changed since the token to what is known, and compares that with what is there.
    fn replay(&self, state: &State, token: LogIndex, known: &mut BTreeMap<OpaqueRef, (LogIndex, String)>) {
        let trace = &self.all.trace;
        let mut last = token;
        for change in state.changes_since(token) {
            if change.index < last || change.index <= token || change.index > state.applied {
                broken!(trace, "watcher {}: event {} after {last}, token {token}", self.name, change.index);
            }
            last = change.index;
            if change.class != CLASS {
                continue;
            }
            let before = match (&change.kind, &change.row) {
                (ChangeKind::Deleted, _) => known.remove(&change.reference),
                (_, Some(row)) => known.insert(change.reference, (row.modified, row.name_label().to_owned())),
                (_, None) => None,
            };
            if (change.kind == ChangeKind::Added) != before.is_none() {
                broken!(trace, "watcher {}: {:?} of {}, known {before:?}", self.name, change.kind, change.reference);
            }
        }
        let there: BTreeMap<OpaqueRef, (LogIndex, String)> =
            state.rows(CLASS).map(|row| (row.reference, (row.modified, row.name_label().to_owned()))).collect();
        if *known != there {
            let wrong = known.iter().find(|(reference, what)| there.get(reference) != Some(what));
            let missed = there.iter().find(|(reference, _)| !known.contains_key(reference));
            broken!(trace, "watcher {} at {}: believes {wrong:?}, missed {missed:?}", self.name, state.applied);
            *known = there;
        }
    }
}
