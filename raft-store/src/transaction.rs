//! Transactions: what is to change, and what must still be so for the change to make sense.
//!
//! The leader decides (identifiers, clocks, placement) and writes the decision down; every member
//! applies it blindly, all or nothing, with the same result.

use std::sync::Arc;

use datamodel::{ClassId, ClassKind, Field, FieldValue, Key, OpaqueRef, Ref, Timestamp, Value};
use uuid::Uuid;

use crate::replace::Replacement;
use crate::row::LogIndex;

/// A change of the pool's rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Transaction {
    pub(crate) id: Uuid,
    pub(crate) time: Timestamp,
    pub(crate) expectations: Vec<Expectation>,
    pub(crate) writes: Vec<Write>,
}

/// What must hold when the transaction is applied.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Expectation {
    Exists(ClassId, OpaqueRef),
    Absent(ClassId, OpaqueRef),
    Unmodified(ClassId, OpaqueRef, LogIndex),
    Value(ClassId, OpaqueRef, u16, Value),
    KeyAbsent(ClassId, OpaqueRef, u16, Key),
    ClassEmpty(ClassId),
    ClassUnchanged(ClassId, LogIndex),
}

/// One write.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Write {
    /// Fields that are not named take the model's defaults.
    Insert(ClassId, OpaqueRef, Vec<(u16, Value)>),
    Set(ClassId, OpaqueRef, u16, Value),
    AddToSet(ClassId, OpaqueRef, u16, Value),
    RemoveFromSet(ClassId, OpaqueRef, u16, Value),
    InsertInMap(ClassId, OpaqueRef, u16, Key, Value),
    RemoveFromMap(ClassId, OpaqueRef, u16, Key),
    /// A change that changes nothing, so that watchers see the object.
    Touch(ClassId, OpaqueRef),
    Delete(ClassId, OpaqueRef),
    Replace(Arc<Replacement>),
}

impl Transaction {
    /// An empty transaction. `id` names it for ever: the same id is applied once, however often it is committed.
    #[must_use]
    pub const fn new(id: Uuid, now: Timestamp) -> Self {
        Self { id, time: now, expectations: Vec::new(), writes: Vec::new() }
    }

    /// Its id.
    #[must_use]
    pub const fn id(&self) -> Uuid {
        self.id
    }

    /// The leader's time when it was decided.
    #[must_use]
    pub const fn time(&self) -> Timestamp {
        self.time
    }

    /// Whether it writes nothing.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// The object of a class that it makes; the last one where it makes several.
    #[must_use]
    pub fn inserted(&self, class: ClassId) -> Option<OpaqueRef> {
        self.writes.iter().rev().find_map(|write| match write {
            Write::Insert(of, reference, _) if *of == class => Some(*reference),
            _ => None,
        })
    }

    /// Makes an object.
    pub fn insert<C: ClassKind>(&mut self, row: NewRow<C>) -> &mut Self {
        self.insert_values(C::ID, row.reference.opaque(), row.fields)
    }

    /// Makes an object of a class known at run time.
    pub fn insert_values(&mut self, class: ClassId, reference: OpaqueRef, fields: Vec<(u16, Value)>) -> &mut Self {
        self.writes.push(Write::Insert(class, reference, fields));
        self
    }

    /// Sets a field. The other end of a relation follows.
    pub fn set<C: ClassKind, T: FieldValue>(&mut self, reference: Ref<C>, field: Field<C, T>, value: T) -> &mut Self {
        self.set_value(C::ID, reference.opaque(), field.index(), value.into_value())
    }

    /// Sets a field of a class known at run time.
    pub fn set_value(&mut self, class: ClassId, reference: OpaqueRef, field: u16, value: Value) -> &mut Self {
        self.writes.push(Write::Set(class, reference, field, value));
        self
    }

    /// Adds a member to a set; nothing where it is in already.
    pub fn add_to_set(&mut self, class: ClassId, reference: OpaqueRef, field: u16, value: Value) -> &mut Self {
        self.writes.push(Write::AddToSet(class, reference, field, value));
        self
    }

    /// Removes a member from a set; nothing where it is not in.
    pub fn remove_from_set(&mut self, class: ClassId, reference: OpaqueRef, field: u16, value: Value) -> &mut Self {
        self.writes.push(Write::RemoveFromSet(class, reference, field, value));
        self
    }

    /// Sets a key of a map.
    pub fn insert_in_map(
        &mut self,
        class: ClassId,
        reference: OpaqueRef,
        field: u16,
        key: Key,
        value: Value,
    ) -> &mut Self {
        self.writes.push(Write::InsertInMap(class, reference, field, key, value));
        self
    }

    /// Removes a key from a map; nothing where it is not in.
    pub fn remove_from_map(&mut self, class: ClassId, reference: OpaqueRef, field: u16, key: Key) -> &mut Self {
        self.writes.push(Write::RemoveFromMap(class, reference, field, key));
        self
    }

    /// Sets a key of a typed map.
    pub fn put<C: ClassKind, K: FieldValue + Ord, V: FieldValue>(
        &mut self,
        reference: Ref<C>,
        field: Field<C, std::collections::BTreeMap<K, V>>,
        key: K,
        value: V,
    ) -> &mut Self {
        if let Some(key) = Key::from_value(key.into_value()) {
            self.insert_in_map(C::ID, reference.opaque(), field.index(), key, value.into_value());
        }
        self
    }

