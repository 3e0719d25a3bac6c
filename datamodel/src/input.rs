//! What a client sent, before anybody knows which types were meant, and its conversion to the model's types.
//!
//! Clients differ: integers come as numbers and as text, dates with and without hyphens, null references
//! as empty strings, records with too few or too many members. What is accepted here is what the
//! published clients send; everything else is refused by name, never guessed.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::errors;
use crate::{ApiError, ClassId, Key, OpaqueRef, Qualifier, Type, Value};

/// A decoded argument.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Text.
    Str(String),
    /// An integer.
    Int(i64),
    /// A double.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// The text of a date (XML-RPC only).
    Time(String),
    /// An array.
    Array(Vec<Input>),
    /// A structure; members in the order they came.
    Struct(Vec<(String, Input)>),
    /// Nothing.
    Nil,
}

impl From<serde_json::Value> for Input {
    /// An integer beyond 64 bits becomes a double. The depth is the parser's to bound.
    fn from(json: serde_json::Value) -> Self {
        use serde_json::Value as Json;
        match json {
            Json::Null => Self::Nil,
            Json::Bool(truth) => Self::Bool(truth),
            Json::Number(number) => match number.as_i64() {
                Some(integer) => Self::Int(integer),
                None => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Self::Str(text),
            Json::Array(items) => Self::Array(items.into_iter().map(Self::from).collect()),
            Json::Object(members) => {
                Self::Struct(members.into_iter().map(|(name, value)| (name, Self::from(value))).collect())
            }
        }
    }
}

/// Why an argument does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Misfit {
    /// To be answered at once.
    Refused(ApiError),
    /// A reference that no object can have: `HANDLE_INVALID`, once the session has been checked.
    NoSuchHandle(ApiError),
}

/// Converts an argument to the type its parameter has. `name` is the parameter's, for errors.
///
/// # Errors
/// `FIELD_TYPE_ERROR(name)` for a wrong type, `INVALID_VALUE(name, text)` for a bad enum word or date,
/// `HANDLE_INVALID(class, text)` for text that is no reference.
pub fn convert(ty: &Type, input: Input, name: &str) -> Result<Value, Misfit> {
    let wrong = || Misfit::Refused(errors::field_type_error(name));
    let invalid = |text: &str| Misfit::Refused(errors::invalid_value(name, text));
    Ok(match (ty, input) {
        (Type::String, Input::Str(text)) => Value::Str(text.into()),
        (Type::Int, Input::Int(number)) => Value::Int(number),
        (Type::Int, Input::Str(text)) => Value::Int(integer(&text).ok_or_else(wrong)?),
        #[allow(clippy::cast_possible_truncation)]
        (Type::Int, Input::Float(number)) if number.fract() == 0.0 && number.abs() < 9e15 => Value::Int(number as i64),
        (Type::Float, Input::Float(number)) => Value::Float(number),
        #[allow(clippy::cast_precision_loss)]
        (Type::Float, Input::Int(number)) => Value::Float(number as f64),
        (Type::Float, Input::Str(text)) => Value::Float(text.trim().parse().map_err(|_| wrong())?),
        (Type::Bool, Input::Bool(truth)) => Value::Bool(truth),
        (Type::DateTime, Input::Time(text) | Input::Str(text)) => {
            Value::Time(text.parse().map_err(|_| invalid(&text))?)
        }
        (Type::Enum(words), Input::Str(text)) => Value::Enum(words.word(&text).ok_or_else(|| invalid(&text))?),
        (Type::Ref(class), Input::Str(text)) => Value::Ref(reference(*class, &text)?),
        (Type::Ref(_), Input::Nil) => Value::Ref(OpaqueRef::NULL),
        (Type::Set(element), Input::Array(items)) => {
            Value::Set(items.into_iter().map(|item| convert(element, item, name)).collect::<Result<_, _>>()?)
        }
        (Type::Map(key, value), Input::Struct(members)) => {
            let mut entries = BTreeMap::new();
            for (member, content) in members {
                let key = Key::from_value(convert(key, Input::Str(member), name)?).ok_or_else(wrong)?;
                entries.insert(key, convert(value, content, name)?);
            }
            Value::map(entries)
        }
        (Type::Record(class), Input::Struct(members)) => record(*class, members)?,
        (Type::Option(_), Input::Nil) => Value::Absent,
        (Type::Option(inner), input) => convert(inner, input, name)?,
        _ => return Err(wrong()),
    })
}

/// Decimal or `0x…`.
fn integer(text: &str) -> Option<i64> {
    let text = text.trim();
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) if hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            i64::from_str_radix(&format!("{sign}{hex}"), 16).ok()
        }
        Some(_) => None,
        None => text.parse().ok(),
    }
}

fn reference(class: ClassId, text: &str) -> Result<OpaqueRef, Misfit> {
    if text.is_empty() {
        return Ok(OpaqueRef::NULL);
    }
    text.parse().map_err(|_| Misfit::NoSuchHandle(errors::handle_invalid(class.def().name, text)))
}

/// A constructor's argument: the members that the class knows, surplus ones dropped, defaults for those left out.
/// A member without a default that is missing is refused by the constructor, which knows what it can do without.
fn record(class: ClassId, members: Vec<(String, Input)>) -> Result<Value, Misfit> {
    let def = class.def();
    let mut out: Vec<(Cow<'static, str>, Value)> = Vec::with_capacity(members.len());
    for (member, content) in members {
        let Some(field) = def.field(&member).and_then(|index| def.field_def(index)).filter(|field| !field.hidden)
        else {
            continue;
        };
        // What only the pool sets is not the caller's to say: whole records are sent back by some clients.
        if field.qualifier == Qualifier::Runtime {
            continue;
        }
        out.push((Cow::Borrowed(field.name), convert(&field.ty, content, field.name)?));
    }
    Ok(Value::Record(out.into()))
}
