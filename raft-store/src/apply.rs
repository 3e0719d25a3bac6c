//! Entries into states: deterministic, all or nothing, both ends of each relation in step.
//!
//! Nothing here may depend on anything but the state and the entry: every member must come to the
//! same state. Time is the entry's.

use std::collections::HashSet;
use std::sync::Arc;

use datamodel::fields::staged;
use datamodel::{ClassId, ClassKind as _, Key, OpaqueRef, Relation, Set, Staged, Timestamp, Value};

use crate::codec::DecodeError;
use crate::remembered::Places;
use crate::replace::{self, Prepared, prepare, read_part, replace};
use crate::row::{LogIndex, Row, edited};
use crate::state::{History, Outcome, State, Table, Tombstone};
use crate::transaction::{Conflict, Expectation, Transaction, Write};

/// Rows that an entry touched, so that they can be written to disk.
pub(crate) type Dirty = HashSet<(ClassId, OpaqueRef)>;

/// Applies one transaction to a state under construction.
///
/// # Errors
/// What was staged for it cannot be read here: this member must not go on.
pub(crate) fn apply(
    state: &mut State,
    index: LogIndex,
    transaction: &Transaction,
    places: &Places,
    dirty: &mut Dirty,
) -> Result<Outcome, DecodeError> {
    if let Some(outcome) = places.find(transaction.id, &state.remembered) {
        return Ok(outcome.clone());
    }
    state.tick(transaction.time);
    let outcome = match check(state, transaction) {
        Ok(()) => prepare(state, transaction)?.map(|staged| write_all(state, index, transaction, staged, dirty)),
        Err(conflict) => Err(conflict),
    };
    places.remember(&mut state.remembered, transaction.id, outcome.clone());
    Ok(outcome)
}

/// Whether applying it takes long: it reads or makes as many rows as a pool has.
pub(crate) fn takes_long(transaction: &Transaction) -> bool {
    let stages = |write: &Write| matches!(write, Write::Insert(class, ..) if *class == Staged::ID);
    replace::of(transaction).is_some() || transaction.writes.iter().any(stages)
}

/// A state as a transaction would make it, and the objects that would differ; none where it would have no effect.
pub(crate) fn preview(state: &State, transaction: &Transaction) -> Option<(State, Dirty)> {
    check(state, transaction).ok()?;
    let (mut after, mut dirty) = (state.clone(), Dirty::new());
    let index = state.applied.next();
    write_all(&mut after, index, transaction, None, &mut dirty);
    Some((after, dirty))
}

/// Moves the end of history; called once for each entry, after its transactions.
pub(crate) fn trim_history(
    state: &mut State,
    index: LogIndex,
    history: History,
    trimmed: &mut Vec<(LogIndex, ClassId, OpaqueRef)>,
) {
    let oldest_time = Timestamp(state.age.0.saturating_sub(history.seconds));
    let oldest_index = LogIndex(index.0.saturating_sub(history.entries));
    while let Some((key, tombstone)) = state.tombstones.get_min().copied() {
        if key.0 >= oldest_index || tombstone.time >= oldest_time {
            break;
        }
        state.tombstones.remove(&key);
        state.oldest_token = state.oldest_token.max(key.0);
        trimmed.push(key);
    }
}

fn name(class: ClassId) -> &'static str {
    class.def().name
}

