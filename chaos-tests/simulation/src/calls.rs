//! Clients of the API: they call whatever host they know, repeat what was lost, follow the events, and remember what they
//! were told.

use std::collections::BTreeMap;
use std::sync::Arc;

use controller::{Caller, Event, EventBatch, Refusal, Reply, Request, Transport};
use datamodel::enums::{TaskStatusType, VmPowerState};
use datamodel::fields::{answer, task, vm};
use datamodel::{Answer, ApiError, ClassKind, Input, OpaqueRef, Operation as Journal, Task, Value, Vm, errors};
use parking_lot::Mutex;
use proto::agent::PowerState;
use raft_store::State;

use crate::agents::{self, Hosts};
use crate::chance::Chance;
use crate::kernel;
use crate::line::{Line, Surroundings};
use crate::node::{Ask, Told};
use crate::registers::Registers;
use crate::{broken, tell};

/// VMs that everybody describes.
const SHARED: usize = 2;

/// What a call came to.
#[derive(Debug, Clone)]
enum Outcome {
    Done(Reply),
    Refused(ApiError),
    /// Its caller does not know.
    Unknown,
}

/// What was said of a VM that was to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Made {
    Yes,
    No,
    Perhaps,
    /// It was made, and then destroyed, or perhaps destroyed.
    Gone,
}

