//! Between what is held in memory and what travels or rests: classes and fields by name there, by place here.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use datamodel::{ClassId, ClassKind as _, Key, OpaqueRef, Staged, Timestamp, Type, Value};
use prost::Message;
use proto::raft as wire;
use uuid::Uuid;

use crate::format::{NEWEST, readable};
use crate::replace::{Replacement, StagedRow};
use crate::row::{LogIndex, Row};
use crate::transaction::{Conflict, Expectation, Transaction, Write};

/// Bytes that say nothing this version understands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not the expected message at all.
    #[error("malformed record: {0}")]
    Malformed(String),
    /// Written by a newer version.
    #[error("a record of format {found}, this version reads up to {reads}: upgrade this host")]
    NewerFormat {
        /// Its format.
        found: u32,
        /// The newest that this version reads.
        reads: u32,
    },
    /// A class that this version does not have.
    #[error("unknown class {0}: upgrade this host")]
    UnknownClass(String),
    /// A field that this version does not have.
    #[error("unknown field {0}.{1}: upgrade this host")]
    UnknownField(&'static str, String),
    /// A word that this version does not have.
    #[error("unknown word {1} of {0}: upgrade this host")]
    UnknownWord(&'static str, String),
    /// A value that does not fit.
    #[error("bad value")]
    BadValue,
}

impl From<prost::DecodeError> for DecodeError {
    fn from(error: prost::DecodeError) -> Self {
        Self::Malformed(error.to_string())
    }
}

fn reference_bytes(reference: OpaqueRef) -> Bytes {
    Bytes::copy_from_slice(reference.bits().as_bytes())
}

pub(crate) fn reference(bytes: &[u8]) -> Result<OpaqueRef, DecodeError> {
    Uuid::from_slice(bytes).map(OpaqueRef::from_uuid).map_err(|_| DecodeError::BadValue)
}

/// Bytes that are to be text.
fn text(bytes: &[u8]) -> Result<&str, DecodeError> {
    std::str::from_utf8(bytes).map_err(|_| DecodeError::BadValue)
}

const fn name_bytes(name: &'static str) -> Bytes {
    Bytes::from_static(name.as_bytes())
}

fn class_named(name: &str) -> Result<ClassId, DecodeError> {
    ClassId::named(name).ok_or_else(|| DecodeError::UnknownClass(name.to_owned()))
}

pub(crate) fn class(name: &[u8]) -> Result<ClassId, DecodeError> {
    class_named(text(name)?)
}

pub(crate) fn class_name(class: ClassId) -> Bytes {
    name_bytes(class.def().name)
}

fn field_name(class: ClassId, field: u16) -> &'static str {
    class.def().field_def(field).map_or("", |def| def.name)
}

fn field(class: ClassId, name: &str) -> Result<(u16, &'static Type), DecodeError> {
    let def = class.def();
    let index = def.field(name).ok_or_else(|| DecodeError::UnknownField(def.name, name.to_owned()))?;
    let field = def.field_def(index).ok_or_else(|| DecodeError::UnknownField(def.name, name.to_owned()))?;
    Ok((index, &field.ty))
}

fn value_to_wire(value: &Value) -> wire::Value {
    use wire::value::Kind;
    let kind = match value {
        Value::Str(text) => Kind::Text(Bytes::copy_from_slice(text.as_bytes())),
        Value::Int(number) => Kind::Integer(*number),
        Value::Float(number) => Kind::Number(*number),
        Value::Bool(truth) => Kind::Truth(*truth),
        Value::Time(time) => Kind::Time(time.0),
        Value::Enum(word) => Kind::Word(name_bytes(word)),
        Value::Ref(reference) => Kind::Reference(reference_bytes(*reference)),
        Value::Set(members) => Kind::Set(wire::Values { values: members.iter().map(value_to_wire).collect() }),
        Value::Map(entries) => Kind::Map(wire::Entries {
            entries: entries
                .iter()
                .map(|(key, value)| wire::Entry {
                    key: Some(value_to_wire(&key.to_value())),
                    value: Some(value_to_wire(value)),
                })
                .collect(),
        }),
        // Records that are no rows are never stored.
        Value::Record(_) | Value::Absent | Value::Void => Kind::Absent(true),
    };
    wire::Value { kind: Some(kind) }
}

