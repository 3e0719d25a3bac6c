//! Typed field ids: the compiler knows of which class a field is, and what it holds.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::{ClassKind, Key, Ref, Timestamp, Value};

/// A field of class `C` that holds a `T`. The index is the field's place in the class.
pub struct Field<C, T> {
    index: u16,
    types: PhantomData<fn() -> (C, T)>,
}

impl<C, T> Clone for Field<C, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<C, T> Copy for Field<C, T> {}

impl<C, T> Field<C, T> {
    pub(crate) const fn new(index: u16) -> Self {
        Self { index, types: PhantomData }
    }

    /// The field's place in its class.
    #[must_use]
    pub const fn index(self) -> u16 {
        self.index
    }
}

/// A Rust type that a field can hold.
pub trait FieldValue: Sized {
    /// `None` where the value is of another type.
    fn from_value(value: &Value) -> Option<Self>;
    /// The value to store.
    fn into_value(self) -> Value;
}

impl FieldValue for Value {
    fn from_value(value: &Value) -> Option<Self> {
        Some(value.clone())
    }
    fn into_value(self) -> Value {
        self
    }
}

macro_rules! plain {
    ($($rust:ty: $variant:ident),* $(,)?) => {$(
        impl FieldValue for $rust {
            fn from_value(value: &Value) -> Option<Self> {
                if let Value::$variant(inner) = value { Some(*inner) } else { None }
            }
            fn into_value(self) -> Value {
                Value::$variant(self)
            }
        }
    )*};
}
plain! { i64: Int, f64: Float, bool: Bool, Timestamp: Time, crate::OpaqueRef: Ref }

impl FieldValue for String {
    fn from_value(value: &Value) -> Option<Self> {
        if let Value::Str(text) = value { Some(text.as_ref().to_owned()) } else { None }
    }
    fn into_value(self) -> Value {
        Value::Str(self.into())
    }
}

impl FieldValue for Arc<str> {
    fn from_value(value: &Value) -> Option<Self> {
        if let Value::Str(text) = value { Some(Arc::clone(text)) } else { None }
    }
    fn into_value(self) -> Value {
        Value::Str(self)
    }
}

impl<C: ClassKind> FieldValue for Ref<C> {
    fn from_value(value: &Value) -> Option<Self> {
        if let Value::Ref(reference) = value { Some(Self::from_opaque(*reference)) } else { None }
    }
    fn into_value(self) -> Value {
        Value::Ref(self.opaque())
    }
}

impl<T: FieldValue> FieldValue for Vec<T> {
    fn from_value(value: &Value) -> Option<Self> {
        if let Value::Set(elements) = value { elements.iter().map(T::from_value).collect() } else { None }
    }
    fn into_value(self) -> Value {
        Value::Set(self.into_iter().map(T::into_value).collect())
    }
}

impl<K: FieldValue + Ord, V: FieldValue> FieldValue for BTreeMap<K, V> {
    fn from_value(value: &Value) -> Option<Self> {
        let Value::Map(entries) = value else { return None };
        entries.iter().map(|(key, value)| Some((K::from_value(&key.to_value())?, V::from_value(value)?))).collect()
    }
    fn into_value(self) -> Value {
        Value::Map(
            self.into_iter()
                .filter_map(|(key, value)| Some((Key::from_value(key.into_value())?, value.into_value())))
                .collect(),
        )
    }
}

/// Declares one of the model's enums.
macro_rules! api_enum {
    ($(#[$doc:meta])* $name:ident $wire:literal { $($variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $(#[doc = concat!("`", $word, "`")] $variant,)*
        }

        impl $name {
            /// Every value, in model order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The word as it travels.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }
        }

        impl std::str::FromStr for $name {
            type Err = crate::UnknownWord;
            fn from_str(text: &str) -> Result<Self, crate::UnknownWord> {
                match text {
                    $($word => Ok(Self::$variant),)*
                    _ => Err(crate::UnknownWord($wire)),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str(self.as_str())
            }
        }

        impl From<$name> for String {
            fn from(word: $name) -> Self {
                word.as_str().to_owned()
            }
        }

        impl crate::FieldValue for $name {
            fn from_value(value: &crate::Value) -> Option<Self> {
                value.as_str().and_then(|text| text.parse().ok())
            }
            fn into_value(self) -> crate::Value {
                crate::Value::Enum(self.as_str())
            }
        }
    };
}
pub(crate) use api_enum;

impl FieldValue for () {
    fn from_value(value: &Value) -> Option<Self> {
        matches!(value, Value::Void).then_some(())
    }
    fn into_value(self) -> Value {
        Value::Void
    }
}
