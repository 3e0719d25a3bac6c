//! XML-RPC: a strict reader for hostile bodies, a writer that every published client can read.
//!
//! No document type, no entities but the five and numbers, bounded depth: what a body can cost is known
//! from its length.

use datamodel::{ApiError, Input, encode, errors};
use quick_xml::Reader;
use quick_xml::events::Event;

use crate::calls::{Decoded, Envelope};

const DEEPEST: usize = 64;

/// Reads a call.
pub(crate) fn decode(body: &[u8]) -> Result<Decoded, String> {
    let text = match std::str::from_utf8(body) {
        Ok(text) => text,
        Err(_) => {
            let shown = String::from_utf8_lossy(body).chars().take(64).collect::<String>();
            return Ok(Decoded::Refused(
                errors::invalid_value("Invalid UTF-8 string in parameter", shown),
                Envelope::Xml,
            ));
        }
    };
    let mut parser = Parser { reader: Reader::from_str(text), depth: 0 };
    parser.reader.config_mut().check_end_names = true;
    parser.open("methodCall")?;
    parser.open("methodName")?;
    let method = parser.text_until("methodName")?.trim().to_owned();
    if method.is_empty() {
        return Err("the method has no name".into());
    }
    let mut params = Vec::new();
    match parser.tag()? {
        Token::Start(tag) if tag == "params/" => {}
        Token::Start(tag) if tag == "params" => {
            while parser.open_or_close("param", "params")? {
                match parser.tag()? {
                    Token::Start(tag) if tag == "value" => params.push(parser.value()?),
                    Token::Start(tag) if tag == "value/" => params.push(Input::Str(String::new())),
                    _ => return Err("<value> expected".into()),
                }
                parser.close("param")?;
            }
        }
        _ => return Err("<params> expected".into()),
    }
    parser.close("methodCall")?;
    Ok(Decoded::Call { method, params, envelope: Envelope::Xml })
}

enum Token {
    Start(String),
    End(String),
    Text(String),
    Eof,
}

struct Parser<'a> {
    reader: Reader<&'a [u8]>,
    depth: usize,
}

