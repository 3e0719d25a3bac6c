//! The one handler of every message that follows from the fields.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use datamodel::{
    ClassDef, ClassId, ClassKind, FieldDef, Filter, Implicit, Key, OpaqueRef, Pool, Qualifier, Relation, Sr, Value,
    errors,
};
use raft_store::{CommitError, Conflict, Row};

use crate::call::{ATTEMPTS, Call, Reply, persist};
use crate::failure::{Failure, Served, refuse};
use crate::operations::refresh;
use crate::repeats::Stage;

pub(crate) async fn serve(call: &Call, what: Implicit, values: Vec<Value>) -> Served<Reply> {
    let class = call.message.class;
    let mut values = values.into_iter();
    let mut next = || values.next().unwrap_or(Value::Void);
    Ok(match what {
        Implicit::GetAll => {
            Reply::Value(Value::Set(call.state.rows(class).map(|row| Value::Ref(row.reference)).collect()))
        }
        Implicit::GetAllRecords => Reply::Records(call.state.rows(class).cloned().collect()),
        Implicit::GetAllWhere => Reply::Value(Value::Set(
            matching(call, &next())?.into_iter().map(|row| Value::Ref(row.reference)).collect(),
        )),
        Implicit::GetAllRecordsWhere => Reply::Records(matching(call, &next())?),
        Implicit::GetByUuid => {
            let uuid = text(&next());
            let row = call.state.by_uuid(class, &uuid).ok_or_else(|| errors::uuid_invalid(class.def().name, uuid))?;
            Reply::Value(Value::Ref(row.reference))
        }
        Implicit::GetByNameLabel => {
            let rows = call.state.by_name_label(class, &text(&next()));
            Reply::Value(Value::Set(rows.iter().map(|row| Value::Ref(row.reference)).collect()))
        }
        Implicit::GetRecord => Reply::Record(row(call, class, &next())?),
        Implicit::Get(field) => Reply::Value(row(call, class, &next())?.value(field).clone()),
        Implicit::Set(field) => {
            let (this, value) = (next(), next());
            let reference = row(call, class, &this)?.reference;
            written(call, (class, reference), decides(class, field), |change| {
                change.set_value(class, reference, field, value.clone());
            })
            .await?
        }
        Implicit::AddToSet(field) | Implicit::RemoveFromSet(field) => {
            let (this, value) = (next(), next());
            let reference = row(call, class, &this)?.reference;
            let adds = matches!(what, Implicit::AddToSet(_));
            written(call, (class, reference), decides(class, field), |change| {
                if adds {
                    change.add_to_set(class, reference, field, value.clone());
                } else {
                    change.remove_from_set(class, reference, field, value.clone());
                }
            })
            .await?
        }
        Implicit::AddToMap(field) => {
            let (this, key, value) = (next(), next(), next());
            add_to_map(call, class, field, &this, key, value).await?
        }
        Implicit::RemoveFromMap(field) => {
            let (this, key) = (next(), next());
            let reference = row(call, class, &this)?.reference;
            let key = Key::from_value(key);
            written(call, (class, reference), decides(class, field), |change| {
                if let Some(key) = &key {
                    change.remove_from_map(class, reference, field, key.clone());
                }
            })
            .await?
        }
        Implicit::Create => Reply::Value(Value::Ref(create(call, class, next(), Vec::new()).await?)),
        Implicit::Destroy => {
            let reference = row(call, class, &next())?.reference;
            written(call, (class, reference), true, |change| {
                change.expect_exists(class, reference).delete_row(class, reference);
            })
            .await?
        }
    })
}

/// Whether something that may be done to an object depends on a field. Names and notes are written often and by several
/// at once: such a write looks at nothing, and so meets nobody.
fn decides(class: ClassId, field: u16) -> bool {
    match class.def().field_def(field).map_or("", |field| field.name) {
        "name_label" | "name_description" | "tags" => false,
        "other_config" => class == Pool::ID || class == Sr::ID,
        _ => true,
    }
}

/// Writes what it is told to; where that decides on what is allowed, on the newest state, and anew if somebody was faster.
async fn written(
    call: &Call,
    (class, reference): (ClassId, OpaqueRef),
    looks: bool,
    tell: impl Fn(&mut raft_store::Transaction),
) -> Served<Reply> {
    if looks {
        persist(call, |state, change| {
            if state.row_of(class, reference).is_none() {
                return refuse(errors::handle_invalid(class.def().name, reference));
            }
            tell(change);
            refresh(state, change);
            Ok(())
        })
        .await?;
    } else {
        let mut change = call.transaction();
        tell(&mut change);
        call.commit(change).await?;
    }
    Ok(Reply::Value(Value::Void))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("").to_owned()
}

fn row(call: &Call, class: ClassId, this: &Value) -> Served<Arc<Row>> {
    let reference = if let Value::Ref(reference) = this { *reference } else { OpaqueRef::NULL };
    let found = call.state.row_of(class, reference).cloned();
    found.ok_or_else(|| Failure::Api(errors::handle_invalid(class.def().name, reference)))
}

fn matching(call: &Call, expression: &Value) -> Served<Vec<Arc<Row>>> {
    let class = call.message.class;
    let filter = Filter::parse(&text(expression))?;
    Ok(call.state.rows(class).filter(|row| filter.matches(class.def(), row.values())).cloned().collect())
}