fn value_from_wire(ty: &Type, value: wire::Value) -> Result<Value, DecodeError> {
    use wire::value::Kind;
    let ty = if let Type::Option(inner) = ty { inner } else { ty };
    Ok(match (ty, value.kind.ok_or(DecodeError::BadValue)?) {
        (_, Kind::Text(bytes)) => Value::Str(text(&bytes)?.into()),
        (_, Kind::Integer(number)) => Value::Int(number),
        (_, Kind::Number(number)) => Value::Float(number),
        (_, Kind::Truth(truth)) => Value::Bool(truth),
        (_, Kind::Time(time)) => Value::Time(Timestamp(time)),
        (Type::Enum(words), Kind::Word(word)) => {
            let word = text(&word)?;
            Value::Enum(words.word(word).ok_or_else(|| DecodeError::UnknownWord(words.name, word.to_owned()))?)
        }
        (_, Kind::Reference(bytes)) => Value::Ref(reference(&bytes)?),
        (Type::Set(element), Kind::Set(values)) => Value::Set(
            values.values.into_iter().map(|value| value_from_wire(element, value)).collect::<Result<_, _>>()?,
        ),
        (Type::Map(key_type, value_type), Kind::Map(entries)) => {
            let mut map = BTreeMap::new();
            for entry in entries.entries {
                let key = value_from_wire(key_type, entry.key.ok_or(DecodeError::BadValue)?)?;
                let value = value_from_wire(value_type, entry.value.ok_or(DecodeError::BadValue)?)?;
                map.insert(Key::from_value(key).ok_or(DecodeError::BadValue)?, value);
            }
            Value::map(map)
        }
        (_, Kind::Absent(_)) => Value::Absent,
        _ => return Err(DecodeError::BadValue),
    })
}

/// A set's member or a map's key, whose type is a part of the field's.
fn element<'a>(ty: &'a Type, of: impl Fn(&'a Type) -> Option<&'a Type>) -> Result<&'a Type, DecodeError> {
    of(ty).ok_or(DecodeError::BadValue)
}

fn set_element(ty: &Type) -> Option<&Type> {
    if let Type::Set(element) = ty { Some(element) } else { None }
}

fn map_key(ty: &Type) -> Option<&Type> {
    if let Type::Map(key, _) = ty { Some(key) } else { None }
}

fn map_value(ty: &Type) -> Option<&Type> {
    if let Type::Map(_, value) = ty { Some(value) } else { None }
}

fn named(class: ClassId, index: u16, value: &Value) -> wire::FieldValue {
    wire::FieldValue { field: name_bytes(field_name(class, index)), value: Some(value_to_wire(value)) }
}

/// Transactions as one log payload.
pub(crate) fn encode_batch(format: u32, transactions: &[Transaction]) -> Bytes {
    let batch = wire::TransactionBatch { format, transactions: transactions.iter().map(transaction_to_wire).collect() };
    Bytes::from(batch.encode_to_vec())
}

/// The format and the transactions of a log payload.
pub(crate) fn decode_batch(bytes: Bytes) -> Result<(u32, Vec<Transaction>), DecodeError> {
    let format = batch_format(bytes.clone(), NEWEST)?;
    let batch = wire::TransactionBatch::decode(bytes)?;
    Ok((format, batch.transactions.into_iter().map(transaction_from_wire).collect::<Result<_, _>>()?))
}

/// The format of a log payload, whatever else is in it.
pub(crate) fn batch_format(bytes: Bytes, reads: u32) -> Result<u32, DecodeError> {
    readable(wire::BatchHead::decode(bytes)?.format, reads)
}

fn transaction_to_wire(transaction: &Transaction) -> wire::Transaction {
    wire::Transaction {
        id: Bytes::copy_from_slice(transaction.id.as_bytes()),
        time: transaction.time.0,
        expectations: transaction.expectations.iter().map(expectation_to_wire).collect(),
        writes: transaction.writes.iter().map(write_to_wire).collect(),
    }
}

fn transaction_from_wire(transaction: wire::Transaction) -> Result<Transaction, DecodeError> {
    Ok(Transaction {
        id: Uuid::from_slice(&transaction.id).map_err(|_| DecodeError::BadValue)?,
        time: Timestamp(transaction.time),
        expectations: transaction.expectations.into_iter().map(expectation_from_wire).collect::<Result<_, _>>()?,
        writes: transaction.writes.into_iter().map(write_from_wire).collect::<Result<_, _>>()?,
    })
}

