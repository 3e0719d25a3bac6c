//! The indexes of a table: its objects by `uuid` and by `name_label`.
//!
//! A change of a persistent map copies the nodes on the way to what changed, entry by entry. A UUID is therefore kept as
//! its sixteen bytes and not as a counted text: a node of them is copied without counting anything.

use std::sync::Arc;

use datamodel::{OpaqueRef, Value};
use imbl::{HashMap, OrdMap, OrdSet};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use crate::row::Row;

/// Objects by the text of their `uuid`, exactly: upper case is another text.
#[derive(Clone, Default)]
pub(crate) struct Uuids {
    /// Texts that are UUIDs as this program writes them: as good as all.
    written: OrdMap<Uuid, OpaqueRef>,
    /// What a client or a database of another make called a uuid.
    others: HashMap<Arc<str>, OpaqueRef>,
}

/// The UUID whose usual form is exactly this text.
fn as_written(text: &str) -> Option<Uuid> {
    let uuid = Uuid::try_parse(text).ok()?;
    (uuid.hyphenated().encode_lower(&mut [0; Hyphenated::LENGTH]) == text).then_some(uuid)
}

impl Uuids {
    pub(crate) fn get(&self, text: &str) -> Option<OpaqueRef> {
        match as_written(text) {
            Some(uuid) => self.written.get(&uuid).copied(),
            None => self.others.get(text).copied(),
        }
    }

    /// The last object of a uuid is the one that is found.
    pub(crate) fn insert(&mut self, row: &Row) {
        let Some(text) = text(row, "uuid") else { return };
        match as_written(text) {
            Some(uuid) => drop(self.written.insert(uuid, row.reference)),
            None => drop(self.others.insert(Arc::clone(text), row.reference)),
        }
    }

    /// Forgets the object, unless another of its uuid came after it.
    pub(crate) fn remove(&mut self, row: &Row) {
        let Some(text) = text(row, "uuid") else { return };
        if self.get(text) != Some(row.reference) {
            return;
        }
        match as_written(text) {
            Some(uuid) => drop(self.written.remove(&uuid)),
            None => drop(self.others.remove(text)),
        }
    }
}

/// Objects by their `name_label`. Thousands may have one name, and each of them may be renamed.
#[derive(Clone, Default)]
pub(crate) struct Names(HashMap<Arc<str>, OrdSet<OpaqueRef>>);

impl Names {
    pub(crate) fn get(&self, label: &str) -> impl Iterator<Item = &OpaqueRef> {
        self.0.get(label).into_iter().flatten()
    }

    pub(crate) fn insert(&mut self, row: &Row) {
        if let Some(label) = text(row, "name_label") {
            self.0.entry(Arc::clone(label)).or_default().insert(row.reference);
        }
    }

    pub(crate) fn remove(&mut self, row: &Row) {
        let Some(label) = text(row, "name_label") else { return };
        if let Some(references) = self.0.get_mut(label) {
            references.remove(&row.reference);
            if references.is_empty() {
                self.0.remove(label);
            }
        }
    }
}

fn text<'a>(row: &'a Row, field: &str) -> Option<&'a Arc<str>> {
    match row.value(row.class.def().field(field)?) {
        Value::Str(text) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use datamodel::{ClassKind as _, Vm};

    use super::*;

    fn named(reference: u128, uuid: &str) -> Row {
        let field = Vm::ID.def().field("uuid").expect("a VM has a uuid");
        Row::of_defaults(Vm::ID, OpaqueRef::from_uuid(Uuid::from_u128(reference)))
            .with_values(&[(field, Value::str(uuid.to_owned()))])
    }

    #[test]
    fn a_uuid_is_found_by_exactly_its_text_whatever_it_is() {
        let texts = [
            "0d5e0c50-63ab-4f0c-a1ae-cbcf8d4ad7e1",
            "0D5E0C50-63AB-4F0C-A1AE-CBCF8D4AD7E1",
            "0d5e0c5063ab4f0ca1aecbcf8d4ad7e1",
            "",
            "my own",
        ];
        let rows: Vec<Row> = texts.iter().zip(1..).map(|(text, reference)| named(reference, text)).collect();
        let mut uuids = Uuids::default();
        for row in &rows {
            assert_eq!(uuids.get(row.uuid()), None);
            uuids.insert(row);
        }
        for row in &rows {
            assert_eq!(uuids.get(row.uuid()), Some(row.reference), "{}", row.uuid());
        }
        for row in &rows {
            uuids.remove(row);
            assert_eq!(uuids.get(row.uuid()), None, "{}", row.uuid());
        }
    }

    #[test]
    fn an_object_that_is_removed_does_not_take_away_another_of_its_uuid() {
        let (old, new) =
            (named(1, "0d5e0c50-63ab-4f0c-a1ae-cbcf8d4ad7e1"), named(2, "0d5e0c50-63ab-4f0c-a1ae-cbcf8d4ad7e1"));
        let mut uuids = Uuids::default();
        uuids.insert(&old);
        uuids.insert(&new);
        uuids.remove(&old);
        assert_eq!(uuids.get(new.uuid()), Some(new.reference));
    }
}
