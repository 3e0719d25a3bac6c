//! Clients of the store: they write, read, make and delete objects, and follow the changes; and they remember what they
//! were told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::network;
use datamodel::{ClassId, ClassKind, OpaqueRef, Ref, Timestamp};
use parking_lot::Mutex;
use raft_store::{ChangeKind, CommitError, LogIndex, NewRow, NotLeader, State, Transaction};
use uuid::Uuid;

use crate::chance::Chance;
use crate::kernel;
use crate::line::{Line, Seclusion, Surroundings};
use crate::network::Place;
use crate::node::{Ask, Told};
use crate::registers::Registers;
use crate::{broken, tell};

/// The class whose objects are written: any would do.
type Object = datamodel::Network;
const CLASS: ClassId = <Object as ClassKind>::ID;
/// Who has been waiting for a leader to be left alone looks whether it is time to end.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Who hurries waits no longer for an answer.
const IN_A_HURRY: Duration = Duration::from_millis(12);
/// So many objects are written and read by everybody.
const REGISTERS: u128 = 4;

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
    registers: Registers,
    /// Objects that were made, with what became of that, and of their deletion if that was asked for.
    objects: BTreeMap<OpaqueRef, (Fate, Option<Fate>)>,
    acknowledged: u64,
}

/// The clients of a run.
#[derive(Clone)]
pub struct Clients {
    all: Surroundings,
    memory: Arc<Mutex<Memory>>,
}

fn register(number: u128) -> Ref<Object> {
    Ref::new(Uuid::from_u128(0x7e57 << 64 | number))
}

fn millis(from: i64) -> i64 {
    (kernel::now() - from) / 1_000_000
}

impl Clients {
    /// Clients that have done nothing yet.
    #[must_use]
    pub fn new(all: Surroundings) -> Self {
        Self { all, memory: Arc::default() }
    }

    /// How many commits were acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.memory.lock().acknowledged
    }

    fn client(&self, name: u64, chance: Chance) -> Client {
        Client { line: Line::new(&self.all, name, chance), memory: Arc::clone(&self.memory), made: Vec::new() }
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
        while kernel::now() < self.all.ends {
            tokio::time::sleep(client.line.chance.millis(1, 120)).await;
            if kernel::now() < self.all.seclusion.borrow().quiet_until {
                client.read().await;
                continue;
            }
            match client.line.chance.below(10) {
                0..=3 => client.write().await,
                4..=6 => client.read().await,
                7..=8 => client.make().await,
                _ => client.delete().await,
            }
        }
    }

    /// Whenever a leader is left alone, one client reads from it and another writes to those who may follow it in office,
    /// both without rest: that it has been followed shows in milliseconds, if at all.
    pub async fn watch_the_secluded(self, name: u64, chance: Chance, reads: bool) {
        let mut client = self.client(name, chance);
        let mut seclusion = self.all.seclusion.clone();
        while kernel::now() < self.all.ends {
            if !matches!(tokio::time::timeout(LOOK_AGAIN, seclusion.changed()).await, Ok(Ok(()))) {
                continue;
            }
            let Seclusion { leader, others, from, until, .. } = seclusion.borrow_and_update().clone();
            let sleeps = u64::try_from(from - kernel::now()).unwrap_or(0);
            tokio::time::sleep(Duration::from_nanos(sleeps)).await;
            while kernel::now() < until {
                if reads {
                    client.read_of(leader).await;
                } else if !others.is_empty() {
                    let other = others[client.line.chance.index(others.len())];
                    client.write_to(other).await;
                }
                tokio::time::sleep(client.line.chance.millis(1, 3)).await;
            }
        }
    }

    /// Follows the changes until it is time to end; what it knows must always be what is there.
    pub async fn follow(self, name: u64, chance: Chance) {
        let mut client = self.client(name, chance);
        let mut token = LogIndex(0);
        let mut known: BTreeMap<OpaqueRef, (LogIndex, String)> = BTreeMap::new();
        while kernel::now() < self.all.ends {
            // Now and then it is away for so long that it has missed what is not kept.
            let away = if client.line.chance.one_in(15) { 5_000 } else { 400 };
            tokio::time::sleep(client.line.chance.millis(1, away)).await;
            // A token means the same on every host, so that any of them will do; one that is behind is asked later.
            let ask = if client.line.chance.one_in(3) { Ask::Look } else { Ask::Read };
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
        let end = |number: &str| {
            let number = number.rsplit(' ').next()?.parse().ok()?;
            Some(state.row(register(number))?.name_label().to_owned())
        };
        memory.registers.judge(&self.all.trace, "0", end);
        for (reference, (made, deleted)) in &memory.objects {
            let row = state.row_of(CLASS, *reference);
            match (made, deleted) {
                (Fate::Applied(index), None | Some(Fate::Never)) => match row {
                    Some(row) if row.created == *index => {}
                    Some(row) => {
                        broken!(self.all.trace, "{reference} was made at {index}, and again at {}", row.created)
                    }
                    None => broken!(self.all.trace, "{reference} was made at {index}, and is lost"),
                },
                (_, Some(Fate::Applied(index))) if row.is_some() => {
                    broken!(self.all.trace, "{reference} was deleted at {index}, and is there");
                }
                (Fate::Never, _) if row.is_some() => {
                    broken!(self.all.trace, "{reference} is there, and its maker was told that it never would be");
                }
                _ => {}
            }
        }
    }
}