fn expectation_to_wire(expectation: &Expectation) -> wire::Expectation {
    use wire::expectation::What;
    let (class, reference, what) = match expectation {
        Expectation::Exists(class, reference) => (class, *reference, What::Exists(true)),
        Expectation::Absent(class, reference) => (class, *reference, What::Absent(true)),
        Expectation::Unmodified(class, reference, modified) => (class, *reference, What::Unmodified(modified.0)),
        Expectation::Value(class, reference, index, value) => {
            (class, *reference, What::Value(named(*class, *index, value)))
        }
        Expectation::KeyAbsent(class, reference, index, key) => {
            (class, *reference, What::KeyAbsent(named(*class, *index, &key.to_value())))
        }
        Expectation::ClassEmpty(class) => (class, OpaqueRef::NULL, What::ClassEmpty(true)),
        Expectation::ClassUnchanged(class, since) => (class, OpaqueRef::NULL, What::ClassUnchanged(since.0)),
    };
    wire::Expectation { class: class_name(*class), reference: reference_bytes(reference), what: Some(what) }
}

fn expectation_from_wire(expectation: wire::Expectation) -> Result<Expectation, DecodeError> {
    use wire::expectation::What;
    let class = class(&expectation.class)?;
    let reference = reference(&expectation.reference)?;
    Ok(match expectation.what.ok_or(DecodeError::BadValue)? {
        What::Exists(_) => Expectation::Exists(class, reference),
        What::Absent(_) => Expectation::Absent(class, reference),
        What::Unmodified(modified) => Expectation::Unmodified(class, reference, LogIndex(modified)),
        What::Value(entry) => {
            let (index, ty) = field(class, text(&entry.field)?)?;
            Expectation::Value(class, reference, index, value_from_wire(ty, entry.value.ok_or(DecodeError::BadValue)?)?)
        }
        What::KeyAbsent(entry) => {
            let (index, ty) = field(class, text(&entry.field)?)?;
            let key = value_from_wire(element(ty, map_key)?, entry.value.ok_or(DecodeError::BadValue)?)?;
            Expectation::KeyAbsent(class, reference, index, Key::from_value(key).ok_or(DecodeError::BadValue)?)
        }
        What::ClassEmpty(_) => Expectation::ClassEmpty(class),
        What::ClassUnchanged(since) => Expectation::ClassUnchanged(class, LogIndex(since)),
    })
}

fn write_to_wire(write: &Write) -> wire::Write {
    use wire::write::What;
    let entry = |class: ClassId, index: u16, key: &Key, value: Option<&Value>| wire::FieldEntry {
        field: name_bytes(field_name(class, index)),
        key: Some(value_to_wire(&key.to_value())),
        value: value.map(value_to_wire),
    };
    let (class, reference, what) = match write {
        Write::Insert(class, reference, fields) => {
            let fields = fields.iter().map(|(index, value)| named(*class, *index, value)).collect();
            (class, reference, What::Insert(wire::Fields { fields }))
        }
        Write::Set(class, reference, index, value) => (class, reference, What::Set(named(*class, *index, value))),
        Write::AddToSet(class, reference, index, value) => {
            (class, reference, What::AddToSet(named(*class, *index, value)))
        }
        Write::RemoveFromSet(class, reference, index, value) => {
            (class, reference, What::RemoveFromSet(named(*class, *index, value)))
        }
        Write::InsertInMap(class, reference, index, key, value) => {
            (class, reference, What::InsertInMap(entry(*class, *index, key, Some(value))))
        }
        Write::RemoveFromMap(class, reference, index, key) => {
            (class, reference, What::RemoveFromMap(entry(*class, *index, key, None)))
        }
        Write::Touch(class, reference) => (class, reference, What::Touch(true)),
        Write::Delete(class, reference) => (class, reference, What::Delete(true)),
        Write::Replace(replacement) => (&Staged::ID, &OpaqueRef::NULL, What::Replace(replacement_to_wire(replacement))),
    };
    wire::Write { class: class_name(*class), reference: reference_bytes(*reference), what: Some(what) }
}