fn check(state: &State, transaction: &Transaction) -> Result<(), Conflict> {
    for expectation in &transaction.expectations {
        match expectation {
            Expectation::Exists(class, reference) => {
                find(state, *class, *reference)?;
            }
            Expectation::Absent(class, reference) => {
                if state.row_of(*class, *reference).is_some() {
                    return Err(Conflict::Exists(name(*class), *reference));
                }
            }
            Expectation::Unmodified(class, reference, modified) => {
                if find(state, *class, *reference)?.modified != *modified {
                    return Err(Conflict::Changed(name(*class), *reference));
                }
            }
            Expectation::Value(class, reference, field, value) => {
                if find(state, *class, *reference)?.value(*field) != value {
                    return Err(Conflict::Changed(name(*class), *reference));
                }
            }
            Expectation::KeyAbsent(class, reference, field, key) => {
                if let Value::Map(entries) = find(state, *class, *reference)?.value(*field)
                    && entries.contains_key(key)
                {
                    return Err(Conflict::KeyExists(name(*class), *reference));
                }
            }
            Expectation::ClassEmpty(class) => {
                if state.count(*class) > 0 {
                    return Err(Conflict::NotEmpty(name(*class)));
                }
            }
            Expectation::ClassUnchanged(class, since) => {
                let after = (since.next(), ClassId(0), OpaqueRef::NULL);
                let live = state.changes.range(after..).any(|((_, changed, _), ())| changed == class);
                if live || state.tombstones.range(after..).any(|((_, gone, _), _)| gone == class) {
                    return Err(Conflict::ClassChanged(name(*class)));
                }
            }
        }
    }
    // All or nothing: what a write needs is looked at before the first one is made.
    let mut made = HashSet::new();
    for write in &transaction.writes {
        match write {
            Write::Insert(class, reference, _) => {
                if state.row_of(*class, *reference).is_some() || !made.insert((*class, *reference)) {
                    return Err(Conflict::Exists(name(*class), *reference));
                }
            }
            Write::Delete(..) | Write::Replace(_) => {}
            Write::Set(class, reference, ..)
            | Write::AddToSet(class, reference, ..)
            | Write::RemoveFromSet(class, reference, ..)
            | Write::InsertInMap(class, reference, ..)
            | Write::RemoveFromMap(class, reference, ..)
            | Write::Touch(class, reference) => {
                if !made.contains(&(*class, *reference)) {
                    find(state, *class, *reference)?;
                }
            }
        }
    }
    Ok(())
}

fn find(state: &State, class: ClassId, reference: OpaqueRef) -> Result<&Arc<Row>, Conflict> {
    state.row_of(class, reference).ok_or(Conflict::Missing(name(class), reference))
}

fn write_all(
    state: &mut State,
    index: LogIndex,
    transaction: &Transaction,
    staged: Prepared,
    dirty: &mut Dirty,
) -> LogIndex {
    let time = state.age;
    let mut editor = Editor { state, index, time, dirty };
    for write in &transaction.writes {
        match write {
            Write::Insert(class, reference, fields) => editor.insert(*class, *reference, fields),
            Write::Set(class, reference, field, value) => editor.assign(*class, *reference, *field, value.clone()),
            Write::AddToSet(class, reference, field, value) => {
                editor.edit_set(*class, *reference, *field, value, true);
            }
            Write::RemoveFromSet(class, reference, field, value) => {
                editor.edit_set(*class, *reference, *field, value, false);
            }
            Write::InsertInMap(class, reference, field, key, value) => {
                editor.edit_map(*class, *reference, *field, key, Some(value));
            }
            Write::RemoveFromMap(class, reference, field, key) => {
                editor.edit_map(*class, *reference, *field, key, None)
            }
            Write::Touch(class, reference) => {
                if let Some(row) = editor.row(*class, *reference) {
                    editor.replace(&row, |_| {});
                }
            }
            Write::Delete(class, reference) => editor.delete(*class, *reference),
            // The last one, whatever the order.
            Write::Replace(_) => {}
        }
    }
    if let Some((replacement, rows, parts)) = staged {
        replace(&mut editor, &replacement, &rows);
        for part in parts {
            editor.delete(Staged::ID, part);
        }
    }
    index
}

/// A state under construction, and where in the log it is.
pub(crate) struct Editor<'a> {
    pub(crate) state: &'a mut State,
    index: LogIndex,
    /// The log's time.
    time: Timestamp,
    dirty: &'a mut Dirty,
}