/// The last change of each object, as a watcher was told of it.
type Known = BTreeMap<(&'static str, OpaqueRef), u64>;

#[derive(Default)]
struct Memory {
    root: String,
    shared: Vec<String>,
    descriptions: Registers,
    made: BTreeMap<String, Made>,
    /// Where each watcher is, and what it believes: the last change of each object.
    watchers: BTreeMap<u64, (u64, Known)>,
    answered: u64,
}

/// The clients of a run.
#[derive(Clone)]
pub struct Callers {
    all: Surroundings,
    memory: Arc<Mutex<Memory>>,
}

fn text(text: impl Into<String>) -> Input {
    Input::Str(text.into())
}

impl Callers {
    /// Clients that have called nobody yet.
    #[must_use]
    pub fn new(all: Surroundings) -> Self {
        Self { all, memory: Arc::default() }
    }

    /// How many calls were answered with a result.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.memory.lock().answered
    }

    fn caller(&self, name: u64, chance: Chance) -> One {
        let session = self.memory.lock().root.clone();
        let line = Line::new(&self.all, name, chance);
        One { line, memory: Arc::clone(&self.memory), session, vms: Vec::new() }
    }

    /// Logs in, for all of them, and makes the VMs that everybody describes.
    pub async fn begin(self, chance: Chance) {
        let mut one = self.caller(0, chance);
        let login = loop {
            if let Outcome::Done(Reply::Value(Value::Ref(session))) =
                one.call("session.login_with_password", vec![text("root"), text("")], None).await
            {
                break session.to_string();
            }
        };
        one.session = login.clone();
        self.memory.lock().root = login;
        while self.memory.lock().shared.len() < SHARED {
            if let Some(reference) = one.clone_template().await {
                self.memory.lock().shared.push(reference);
            }
        }
    }

    /// Makes, starts, stops, describes and destroys VMs until it is time to end.
    pub async fn work(self, name: u64, chance: Chance) {
        let mut one = self.caller(name, chance);
        while kernel::now() < self.all.ends {
            tokio::time::sleep(one.line.chance.millis(1, 250)).await;
            match one.line.chance.below(12) {
                0..=1 => one.make().await,
                2..=5 => one.operate().await,
                6..=8 => one.describe().await,
                9..=10 => one.read().await,
                _ => one.destroy().await,
            }
        }
    }

    /// Sits by the machines until it is time to end, and says of each that is off for long that it is dead.
    pub async fn oversee(self, name: u64, chance: Chance, hosts: Hosts) {
        let mut one = self.caller(name, chance);
        while kernel::now() < self.all.ends {
            tokio::time::sleep(one.line.chance.millis(300, 1_200)).await;
            let Some(node) = hosts.off() else { continue };
            let uuid = text(agents::host_uuid(node).to_string());
            let Outcome::Done(Reply::Value(Value::Ref(host))) = one.ask("host.get_by_uuid", vec![uuid], None).await
            else {
                continue;
            };
            // Vouched for by who looked: it is off, or was a moment ago.
            let key = one.key();
            let said = match one.ask("host.declare_dead", vec![text(host.to_string())], key).await {
                Outcome::Done(_) => "done",
                Outcome::Refused(error) => error.code,
                Outcome::Unknown => "unknown",
            };
            tell!(self.all.trace, "host {node} is declared dead: {said}");
        }
    }

    /// Follows all events until it is time to end.
    pub async fn follow(self, name: u64, chance: Chance) {
        let mut one = self.caller(name, chance);
        let mut token = String::new();
        let mut known = Known::new();
        while kernel::now() < self.all.ends {
            let wait = f64::from(u32::try_from(one.line.chance.below(4_000)).unwrap_or(0)) / 1_000.0;
            let arguments = vec![Input::Array(vec![text("*")]), text(token.clone()), Input::Float(wait)];
            match one.ask("event.from", arguments, None).await {
                Outcome::Done(Reply::Events(batch)) => {
                    one.hear(&batch, &token, &mut known);
                    token = batch.token;
                    self.memory.lock().watchers.insert(name, (number(&token), known.clone()));
                }
                Outcome::Refused(error) if error.code == errors::EVENTS_LOST => {
                    // Only who was away for longer than deletions are remembered; it reads everything anew.
                    let newest = self.all.doors.newest().0;
                    tell!(self.all.trace, "watcher {name} was away since {}: {newest}", number(&token));
                    if number(&token) + self.all.history > newest {
                        broken!(self.all.trace, "watcher {name} is told too early that it lost events");
                    }
                    token.clear();
                    known.clear();
                }
                _ => {}
            }
            let away = if one.line.chance.one_in(15) { 5_000 } else { 500 };
            tokio::time::sleep(one.line.chance.millis(1, away)).await;
        }
    }

    /// What is still under way in a state; nothing once a pool has come to rest.
    #[must_use]
    pub fn under_way(state: &State) -> Vec<String> {
        let pending = |row: &&Arc<raft_store::Row>| row.get(task::STATUS) == TaskStatusType::Pending;
        let tasks =
            state.all::<Task>().filter(pending).map(|row| format!("task {} ({})", row.uuid(), row.name_label()));
        let journal = state.all::<Journal>().map(|row| format!("operation {}", row.uuid()));
        let busy = |row: &&Arc<raft_store::Row>| !row.get(vm::CURRENT_OPERATIONS).is_empty();
        let vms = state.all::<Vm>().filter(busy).map(|row| format!("VM {}", row.name_label()));
        let open = |row: &&Arc<raft_store::Row>| row.get(answer::STATE) == "open";
        let answers = state.all::<Answer>().filter(open).map(|row| format!("answer {}", row.reference));
        tasks.chain(journal).chain(vms).chain(answers).collect()
    }

    /// Where rows and domains differ.
    #[must_use]
    pub fn unlike(state: &State, hosts: &Hosts) -> Vec<String> {
        let domains = hosts.domains();
        let mut out = Vec::new();
        for row in state.all::<Vm>().filter(|row| !row.get(vm::IS_CONTROL_DOMAIN) && !row.get(vm::IS_A_TEMPLATE)) {
            let shown = row.get(vm::POWER_STATE);
            let is = match domains.get(row.uuid()).map(|(_, state)| *state) {
                Some(PowerState::Running) => VmPowerState::Running,
                Some(PowerState::Paused) => VmPowerState::Paused,
                _ => VmPowerState::Halted,
            };
            if shown != is {
                out.push(format!("VM {} is {is:?} and shown {shown:?}", row.name_label()));
            }
        }
        let ours = |uuid: &str| state.by_uuid(Vm::ID, uuid).is_some();
        out.extend(domains.keys().filter(|uuid| !ours(uuid)).map(|uuid| format!("domain {uuid} belongs to no VM")));
        out
    }

    /// What must hold when all is over.
    pub fn judge(&self, state: &State) {
        let memory = self.memory.lock();
        let end = |reference: &str| {
            let row = state.row_of(Vm::ID, reference.parse().ok()?)?;
            Some(row.get(vm::NAME_DESCRIPTION))
        };
        memory.descriptions.judge(&self.all.trace, INITIAL, end);
        for (name, made) in &memory.made {
            let there = state.by_name_label(Vm::ID, name).len();
            let right = match made {
                Made::Yes => there == 1,
                Made::No => there == 0,
                Made::Perhaps | Made::Gone => there <= 1,
            };
            if !right {
                broken!(self.all.trace, "{there} VMs are named {name}, which was made: {made:?}");
            }
        }
        for (watcher, (token, known)) in &memory.watchers {
            for class in datamodel::model().classes().iter().filter(|class| class.stored && class.emits_events) {
                for row in state.rows(class.id).filter(|row| row.modified.0 <= *token) {
                    let believed = known.get(&(class.event_name, row.reference));
                    if believed != Some(&row.modified.0) {
                        let what = format!("{} {}", class.name, row.reference);
                        broken!(
                            self.all.trace,
                            "watcher {watcher} at {token} believes {believed:?} of {what}: {}",
                            row.modified
                        );
                    }
                }
            }
        }
    }
}