impl Parser<'_> {
    fn next(&mut self) -> Result<Token, String> {
        loop {
            let event = self.reader.read_event().map_err(|error| format!("bad XML: {error}"))?;
            return Ok(match event {
                Event::Start(start) => {
                    self.depth += 1;
                    if self.depth > DEEPEST {
                        return Err("nested too deeply".into());
                    }
                    Token::Start(start.name().as_ref().to_owned())
                }
                Event::End(end) => {
                    self.depth = self.depth.saturating_sub(1);
                    Token::End(end.name().as_ref().to_owned())
                }
                Event::Empty(empty) => return Ok(Token::Start(format!("{}/", empty.name().as_ref()))),
                Event::Text(text) => Token::Text((*text).to_owned()),
                Event::CData(data) => Token::Text((*data).to_owned()),
                Event::GeneralRef(entity) => Token::Text(character(&entity)?),
                Event::DocType(_) => return Err("a document type is not allowed".into()),
                Event::Eof => Token::Eof,
                Event::Comment(_) | Event::Decl(_) | Event::PI(_) => continue,
            });
        }
    }

    /// The next tag; only white space may stand before it.
    fn tag(&mut self) -> Result<Token, String> {
        loop {
            match self.next()? {
                Token::Text(text) if text.trim().is_empty() => {}
                Token::Text(_) => return Err("text where a tag belongs".into()),
                Token::Eof => return Err("the body is cut short".into()),
                token => return Ok(token),
            }
        }
    }

    fn open(&mut self, wanted: &str) -> Result<(), String> {
        match self.tag()? {
            Token::Start(name) if name == wanted => Ok(()),
            _ => Err(format!("<{wanted}> expected")),
        }
    }

    fn close(&mut self, wanted: &str) -> Result<(), String> {
        match self.tag()? {
            Token::End(name) if name == wanted => Ok(()),
            _ => Err(format!("</{wanted}> expected")),
        }
    }

    /// True at `<start>`, false at `</end>`.
    fn open_or_close(&mut self, start: &str, end: &str) -> Result<bool, String> {
        match self.tag()? {
            Token::Start(name) if name == start => Ok(true),
            Token::End(name) if name == end => Ok(false),
            _ => Err(format!("<{start}> or </{end}> expected")),
        }
    }

    fn text_until(&mut self, end: &str) -> Result<String, String> {
        let mut out = String::new();
        loop {
            match self.next()? {
                Token::Text(text) => out.push_str(&text),
                Token::End(name) if name == end => return Ok(out),
                _ => return Err(format!("</{end}> expected")),
            }
        }
    }

    /// After `<value>`: what it holds, up to `</value>`.
    fn value(&mut self) -> Result<Input, String> {
        let mut bare = String::new();
        loop {
            match self.next()? {
                Token::Text(text) => bare.push_str(&text),
                Token::End(name) if name == "value" => return Ok(Input::Str(bare)),
                Token::Start(name) if bare.trim().is_empty() => {
                    let value = self.typed(&name)?;
                    self.close("value")?;
                    return Ok(value);
                }
                Token::Eof => return Err("the body is cut short".into()),
                _ => return Err("</value> expected".into()),
            }
        }
    }

    fn typed(&mut self, name: &str) -> Result<Input, String> {
        Ok(match name {
            "string" => Input::Str(self.text_until("string")?),
            "string/" => Input::Str(String::new()),
            "int" | "i4" | "i8" => {
                let text = self.text_until(name)?;
                Input::Int(text.trim().parse().map_err(|_| "not an integer".to_owned())?)
            }
            // Only 1 is true: that is what clients have come to rely on.
            "boolean" => Input::Bool(self.text_until("boolean")?.trim() == "1"),
            "double" => {
                let text = self.text_until("double")?;
                Input::Float(text.trim().parse().map_err(|_| "not a number".to_owned())?)
            }
            "dateTime.iso8601" => Input::Time(self.text_until(name)?),
            "base64" => Input::Str(self.text_until("base64")?),
            "nil/" => Input::Nil,
            "nil" => {
                self.close("nil")?;
                Input::Nil
            }
            "array" => {
                let items = self.array()?;
                self.close("array")?;
                items
            }
            "struct" => self.structure()?,
            "struct/" => Input::Struct(Vec::new()),
            other => return Err(format!("unknown type <{other}>")),
        })
    }

    fn array(&mut self) -> Result<Input, String> {
        match self.tag()? {
            Token::Start(name) if name == "data/" => return Ok(Input::Array(Vec::new())),
            Token::Start(name) if name == "data" => {}
            _ => return Err("<data> expected".into()),
        }
        let mut items = Vec::new();
        loop {
            match self.tag()? {
                Token::Start(name) if name == "value" => items.push(self.value()?),
                Token::Start(name) if name == "value/" => items.push(Input::Str(String::new())),
                Token::End(name) if name == "data" => return Ok(Input::Array(items)),
                _ => return Err("<value> or </data> expected".into()),
            }
        }
    }

    fn structure(&mut self) -> Result<Input, String> {
        let mut members = Vec::new();
        while self.open_or_close("member", "struct")? {
            self.open("name")?;
            let name = self.text_until("name")?;
            let value = match self.tag()? {
                Token::Start(tag) if tag == "value" => self.value()?,
                Token::Start(tag) if tag == "value/" => Input::Str(String::new()),
                _ => return Err("<value> expected".into()),
            };
            members.push((name, value));
            self.close("member")?;
        }
        Ok(Input::Struct(members))
    }
}

/// The five entities and numbers; anything else would need a document type.
fn character(entity: &str) -> Result<String, String> {
    let number = |digits: &str, radix| u32::from_str_radix(digits, radix).ok().and_then(char::from_u32);
    let known = match entity {
        "lt" => Some('<'),
        "gt" => Some('>'),
        "amp" => Some('&'),
        "quot" => Some('"'),
        "apos" => Some('\''),
        _ => match entity.strip_prefix("#x") {
            Some(digits) => number(digits, 16),
            None => entity.strip_prefix('#').and_then(|digits| number(digits, 10)),
        },
    };
    known.map(String::from).ok_or_else(|| format!("unknown entity &{entity};"))
}

const HEAD: &[u8] = b"<?xml version=\"1.0\"?><methodResponse><params><param>";
const TAIL: &[u8] = b"</param></params></methodResponse>";

