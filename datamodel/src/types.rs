//! The type system of the API, and the notation that the class files use for it.

use std::fmt;

use crate::value::{Map, Set};
use crate::{ClassId, OpaqueRef, Timestamp, Value};

/// An enum and its words, in model order.
#[derive(Debug, PartialEq, Eq)]
pub struct EnumDef {
    /// Its name.
    pub name: &'static str,
    /// Its words as they travel.
    pub words: Vec<&'static str>,
    /// The words that the first replicated format did not have, and the first one that has them.
    pub newer: Vec<(&'static str, u32)>,
}

impl EnumDef {
    /// The first replicated format that has a word: members of older ones do not know it.
    #[must_use]
    pub fn format(&self, word: &str) -> u32 {
        self.newer.iter().find(|(newer, _)| *newer == word).map_or(1, |(_, format)| *format)
    }

    /// The model's spelling of a word; case does not matter.
    #[must_use]
    pub fn word(&self, text: &str) -> Option<&'static str> {
        self.words
            .iter()
            .copied()
            .find(|word| *word == text)
            .or_else(|| self.words.iter().copied().find(|word| word.eq_ignore_ascii_case(text)))
    }
}

/// A type of a field, a parameter or a result.
#[derive(Debug, Clone, PartialEq)]
pub enum Type {
    /// `string`
    String,
    /// `int`
    Int,
    /// `float`
    Float,
    /// `bool`
    Bool,
    /// `datetime`
    DateTime,
    /// `enum NAME`
    Enum(&'static EnumDef),
    /// `CLASS ref`
    Ref(ClassId),
    /// `T set`
    Set(Box<Type>),
    /// `(K -> V) map`
    Map(Box<Type>, Box<Type>),
    /// `CLASS record`
    Record(ClassId),
    /// `T option`
    Option(Box<Type>),
    /// `<class> record`: a record of whatever class the context says (`event.snapshot`).
    AnyRecord,
    /// `an event batch`: what `event.from` answers.
    EventBatch,
    /// `void`
    Void,
}

impl Type {
    /// Reads the notation. `class` and `word` resolve names.
    pub(crate) fn parse(
        text: &str,
        class: &dyn Fn(&str) -> Option<ClassId>,
        word: &dyn Fn(&str) -> Option<&'static EnumDef>,
    ) -> Result<Self, String> {
        let text = text.trim();
        let inner = |text: &str| Self::parse(text, class, word).map(Box::new);
        Ok(match text {
            "string" => Self::String,
            "int" => Self::Int,
            "float" => Self::Float,
            "bool" => Self::Bool,
            "datetime" => Self::DateTime,
            "void" => Self::Void,
            "<class> record" => Self::AnyRecord,
            "an event batch" => Self::EventBatch,
            _ => {
                if let Some(element) = text.strip_suffix(" set") {
                    Self::Set(inner(element)?)
                } else if let Some(element) = text.strip_suffix(" option") {
                    Self::Option(inner(element)?)
                } else if let Some(pair) = text.strip_suffix(") map").and_then(|pair| pair.strip_prefix('(')) {
                    let (key, value) = pair.split_once(" -> ").ok_or_else(|| format!("map without arrow: {text}"))?;
                    Self::Map(inner(key)?, inner(value)?)
                } else if let Some(name) = text.strip_suffix(" ref") {
                    Self::Ref(class(name).ok_or_else(|| format!("unknown class: {text}"))?)
                } else if let Some(name) = text.strip_suffix(" record") {
                    Self::Record(class(name).ok_or_else(|| format!("unknown class: {text}"))?)
                } else if let Some(name) = text.strip_prefix("enum ") {
                    Self::Enum(word(name).ok_or_else(|| format!("unknown enum: {text}"))?)
                } else {
                    return Err(format!("unknown type: {text}"));
                }
            }
        })
    }

    /// The first replicated format in which a value of this type can be written: that of its newest word.
    #[must_use]
    pub fn format(&self, value: &Value) -> u32 {
        match (self, value) {
            (Self::Enum(words), Value::Enum(word)) => words.format(word),
            (Self::Set(element), Value::Set(members)) => {
                members.iter().map(|member| element.format(member)).max().unwrap_or(1)
            }
            (Self::Map(key, value), Value::Map(entries)) => {
                let entries = entries.iter().map(|(name, held)| key.format(&name.to_value()).max(value.format(held)));
                entries.max().unwrap_or(1)
            }
            (Self::Option(inner), value) => inner.format(value),
            _ => 1,
        }
    }

    /// The newest format of any word of this type.
    #[must_use]
    pub fn newest_word(&self) -> u32 {
        match self {
            Self::Enum(words) => words.newer.iter().map(|(_, format)| *format).max().unwrap_or(1),
            Self::Set(inner) | Self::Option(inner) => inner.newest_word(),
            Self::Map(key, value) => key.newest_word().max(value.newest_word()),
            _ => 1,
        }
    }

    /// What a field of this type holds when nobody said anything.
    #[must_use]
    pub fn zero(&self) -> Value {
        match self {
            Self::String => Value::str(""),
            Self::Int => Value::Int(0),
            Self::Float => Value::Float(0.0),
            Self::Bool => Value::Bool(false),
            Self::DateTime => Value::Time(Timestamp::EPOCH),
            Self::Enum(words) => Value::Enum(words.words.first().copied().unwrap_or("")),
            Self::Ref(_) => Value::Ref(OpaqueRef::NULL),
            Self::Set(_) => Value::Set(Set::default()),
            Self::Map(..) => Value::Map(Map::default()),
            Self::Record(_) | Self::AnyRecord | Self::EventBatch | Self::Option(_) => Value::Absent,
            Self::Void => Value::Void,
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::String => out.write_str("string"),
            Self::Int => out.write_str("int"),
            Self::Float => out.write_str("float"),
            Self::Bool => out.write_str("bool"),
            Self::DateTime => out.write_str("datetime"),
            Self::Void => out.write_str("void"),
            Self::AnyRecord => out.write_str("<class> record"),
            Self::EventBatch => out.write_str("an event batch"),
            Self::Enum(words) => write!(out, "enum {}", words.name),
            Self::Ref(class) => write!(out, "{} ref", class.def().name),
            Self::Record(class) => write!(out, "{} record", class.def().name),
            Self::Set(element) => write!(out, "{element} set"),
            Self::Option(element) => write!(out, "{element} option"),
            Self::Map(key, value) => write!(out, "({key} -> {value}) map"),
        }
    }
}
