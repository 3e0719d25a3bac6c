//! The notation of defaults in the class files: `""`, `0`, `1.`, `true`, `{}`, `{a}`, `{"k" -> "v"}`,
//! `OpaqueRef:NULL`, a bare enum word.

use std::collections::BTreeMap;

use crate::{Key, OpaqueRef, Type, Value};

pub(crate) fn parse_default(ty: &Type, text: &str) -> Option<Value> {
    let text = text.trim();
    Some(match ty {
        Type::String => Value::str(text.strip_prefix('"')?.strip_suffix('"')?),
        Type::Int => Value::Int(text.parse().ok()?),
        Type::Float => Value::Float(text.parse().ok()?),
        Type::Bool => Value::Bool(text.parse().ok()?),
        Type::DateTime => Value::Time(text.parse().ok()?),
        Type::Enum(words) => Value::Enum(words.word(text)?),
        Type::Ref(_) if text == "Null" => Value::Ref(OpaqueRef::NULL),
        Type::Ref(_) => Value::Ref(text.parse().ok()?),
        Type::Option(_) if text == "None" => Value::Absent,
        Type::Option(inner) => parse_default(inner, text)?,
        Type::Set(element) => {
            let elements = items(text)?.into_iter().map(|item| parse_default(element, item));
            Value::Set(elements.collect::<Option<_>>()?)
        }
        Type::Map(key, value) => {
            let mut entries = BTreeMap::new();
            for item in items(text)? {
                let (name, content) = item.split_once(" -> ")?;
                entries.insert(Key::from_value(parse_default(key, name)?)?, parse_default(value, content)?);
            }
            Value::map(entries)
        }
        Type::Record(_) | Type::AnyRecord | Type::EventBatch | Type::Void => return None,
    })
}

fn items(text: &str) -> Option<Vec<&str>> {
    let inner = text.strip_prefix('{')?.strip_suffix('}')?.trim();
    Some(if inner.is_empty() { Vec::new() } else { inner.split(',').map(str::trim).collect() })
}
