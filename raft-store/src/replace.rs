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
use crate::row::Row;
use crate::state::State;
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
    /// Rows as the content of one row of the class `staged`.
    #[must_use]
    pub fn part(rows: &[Self]) -> String {
        encode_staged(rows)
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

/// The replacement of a transaction, if it has one, with its rows.
pub(crate) type Prepared = Option<(Arc<Replacement>, Vec<StagedRow>, Vec<OpaqueRef>)>;

/// Reads what a transaction has staged.
///
/// # Errors
/// Where a part cannot be read: then this member is not of the others' version, and must not go on.
pub(crate) fn prepare(state: &State, transaction: &Transaction) -> Result<Result<Prepared, Conflict>, DecodeError> {
    let replacement = transaction.writes.iter().find_map(|write| match write {
        Write::Replace(replacement) => Some(Arc::clone(replacement)),
        _ => None,
    });
    let Some(replacement) = replacement else { return Ok(Ok(None)) };
    let mut parts: Vec<_> = state.all::<Staged>().filter(|row| row.get(staged::STAGE) == replacement.stage).collect();
    parts.sort_by_key(|row| row.get(staged::PLACE));
    let whole = (0..).zip(&parts).all(|(place, row)| row.get(staged::PLACE) == place);
    if !whole || parts.len() as u64 != replacement.parts {
        return Ok(Err(Conflict::Unstaged));
    }
    let mut rows = Vec::new();
    for part in &parts {
        let content: String = part.get(staged::CONTENT);
        rows.extend(decode_staged(&content)?);
    }
    Ok(Ok(Some((replacement, rows, parts.iter().map(|row| row.reference).collect()))))
}

/// Replaces. Rows that come out as they were are left alone, so that watchers hear of changes only.
pub(crate) fn replace(editor: &mut Editor<'_>, replacement: &Replacement, rows: Vec<StagedRow>) {
    let kept: HashSet<_> = replacement.keep.iter().copied().collect();
    let mut wanted: HashMap<ClassId, BTreeMap<OpaqueRef, Vec<(u16, Value)>>> = HashMap::new();
    for row in rows {
        wanted.entry(row.class).or_default().insert(row.reference, row.fields);
    }
    for (class, kept_fields) in &replacement.classes {
        let mut rows = wanted.remove(class).unwrap_or_default();
        let there: Vec<Arc<Row>> = editor.state.rows(*class).cloned().collect();
        for row in there {
            if kept.contains(&(*class, row.reference)) {
                rows.remove(&row.reference);
                continue;
            }
            match rows.remove(&row.reference) {
                None => editor.bury(&row),
                Some(fields) => {
                    let mut values = fresh(*class, &fields);
                    for (place, value) in (0_u16..).zip(&mut values) {
                        if kept_fields.contains(&place) || follows(*class, place) {
                            *value = row.value(place).clone();
                        }
                    }
                    editor.put_row(&row, values);
                }
            }
        }
        for (reference, fields) in rows {
            editor.add_row(*class, reference, fresh(*class, &fields));
        }
    }
    mend_relations(editor);
}

fn fresh(class: ClassId, fields: &[(u16, Value)]) -> Vec<Value> {
    let mut values: Vec<Value> = class.def().fields.iter().map(|field| field.default.clone()).collect();
    for (index, value) in fields {
        if let Some(slot) = values.get_mut(usize::from(*index))
            && !follows(class, *index)
        {
            *slot = value.clone();
        }
    }
    values
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
            let mut values = row.values().to_vec();
            for place in &places {
                let named = followers.remove(&(class.id, row.reference, *place)).unwrap_or_default();
                if let Some(value) = values.get_mut(usize::from(*place)) {
                    *value = followed(value, &named);
                }
            }
            editor.put_row(&row, values);
        }
    }
}

/// The members that stay keep their order.
fn followed(old: &Value, named: &[OpaqueRef]) -> Value {
    match old {
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
