//! XML-RPC as the clients read it: no white space between tags, integers and strings bare in `<value>`.

use std::io::Write as _;

use crate::{ClassDef, Value};

/// Appends `<value>…</value>`.
pub fn xml(value: &Value, out: &mut Vec<u8>) {
    out.extend_from_slice(b"<value>");
    match value {
        Value::Str(text) => xml_text(text, out),
        Value::Enum(word) => xml_text(word, out),
        Value::Int(number) => out.extend_from_slice(itoa::Buffer::new().format(*number).as_bytes()),
        Value::Float(number) => {
            out.extend_from_slice(b"<double>");
            double(*number, out);
            out.extend_from_slice(b"</double>");
        }
        Value::Bool(truth) => {
            out.extend_from_slice(if *truth { b"<boolean>1</boolean>" } else { b"<boolean>0</boolean>" });
        }
        Value::Time(time) => {
            out.extend_from_slice(b"<dateTime.iso8601>");
            time.write_to(out);
            out.extend_from_slice(b"</dateTime.iso8601>");
        }
        Value::Ref(reference) => reference.write_to(out),
        Value::Set(elements) => {
            out.extend_from_slice(b"<array><data>");
            for element in elements.iter() {
                xml(element, out);
            }
            out.extend_from_slice(b"</data></array>");
        }
        Value::Map(entries) => {
            out.extend_from_slice(b"<struct>");
            for (key, value) in entries.iter() {
                member(&key.text(), value, out);
            }
            out.extend_from_slice(b"</struct>");
        }
        Value::Record(members) => {
            out.extend_from_slice(b"<struct>");
            for (name, value) in members.iter().filter(|(_, value)| !matches!(value, Value::Absent)) {
                member(name, value, out);
            }
            out.extend_from_slice(b"</struct>");
        }
        Value::Absent | Value::Void => {}
    }
    out.extend_from_slice(b"</value>");
}

/// Appends a row's record as `<value><struct>…</struct></value>`.
pub fn xml_record(class: &ClassDef, fields: &[Value], out: &mut Vec<u8>) {
    out.extend_from_slice(b"<value><struct>");
    for (name, value) in super::visible(class, fields) {
        member(name, value, out);
    }
    out.extend_from_slice(b"</struct></value>");
}

fn member(name: &str, value: &Value, out: &mut Vec<u8>) {
    out.extend_from_slice(b"<member><name>");
    xml_text(name, out);
    out.extend_from_slice(b"</name>");
    xml(value, out);
    out.extend_from_slice(b"</member>");
}

/// The layout of C's `%.16g`: no point in whole numbers, `1e+20`, `1e-05`. The digits are the fewest that read back
/// as the same number.
fn double(number: f64, out: &mut Vec<u8>) {
    // Writing to a Vec cannot fail.
    let _ = if number.is_nan() {
        out.write_all(b"nan")
    } else if number.is_infinite() {
        out.write_all(if number > 0.0 { b"inf" } else { b"-inf" })
    } else if number == 0.0 || (1e-4..1e16).contains(&number.abs()) {
        write!(out, "{number}")
    } else {
        let start = out.len();
        let _ = write!(out, "{number:e}");
        exponent_as_in_c(start, out)
    };
}

/// Rewrites the exponent of the number that begins at `start`: with its sign, and two digits at least.
fn exponent_as_in_c(start: usize, out: &mut Vec<u8>) -> std::io::Result<()> {
    let Some(mark) = out[start..].iter().position(|byte| *byte == b'e').map(|at| start + at) else { return Ok(()) };
    let digits = out[mark + 1..].iter().filter(|byte| byte.is_ascii_digit());
    let size = digits.fold(0_u32, |size, digit| size * 10 + u32::from(digit - b'0'));
    let sign = if out[mark + 1..].starts_with(b"-") { '-' } else { '+' };
    out.truncate(mark);
    write!(out, "e{sign}{size:02}")
}

/// Appends text with the four entities; what XML 1.0 forbids is dropped.
pub fn xml_text(text: &str, out: &mut Vec<u8>) {
    let bytes = text.as_bytes();
    let mut plain = 0;
    for (index, byte) in bytes.iter().enumerate() {
        let (entity, length): (&[u8], usize) = match byte {
            b'<' => (b"&lt;", 1),
            b'>' => (b"&gt;", 1),
            b'&' => (b"&amp;", 1),
            b'"' => (b"&quot;", 1),
            // A bare carriage return would be read back as a line feed.
            b'\r' => (b"&#13;", 1),
            b'\t' | b'\n' => continue,
            0..=0x1f => (b"", 1),
            // U+FFFE and U+FFFF.
            0xef if bytes.get(index + 1) == Some(&0xbf) && matches!(bytes.get(index + 2), Some(0xbe | 0xbf)) => {
                (b"", 3)
            }
            _ => continue,
        };
        if plain <= index {
            out.extend_from_slice(&bytes[plain..index]);
            out.extend_from_slice(entity);
            plain = index + length;
        }
    }
    out.extend_from_slice(&bytes[plain..]);
}

#[cfg(test)]
mod tests {
    #[test]
    fn doubles_have_the_layout_that_c_gives_them() {
        for (number, text) in [
            (0.0001, "0.0001"),
            (0.000_012, "1.2e-05"),
            (-1e-300, "-1e-300"),
            (9_999_999_999_999_998.0, "9999999999999998"),
            (1e16, "1e+16"),
            (1.5e20, "1.5e+20"),
            (-2.5, "-2.5"),
        ] {
            let mut out = b"7".to_vec();
            super::double(number, &mut out);
            assert_eq!(String::from_utf8_lossy(&out), format!("7{text}"));
        }
    }
}
