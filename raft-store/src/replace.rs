//! Whole classes replaced at once, however many rows they have.
//!
//! A log entry has to fit a message between peers, and a pool's rows do not. So rows are staged first, in entries of
//! ordinary size, as rows of the class `staged`; a last, small transaction replaces the classes by what was staged.
//! Until it is applied nobody sees anything of it, and who dies in between leaves nothing but parts to be thrown away.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use datamodel::fields::staged;
use datamodel::{ClassId, OpaqueRef, Relation, Staged, Value, model};

use crate::apply::Editor;
use crate::codec::{DecodeError, decode_staged, encode_staged};
use crate::format::{TooNew, fit_row};
use crate::row::Row;
use crate::state::State;
use crate::store::CommitError;
use crate::transaction::{Conflict, Transaction, Write};

/// A row to come.
#[derive(Debug, Clone, PartialEq)]
pub struct StagedRow {
    /// Its class.
    pub class: ClassId,
    /// Its reference.
    pub reference: OpaqueRef,
    /// Its fields; those that are not named take the model's defaults.
    pub fields: Vec<(u16, Value)>,
}

impl StagedRow {
    /// Rows as the content of one row of the class `staged`, for a pool that writes this format: nobody looks into it
    /// again before it is sent.
    ///
    /// # Errors
    /// [`CommitError::NotYet`] where a row cannot be written without what is newer.
    pub fn part(rows: &[Self], format: u32) -> Result<String, CommitError> {
        let fitting = rows.iter().map(|row| fit_row(row, format));
        let fitting = fitting.collect::<Result<Vec<_>, _>>().map_err(|TooNew(needs)| CommitError::NotYet(needs))?;
        Ok(encode_staged(&fitting))
    }
}

/// What takes the place of what.
#[derive(Debug, Clone, PartialEq)]
pub struct Replacement {
    /// The parts that belong to it.
    pub stage: String,
    /// How many they are.
    pub parts: u64,
    /// The classes whose rows are replaced, and the fields in which an object that is there keeps what it has.
    pub classes: Vec<(ClassId, Vec<u16>)>,
    /// Rows of these classes that stay as they are.
    pub keep: Vec<(ClassId, OpaqueRef)>,
}

/// A row to come, with all its values.
pub(crate) struct Fresh {
    class: ClassId,
    reference: OpaqueRef,
    values: Vec<Value>,
}

/// The replacement of a transaction, if it has one, with its rows and the parts that they were staged in.
pub(crate) type Prepared = Option<(Arc<Replacement>, Vec<Arc<[Fresh]>>, Vec<OpaqueRef>)>;

/// The replacement that a transaction makes, if it makes one.
pub(crate) fn of(transaction: &Transaction) -> Option<&Arc<Replacement>> {
    transaction.writes.iter().find_map(|write| match write {
        Write::Replace(replacement) => Some(replacement),
        _ => None,
    })
}

/// Reads the rows of a part.
pub(crate) fn read_part(content: &str) -> Result<Arc<[Fresh]>, DecodeError> {
    let rows = decode_staged(content)?.into_iter().map(|row| {
        let mut values: Vec<Value> = row.class.def().fields.iter().map(|field| field.default.clone()).collect();
        for (index, value) in row.fields {
            if let Some(slot) = values.get_mut(usize::from(index))
                && !follows(row.class, index)
            {
                *slot = value;
            }
        }
        Fresh { class: row.class, reference: row.reference, values }
    });
    Ok(rows.collect())
}

/// Finds what a transaction has staged.
///
/// # Errors
/// Where a part cannot be read: then this member is not of the others' version, and must not go on.
pub(crate) fn prepare(state: &State, transaction: &Transaction) -> Result<Result<Prepared, Conflict>, DecodeError> {
    let Some(replacement) = of(transaction).cloned() else { return Ok(Ok(None)) };
    let mut parts: Vec<_> = state.all::<Staged>().filter(|row| row.get(staged::STAGE) == replacement.stage).collect();
    parts.sort_by_key(|row| row.get(staged::PLACE));
    let whole = (0..).zip(&parts).all(|(place, row)| row.get(staged::PLACE) == place);
    if !whole || parts.len() as u64 != replacement.parts {
        return Ok(Err(Conflict::Unstaged));
    }
    let mut rows = Vec::with_capacity(parts.len());
    for part in &parts {
        rows.push(match state.staged.get(&part.reference) {
            Some(rows) => Arc::clone(rows),
            None => read_part(part.value(staged::CONTENT.index()).as_str().unwrap_or_default())?,
        });
    }
    Ok(Ok(Some((replacement, rows, parts.iter().map(|row| row.reference).collect()))))
}