/// One client.
struct Client {
    line: Line,
    memory: Arc<Mutex<Memory>>,
    made: Vec<OpaqueRef>,
}

impl Client {
    fn uuid(&mut self) -> Uuid {
        Uuid::from_u64_pair(self.line.chance.next(), self.line.chance.next())
    }

    fn transaction(&mut self) -> Transaction {
        Transaction::new(self.uuid(), Timestamp(kernel::WALL + kernel::now() / 1_000_000_000))
    }

    fn value(&mut self) -> String {
        format!("{}.{}", self.line.name, self.line.chance.next() & 0xffff_ffff)
    }

    async fn ask(&mut self, ask: Ask) -> Option<Told> {
        let limit = self.line.chance.millis(500, 12_000);
        let told = self.line.ask(ask, limit).await;
        if let Some(
            Told::State(Err(NotLeader { leader })) | Told::Committed(Err(CommitError::NotLeader(NotLeader { leader }))),
        ) = &told
        {
            self.line.turn(leader.as_ref().map(|leader| leader.node_id));
        }
        told
    }

    /// Commits; where the answer is lost, again, or not, as a client does.
    async fn commit(&mut self, transaction: Transaction, stubborn: bool) -> Fate {
        let mut fate = Fate::Never;
        let patience = self.line.chance.below(8);
        for attempt in 0.. {
            match self.ask(Ask::Commit(transaction.clone())).await {
                Some(Told::Committed(Ok(index))) => {
                    self.memory.lock().acknowledged += 1;
                    return Fate::Applied(index);
                }
                // It expects nothing that could fail, so that this can only be said of a deletion done already.
                Some(Told::Committed(Err(CommitError::Conflict(_)))) => return Fate::Unknown,
                Some(Told::Committed(Err(CommitError::NotLeader(_) | CommitError::Overloaded))) => {}
                Some(_) | None => fate = Fate::Unknown,
            }
            if !stubborn && attempt >= patience || kernel::now() > self.line.all.ends + 20_000_000_000 {
                return fate;
            }
            tokio::time::sleep(self.line.chance.millis(5, 100)).await;
        }
        fate
    }

    fn remember(&self, number: u128, began: i64, known: bool, value: String, write: bool) {
        self.memory.lock().registers.remember(&format!("register {number}"), began, known, value, write);
    }

    async fn write(&mut self) {
        let number = u128::from(self.line.chance.next()) % REGISTERS;
        let value = self.value();
        let mut transaction = self.transaction();
        transaction.set(register(number), network::NAME_LABEL, value.clone());
        let began = kernel::now();
        let fate = self.commit(transaction, false).await;
        tell!(
            self.line.all.trace,
            "client {} wrote {value} to {number} in {} ms: {fate:?}",
            self.line.name,
            millis(began)
        );
        match fate {
            Fate::Applied(_) => self.remember(number, began, true, value, true),
            // A write that never happened and is read all the same is found too: nobody wrote that value.
            Fate::Never => {}
            Fate::Unknown => self.remember(number, began, false, value, true),
        }
    }