/// Up to where the result's `<value>` begins.
pub(crate) fn success_head(bare: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(HEAD);
    if !bare {
        out.extend_from_slice(
            b"<value><struct><member><name>Status</name><value>Success</value></member><member><name>Value</name>",
        );
    }
}

/// After the result's `</value>`.
pub(crate) fn success_tail(bare: bool, out: &mut Vec<u8>) {
    if !bare {
        out.extend_from_slice(b"</member></struct></value>");
    }
    out.extend_from_slice(TAIL);
}

pub(crate) fn failure(error: &ApiError, out: &mut Vec<u8>) {
    out.extend_from_slice(HEAD);
    out.extend_from_slice(
        b"<value><struct><member><name>Status</name><value>Failure</value></member>\
          <member><name>ErrorDescription</name><value><array><data>",
    );
    for word in error.description() {
        out.extend_from_slice(b"<value>");
        encode::xml_text(&word, out);
        out.extend_from_slice(b"</value>");
    }
    out.extend_from_slice(b"</data></array></value></member></struct></value>");
    out.extend_from_slice(TAIL);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;

    fn param(value: &str) -> Result<Input, String> {
        let body = format!(
            "<?xml version=\"1.0\"?><methodCall><methodName>a.b</methodName><params><param>{value}</param></params></methodCall>"
        );
        match decode(body.as_bytes())? {
            Decoded::Call { mut params, .. } => Ok(params.remove(0)),
            Decoded::Refused(error, _) => Err(error.to_string()),
        }
    }

    #[test]
    fn every_type_that_clients_send_is_read() {
        let text = |text: &str| Input::Str(text.to_owned());
        for (value, wanted) in [
            ("<value> bare &lt;text&gt; </value>", text(" bare <text> ")),
            ("<value/>", text("")),
            ("<value></value>", text("")),
            ("<value> <string>a&#x41;&#66;</string> </value>", text("aAB")),
            ("<value><string/></value>", text("")),
            ("<value><![CDATA[<x>]]></value>", text("<x>")),
            ("<value><int>-7</int></value>", Input::Int(-7)),
            ("<value><i4>7</i4></value>", Input::Int(7)),
            ("<value><i8>9223372036854775807</i8></value>", Input::Int(i64::MAX)),
            ("<value><boolean>1</boolean></value>", Input::Bool(true)),
            ("<value><boolean>true</boolean></value>", Input::Bool(false)),
            ("<value><double>5.0</double></value>", Input::Float(5.0)),
            ("<value><nil/></value>", Input::Nil),
            ("<value><array><data/></array></value>", Input::Array(vec![])),
            ("<value><array><data><value>a</value></data></array></value>", Input::Array(vec![text("a")])),
            ("<value><struct/></value>", Input::Struct(vec![])),
            (
                "<value><struct><member><name>k</name><value>v</value></member></struct></value>",
                Input::Struct(vec![("k".to_owned(), text("v"))]),
            ),
        ] {
            assert_eq!(param(value), Ok(wanted), "{value}");
        }
    }

    #[test]
    fn what_is_malformed_or_hostile_is_refused() {
        let deep = format!("{}x{}", "<value><array><data>".repeat(100), "</data></array></value>".repeat(100));
        for value in [
            "<value><int>x</int></value>",
            "<value><int/></value>",
            "<value><i4>1</i8></value>",
            "<value>&bomb;</value>",
            "<other/>",
            &deep,
        ] {
            assert!(param(value).is_err(), "{value}");
        }
        let bomb = "<!DOCTYPE a [<!ENTITY b \"bbbb\">]><methodCall><methodName>a</methodName><params/></methodCall>";
        for body in ["", "x", "<methodCall>", "<methodCall><methodName>a</methodName></methodCall>", bomb] {
            assert!(decode(body.as_bytes()).is_err(), "{body}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn no_cut_of_a_good_call_makes_the_reader_panic(cut in 0_usize..120) {
            let good = b"<methodCall><methodName>a</methodName><params><param><value><i4>1</i4></value></param></params></methodCall>";
            let _ = decode(&good[..cut.min(good.len())]);
        }
    }
}