impl Editor<'_> {
    fn row(&self, class: ClassId, reference: OpaqueRef) -> Option<Arc<Row>> {
        self.state.row_of(class, reference).cloned()
    }

    fn insert(&mut self, class: ClassId, reference: OpaqueRef, given: &[(u16, Value)]) {
        let def = class.def();
        let mut fields: Vec<Value> = def.fields.iter().map(|field| field.default.clone()).collect();
        let mut related = Vec::new();
        for (index, value) in given {
            let relation = def.field_def(*index).and_then(|field| field.relation);
            match relation {
                // Kept by the other end.
                Some(Relation::Follower { .. }) => continue,
                Some(relation) => related.push((relation, value.clone())),
                None => {}
            }
            if let Some(slot) = fields.get_mut(usize::from(*index)) {
                *slot = value.clone();
            }
        }
        // One that cannot be read is found by the transaction that uses it.
        if class == Staged::ID
            && let Some(content) = fields.get(usize::from(staged::CONTENT.index())).and_then(Value::as_str)
            && let Ok(rows) = read_part(content)
        {
            self.state.staged.insert(reference, rows);
        }
        self.add_row(class, reference, fields);
        for (relation, value) in related {
            self.follow(reference, relation, &Value::Absent, &value);
        }
    }

    /// Makes a new version of a row. Whoever calls has looked that something changes.
    fn replace(&mut self, row: &Arc<Row>, edit: impl FnOnce(&mut [Value])) {
        let new = edited(row, self.index, edit);
        self.changed(row, &new);
    }

    fn changed(&mut self, row: &Arc<Row>, new: &Arc<Row>) {
        self.state.changes.remove(&(row.modified, row.class, row.reference));
        self.state.changes.insert((self.index, row.class, row.reference), ());
        self.dirty.insert((row.class, row.reference));
        relink(self.state, row, new);
    }

    /// Gives a row all its values anew; nothing where they are what they were. Relations are the caller's to mend.
    pub(crate) fn put_row(&mut self, row: &Arc<Row>, values: Vec<Value>) {
        if row.values() != values.as_slice() {
            let new = Row::new(row.class, row.reference, row.created, self.index, values);
            self.changed(row, &Arc::new(new));
        }
    }

    /// Makes a row. Relations are the caller's to mend.
    pub(crate) fn add_row(&mut self, class: ClassId, reference: OpaqueRef, values: Vec<Value>) {
        let row = Arc::new(Row::new(class, reference, self.index, self.index, values));
        self.state.tombstones.remove(&(self.index, class, reference));
        link(self.state, &row);
        self.state.changes.insert((self.index, class, reference), ());
        self.dirty.insert((class, reference));
    }

    /// Ends a row. Relations are the caller's to mend.
    pub(crate) fn bury(&mut self, row: &Arc<Row>) {
        let (class, reference) = (row.class, row.reference);
        unlink(self.state, row);
        if class == Staged::ID {
            self.state.staged.remove(&reference);
        }
        self.state.changes.remove(&(row.modified, class, reference));
        self.state
            .tombstones
            .insert((self.index, class, reference), Tombstone { created: row.created, time: self.time });
        self.dirty.insert((class, reference));
    }

    fn assign(&mut self, class: ClassId, reference: OpaqueRef, field: u16, value: Value) {
        let Some(row) = self.row(class, reference) else { return };
        let old = row.value(field).clone();
        if old == value {
            return;
        }
        let relation = class.def().field_def(field).and_then(|def| def.relation);
        if matches!(relation, Some(Relation::Follower { .. })) {
            return;
        }
        self.replace(&row, |fields| put(fields, field, value.clone()));
        if let Some(relation) = relation {
            self.follow(reference, relation, &old, &value);
        }
    }

    /// The other end of a relation follows a change of this one.
    fn follow(&mut self, reference: OpaqueRef, relation: Relation, old: &Value, new: &Value) {
        let this = Value::Ref(reference);
        match relation {
            Relation::Owner { class: other, follower } => {
                for (end, gains) in [(old, false), (new, true)] {
                    if let Value::Ref(end) = end {
                        self.follower(other, *end, follower, &this, gains);
                    }
                }
            }
            Relation::Pair { class: other, field: twin } => {
                let members =
                    |value: &Value| if let Value::Set(members) = value { members.clone() } else { Set::default() };
                let (old, new) = (members(old), members(new));
                for lost in old.iter().filter(|member| !new.contains(member)) {
                    if let Value::Ref(end) = lost {
                        self.follower(other, *end, twin, &this, false);
                    }
                }
                for gained in new.iter().filter(|member| !old.contains(member)) {
                    if let Value::Ref(end) = gained {
                        self.follower(other, *end, twin, &this, true);
                    }
                }
            }
            Relation::Follower { .. } => {}
        }
    }

    /// Changes the kept end of a relation, set or single reference. An end that does not exist is left dangling.
    fn follower(&mut self, class: ClassId, reference: OpaqueRef, field: u16, this: &Value, gains: bool) {
        let Some(row) = self.row(class, reference) else { return };
        match row.value(field) {
            Value::Set(members) if members.contains(this) != gains => {
                self.replace(&row, |fields| {
                    if let Some(Value::Set(members)) = fields.get_mut(usize::from(field)) {
                        members.edit(|members| {
                            if gains { members.push(this.clone()) } else { members.retain(|member| member != this) }
                        });
                    }
                });
            }
            Value::Ref(_) => {
                let new = if gains { this.clone() } else { Value::Ref(OpaqueRef::NULL) };
                if *row.value(field) != new && (gains || row.value(field) == this) {
                    self.replace(&row, |fields| put(fields, field, new));
                }
            }
            _ => {}
        }
    }

    fn edit_set(&mut self, class: ClassId, reference: OpaqueRef, field: u16, value: &Value, add: bool) {
        let Some(row) = self.row(class, reference) else { return };
        let Value::Set(members) = row.value(field) else { return };
        if members.contains(value) == add {
            return;
        }
        let mut members = members.clone();
        members.edit(
            |members| {
                if add { members.push(value.clone()) } else { members.retain(|member| member != value) }
            },
        );
        self.assign(class, reference, field, Value::Set(members));
    }

    fn edit_map(&mut self, class: ClassId, reference: OpaqueRef, field: u16, key: &Key, value: Option<&Value>) {
        let Some(row) = self.row(class, reference) else { return };
        let Value::Map(entries) = row.value(field) else { return };
        if entries.get(key) == value {
            return;
        }
        self.replace(&row, |fields| {
            if let Some(Value::Map(entries)) = fields.get_mut(usize::from(field)) {
                entries.edit(|entries| match value {
                    Some(value) => entries.insert(key.clone(), value.clone()),
                    None => entries.remove(key),
                });
            }
        });
    }

    fn delete(&mut self, class: ClassId, reference: OpaqueRef) {
        let Some(row) = self.row(class, reference) else { return };
        for (def, index) in class.def().fields.iter().zip(0_u16..) {
            if let Some(relation @ (Relation::Owner { .. } | Relation::Pair { .. })) = def.relation {
                let value = row.value(index).clone();
                let nothing = if matches!(value, Value::Set(_)) { Value::Set(Set::default()) } else { Value::Absent };
                self.follow(reference, relation, &value, &nothing);
            }
        }
        // A relation of a class with itself may have changed this very row.
        if let Some(row) = self.row(class, reference) {
            self.bury(&row);
        }
    }
}