    async fn read(&mut self) {
        let began = kernel::now();
        let told = self.ask(Ask::Read).await;
        self.remember_read(began, told);
    }

    async fn read_of(&mut self, node: Place) {
        let began = kernel::now();
        let told = self.line.ask_of(node, Ask::Read, IN_A_HURRY).await;
        self.remember_read(began, told);
    }

    async fn write_to(&mut self, node: Place) {
        let number = u128::from(self.line.chance.next()) % REGISTERS;
        let value = self.value();
        let mut transaction = self.transaction();
        transaction.set(register(number), network::NAME_LABEL, value.clone());
        let began = kernel::now();
        match self.line.ask_of(node, Ask::Commit(transaction), IN_A_HURRY).await {
            Some(Told::Committed(Ok(_))) => self.remember(number, began, true, value, true),
            Some(Told::Committed(Err(CommitError::NotLeader(_) | CommitError::Overloaded))) => {}
            _ => self.remember(number, began, false, value, true),
        }
    }

    fn remember_read(&self, began: i64, told: Option<Told>) {
        let Some(Told::State(Ok(state))) = told else { return };
        for number in 0..REGISTERS {
            let Some(row) = state.row(register(number)) else { continue };
            self.remember(number, began, true, row.name_label().to_owned(), false);
        }
    }

    async fn make(&mut self) {
        let reference: Ref<Object> = Ref::new(self.uuid());
        let mut transaction = self.transaction();
        let uuid = self.uuid();
        transaction.insert(NewRow::new(reference, uuid).with(network::NAME_LABEL, self.value()));
        let fate = self.commit(transaction, false).await;
        tell!(self.line.all.trace, "client {} made {reference}: {fate:?}", self.line.name);
        self.memory.lock().objects.insert(reference.opaque(), (fate, None));
        if matches!(fate, Fate::Applied(_)) {
            self.made.push(reference.opaque());
        }
    }

    async fn delete(&mut self) {
        let Some(reference) = self.made.pop() else { return };
        let mut transaction = self.transaction();
        transaction.delete_row(CLASS, reference);
        let fate = self.commit(transaction, false).await;
        tell!(self.line.all.trace, "client {} deleted {reference}: {fate:?}", self.line.name);
        if let Some(object) = self.memory.lock().objects.get_mut(&reference) {
            object.1 = Some(fate);
        }
    }

    /// Adds what changed since the token to what is known, and compares that with what is there.
    fn replay(&self, state: &State, mut token: LogIndex, known: &mut BTreeMap<OpaqueRef, (LogIndex, String)>) {
        let trace = &self.line.all.trace;
        if token > LogIndex(0) && token < state.oldest_token() {
            // It has missed what nobody can tell it any more, and begins anew.
            tell!(trace, "watcher {} was away since {token}, before {}", self.line.name, state.oldest_token());
            token = LogIndex(0);
            known.clear();
        }
        let mut last = token;
        for change in state.changes_since(token) {
            if change.index < last || change.index <= token || change.index > state.applied {
                broken!(trace, "watcher {}: event {} after {last}, token {token}", self.line.name, change.index);
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
                broken!(
                    trace,
                    "watcher {}: {:?} of {}, known {before:?}",
                    self.line.name,
                    change.kind,
                    change.reference
                );
            }
        }
        let there: BTreeMap<OpaqueRef, (LogIndex, String)> =
            state.rows(CLASS).map(|row| (row.reference, (row.modified, row.name_label().to_owned()))).collect();
        if *known != there {
            let wrong = known.iter().find(|(reference, what)| there.get(reference) != Some(what));
            let missed = there.iter().find(|(reference, _)| !known.contains_key(reference));
            broken!(trace, "watcher {} at {}: believes {wrong:?}, missed {missed:?}", self.line.name, state.applied);
            *known = there;
        }
    }
}
