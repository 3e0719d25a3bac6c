//! Values of fields, parameters and results. Small to hold: rows are made of them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

use crate::{OpaqueRef, Timestamp};

/// One value of an API type.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A string.
    Str(Arc<str>),
    /// A 64-bit integer.
    Int(i64),
    /// A double.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A date.
    Time(Timestamp),
    /// A word of an enum, as the model spells it.
    Enum(&'static str),
    /// A reference to an object.
    Ref(OpaqueRef),
    /// A set; the order is kept.
    Set(Set),
    /// A map.
    Map(Map),
    /// A record that is no row, such as an event or a constructor's argument; members in order.
    Record(Box<[(Cow<'static, str>, Value)]>),
    /// An optional value that is not there: its record member is left out.
    Absent,
    /// The result of a message that has none: the empty string on the wire.
    Void,
}

impl Value {
    /// A string.
    pub fn str(text: impl Into<Arc<str>>) -> Self {
        Self::Str(text.into())
    }

    /// A set.
    pub fn set(members: impl IntoIterator<Item = Self>) -> Self {
        Self::Set(members.into_iter().collect())
    }

    /// A map.
    pub fn map(entries: impl IntoIterator<Item = (Key, Self)>) -> Self {
        Self::Map(entries.into_iter().collect())
    }

    /// The text, where this is a string or an enum.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            Self::Enum(word) => Some(word),
            _ => None,
        }
    }
}

/// The members of a set: shared by the rows that have the same one, and nothing where there are none. Rows are copied
/// with every change, and most sets and maps of most rows are empty or as their template had them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Set(Option<Arc<Vec<Value>>>);

impl Set {
    /// Changes it; who shares it keeps what it was.
    pub fn edit<T>(&mut self, edit: impl FnOnce(&mut Vec<Value>) -> T) -> T {
        let out = edit(Arc::make_mut(self.0.get_or_insert_default()));
        self.0.take_if(|members| members.is_empty());
        out
    }
}

impl Deref for Set {
    type Target = [Value];

    fn deref(&self) -> &[Value] {
        self.0.as_ref().map_or(&[], |members| members.as_slice())
    }
}

impl FromIterator<Value> for Set {
    fn from_iter<I: IntoIterator<Item = Value>>(members: I) -> Self {
        let members: Vec<Value> = members.into_iter().collect();
        Self((!members.is_empty()).then(|| Arc::new(members)))
    }
}

impl IntoIterator for Set {
    type Item = Value;
    type IntoIter = std::vec::IntoIter<Value>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.map(Arc::unwrap_or_clone).unwrap_or_default().into_iter()
    }
}

/// The entries of a map; shared as a [`Set`]'s members are.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Map(Option<Arc<BTreeMap<Key, Value>>>);

static NO_ENTRIES: BTreeMap<Key, Value> = BTreeMap::new();

impl Map {
    /// Changes it; who shares it keeps what it was.
    pub fn edit<T>(&mut self, edit: impl FnOnce(&mut BTreeMap<Key, Value>) -> T) -> T {
        let out = edit(Arc::make_mut(self.0.get_or_insert_default()));
        self.0.take_if(|entries| entries.is_empty());
        out
    }
}

impl Deref for Map {
    type Target = BTreeMap<Key, Value>;

    fn deref(&self) -> &BTreeMap<Key, Value> {
        self.0.as_deref().unwrap_or(&NO_ENTRIES)
    }
}

impl FromIterator<(Key, Value)> for Map {
    fn from_iter<I: IntoIterator<Item = (Key, Value)>>(entries: I) -> Self {
        let entries: BTreeMap<Key, Value> = entries.into_iter().collect();
        Self((!entries.is_empty()).then(|| Arc::new(entries)))
    }
}

impl IntoIterator for Map {
    type Item = (Key, Value);
    type IntoIter = std::collections::btree_map::IntoIter<Key, Value>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.map(Arc::unwrap_or_clone).unwrap_or_default().into_iter()
    }
}

/// A key of a map.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// A string.
    Str(Arc<str>),
    /// An integer.
    Int(i64),
    /// A reference.
    Ref(OpaqueRef),
    /// A word of an enum.
    Enum(&'static str),
}

impl Key {
    /// The key as a value of its own.
    #[must_use]
    pub fn to_value(&self) -> Value {
        match self {
            Self::Str(text) => Value::Str(Arc::clone(text)),
            Self::Int(number) => Value::Int(*number),
            Self::Ref(reference) => Value::Ref(*reference),
            Self::Enum(word) => Value::Enum(word),
        }
    }

    /// A value as a key; `None` where the type cannot be one.
    #[must_use]
    pub fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Str(text) => Some(Self::Str(text)),
            Value::Int(number) => Some(Self::Int(number)),
            Value::Ref(reference) => Some(Self::Ref(reference)),
            Value::Enum(word) => Some(Self::Enum(word)),
            _ => None,
        }
    }

    /// The key as the wire spells it.
    #[must_use]
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Self::Str(text) => Cow::Borrowed(text),
            Self::Int(number) => Cow::Owned(number.to_string()),
            Self::Ref(reference) => Cow::Owned(reference.to_string()),
            Self::Enum(word) => Cow::Borrowed(word),
        }
    }
}

impl From<&str> for Key {
    fn from(text: &str) -> Self {
        Self::Str(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows are made of values, thousands of them for each VM.
    #[test]
    fn a_value_is_three_words() {
        assert_eq!(size_of::<Value>(), 24);
        assert_eq!(size_of::<Set>(), 8);
        assert_eq!(size_of::<Map>(), 8);
    }

    #[test]
    fn who_shares_a_set_or_a_map_keeps_it_when_another_changes_it() {
        let before: Set = [Value::Int(1)].into_iter().collect();
        let mut after = before.clone();
        after.edit(|members| members.push(Value::Int(2)));
        assert_eq!((before.len(), after.len()), (1, 2));
        after.edit(Vec::clear);
        assert_eq!(after, Set::default(), "nothing is always the same nothing");

        let before: Map = [(Key::from("a"), Value::Int(1))].into_iter().collect();
        let mut after = before.clone();
        after.edit(|entries| entries.remove(&Key::from("a")));
        assert_eq!((before.len(), after), (1, Map::default()));
    }
}
