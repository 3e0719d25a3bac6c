//! The journal row of an operation, as its steps and their consequences are told from it.
//!
//! What an operation is about is in the row's own fields; everything else in its parameters, under names that no
//! kind of operation uses for itself:
//!
//! | parameter | says |
//! | --- | --- |
//! | `held` | the objects that carry the operation in `current_operations` |
//! | `did/N` | what step N came to; steps that have none were not done, or nobody knows |
//! | `undo/N` | how step N is undone, written before it is done; what is still owed of it, once the operation is over |
//! | `failed` | the error for which the steps are being undone |
//! | `task`, `answer` | what ends with it |

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use datamodel::fields::operation;
use datamodel::{
    ApiError, ClassId, ClassKind, Host, Input, OpaqueRef, Operation, Ref, Task, Value, Vm, convert, encode,
};
use proto::Message as _;
use raft_store::{LogIndex, NewRow, Row, Transaction};
use uuid::Uuid;

use super::step::{Planned, Undo};
use crate::agent::Performed;
use crate::failure::described;
use crate::repeats::ANSWER;

const HELD: &str = "held";
const DID: &str = "did/";
const UNDO: &str = "undo/";
const FAILED: &str = "failed";
const TASK: &str = "task";

/// An operation as its journal tells it.
#[derive(Debug, Clone)]
pub(crate) struct Journal {
    pub(crate) reference: Ref<Operation>,
    pub(crate) uuid: String,
    pub(crate) verb: String,
    /// The VM that it is about, if it is about one.
    pub(crate) vm: Ref<Vm>,
    /// The host that does it, if it is one for all steps.
    pub(crate) host: Ref<Host>,
    pub(crate) task: Ref<Task>,
    /// The entry that decided it.
    pub(crate) decided: LogIndex,
    pub(super) parameters: BTreeMap<String, String>,
    /// What the steps that are done came to, in order.
    pub(crate) outcomes: Vec<Performed>,
    /// How they are undone, by their numbers.
    pub(super) undo: BTreeMap<u32, Undo>,
    /// What it goes on without, and is done later.
    pub(super) debts: BTreeMap<u32, Undo>,
    pub(super) failure: Option<ApiError>,
    /// It was read from its row: whoever had it in hand before may have begun the step that comes next.
    pub(super) adopted: bool,
}

impl Journal {
    /// From its row.
    pub(super) fn read(row: &Row) -> Self {
        let parameters = row.get(operation::PARAMETERS);
        let numbered = |prefix: &str| -> BTreeMap<u32, Vec<u8>> {
            let entries = parameters
                .iter()
                .filter_map(|(key, text)| Some((key.strip_prefix(prefix)?.parse().ok()?, BASE64.decode(text).ok()?)));
            entries.collect()
        };
        let did = numbered(DID);
        let outcome = |bytes: &Vec<u8>| {
            let outcome = proto::agent::Outcome::decode(bytes.as_slice()).ok()?;
            Performed::try_from(outcome).ok()
        };
        Self {
            reference: row.typed(),
            uuid: row.uuid().to_owned(),
            verb: row.get(operation::VERB),
            vm: row.get(operation::VM),
            host: row.get(operation::HOST),
            task: row.get(operation::TASK),
            decided: row.created,
            outcomes: (0..).map_while(|number| did.get(&number).and_then(outcome)).collect(),
            undo: numbered(UNDO)
                .into_iter()
                .filter_map(|(number, bytes)| Some((number, Undo::decode(&bytes)?)))
                .collect(),
            debts: BTreeMap::new(),
            adopted: true,
            failure: parameters.get(FAILED).map(|text| described(serde_json::from_str(text).unwrap_or_default())),
            parameters,
        }
    }

    /// A parameter that its kind gave it; empty where it gave none.
    pub(crate) fn parameter(&self, name: &str) -> &str {
        self.parameters.get(name).map_or("", String::as_str)
    }

    /// A parameter that names an object.
    pub(crate) fn object<C>(&self, name: &str) -> Ref<C> {
        Ref::from_opaque(self.parameter(name).parse().unwrap_or(OpaqueRef::NULL))
    }

    /// A parameter that is a number; zero where there is none.
    pub(crate) fn number(&self, name: &str) -> i64 {
        self.parameter(name).parse().unwrap_or(0)
    }

    /// What is to become the fields of an object that it makes, as they were noted.
    pub(crate) fn fields(&self, class: ClassId) -> Vec<(u16, Value)> {
        let noted: BTreeMap<String, serde_json::Value> =
            serde_json::from_str(self.parameter(&fields_of(class))).unwrap_or_default();
        let field = |(name, json): (String, serde_json::Value)| {
            let index = class.def().field(&name)?;
            let ty = &class.def().field_def(index)?.ty;
            Some((index, convert(ty, Input::from(json), &name).ok()?))
        };
        noted.into_iter().filter_map(field).collect()
    }

    /// The next step's number.
    pub(super) fn position(&self) -> u32 {
        u32::try_from(self.outcomes.len()).unwrap_or(u32::MAX)
    }

    /// The objects that carry it in `current_operations`.
    pub(super) fn held(&self) -> Vec<(ClassId, OpaqueRef)> {
        let Some(held) = self.parameters.get(HELD) else {
            // Written before operations could be about anything else.
            return if self.vm.is_null() { Vec::new() } else { vec![(Vm::ID, self.vm.opaque())] };
        };
        let object = |text: &str| {
            let (class, reference) = text.split_once('/')?;
            Some((ClassId::named(class)?, reference.parse().ok()?))
        };
        held.split_whitespace().filter_map(object).collect()
    }