fn put(fields: &mut [Value], field: u16, value: Value) {
    if let Some(slot) = fields.get_mut(usize::from(field)) {
        *slot = value;
    }
}

fn table(state: &mut State, class: ClassId) -> Option<&mut Table> {
    state.tables.get_mut(usize::from(class.0)).map(Arc::make_mut)
}

/// Puts a row into its table and the table's indexes.
pub(crate) fn link(state: &mut State, row: &Arc<Row>) {
    let Some(table) = table(state, row.class) else { return };
    table.by_uuid.insert(row);
    table.by_name.insert(row);
    table.rows.insert(row.reference, Arc::clone(row));
}

fn unlink(state: &mut State, row: &Arc<Row>) {
    let Some(table) = table(state, row.class) else { return };
    table.by_uuid.remove(row);
    table.by_name.remove(row);
    table.rows.remove(&row.reference);
}

fn relink(state: &mut State, old: &Arc<Row>, new: &Arc<Row>) {
    let Some(table) = table(state, new.class) else { return };
    if old.uuid() != new.uuid() {
        table.by_uuid.remove(old);
        table.by_uuid.insert(new);
    }
    if old.name_label() != new.name_label() {
        table.by_name.remove(old);
        table.by_name.insert(new);
    }
    table.rows.insert(new.reference, Arc::clone(new));
}