/// Replaces. Rows that come out as they were are left alone, so that watchers hear of changes only.
pub(crate) fn replace(editor: &mut Editor<'_>, replacement: &Replacement, rows: &[Arc<[Fresh]>]) {
    let kept: HashSet<_> = replacement.keep.iter().copied().collect();
    let mut wanted: HashMap<ClassId, BTreeMap<OpaqueRef, &Fresh>> = HashMap::new();
    for row in rows.iter().flat_map(|part| part.iter()) {
        wanted.entry(row.class).or_default().insert(row.reference, row);
    }
    for (class, kept_fields) in &replacement.classes {
        let mut rows = wanted.remove(class).unwrap_or_default();
        let there: Vec<Arc<Row>> = editor.state.rows(*class).cloned().collect();
        let stays: Vec<bool> = (0..)
            .zip(&class.def().fields)
            .map(|(place, _)| kept_fields.contains(&place) || follows(*class, place))
            .collect();
        for row in there {
            if kept.contains(&(*class, row.reference)) {
                rows.remove(&row.reference);
                continue;
            }
            match rows.remove(&row.reference) {
                None => editor.bury(&row),
                Some(fresh) => {
                    let held = row.values().iter().zip(&fresh.values).zip(&stays);
                    if held.clone().any(|((old, new), stays)| !stays && old != new) {
                        let values = held.map(|((old, new), stays)| if *stays { old } else { new }.clone()).collect();
                        editor.put_row(&row, values);
                    }
                }
            }
        }
        for (reference, fresh) in rows {
            editor.add_row(*class, reference, fresh.values.clone());
        }
    }
    mend_relations(editor);
}

fn follows(class: ClassId, field: u16) -> bool {
    let relation = class.def().field_def(field).and_then(|def| def.relation);
    matches!(relation, Some(Relation::Follower { .. }))
}

/// What followers there are, by the object and the field that holds them.
type Followers = HashMap<(ClassId, OpaqueRef, u16), Vec<OpaqueRef>>;

/// Makes every follower say what the owners say, in one walk over all of them.
fn mend_relations(editor: &mut Editor<'_>) {
    let mut followers = Followers::new();
    for class in model().classes() {
        for (field, place) in class.fields.iter().zip(0_u16..) {
            let Some(Relation::Owner { class: other, follower }) = field.relation else { continue };
            for row in editor.state.rows(class.id) {
                if let Value::Ref(end) = row.value(place)
                    && !end.is_null()
                {
                    followers.entry((other, *end, follower)).or_default().push(row.reference);
                }
            }
        }
    }
    for class in model().classes() {
        let places: Vec<u16> =
            (0..).zip(&class.fields).map(|(place, _)| place).filter(|place| follows(class.id, *place)).collect();
        if places.is_empty() {
            continue;
        }
        let there: Vec<Arc<Row>> = editor.state.rows(class.id).cloned().collect();
        for row in there {
            let changed = places.iter().filter_map(|place| {
                let named = followers.remove(&(class.id, row.reference, *place)).unwrap_or_default();
                let value = followed(row.value(*place), &named);
                (value != *row.value(*place)).then_some((*place, value))
            });
            let changed: Vec<_> = changed.collect();
            if changed.is_empty() {
                continue;
            }
            let mut values = row.values().to_vec();
            for (place, value) in changed {
                if let Some(slot) = values.get_mut(usize::from(place)) {
                    *slot = value;
                }
            }
            editor.put_row(&row, values);
        }
    }
}

/// The members that stay keep their order.
fn followed(old: &Value, named: &[OpaqueRef]) -> Value {
    match old {
        Value::Set(members) if members.is_empty() && named.is_empty() => old.clone(),
        Value::Set(members) => {
            let new: HashSet<_> = named.iter().copied().collect();
            let mut out: Vec<Value> =
                members.iter().filter(|member| matches!(member, Value::Ref(it) if new.contains(it))).cloned().collect();
            let stay: HashSet<_> =
                out.iter().filter_map(|member| if let Value::Ref(it) = member { Some(*it) } else { None }).collect();
            out.extend(named.iter().filter(|reference| !stay.contains(reference)).map(|it| Value::Ref(*it)));
            Value::set(out)
        }
        _ => Value::Ref(named.last().copied().unwrap_or(OpaqueRef::NULL)),
    }
}
