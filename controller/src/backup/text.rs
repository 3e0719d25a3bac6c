//! Values as JSON without loss: unlike the wire's, which drops what XML-RPC has no form for.

use datamodel::{Key, Type, Value};
use serde_json::Value as Json;

/// A stored value; none for what no row holds.
pub(super) fn to_json(value: &Value) -> Option<Json> {
    Some(match value {
        Value::Str(text) => Json::from(text.as_ref()),
        Value::Enum(word) => Json::from(*word),
        Value::Int(number) => Json::from(*number),
        // As text: exact both ways, and not everything that is a float is a number in JSON.
        Value::Float(number) => Json::from(format!("{number:?}")),
        Value::Bool(truth) => Json::from(*truth),
        Value::Time(time) => Json::from(time.0),
        Value::Ref(reference) => Json::from(reference.to_string()),
        Value::Set(members) => Json::Array(members.iter().map(to_json).collect::<Option<_>>()?),
        Value::Map(entries) => Json::Object(
            entries
                .iter()
                .map(|(key, value)| Some((key.text().into_owned(), to_json(value)?)))
                .collect::<Option<_>>()?,
        ),
        Value::Absent => Json::Null,
        Value::Record(_) | Value::Void => return None,
    })
}

/// A value of a type; none where it is not of that type.
pub(super) fn from_json(ty: &Type, json: &Json) -> Option<Value> {
    Some(match (ty, json) {
        (Type::String, Json::String(text)) => Value::str(text.as_str()),
        (Type::Enum(words), Json::String(word)) => Value::Enum(exact(words, word)?),
        (Type::Int, Json::Number(number)) => Value::Int(number.as_i64()?),
        (Type::Float, Json::String(number)) => Value::Float(number.parse().ok()?),
        (Type::Bool, Json::Bool(truth)) => Value::Bool(*truth),
        (Type::DateTime, Json::Number(time)) => Value::Time(datamodel::Timestamp(time.as_i64()?)),
        (Type::Ref(_), Json::String(reference)) => Value::Ref(reference.parse().ok()?),
        (Type::Set(element), Json::Array(members)) => {
            Value::Set(members.iter().map(|member| from_json(element, member)).collect::<Option<_>>()?)
        }
        (Type::Map(key, value), Json::Object(entries)) => {
            let pairs = entries.iter().map(|(name, content)| Some((from_text(key, name)?, from_json(value, content)?)));
            Value::Map(pairs.collect::<Option<_>>()?)
        }
        (Type::Option(_), Json::Null) => Value::Absent,
        (Type::Option(inner), json) => from_json(inner, json)?,
        _ => return None,
    })
}

fn from_text(ty: &Type, text: &str) -> Option<Key> {
    Some(match ty {
        Type::String => Key::Str(text.into()),
        Type::Int => Key::Int(text.parse().ok()?),
        Type::Ref(_) => Key::Ref(text.parse().ok()?),
        Type::Enum(words) => Key::Enum(exact(words, text)?),
        _ => return None,
    })
}

/// The model's reader of words does not mind their case; here there is one spelling.
fn exact(words: &datamodel::EnumDef, text: &str) -> Option<&'static str> {
    words.words.iter().copied().find(|word| *word == text)
}