    /// Removes a key of a typed map.
    pub fn take<C: ClassKind, K: FieldValue + Ord, V: FieldValue>(
        &mut self,
        reference: Ref<C>,
        field: Field<C, std::collections::BTreeMap<K, V>>,
        key: K,
    ) -> &mut Self {
        if let Some(key) = Key::from_value(key.into_value()) {
            self.remove_from_map(C::ID, reference.opaque(), field.index(), key);
        }
        self
    }

    /// Marks an object changed, so that watchers see it.
    pub fn touch(&mut self, class: ClassId, reference: OpaqueRef) -> &mut Self {
        self.writes.push(Write::Touch(class, reference));
        self
    }

    /// Ends an object; nothing where it is gone. The other ends of its relations forget it.
    pub fn delete<C: ClassKind>(&mut self, reference: Ref<C>) -> &mut Self {
        self.delete_row(C::ID, reference.opaque())
    }

    /// Ends an object of a class known at run time.
    pub fn delete_row(&mut self, class: ClassId, reference: OpaqueRef) -> &mut Self {
        self.writes.push(Write::Delete(class, reference));
        self
    }

    /// The object must exist.
    pub fn expect_exists(&mut self, class: ClassId, reference: OpaqueRef) -> &mut Self {
        self.expectations.push(Expectation::Exists(class, reference));
        self
    }

    /// The object must not exist.
    pub fn expect_absent(&mut self, class: ClassId, reference: OpaqueRef) -> &mut Self {
        self.expectations.push(Expectation::Absent(class, reference));
        self
    }

    /// The object must exist and be the version that was read.
    pub fn expect_unmodified(&mut self, class: ClassId, reference: OpaqueRef, modified: LogIndex) -> &mut Self {
        self.expectations.push(Expectation::Unmodified(class, reference, modified));
        self
    }

    /// The row must be the very version that was read.
    pub fn expect_row(&mut self, row: &crate::Row) -> &mut Self {
        self.expect_unmodified(row.class, row.reference, row.modified)
    }

    /// A field must hold this.
    pub fn expect<C: ClassKind, T: FieldValue>(
        &mut self,
        reference: Ref<C>,
        field: Field<C, T>,
        value: T,
    ) -> &mut Self {
        self.expectations.push(Expectation::Value(C::ID, reference.opaque(), field.index(), value.into_value()));
        self
    }

    /// A field of a class known at run time must hold this.
    pub fn expect_value(&mut self, class: ClassId, reference: OpaqueRef, field: u16, value: Value) -> &mut Self {
        self.expectations.push(Expectation::Value(class, reference, field, value));
        self
    }

    /// A map must not have this key.
    pub fn expect_absent_key(&mut self, class: ClassId, reference: OpaqueRef, field: u16, key: Key) -> &mut Self {
        self.expectations.push(Expectation::KeyAbsent(class, reference, field, key));
        self
    }

    /// No object of the class was made, changed or ended after this index.
    pub fn expect_class_unchanged(&mut self, class: ClassId, since: LogIndex) -> &mut Self {
        self.expectations.push(Expectation::ClassUnchanged(class, since));
        self
    }

    /// Replaces the rows of whole classes by staged ones, at once however many they are. It is the last write: those
    /// before it are taken for the state that it finds.
    pub fn replace(&mut self, replacement: Replacement) -> &mut Self {
        self.writes.push(Write::Replace(Arc::new(replacement)));
        self
    }

    /// The class must have no object at all.
    pub fn expect_class_empty(&mut self, class: ClassId) -> &mut Self {
        self.expectations.push(Expectation::ClassEmpty(class));
        self
    }
}

/// An object about to be made. What is not set takes the model's default.
#[derive(Debug, Clone)]
pub struct NewRow<C> {
    reference: Ref<C>,
    fields: Vec<(u16, Value)>,
}

impl<C: ClassKind> NewRow<C> {
    /// An object with this reference and this uuid.
    #[must_use]
    pub fn new(reference: Ref<C>, uuid: Uuid) -> Self {
        let mut fields = Vec::with_capacity(16);
        if let Some(index) = C::ID.def().field("uuid") {
            fields.push((index, Value::str(uuid.hyphenated().to_string())));
        }
        Self { reference, fields }
    }

    /// Sets a field.
    #[must_use]
    pub fn with<T: FieldValue>(mut self, field: Field<C, T>, value: T) -> Self {
        self.fields.push((field.index(), value.into_value()));
        self
    }

    /// Sets a field by its place.
    #[must_use]
    pub fn with_value(mut self, field: u16, value: Value) -> Self {
        self.fields.push((field, value));
        self
    }

    /// Its reference.
    #[must_use]
    pub const fn reference(&self) -> Ref<C> {
        self.reference
    }
}

/// Why a transaction had no effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// The object is gone.
    #[error("{0}/{1} does not exist")]
    Missing(&'static str, OpaqueRef),
    /// The object is there already.
    #[error("{0}/{1} exists")]
    Exists(&'static str, OpaqueRef),
    /// The object changed since it was read.
    #[error("{0}/{1} has changed")]
    Changed(&'static str, OpaqueRef),
    /// The map has the key.
    #[error("{0}/{1} has the key")]
    KeyExists(&'static str, OpaqueRef),
    /// The class has objects.
    #[error("{0} has objects")]
    NotEmpty(&'static str),
    /// Objects of the class have changed.
    #[error("{0} has changed")]
    ClassChanged(&'static str),
    /// What was staged is not all there.
    #[error("not all parts are there")]
    Unstaged,
}
