//! Rows: one object of the pool, immutable, shared, with its encodings kept.

use std::fmt;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use datamodel::{ClassId, ClassKind, Field, FieldValue, OpaqueRef, Ref, Value, encode};

/// A position in the replicated log. It is the pool's time: event tokens and epochs are log indexes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct LogIndex(pub u64);

impl LogIndex {
    /// The index after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for LogIndex {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// An object as it was from `modified` on. A change makes a new row; who holds an old one keeps it.
pub struct Row {
    /// Its class.
    pub class: ClassId,
    /// Its reference.
    pub reference: OpaqueRef,
    /// The entry that made the object.
    pub created: LogIndex,
    /// The entry that made this version of it.
    pub modified: LogIndex,
    fields: Box<[Value]>,
    json: OnceLock<Bytes>,
    xml: OnceLock<Bytes>,
}

impl Row {
    pub(crate) fn new(
        class: ClassId,
        reference: OpaqueRef,
        created: LogIndex,
        modified: LogIndex,
        fields: Vec<Value>,
    ) -> Self {
        let fields = fields.into_boxed_slice();
        Self { class, reference, created, modified, fields, json: OnceLock::new(), xml: OnceLock::new() }
    }

    /// A typed field. A field of another class, or a value of another type, reads as the type's stored default:
    /// the model makes both impossible, and a read must not bring the pool down.
    #[must_use]
    pub fn get<C: ClassKind, T: FieldValue>(&self, field: Field<C, T>) -> T {
        debug_assert_eq!(self.class, C::ID, "a field of another class");
        self.fields
            .get(usize::from(field.index()))
            .and_then(T::from_value)
            .or_else(|| C::ID.def().field_def(field.index()).and_then(|def| T::from_value(&def.default)))
            .unwrap_or_else(|| unreadable::<C, T>(field.index()))
    }

    /// A field by its place in the class.
    #[must_use]
    pub fn value(&self, index: u16) -> &Value {
        self.fields.get(usize::from(index)).unwrap_or(&Value::Absent)
    }

    /// Every field in model order.
    #[must_use]
    pub fn values(&self) -> &[Value] {
        &self.fields
    }

    /// The `uuid` field.
    #[must_use]
    pub fn uuid(&self) -> &str {
        self.text("uuid")
    }

    /// The `name_label` field; empty where the class has none.
    #[must_use]
    pub fn name_label(&self) -> &str {
        self.text("name_label")
    }

    fn text(&self, field: &str) -> &str {
        self.class.def().field(field).and_then(|index| self.value(index).as_str()).unwrap_or("")
    }

    /// A row with every field at its default: for decisions about objects that are not there yet.
    #[must_use]
    pub fn of_defaults(class: ClassId, reference: OpaqueRef) -> Self {
        let fields = class.def().fields.iter().map(|field| field.default.clone()).collect();
        Self::new(class, reference, LogIndex(0), LogIndex(0), fields)
    }

    /// The row as it would be with other values: for decisions, never stored.
    #[must_use]
    pub fn with_values(&self, changes: &[(u16, Value)]) -> Self {
        let mut fields = self.fields.to_vec();
        for (index, value) in changes {
            if let Some(slot) = fields.get_mut(usize::from(*index)) {
                *slot = value.clone();
            }
        }
        Self::new(self.class, self.reference, self.created, self.modified, fields)
    }

    /// The reference with its class; null where the row is of another class.
    #[must_use]
    pub fn typed<C: ClassKind>(&self) -> Ref<C> {
        if self.class == C::ID { Ref::from_opaque(self.reference) } else { Ref::NULL }
    }

    /// The record as JSON, made once and kept.
    #[must_use]
    pub fn json(&self) -> Bytes {
        let encode = || {
            let mut out = Vec::with_capacity(4096);
            encode::json_record(self.class.def(), &self.fields, &mut out);
            out.shrink_to_fit();
            Bytes::from(out)
        };
        self.json.get_or_init(encode).clone()
    }

    /// The record as an XML-RPC value, made once and kept.
    #[must_use]
    pub fn xml(&self) -> Bytes {
        let encode = || {
            let mut out = Vec::with_capacity(8192);
            encode::xml_record(self.class.def(), &self.fields, &mut out);
            out.shrink_to_fit();
            Bytes::from(out)
        };
        self.xml.get_or_init(encode).clone()
    }
}

/// Neither the value nor the model's default is of the field's type: the generated code and the model disagree.
#[cold]
#[allow(clippy::panic)]
fn unreadable<C: ClassKind, T>(index: u16) -> T {
    panic!("{}: field {index} does not hold what its type says", C::NAME)
}

impl fmt::Debug for Row {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the fields: rows hold secrets.
        write!(out, "{}/{} at {}", self.class.def().name, self.reference, self.modified)
    }
}

/// A row that is being changed by one entry.
pub(crate) fn edited(row: &Row, modified: LogIndex, edit: impl FnOnce(&mut [Value])) -> Arc<Row> {
    let mut fields = row.fields.to_vec();
    edit(&mut fields);
    Arc::new(Row::new(row.class, row.reference, row.created, modified, fields))
}
