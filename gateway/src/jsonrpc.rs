//! JSON-RPC 1.0 and 2.0, as the published clients read them.

use datamodel::{ApiError, Input, encode, errors};
use serde_json::Value as Json;

use crate::calls::{Decoded, Envelope};

/// A call's id, echoed as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Id {
    Number(i64),
    Text(String),
}

impl Id {
    pub(crate) fn write_to(&self, out: &mut Vec<u8>) {
        match self {
            Self::Number(number) => out.extend_from_slice(number.to_string().as_bytes()),
            Self::Text(text) => encode::json_string(text, out),
        }
    }
}

/// Reads a call. Depth is bounded by the parser.
pub(crate) fn decode(body: &[u8]) -> Result<Decoded, String> {
    let text = match std::str::from_utf8(body) {
        Ok(text) => text,
        Err(_) => {
            let shown = String::from_utf8_lossy(body).chars().take(64).collect::<String>();
            let error = errors::invalid_value("Invalid UTF-8 string in parameter", shown);
            return Ok(Decoded::Refused(error, Envelope::Json2(Id::Number(0))));
        }
    };
    let json: Json = serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
    let Json::Object(mut call) = json else { return Err("a call is an object; batches are not served".into()) };
    let id = match call.remove("id") {
        Some(Json::String(text)) => Id::Text(text),
        Some(Json::Number(number)) => Id::Number(number.as_i64().ok_or("the id is no integer")?),
        _ => return Err("a call has an id, a string or an integer".into()),
    };
    let envelope = match call.remove("jsonrpc") {
        None => Envelope::Json1(id),
        Some(Json::String(version)) if version == "2.0" => Envelope::Json2(id),
        Some(_) => return Err("the version is 2.0, or left out".into()),
    };
    let Some(Json::String(method)) = call.remove("method") else { return Err("a call has a method".into()) };
    let params = match call.remove("params") {
        Some(Json::Array(params)) => params.into_iter().map(Input::from).collect(),
        Some(Json::Null) | None if matches!(envelope, Envelope::Json2(_)) => Vec::new(),
        Some(object @ Json::Object(_)) if matches!(envelope, Envelope::Json2(_)) => vec![object.into()],
        _ => return Err("params is an array".into()),
    };
    Ok(Decoded::Call { method, params, envelope })
}

fn strings(words: impl IntoIterator<Item = impl AsRef<str>>, out: &mut Vec<u8>) {
    out.push(b'[');
    for (place, word) in words.into_iter().enumerate() {
        if place > 0 {
            out.push(b',');
        }
        encode::json_string(word.as_ref(), out);
    }
    out.push(b']');
}

pub(crate) fn failure_1(error: &ApiError, id: &Id, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"result\":null,\"error\":");
    strings(error.description(), out);
    out.extend_from_slice(b",\"id\":");
    id.write_to(out);
    out.push(b'}');
}

pub(crate) fn failure_2(error: &ApiError, id: &Id, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"jsonrpc\":\"2.0\",\"error\":{\"code\":1,\"message\":");
    encode::json_string(error.code, out);
    out.extend_from_slice(b",\"data\":");
    strings(&error.params, out);
    out.extend_from_slice(b"},\"id\":");
    id.write_to(out);
    out.push(b'}');
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;

    fn envelope(body: &str) -> Envelope {
        match decode(body.as_bytes()) {
            Ok(Decoded::Call { envelope, .. }) => envelope,
            Ok(Decoded::Refused(error, _)) => panic!("{error}"),
            Err(reason) => panic!("{body}: {reason}"),
        }
    }

    #[test]
    fn both_versions_are_told_apart_and_ids_are_kept_as_they_came() {
        assert!(matches!(envelope(r#"{"method":"a","params":[],"id":7}"#), Envelope::Json1(Id::Number(7))));
        assert!(
            matches!(envelope(r#"{"jsonrpc":"2.0","method":"a","id":"x"}"#), Envelope::Json2(Id::Text(id)) if id == "x")
        );
        assert!(matches!(
            envelope(r#"{"jsonrpc":"2.0","method":"a","params":null,"id":0}"#),
            Envelope::Json2(Id::Number(0))
        ));
    }

    #[test]
    fn what_is_not_served_is_refused() {
        let deep = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"a","params":{}"#, "[".repeat(100_000));
        for body in [
            "",
            "[]",
            "7",
            r#"[{"jsonrpc":"2.0","method":"a","id":1}]"#,
            r#"{"jsonrpc":"2.0","method":"a","id":null}"#,
            r#"{"jsonrpc":"2.0","method":"a"}"#,
            r#"{"jsonrpc":"2.0","method":"a","id":1.5}"#,
            r#"{"jsonrpc":"1.1","method":"a","id":1}"#,
            r#"{"method":"a","id":1}"#,
            r#"{"jsonrpc":"2.0","id":1,"params":[]}"#,
            &deep,
        ] {
            assert!(decode(body.as_bytes()).is_err(), "{body:.80}");
        }
    }

    #[test]
    fn failures_have_the_forms_that_clients_parse() {
        let error = ApiError::new("CODE", vec!["a\"b".to_owned()]);
        let mut out = Vec::new();
        failure_2(&error, &Id::Number(3), &mut out);
        assert_eq!(out, br#"{"jsonrpc":"2.0","error":{"code":1,"message":"CODE","data":["a\"b"]},"id":3}"#);
        out.clear();
        failure_1(&error, &Id::Text("i".into()), &mut out);
        assert_eq!(out, br#"{"result":null,"error":["CODE","a\"b"],"id":"i"}"#);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes);
        }
    }
}