fn write_from_wire(write: wire::Write) -> Result<Write, DecodeError> {
    use wire::write::What;
    let class = class(&write.class)?;
    let reference = reference(&write.reference)?;
    let bad = || DecodeError::BadValue;
    let member = |entry: wire::FieldValue| -> Result<(u16, Value), DecodeError> {
        let (index, ty) = field(class, text(&entry.field)?)?;
        Ok((index, value_from_wire(element(ty, set_element)?, entry.value.ok_or_else(bad)?)?))
    };
    let key = |entry: &mut wire::FieldEntry| -> Result<(u16, Key, &'static Type), DecodeError> {
        let (index, ty) = field(class, text(&entry.field)?)?;
        let key = value_from_wire(element(ty, map_key)?, entry.key.take().ok_or_else(bad)?)?;
        Ok((index, Key::from_value(key).ok_or_else(bad)?, ty))
    };
    Ok(match write.what.ok_or_else(bad)? {
        What::Insert(fields) => Write::Insert(class, reference, decode_fields(class, fields.fields)?),
        What::Set(entry) => {
            let (index, ty) = field(class, text(&entry.field)?)?;
            Write::Set(class, reference, index, value_from_wire(ty, entry.value.ok_or_else(bad)?)?)
        }
        What::AddToSet(entry) => {
            let (index, value) = member(entry)?;
            Write::AddToSet(class, reference, index, value)
        }
        What::RemoveFromSet(entry) => {
            let (index, value) = member(entry)?;
            Write::RemoveFromSet(class, reference, index, value)
        }
        What::InsertInMap(mut entry) => {
            let (index, key, ty) = key(&mut entry)?;
            let value = value_from_wire(element(ty, map_value)?, entry.value.ok_or_else(bad)?)?;
            Write::InsertInMap(class, reference, index, key, value)
        }
        What::RemoveFromMap(mut entry) => {
            let (index, key, _) = key(&mut entry)?;
            Write::RemoveFromMap(class, reference, index, key)
        }
        What::Touch(_) => Write::Touch(class, reference),
        What::Delete(_) => Write::Delete(class, reference),
        What::Replace(replacement) => Write::Replace(Arc::new(replacement_from_wire(replacement)?)),
    })
}

fn replacement_to_wire(replacement: &Replacement) -> wire::Replacement {
    let kept =
        |class: ClassId, fields: &[u16]| fields.iter().map(|field| field_name(class, *field).to_owned()).collect();
    wire::Replacement {
        stage: replacement.stage.clone(),
        parts: replacement.parts,
        classes: replacement
            .classes
            .iter()
            .map(|(class, fields)| wire::ReplacedClass {
                class: class.def().name.to_owned(),
                kept_fields: kept(*class, fields),
            })
            .collect(),
        keep: replacement
            .keep
            .iter()
            .map(|(class, reference)| wire::RowName {
                class: class.def().name.to_owned(),
                reference: reference_bytes(*reference),
            })
            .collect(),
    }
}

fn replacement_from_wire(replacement: wire::Replacement) -> Result<Replacement, DecodeError> {
    let classes = replacement.classes.into_iter().map(|replaced| {
        let class = class_named(&replaced.class)?;
        let kept = replaced.kept_fields.iter().map(|name| field(class, name).map(|(index, _)| index));
        Ok((class, kept.collect::<Result<_, _>>()?))
    });
    let keep = replacement.keep.iter().map(|row| Ok((class_named(&row.class)?, reference(&row.reference)?)));
    Ok(Replacement {
        stage: replacement.stage,
        parts: replacement.parts,
        classes: classes.collect::<Result<_, DecodeError>>()?,
        keep: keep.collect::<Result<_, DecodeError>>()?,
    })
}

/// Rows as the content of one part of a stage.
pub(crate) fn encode_staged(rows: &[StagedRow]) -> String {
    let rows = rows.iter().map(|row| wire::StoredRow {
        class: class_name(row.class),
        reference: reference_bytes(row.reference),
        created: 0,
        modified: 0,
        fields: row.fields.iter().map(|(index, value)| named(row.class, *index, value)).collect(),
    });
    let batch = wire::RowBatch { rows: rows.collect(), ..Default::default() };
    BASE64_STANDARD.encode(batch.encode_to_vec())
}

/// The rows of one part of a stage.
pub(crate) fn decode_staged(content: &str) -> Result<Vec<StagedRow>, DecodeError> {
    let bytes = BASE64_STANDARD.decode(content).map_err(|error| DecodeError::Malformed(error.to_string()))?;
    let batch = wire::RowBatch::decode(bytes.as_slice())?;
    let rows = batch.rows.into_iter().map(|row| {
        let class = class(&row.class)?;
        Ok(StagedRow { class, reference: reference(&row.reference)?, fields: decode_fields(class, row.fields)? })
    });
    rows.collect()
}

