//! Values of fields, parameters and results. Small to hold: rows are made of them.

use std::borrow::Cow;
use std::collections::BTreeMap;
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
    Set(Vec<Value>),
    /// A map.
    Map(BTreeMap<Key, Value>),
    /// A record that is no row, such as an event or a constructor's argument; members in order.
    Record(Vec<(Cow<'static, str>, Value)>),
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
