//! Versions of what is replicated: what this program reads, and what the pool writes.
//!
//! Every entry carries the format that it is written in. The pool as a whole is at one *level*: the newest format that
//! any applied entry had. A leader writes at the level, so that whoever could read the pool yesterday can read it
//! today. It raises the level by an empty entry of a newer format, once every member, voter or learner, has told it
//! that it reads that one; nothing lowers it. A member is asked what it reads before anything is sent to it, and gets
//! nothing that it does not read.
//!
//! What a format brought is said where it is: `format = N` at a field or class of the model, `word_formats` at the words
//! of an enum, and [`needed`] here. Below that level a field keeps its default (writes of it are left out), and what
//! cannot be left out, such as a word in a field that was there before, is refused. A name that a member does not know therefore never reaches it; if one does all the same, it is refused and never
//! guessed at.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use datamodel::{ClassId, Key, Type, Value};
use openraft::EntryPayload;
use openraft::async_runtime::WatchReceiver as _;
use tokio::sync::watch;

use crate::codec::{DecodeError, batch_format, encode_batch};
use crate::machine::Machine;
use crate::proposer::Answers;
use crate::replace::StagedRow;
use crate::store::leads;
use crate::transaction::{Expectation, Transaction, Write};
use crate::types::{Batch, Entry, Raft};

/// The first release's.
pub(crate) const OLDEST: u32 = 1;
/// The newest that this version reads, and that it writes once every member reads it.
///
/// 2: transactions in parts (the class `staged`, the write `replace`, the expectation `class_unchanged`).
/// 3: certificates that the pool was given (the class `trusted`).
pub(crate) const NEWEST: u32 = 3;

/// The formats of replicated data that this version can be limited to: [`StoreConfig::reads`](crate::StoreConfig::reads).
pub const FORMATS: RangeInclusive<u32> = OLDEST..=NEWEST;

/// The leader looks whether the level can be raised when it takes office, when a member says what it reads, and so often.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const RAISE_LIMIT: Duration = Duration::from_secs(5);
/// A transaction waits so long for a format that no member is known to stand against: a new pool, and a new leader, have
/// not heard from all members yet.
const REACH_LIMIT: Duration = Duration::from_secs(2);

/// A format, if it can be read.
pub(crate) fn readable(format: u32, reads: u32) -> Result<u32, DecodeError> {
    // Nothing of the first release had another one.
    let format = format.max(OLDEST);
    if format > reads { Err(DecodeError::NewerFormat { found: format, reads }) } else { Ok(format) }
}

/// Refuses what a member that reads up to `reads` cannot read, the payload's format first, then every name in it.
pub(crate) fn admit(entry: &Entry, reads: u32) -> Result<(), DecodeError> {
    let EntryPayload::Normal(batch) = &entry.payload else { return Ok(()) };
    readable(batch.format, reads)?;
    batch.transactions.iter().try_for_each(|transaction| readable(needed(transaction), reads).map(drop))
}

/// The same of a payload that has not been decoded.
pub(crate) fn admit_bytes(encoded: Bytes, reads: u32) -> Result<(), DecodeError> {
    batch_format(encoded, reads).map(drop)
}

/// A transaction needs a newer format than the pool is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooNew(pub(crate) u32);

/// What the names and words in a transaction need.
pub(crate) fn needed(transaction: &Transaction) -> u32 {
    let writes = transaction.writes.iter().map(|write| match write {
        Write::Insert(class, _, fields) => {
            let fields =
                fields.iter().map(|(index, value)| field_format(*class, *index).max(words(*class, *index, value)));
            fields.max().unwrap_or(OLDEST).max(class_format(*class))
        }
        Write::Set(class, _, field, value) => named(*class, *field).max(words(*class, *field, value)),
        Write::AddToSet(class, _, field, value) | Write::RemoveFromSet(class, _, field, value) => {
            named(*class, *field).max(member_words(*class, *field, value))
        }
        Write::InsertInMap(class, _, field, key, value) => {
            named(*class, *field).max(entry_words(*class, *field, key, Some(value)))
        }
        Write::RemoveFromMap(class, _, field, key) => named(*class, *field).max(entry_words(*class, *field, key, None)),
        Write::Touch(class, _) | Write::Delete(class, _) => class_format(*class),
        Write::Replace(_) => 2,
    });
    let expectations = transaction.expectations.iter().map(|expectation| match expectation {
        Expectation::Value(class, _, field, value) => named(*class, *field).max(words(*class, *field, value)),
        Expectation::KeyAbsent(class, _, field, key) => {
            named(*class, *field).max(entry_words(*class, *field, key, None))
        }
        Expectation::Exists(class, _)
        | Expectation::Absent(class, _)
        | Expectation::Unmodified(class, ..)
        | Expectation::ClassEmpty(class) => class_format(*class),
        Expectation::ClassUnchanged(..) => 2,
    });
    writes.chain(expectations).max().unwrap_or(OLDEST)
}