/// Fields rest in the model's order: each is looked for where the last one was found, and only then by its name.
fn decode_fields(class: ClassId, fields: Vec<wire::FieldValue>) -> Result<Vec<(u16, Value)>, DecodeError> {
    let mut out = Vec::with_capacity(fields.len());
    let mut rest = class.def().fields.iter().zip(0..);
    for entry in fields {
        let name = text(&entry.field)?;
        let found = match rest.find(|(def, _)| def.name == name) {
            Some((def, index)) => (index, &def.ty),
            None => field(class, name)?,
        };
        out.push((found.0, value_from_wire(found.1, entry.value.ok_or(DecodeError::BadValue)?)?));
    }
    Ok(out)
}

/// A row as it rests: without what equals the model's defaults.
pub(crate) fn row_to_wire(row: &Row) -> wire::StoredRow {
    let def = row.class.def();
    let fields = def.fields.iter().zip(row.values()).filter(|(field, value)| field.default != **value);
    wire::StoredRow {
        class: class_name(row.class),
        reference: reference_bytes(row.reference),
        created: row.created.0,
        modified: row.modified.0,
        fields: fields
            .map(|(field, value)| wire::FieldValue { field: name_bytes(field.name), value: Some(value_to_wire(value)) })
            .collect(),
    }
}

/// A row back from its rest.
pub(crate) fn row_from_wire(stored: wire::StoredRow) -> Result<Row, DecodeError> {
    let class = class(&stored.class)?;
    let mut fields: Vec<Value> = class.def().fields.iter().map(|field| field.default.clone()).collect();
    for (index, value) in decode_fields(class, stored.fields)? {
        // What is as the model has it shares the model's.
        if let Some(slot) = fields.get_mut(usize::from(index)).filter(|slot| **slot != value) {
            *slot = value;
        }
    }
    let reference = reference(&stored.reference)?;
    Ok(Row::new(class, reference, LogIndex(stored.created), LogIndex(stored.modified), fields))
}

/// A remembered outcome as it rests.
pub(crate) fn outcome_to_wire(
    transaction: Uuid,
    sequence: u64,
    outcome: &Result<LogIndex, Conflict>,
) -> wire::StoredOutcome {
    let (index, conflict, class, reference) = match outcome {
        Ok(index) => (index.0, "", "", OpaqueRef::NULL),
        Err(Conflict::Missing(class, reference)) => (0, "missing", *class, *reference),
        Err(Conflict::Exists(class, reference)) => (0, "exists", *class, *reference),
        Err(Conflict::Changed(class, reference)) => (0, "changed", *class, *reference),
        Err(Conflict::KeyExists(class, reference)) => (0, "key-exists", *class, *reference),
        Err(Conflict::NotEmpty(class)) => (0, "not-empty", *class, OpaqueRef::NULL),
        Err(Conflict::ClassChanged(class)) => (0, "class-changed", *class, OpaqueRef::NULL),
        Err(Conflict::Unstaged) => (0, "unstaged", Staged::NAME, OpaqueRef::NULL),
    };
    wire::StoredOutcome {
        transaction: Bytes::copy_from_slice(transaction.as_bytes()),
        sequence,
        index,
        conflict: name_bytes(conflict),
        class: name_bytes(class),
        reference: reference_bytes(reference),
    }
}

/// A remembered outcome back from its rest.
pub(crate) fn outcome_from_wire(
    stored: &wire::StoredOutcome,
) -> Result<(Uuid, Result<LogIndex, Conflict>), DecodeError> {
    let id = Uuid::from_slice(&stored.transaction).map_err(|_| DecodeError::BadValue)?;
    if stored.conflict.is_empty() {
        return Ok((id, Ok(LogIndex(stored.index))));
    }
    let class = class(&stored.class)?.def().name;
    let reference = reference(&stored.reference)?;
    let conflict = match text(&stored.conflict)? {
        "missing" => Conflict::Missing(class, reference),
        "exists" => Conflict::Exists(class, reference),
        "changed" => Conflict::Changed(class, reference),
        "key-exists" => Conflict::KeyExists(class, reference),
        "not-empty" => Conflict::NotEmpty(class),
        "class-changed" => Conflict::ClassChanged(class),
        "unstaged" => Conflict::Unstaged,
        _ => return Err(DecodeError::BadValue),
    };
    Ok((id, Err(conflict)))
}
