//! The pool as of one log index: tables, their indexes, and the memory of what changed when.
//!
//! A state never changes. Applying an entry makes a new one that shares almost everything with the
//! old (persistent maps), so that a reader keeps a consistent view for as long as it likes, and a
//! snapshot is nothing but a state.

use std::sync::Arc;

use datamodel::{ClassId, ClassKind, OpaqueRef, Ref, Timestamp, model};
use imbl::{HashMap, OrdMap};

use crate::indexes::{Names, Uuids};
use crate::remembered::Remembered;
use crate::replace::Fresh;
use crate::row::{LogIndex, Row};
use crate::transaction::{Conflict, Transaction};

/// The log's time goes on by no more than this with one entry: whatever jumps a leader's clock makes, an hour of history
/// is an hour. Where entries are seldom, history is kept for longer than it need be.
const LONGEST_STEP: i64 = 60;

/// How far back deletions are remembered, so that who was away can be told of them: whichever reaches further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct History {
    /// At least so many entries.
    pub entries: u64,
    /// At least so many seconds of the log's time.
    pub seconds: i64,
}

impl Default for History {
    fn default() -> Self {
        Self { entries: 100_000, seconds: 3600 }
    }
}

#[derive(Clone, Default)]
pub(crate) struct Table {
    pub(crate) rows: OrdMap<OpaqueRef, Arc<Row>>,
    pub(crate) by_uuid: Uuids,
    pub(crate) by_name: Names,
}

/// A change's place in the order of changes.
pub(crate) type ChangeKey = (LogIndex, ClassId, OpaqueRef);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tombstone {
    pub(crate) created: LogIndex,
    pub(crate) time: Timestamp,
}

/// What a transaction came to: the index that applied it, or why it had no effect.
pub(crate) type Outcome = Result<LogIndex, Conflict>;

/// The pool as of `applied`.
#[derive(Clone)]
pub struct State {
    /// The last entry in it.
    pub applied: LogIndex,
    /// The newest format that an entry was written in.
    pub(crate) format: u32,
    pub(crate) clock: Timestamp,
    /// The log's own time, by which history is measured.
    pub(crate) age: Timestamp,
    /// The leader's clock as `age` was last moved by it.
    pub(crate) age_read: Timestamp,
    pub(crate) tables: Vec<Arc<Table>>,
    pub(crate) changes: OrdMap<ChangeKey, ()>,
    pub(crate) tombstones: OrdMap<ChangeKey, Tombstone>,
    pub(crate) oldest_token: LogIndex,
    pub(crate) remembered: Remembered,
    /// What parts of a replacement have in them, read when they came, so that the replacement itself is quick. A part
    /// that is not here is read then.
    pub(crate) staged: HashMap<OpaqueRef, Arc<[Fresh]>>,
}

/// How an object changed between two log indexes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// It was made.
    Added,
    /// It is another than before.
    Modified,
    /// It is gone.
    Deleted,
}

/// The net change of one object.
#[derive(Debug, Clone)]
pub struct Change {
    /// The entry of its last change.
    pub index: LogIndex,
    /// Its class.
    pub class: ClassId,
    /// Its reference.
    pub reference: OpaqueRef,
    /// What came of it.
    pub kind: ChangeKind,
    /// The object as it is now; none where it is gone.
    pub row: Option<Arc<Row>>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            applied: LogIndex(0),
            format: crate::format::OLDEST,
            clock: Timestamp::EPOCH,
            age: Timestamp::EPOCH,
            age_read: Timestamp::EPOCH,
            tables: model().classes().iter().map(|_| Arc::new(Table::default())).collect(),
            changes: OrdMap::new(),
            tombstones: OrdMap::new(),
            oldest_token: LogIndex(0),
            remembered: Remembered::default(),
            staged: HashMap::new(),
        }
    }
}

impl State {
    /// Goes on where a stored or sent state was.
    pub(crate) fn resume(&mut self, head: &proto::raft::StateHead) {
        self.applied = LogIndex(head.applied);
        self.clock = Timestamp(head.clock);
        self.age = Timestamp(head.age);
        self.age_read = Timestamp(head.age_read);
        self.oldest_token = LogIndex(head.oldest_token);
    }

    /// Moves the clocks on by an entry of that time.
    pub(crate) fn tick(&mut self, time: Timestamp) {
        self.clock = self.clock.max(time);
        if self.age == Timestamp::EPOCH {
            (self.age, self.age_read) = (time, time);
        }
        let step = time.0.saturating_sub(self.age_read.0);
        // A little back is a transaction that was made before another and written after it.
        if !(-LONGEST_STEP..=0).contains(&step) {
            self.age = Timestamp(self.age.0.saturating_add(step.clamp(0, LONGEST_STEP)));
            self.age_read = time;
        }
    }