fn class_format(class: ClassId) -> u32 {
    class.def().format
}

fn field_format(class: ClassId, field: u16) -> u32 {
    class.def().field_def(field).map_or(OLDEST, |def| def.format)
}

/// What a field's name and its class's need.
fn named(class: ClassId, field: u16) -> u32 {
    class_format(class).max(field_format(class, field))
}

/// The type of a field that has words which came later; most have none, and their values are not looked at.
fn type_with_newer_words(class: ClassId, field: u16) -> Option<&'static Type> {
    class.def().field_def(field).filter(|def| def.newest_word > OLDEST).map(|def| &def.ty)
}

/// What the words of a field's value need.
fn words(class: ClassId, field: u16, value: &Value) -> u32 {
    type_with_newer_words(class, field).map_or(OLDEST, |ty| ty.format(value))
}

/// The same of a member of its set.
fn member_words(class: ClassId, field: u16, member: &Value) -> u32 {
    match type_with_newer_words(class, field) {
        Some(Type::Set(element)) => element.format(member),
        _ => OLDEST,
    }
}

/// The same of an entry of its map.
fn entry_words(class: ClassId, field: u16, key: &Key, value: Option<&Value>) -> u32 {
    match type_with_newer_words(class, field) {
        Some(Type::Map(keys, values)) => {
            keys.format(&key.to_value()).max(value.map_or(OLDEST, |value| values.format(value)))
        }
        _ => OLDEST,
    }
}

/// Makes rows to be staged fit a level: fields that are newer are left out, and a newer word is refused.
pub(crate) fn fit_row(row: &StagedRow, level: u32) -> Result<StagedRow, TooNew> {
    let fields: Vec<_> =
        row.fields.iter().filter(|(field, _)| field_format(row.class, *field) <= level).cloned().collect();
    let words = fields.iter().map(|(field, value)| words(row.class, *field, value)).max().unwrap_or(OLDEST);
    let needs = class_format(row.class).max(words);
    if needs > level {
        Err(TooNew(needs))
    } else {
        Ok(StagedRow { class: row.class, reference: row.reference, fields })
    }
}

/// Makes a transaction fit a level: writes of fields that are newer are left out, and so are expectations that such
/// fields meet by their defaults.
pub(crate) fn fit(transaction: &mut Transaction, level: u32) -> Result<(), TooNew> {
    if needed(transaction) <= level {
        return Ok(());
    }
    let old = |class: &ClassId, field: &u16| field_format(*class, *field) <= level;
    transaction.writes.retain_mut(|write| match write {
        Write::Insert(class, _, fields) => {
            fields.retain(|(field, _)| old(class, field));
            true
        }
        Write::Set(class, _, field, _)
        | Write::AddToSet(class, _, field, _)
        | Write::RemoveFromSet(class, _, field, _)
        | Write::InsertInMap(class, _, field, ..)
        | Write::RemoveFromMap(class, _, field, _) => class_format(*class) > level || old(class, field),
        Write::Touch(..) | Write::Delete(..) | Write::Replace(_) => true,
    });
    transaction.expectations.retain(|expectation| match expectation {
        Expectation::Value(class, _, field, value) => {
            old(class, field) || class.def().field_def(*field).is_none_or(|def| def.default != *value)
        }
        Expectation::KeyAbsent(class, _, field, _) => old(class, field),
        _ => true,
    });
    let needs = needed(transaction);
    if needs > level { Err(TooNew(needs)) } else { Ok(()) }
}