async fn add_to_map(call: &Call, class: ClassId, field: u16, this: &Value, key: Value, value: Value) -> Served<Reply> {
    let row = row(call, class, this)?;
    let Some(key) = Key::from_value(key) else { return refuse(errors::field_type_error("key")) };
    let duplicate = || {
        let field = class.def().field_def(field).map_or("", |field| field.name);
        let field = field.strip_prefix("name_").map_or_else(|| field.to_owned(), |rest| format!("name__{rest}"));
        Failure::Api(errors::map_duplicate_key(class.def().name, field, row.reference, key.text()))
    };
    let insertion = || {
        let mut change = call.transaction();
        change.expect_absent_key(class, row.reference, field, key.clone()).insert_in_map(
            class,
            row.reference,
            field,
            key.clone(),
            value.clone(),
        );
        change
    };
    // The conflict is the check: two clients that add the same key cannot both win. Any other says that what the
    // addition allows has to be worked out anew.
    for _ in 0..ATTEMPTS {
        let mut change = insertion();
        if decides(class, field) {
            refresh(&*call.latest().await?, &mut change);
        }
        match call.commit_as(change, Stage::Done(Value::Void)).await {
            Ok(_) => return Ok(Reply::Value(Value::Void)),
            Err(CommitError::Conflict(Conflict::KeyExists(..))) => return Err(duplicate()),
            Err(CommitError::Conflict(Conflict::Changed(..))) => {}
            Err(error) => return Err(error.into()),
        }
    }
    refuse(errors::too_many_pending_tasks())
}

/// Makes an object from a constructor's record. `more` overrides what the client sent.
pub(crate) async fn create(call: &Call, class: ClassId, record: Value, more: Vec<(u16, Value)>) -> Served<OpaqueRef> {
    let mut change = call.transaction();
    let reference = insert(call, &mut change, class, record, more)?;
    call.commit(change).await?;
    Ok(reference)
}

/// Adds the insertion of an object to a transaction.
pub(crate) fn insert(
    call: &Call,
    change: &mut raft_store::Transaction,
    class: ClassId,
    record: Value,
    more: Vec<(u16, Value)>,
) -> Served<OpaqueRef> {
    let def = class.def();
    let members = if let Value::Record(members) = record { members.into_vec() } else { Vec::new() };
    check_members(def, &members)?;
    let mut fields: Vec<(u16, Value)> =
        members.into_iter().filter_map(|(name, value)| Some((def.field(&name)?, value))).collect();
    if let Some(index) = def.field("uuid") {
        fields.retain(|(field, _)| *field != index);
        fields.push((index, Value::str(call.uuid().hyphenated().to_string())));
    }
    for (index, value) in more {
        fields.retain(|(field, _)| *field != index);
        fields.push((index, value));
    }
    let reference = OpaqueRef::from_uuid(call.uuid());
    for (index, value) in &fields {
        expect_other_end(call, change, def, *index, value)?;
    }
    change.insert_values(class, reference, fields);
    Ok(reference)
}

/// The fields that a client chooses for a new object, for work that makes it later. What they refer to must exist.
pub(crate) fn chosen(call: &Call, class: ClassId, record: Value) -> Served<Vec<(u16, Value)>> {
    let def = class.def();
    let members = if let Value::Record(members) = record { members.into_vec() } else { Vec::new() };
    check_members(def, &members)?;
    let chooses = |index: &u16| def.field_def(*index).is_some_and(|field| field.qualifier != Qualifier::Runtime);
    let fields: Vec<(u16, Value)> =
        members.into_iter().filter_map(|(name, value)| Some((def.field(&name).filter(chooses)?, value))).collect();
    let mut nothing = call.transaction();
    for (index, value) in &fields {
        expect_other_end(call, &mut nothing, def, *index, value)?;
    }
    Ok(fields)
}

/// A constructor's record must say everything that has no default.
fn check_members(def: &ClassDef, members: &[(Cow<'static, str>, Value)]) -> Served<()> {
    let given: HashSet<&str> = members.iter().map(|(name, _)| name.as_ref()).collect();
    let wanted = |field: &&FieldDef| {
        !field.hidden && field.qualifier != Qualifier::Runtime && !field.has_default && !given.contains(field.name)
    };
    match def.fields.iter().find(wanted) {
        Some(field) => {
            refuse(errors::internal_error(format!("{}.create: the field {} is missing", def.name, field.name)))
        }
        None => Ok(()),
    }
}

/// What a new object refers to by a relation must exist when it is made.
fn expect_other_end(
    call: &Call,
    change: &mut raft_store::Transaction,
    def: &ClassDef,
    index: u16,
    value: &Value,
) -> Served<()> {
    let relation = def.field_def(index).and_then(|field| field.relation);
    if let (Some(Relation::Owner { class, .. }), Value::Ref(reference)) = (relation, value)
        && !reference.is_null()
    {
        if call.state.row_of(class, *reference).is_none() {
            return refuse(errors::handle_invalid(class.def().name, *reference));
        }
        change.expect_exists(class, *reference);
    }
    Ok(())
}