    pub(crate) fn table(&self, class: ClassId) -> Option<&Table> {
        self.tables.get(usize::from(class.0)).map(Arc::as_ref)
    }

    /// An object by its typed reference.
    #[must_use]
    pub fn row<C: ClassKind>(&self, reference: Ref<C>) -> Option<&Arc<Row>> {
        self.row_of(C::ID, reference.opaque())
    }

    /// An object by class and reference.
    #[must_use]
    pub fn row_of(&self, class: ClassId, reference: OpaqueRef) -> Option<&Arc<Row>> {
        self.table(class)?.rows.get(&reference)
    }

    /// Every object of a class, by reference.
    pub fn rows(&self, class: ClassId) -> impl Iterator<Item = &Arc<Row>> {
        self.table(class).into_iter().flat_map(|table| table.rows.values())
    }

    /// Every object of a class known to the compiler.
    pub fn all<C: ClassKind>(&self) -> impl Iterator<Item = &Arc<Row>> {
        self.rows(C::ID)
    }

    /// How many objects a class has.
    #[must_use]
    pub fn count(&self, class: ClassId) -> usize {
        self.table(class).map_or(0, |table| table.rows.len())
    }

    /// An object by its `uuid` field.
    #[must_use]
    pub fn by_uuid(&self, class: ClassId, uuid: &str) -> Option<&Arc<Row>> {
        let table = self.table(class)?;
        table.rows.get(&table.by_uuid.get(uuid)?)
    }

    /// Objects by their `name_label`, exactly.
    #[must_use]
    pub fn by_name_label(&self, class: ClassId, label: &str) -> Vec<Arc<Row>> {
        let Some(table) = self.table(class) else { return Vec::new() };
        table.by_name.get(label).filter_map(|reference| table.rows.get(reference).cloned()).collect()
    }

    /// The class of a reference, whichever it is.
    #[must_use]
    pub fn class_of(&self, reference: OpaqueRef) -> Option<ClassId> {
        self.tables
            .iter()
            .zip(0..)
            .find(|(table, _)| table.rows.contains_key(&reference))
            .map(|(_, index)| ClassId(index))
    }

    /// What changed after `token`, one change for each object, in the order of their last changes.
    /// An object that was made and ended in between is not mentioned. Costs what changed, not what exists.
    pub fn changes_since(&self, token: LogIndex) -> impl Iterator<Item = Change> + '_ {
        let after = (LogIndex(token.0.saturating_add(1)), ClassId(0), OpaqueRef::NULL);
        let live = self.changes.range(after..).filter_map(move |((index, class, reference), ())| {
            let row = self.row_of(*class, *reference)?;
            let kind = if row.created > token { ChangeKind::Added } else { ChangeKind::Modified };
            Some(Change { index: *index, class: *class, reference: *reference, kind, row: Some(Arc::clone(row)) })
        });
        let dead = self.tombstones.range(after..).filter(move |(_, tombstone)| tombstone.created <= token).map(
            |((index, class, reference), _)| Change {
                index: *index,
                class: *class,
                reference: *reference,
                kind: ChangeKind::Deleted,
                row: None,
            },
        );
        Merged { live: live.peekable(), dead: dead.peekable() }
    }

    /// A token below this one has lost deletions: the client must read everything anew.
    #[must_use]
    pub const fn oldest_token(&self) -> LogIndex {
        self.oldest_token
    }

    /// The state as a transaction would make it, and the objects that would differ: for decisions that follow from one.
    /// None where it would have no effect, because what it expects does not hold. What it replaces as a whole is not seen.
    #[must_use]
    pub fn preview(&self, transaction: &Transaction) -> Option<(Self, Vec<(ClassId, OpaqueRef)>)> {
        crate::apply::preview(self, transaction).map(|(after, touched)| (after, touched.into_iter().collect()))
    }

    /// The greatest time that any entry carried, as its leader's clock had it.
    #[must_use]
    pub const fn clock(&self) -> Timestamp {
        self.clock
    }
}

/// Two streams in log order, merged.
struct Merged<L: Iterator<Item = Change>, D: Iterator<Item = Change>> {
    live: std::iter::Peekable<L>,
    dead: std::iter::Peekable<D>,
}

impl<L: Iterator<Item = Change>, D: Iterator<Item = Change>> Iterator for Merged<L, D> {
    type Item = Change;

    fn next(&mut self) -> Option<Change> {
        match (self.live.peek(), self.dead.peek()) {
            (Some(live), Some(dead)) if dead.index < live.index => self.dead.next(),
            (None, _) => self.dead.next(),
            _ => self.live.next(),
        }
    }
}
