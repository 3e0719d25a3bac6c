//! JSON as the clients read it: integers are numbers, dates and references strings, void the empty string.

use std::io::Write as _;

use crate::{ClassDef, Key, Value};

/// Appends a value.
pub fn json(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Str(text) => json_string(text, out),
        Value::Enum(word) => json_string(word, out),
        Value::Int(number) => out.extend_from_slice(itoa::Buffer::new().format(*number).as_bytes()),
        Value::Float(number) => float(*number, out),
        Value::Bool(truth) => out.extend_from_slice(if *truth { b"true" } else { b"false" }),
        Value::Time(time) => {
            out.push(b'"');
            time.write_to(out);
            out.push(b'"');
        }
        Value::Ref(reference) => {
            out.push(b'"');
            reference.write_to(out);
            out.push(b'"');
        }
        Value::Set(elements) => {
            out.push(b'[');
            for (index, element) in elements.iter().enumerate() {
                comma(index, out);
                json(element, out);
            }
            out.push(b']');
        }
        Value::Map(entries) => {
            out.push(b'{');
            for (index, (key, value)) in entries.iter().enumerate() {
                comma(index, out);
                name(key, out);
                out.push(b':');
                json(value, out);
            }
            out.push(b'}');
        }
        Value::Record(members) => {
            out.push(b'{');
            let there = members.iter().filter(|(_, value)| !matches!(value, Value::Absent));
            for (index, (name, value)) in there.enumerate() {
                comma(index, out);
                json_string(name, out);
                out.push(b':');
                json(value, out);
            }
            out.push(b'}');
        }
        Value::Absent | Value::Void => out.extend_from_slice(b"\"\""),
    }
}

/// Appends a row's record.
pub fn json_record(class: &ClassDef, fields: &[Value], out: &mut Vec<u8>) {
    out.push(b'{');
    for (index, (name, value)) in super::visible(class, fields).enumerate() {
        comma(index, out);
        out.push(b'"');
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b"\":");
        json(value, out);
    }
    out.push(b'}');
}

fn comma(index: usize, out: &mut Vec<u8>) {
    if index > 0 {
        out.push(b',');
    }
}

fn name(key: &Key, out: &mut Vec<u8>) {
    match key {
        Key::Ref(reference) => {
            out.push(b'"');
            reference.write_to(out);
            out.push(b'"');
        }
        other => json_string(&other.text(), out),
    }
}

/// A float keeps its point; JSON has no word for what is not finite, so that the clients' own is used.
fn float(number: f64, out: &mut Vec<u8>) {
    if number.is_nan() {
        out.extend_from_slice(b"NaN");
    } else if number.is_infinite() {
        out.extend_from_slice(if number > 0.0 { b"Infinity" } else { b"-Infinity" });
    } else {
        // Writing to a Vec cannot fail. Debug form: shortest text that reads back the same, with a point or exponent.
        let _ = write!(out, "{number:?}");
    }
}

/// Appends text as a JSON string.
pub fn json_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    let bytes = text.as_bytes();
    let mut plain = 0;
    for (index, byte) in bytes.iter().enumerate() {
        if !matches!(byte, b'"' | b'\\' | 0..=0x1f) {
            continue;
        }
        out.extend_from_slice(&bytes[plain..index]);
        plain = index + 1;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            // The other control characters may not travel: XML has no form for them, and both wires say the same.
            _ => {}
        }
    }
    out.extend_from_slice(&bytes[plain..]);
    out.push(b'"');
}