/// What this member reads, and what the others have said that they read.
#[derive(Clone)]
pub(crate) struct Formats {
    /// The newest that this member reads.
    pub(crate) reads: u32,
    machine: Arc<Machine>,
    others: watch::Sender<BTreeMap<u64, u32>>,
}

impl Formats {
    pub(crate) fn new(reads: u32, machine: Arc<Machine>) -> Self {
        Self { reads: reads.clamp(OLDEST, NEWEST), machine, others: watch::Sender::default() }
    }

    /// What the pool writes.
    pub(crate) fn level(&self) -> u32 {
        self.machine.state.load().format
    }

    /// Whether a member is known to read what the pool writes.
    pub(crate) fn suits(&self, node: u64) -> bool {
        self.others.borrow().get(&node).is_some_and(|reads| *reads >= self.level())
    }

    /// A member has said what it reads. Whether it reads what the pool writes.
    pub(crate) fn heard(&self, node: u64, reads: u32) -> bool {
        let level = self.level();
        let news = self.others.send_if_modified(|others| others.insert(node, reads) != Some(reads));
        if reads < level && news {
            tracing::error!(node, reads, level, "a member of an older version gets nothing: upgrade it");
        }
        reads >= level
    }

    /// The newest format that the members all read; none while one has not said.
    fn common(&self, raft: &Raft, this: u64) -> Option<u32> {
        self.read_by_members(raft, this).into_iter().min().flatten()
    }

    /// Whether a member is known not to read a format.
    fn stands_against(&self, raft: &Raft, this: u64, format: u32) -> bool {
        self.read_by_members(raft, this).into_iter().flatten().any(|reads| reads < format)
    }

    /// What each member reads; none for one that has not said.
    fn read_by_members(&self, raft: &Raft, this: u64) -> Vec<Option<u32>> {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let others = self.others.borrow();
        let nodes = metrics.membership_config.membership().nodes();
        nodes.map(|(id, _)| if *id == this { Some(self.reads) } else { others.get(id).copied() }).collect()
    }

    /// Waits until the pool writes a format, as long as no member stands against it. Whether it does, in time.
    pub(crate) async fn reached(&self, raft: &Raft, this: u64, format: u32) -> bool {
        let (mut applied, mut others) = (self.machine.applied.subscribe(), self.others.subscribe());
        let waiting = async {
            loop {
                // ORDER: what is seen from here on wakes, what was seen before is looked at.
                applied.borrow_and_update();
                others.borrow_and_update();
                if self.level() >= format {
                    return true;
                }
                if self.stands_against(raft, this, format) {
                    return false;
                }
                let goes_on = tokio::select! {
                    changed = applied.changed() => changed.is_ok(),
                    changed = others.changed() => changed.is_ok(),
                };
                if !goes_on {
                    return false;
                }
            }
        };
        tokio::time::timeout(REACH_LIMIT, waiting).await.unwrap_or(false)
    }
}

/// Raises the level whenever this node leads and every member reads a newer one. Ends with the store.
pub(crate) async fn raise(this: u64, raft: Raft, formats: Formats) {
    let (mut office, mut others) = (formats.machine.office.subscribe(), formats.others.subscribe());
    loop {
        // Both are kept by `formats`: neither ends before this does.
        tokio::select! {
            _ = office.changed() => {}
            _ = others.changed() => {}
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let level = formats.level();
        if level >= formats.reads || !leads(raft.metrics().borrow_watched().state) {
            continue;
        }
        let Some(format) = formats.common(&raft, this).filter(|common| *common > level) else { continue };
        let batch = Batch {
            format,
            transactions: Arc::from([]),
            encoded: encode_batch(format, &[]),
            answers: Answers::default(),
        };
        match tokio::time::timeout(RAISE_LIMIT, raft.client_write(batch)).await {
            Ok(Ok(_)) => tracing::info!(format, "every member reads a newer format: the pool goes over to it"),
            Ok(Err(error)) => tracing::debug!(%error, "the pool's format is raised later"),
            Err(_) => tracing::debug!("the pool's format is raised later"),
        }
    }
}