/// What the template's clones are described as.
const INITIAL: &str = "described by nobody yet";

fn number(token: &str) -> u64 {
    token.split(',').next().and_then(|index| index.parse().ok()).unwrap_or(0)
}

/// One client.
struct One {
    line: Line,
    memory: Arc<Mutex<Memory>>,
    session: String,
    /// Its own VMs, by reference and name.
    vms: Vec<(String, String)>,
}

impl One {
    /// A key for a call, or none: not every client sends one.
    fn key(&mut self) -> Option<String> {
        let key = self.line.unique("key");
        (!self.line.chance.one_in(3)).then_some(key)
    }

    async fn ask(&mut self, method: &str, mut params: Vec<Input>, key: Option<String>) -> Outcome {
        params.insert(0, text(self.session.clone()));
        self.call(method, params, key).await
    }

    /// Calls until there is an answer. A lost answer is asked for again where that is safe: a read, or a call with a key.
    async fn call(&mut self, method: &str, params: Vec<Input>, key: Option<String>) -> Outcome {
        let harmless = method.contains(".get_") || method == "event.from" || key.is_some();
        let began = kernel::now();
        loop {
            let caller = Caller {
                transport: Transport::Unix,
                peer: None,
                user_agent: "simulation".into(),
                originator: String::new(),
                forwarded: false,
                idempotency_key: key.clone(),
            };
            let request = Request { caller, method: method.to_owned(), params: params.clone() };
            let limit = self.line.chance.millis(4_000, 15_000);
            match self.line.ask(Ask::Call(request), limit).await {
                Some(Told::Reply(Ok(reply))) => {
                    self.memory.lock().answered += 1;
                    return Outcome::Done(reply);
                }
                Some(Told::Reply(Err(Refusal::Forward(member)))) => self.line.turn(Some(member.node_id)),
                Some(Told::Reply(Err(Refusal::Retry))) => {}
                Some(Told::Reply(Err(Refusal::Api(error)))) => {
                    if error.code == errors::SESSION_INVALID {
                        broken!(self.line.all.trace, "client {}: {method}: its session is gone", self.line.name);
                        return Outcome::Refused(error);
                    }
                    if error.code != errors::HOST_IN_EMERGENCY_MODE {
                        let unsure = error.code == errors::INTERNAL_ERROR && key.is_none();
                        return if unsure { Outcome::Unknown } else { Outcome::Refused(error) };
                    }
                    self.line.turn(None);
                }
                Some(_) | None => {
                    if !harmless {
                        return Outcome::Unknown;
                    }
                }
            }
            if kernel::now() > self.line.all.ends.max(began) + 30_000_000_000 {
                return Outcome::Unknown;
            }
            tokio::time::sleep(self.line.chance.millis(5, 60)).await;
        }
    }

    async fn template(&mut self) -> Option<String> {
        let found = self.ask("VM.get_by_name_label", vec![text("Other install media")], None).await;
        match found {
            Outcome::Done(Reply::Value(Value::Set(references))) => match references.first() {
                Some(Value::Ref(reference)) => Some(reference.to_string()),
                _ => None,
            },
            _ => None,
        }
    }

    /// A clone of the template under a name of its own; its reference, where the client is told one.
    async fn clone_template(&mut self) -> Option<String> {
        let template = self.template().await?;
        let name = self.line.unique("vm");
        let key = self.key();
        let keyed = key.is_some();
        let outcome = self.ask("VM.clone", vec![text(template), text(name.clone())], key).await;
        let made = match &outcome {
            Outcome::Done(_) => Made::Yes,
            Outcome::Refused(_) => Made::No,
            Outcome::Unknown => Made::Perhaps,
        };
        tell!(self.line.all.trace, "client {}: {name}, key {keyed}: {made:?}", self.line.name);
        self.memory.lock().made.insert(name.clone(), made);
        let Outcome::Done(Reply::Value(Value::Ref(reference))) = outcome else { return None };
        let reference = reference.to_string();
        self.vms.push((reference.clone(), name));
        let (one, other) = (self.line.unique("key"), self.line.unique("key"));
        let words = vec![text(&reference), text(INITIAL)];
        let described = self.ask("VM.set_name_description", words, Some(one)).await;
        let provisioned = self.ask("VM.provision", vec![text(&reference)], Some(other)).await;
        let whole = matches!((described, provisioned), (Outcome::Done(_), Outcome::Done(_)));
        whole.then_some(reference)
    }