    /// The answer that it closes, if its call may be repeated.
    pub(super) fn answer(&self) -> Option<OpaqueRef> {
        self.parameters.get(ANSWER).and_then(|text| text.parse().ok())
    }

    /// Whether it made its task itself, and so ends it.
    pub(super) fn owns_task(&self) -> bool {
        self.parameters.contains_key(TASK)
    }

    /// Only what could not be undone, or done, is left of it: nobody waits for that, and nothing is held.
    pub(super) fn only_owes(&self) -> bool {
        self.failure.is_some() && self.parameters.get(HELD).is_some_and(String::is_empty) && self.task.is_null()
    }

    /// The last step's outcome, and that `next` comes now.
    pub(super) fn advance(&self, change: &mut Transaction, next: &Planned) {
        let last = self.position().saturating_sub(1);
        if let Some(outcome) = self.outcomes.last() {
            let bytes = proto::agent::Outcome::from(outcome.clone()).encode_to_vec();
            change.put(self.reference, operation::PARAMETERS, format!("{DID}{last}"), BASE64.encode(bytes));
        }
        if let Some(undo) = &next.undo {
            let key = format!("{UNDO}{}", self.position());
            change.put(self.reference, operation::PARAMETERS, key, BASE64.encode(undo.encode()));
        }
        change.set(self.reference, operation::STEP, self.position().to_string());
    }

    /// From now on it is undone.
    pub(super) fn turn(&self, change: &mut Transaction, error: &ApiError) {
        let text = serde_json::to_string(&error.description()).unwrap_or_default();
        change.put(self.reference, operation::PARAMETERS, FAILED.to_owned(), text);
    }

    /// A step was not done: there is nothing to undo of it.
    pub(super) fn forget_undo(&self, change: &mut Transaction, number: u32) {
        change.take(self.reference, operation::PARAMETERS, format!("{UNDO}{number}"));
    }

    /// It has ended, but for what could not be undone, or done, yet.
    pub(super) fn owe(&self, change: &mut Transaction, debts: &BTreeMap<u32, Undo>) {
        let mut left = BTreeMap::new();
        let text = self.failure.as_ref().and_then(|error| serde_json::to_string(&error.description()).ok());
        left.insert(FAILED.to_owned(), text.unwrap_or_default());
        left.insert(HELD.to_owned(), String::new());
        for (number, undo) in debts {
            left.insert(format!("{UNDO}{number}"), BASE64.encode(undo.encode()));
        }
        change.set(self.reference, operation::PARAMETERS, left).set(self.reference, operation::TASK, Ref::NULL).set(
            self.reference,
            operation::VM,
            Ref::NULL,
        );
    }
}

fn fields_of(class: ClassId) -> String {
    format!("{} fields", class.def().name)
}

/// A journal row that is being written.
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) vm: Ref<Vm>,
    pub(super) host: Ref<Host>,
    pub(super) parameters: BTreeMap<String, String>,
    pub(super) held: Vec<(ClassId, OpaqueRef)>,
}

impl Entry {
    /// Ends a task with the operation that the operation made itself.
    pub(super) fn own_task(&mut self) {
        self.parameters.insert(TASK.to_owned(), "own".to_owned());
    }

    pub(super) fn closes(&mut self, answer: OpaqueRef) {
        self.parameters.insert(ANSWER.to_owned(), answer.to_string());
    }

    /// Notes the fields of an object that it makes.
    pub(super) fn note_fields(&mut self, class: ClassId, fields: &[(u16, Value)]) {
        let field = |(index, value): &(u16, Value)| {
            let mut json = Vec::new();
            encode::json(value, &mut json);
            Some((class.def().field_def(*index)?.name, serde_json::from_slice(&json).ok()?))
        };
        let noted: BTreeMap<&str, serde_json::Value> = fields.iter().filter_map(field).collect();
        self.parameters.insert(fields_of(class), serde_json::to_string(&noted).unwrap_or_default());
    }

    /// As it will be read, for the plan of its first step.
    pub(super) fn foresee(&self, reference: Ref<Operation>, uuid: Uuid, verb: &str, task: Ref<Task>) -> Journal {
        Journal {
            reference,
            uuid: uuid.hyphenated().to_string(),
            verb: verb.to_owned(),
            vm: self.vm,
            host: self.host,
            task,
            decided: LogIndex(0),
            parameters: self.parameters.clone(),
            outcomes: Vec::new(),
            undo: BTreeMap::new(),
            debts: BTreeMap::new(),
            failure: None,
            adopted: false,
        }
    }

    /// The row, with how the first step is undone.
    pub(super) fn into_row(self, foreseen: &Journal, uuid: Uuid, first: Option<&Planned>) -> NewRow<Operation> {
        let mut parameters = self.parameters;
        let held: Vec<String> =
            self.held.iter().map(|(class, reference)| format!("{}/{reference}", class.def().name)).collect();
        parameters.insert(HELD.to_owned(), held.join(" "));
        if let Some(undo) = first.and_then(|step| step.undo.as_ref()) {
            parameters.insert(format!("{UNDO}0"), BASE64.encode(undo.encode()));
        }
        NewRow::new(foreseen.reference, uuid)
            .with(operation::VERB, foreseen.verb.clone())
            .with(operation::VM, self.vm)
            .with(operation::HOST, self.host)
            .with(operation::TASK, foreseen.task)
            .with(operation::STEP, "0".to_owned())
            .with(operation::PARAMETERS, parameters)
    }
}