    async fn make(&mut self) {
        if self.vms.len() < 6 {
            self.clone_template().await;
        }
    }

    async fn operate(&mut self) {
        if self.vms.is_empty() {
            return;
        }
        let (reference, name) = self.vms[self.line.chance.index(self.vms.len())].clone();
        let flag = |truth| Input::Bool(truth);
        let (method, more) = match self.line.chance.below(6) {
            0..=2 => ("VM.start", vec![flag(self.line.chance.one_in(4)), flag(false)]),
            3 => ("VM.hard_shutdown", vec![]),
            4 => ("VM.pause", vec![]),
            _ => ("VM.unpause", vec![]),
        };
        let mut params = vec![text(reference)];
        params.extend(more);
        let method = if self.line.chance.one_in(3) { format!("Async.{method}") } else { method.to_owned() };
        let key = self.key();
        let outcome = self.ask(&method, params, key).await;
        let said = match &outcome {
            Outcome::Done(_) => "done",
            Outcome::Refused(error) => error.code,
            Outcome::Unknown => "unknown",
        };
        tell!(self.line.all.trace, "client {}: {method} of {name}: {said}", self.line.name);
    }

    async fn destroy(&mut self) {
        if self.vms.len() < 2 {
            return;
        }
        let (reference, name) = self.vms.remove(0);
        self.memory.lock().made.insert(name.clone(), Made::Gone);
        let key = self.key();
        let outcome = self.ask("VM.destroy", vec![text(reference.clone())], key).await;
        match outcome {
            Outcome::Done(_) => drop(self.memory.lock().made.insert(name.clone(), Made::No)),
            Outcome::Refused(_) => self.vms.push((reference, name.clone())),
            Outcome::Unknown => {}
        }
        tell!(
            self.line.all.trace,
            "client {}: destroyed {name}: {}",
            self.line.name,
            matches!(outcome, Outcome::Done(_))
        );
    }

    fn shared(&mut self) -> Option<String> {
        let shared = self.memory.lock().shared.clone();
        (!shared.is_empty()).then(|| shared[self.line.chance.index(shared.len())].clone())
    }

    fn remember(&self, reference: &str, began: i64, known: bool, value: String, write: bool) {
        self.memory.lock().descriptions.remember(reference, began, known, value, write);
    }

    async fn describe(&mut self) {
        let Some(reference) = self.shared() else { return };
        let value = self.line.unique("words");
        let key = self.key();
        let began = kernel::now();
        let outcome = self.ask("VM.set_name_description", vec![text(&reference), text(&value)], key).await;
        match outcome {
            Outcome::Done(_) => self.remember(&reference, began, true, value, true),
            Outcome::Unknown => self.remember(&reference, began, false, value, true),
            // It was not written; who reads it all the same reads what nobody wrote.
            Outcome::Refused(_) => {}
        }
    }

    async fn read(&mut self) {
        let Some(reference) = self.shared() else { return };
        let began = kernel::now();
        let outcome = self.ask("VM.get_name_description", vec![text(&reference)], None).await;
        if let Outcome::Done(Reply::Value(value)) = outcome
            && let Some(words) = value.as_str()
        {
            self.remember(&reference, began, true, words.to_owned(), false);
        }
    }

    /// Adds a batch of events to what is known: nothing twice, nothing out of order, nothing left out.
    fn hear(&self, batch: &EventBatch, token: &str, known: &mut Known) {
        let trace = &self.line.all.trace;
        let (after, upto) = (number(token), number(&batch.token));
        let mut last = after;
        for Event { id, class, operation, reference, snapshot } in &batch.events {
            if *id < last || *id <= after || *id > upto {
                broken!(trace, "watcher {}: event {id} after {last}, of {after} to {upto}", self.line.name);
            }
            last = *id;
            let before = match (*operation, snapshot) {
                ("del", _) => known.remove(&(*class, *reference)),
                (_, Some(row)) => known.insert((*class, *reference), row.modified.0),
                (_, None) => None,
            };
            if (*operation == "add") != before.is_none() {
                broken!(trace, "watcher {}: {operation} of {class} {reference}, known {before:?}", self.line.name);
            }
        }
        for (class, count) in &batch.valid_ref_counts {
            let emits = datamodel::ClassId::from_event_name(class).is_some_and(|class| class.def().emits_events);
            let believed = known.keys().filter(|(known, _)| known == class).count();
            if emits && believed != *count {
                broken!(trace, "watcher {} at {upto}: {believed} of {count} {class}", self.line.name);
            }
        }
    }
}
