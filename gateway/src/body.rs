//! An answer's body: pieces that go out one after the other, and long lists that are written only as they go.
//!
//! A pool of 64,000 VMs answers `VM.get_all_records` with 180 MB. Written at once, they would hold a thread of the runtime
//! for longer than an election, and the memory until the slowest client has read them. A list that is longer than
//! [`WRITTEN_AT_ONCE`] therefore stays what it is, references to rows, and becomes bytes piece by piece; its length is
//! not known before its end.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use controller::{Event, EventBatch, Reply};
use datamodel::{Value, encode};
use raft_store::Row;

use crate::calls::Protocol;

/// A list of so many objects is worth the trouble.
const WRITTEN_AT_ONCE: usize = 128;
/// A piece of a list is about so large.
const PIECE: usize = 64 << 10;
/// Kept encodings are copied while small, shared where copying would cost more.
const WORTH_A_PIECE: usize = 8 << 10;

/// The pieces that are left.
#[derive(Default)]
pub(crate) struct Body {
    pieces: VecDeque<Piece>,
    open: Vec<u8>,
}

enum Piece {
    Bytes(Bytes),
    List { list: List, next: usize, protocol: Protocol },
}

/// Objects of which each is written like the others.
enum List {
    Records(Vec<Arc<Row>>),
    Events(Vec<Event>),
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self { pieces: VecDeque::from([Piece::Bytes(bytes)]), open: Vec::new() }
    }
}

impl std::fmt::Debug for Body {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the content: answers hold secrets.
        write!(out, "{} pieces", self.pieces.len())
    }
}

impl Body {
    /// Where small things are appended.
    pub(crate) fn text(&mut self) -> &mut Vec<u8> {
        &mut self.open
    }

    /// Appends bytes that are kept elsewhere.
    pub(crate) fn share(&mut self, bytes: Bytes) {
        if bytes.len() < WORTH_A_PIECE && self.open.len() < PIECE {
            self.open.extend_from_slice(&bytes);
        } else {
            self.cut();
            self.pieces.push_back(Piece::Bytes(bytes));
        }
    }

    fn cut(&mut self) {
        if !self.open.is_empty() {
            self.pieces.push_back(Piece::Bytes(std::mem::take(&mut self.open).into()));
        }
    }

    /// How many bytes are left; none where nobody can know without writing them.
    pub(crate) fn length(&self) -> Option<u64> {
        let mut length = self.open.len() as u64;
        for piece in &self.pieces {
            match piece {
                Piece::Bytes(bytes) => length += bytes.len() as u64,
                Piece::List { .. } => return None,
            }
        }
        Some(length)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.open.is_empty()
    }

    fn list(&mut self, list: List, protocol: Protocol) {
        if list.len() <= WRITTEN_AT_ONCE {
            for place in 0..list.len() {
                list.write(place, protocol, self);
            }
        } else {
            self.cut();
            self.pieces.push_back(Piece::List { list, next: 0, protocol });
        }
    }

    /// Appends an answer as JSON.
    pub(crate) fn json(&mut self, reply: Reply) {
        match reply {
            Reply::Value(value) => encode::json(&value, self.text()),
            Reply::Record(row) => self.share(row.json()),
            Reply::Records(rows) => {
                self.text().push(b'{');
                self.list(List::Records(rows), Protocol::JsonRpc);
                self.text().push(b'}');
            }
            Reply::Events(batch) => self.events_json(batch),
            Reply::EventList(events) => self.event_list_json(events),
            Reply::Methods(names) => {
                encode::json(&Value::Set(names.into_iter().map(Value::str).collect()), self.text())
            }
        }
    }

    fn event_list_json(&mut self, events: Vec<Event>) {
        self.text().push(b'[');
        self.list(List::Events(events), Protocol::JsonRpc);
        self.text().push(b']');
    }

    fn events_json(&mut self, batch: EventBatch) {
        self.text().extend_from_slice(b"{\"events\":");
        self.event_list_json(batch.events);
        self.text().extend_from_slice(b",\"valid_ref_counts\":{");
        for (place, (class, count)) in batch.valid_ref_counts.iter().enumerate() {
            let comma = if place > 0 { "," } else { "" };
            self.text().extend_from_slice(format!("{comma}\"{class}\":{count}").as_bytes());
        }
        self.text().extend_from_slice(b"},\"token\":");
        encode::json_string(&batch.token, self.text());
        self.text().push(b'}');
    }

    /// Appends an answer as a value of XML-RPC.
    pub(crate) fn xml(&mut self, reply: Reply) {
        match reply {
            Reply::Value(value) => encode::xml(&value, self.text()),
            Reply::Record(row) => self.share(row.xml()),
            Reply::Records(rows) => {
                self.text().extend_from_slice(b"<value><struct>");
                self.list(List::Records(rows), Protocol::XmlRpc);
                self.text().extend_from_slice(b"</struct></value>");
            }
            Reply::Events(batch) => self.events_xml(batch),
            Reply::EventList(events) => self.event_list_xml(events),
            Reply::Methods(names) => encode::xml(&Value::Set(names.into_iter().map(Value::str).collect()), self.text()),
        }
    }

    fn event_list_xml(&mut self, events: Vec<Event>) {
        self.text().extend_from_slice(b"<value><array><data>");
        self.list(List::Events(events), Protocol::XmlRpc);
        self.text().extend_from_slice(b"</data></array></value>");
    }

    fn events_xml(&mut self, batch: EventBatch) {
        self.text().extend_from_slice(b"<value><struct><member><name>events</name>");
        self.event_list_xml(batch.events);
        self.text().extend_from_slice(b"</member><member><name>valid_ref_counts</name><value><struct>");
        for (class, count) in &batch.valid_ref_counts {
            // The one place where integers travel typed.
            self.text().extend_from_slice(
                format!("<member><name>{class}</name><value><i4>{count}</i4></value></member>").as_bytes(),
            );
        }
        self.text().extend_from_slice(b"</struct></value></member>");
        member_xml("token", &batch.token, self.text());
        self.text().extend_from_slice(b"</struct></value>");
    }
}

impl Iterator for Body {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        loop {
            match self.pieces.pop_front() {
                Some(Piece::Bytes(bytes)) => return Some(bytes),
                Some(Piece::List { list, mut next, protocol }) => {
                    let mut written = Self::default();
                    while next < list.len() && written.pieces.is_empty() && written.open.len() < PIECE {
                        list.write(next, protocol, &mut written);
                        next += 1;
                    }
                    written.cut();
                    if next < list.len() {
                        self.pieces.push_front(Piece::List { list, next, protocol });
                    }
                    for piece in written.pieces.into_iter().rev() {
                        self.pieces.push_front(piece);
                    }
                }
                None if self.open.is_empty() => return None,
                None => return Some(std::mem::take(&mut self.open).into()),
            }
        }
    }
}

impl List {
    fn len(&self) -> usize {
        match self {
            Self::Records(rows) => rows.len(),
            Self::Events(events) => events.len(),
        }
    }

    /// Writes one of them, with what stands before it.
    fn write(&self, place: usize, protocol: Protocol, out: &mut Body) {
        match (self, protocol) {
            (Self::Records(rows), Protocol::JsonRpc) => {
                if let Some(row) = rows.get(place) {
                    let text = out.text();
                    text.extend_from_slice(if place == 0 { b"\"" } else { b",\"" });
                    row.reference.write_to(text);
                    text.extend_from_slice(b"\":");
                    out.share(row.json());
                }
            }
            (Self::Records(rows), Protocol::XmlRpc) => {
                if let Some(row) = rows.get(place) {
                    let text = out.text();
                    text.extend_from_slice(b"<member><name>");
                    row.reference.write_to(text);
                    text.extend_from_slice(b"</name>");
                    out.share(row.xml());
                    out.text().extend_from_slice(b"</member>");
                }
            }
            (Self::Events(events), Protocol::JsonRpc) => {
                if let Some(event) = events.get(place) {
                    if place > 0 {
                        out.text().push(b',');
                    }
                    event_json(event, out);
                }
            }
            (Self::Events(events), Protocol::XmlRpc) => {
                if let Some(event) = events.get(place) {
                    event_xml(event, out);
                }
            }
        }
    }
}

fn event_json(event: &Event, out: &mut Body) {
    let text = out.text();
    text.extend_from_slice(
        format!(
            "{{\"id\":\"{}\",\"timestamp\":\"0.0\",\"class\":\"{}\",\"operation\":\"{}\",\"ref\":\"",
            event.id, event.class, event.operation
        )
        .as_bytes(),
    );
    event.reference.write_to(text);
    text.push(b'"');
    if let Some(row) = &event.snapshot {
        text.extend_from_slice(b",\"snapshot\":");
        out.share(row.json());
    }
    out.text().push(b'}');
}

fn member_xml(name: &str, value: &str, text: &mut Vec<u8>) {
    text.extend_from_slice(format!("<member><name>{name}</name><value>{value}</value></member>").as_bytes());
}

fn event_xml(event: &Event, out: &mut Body) {
    let text = out.text();
    text.extend_from_slice(b"<value><struct>");
    member_xml("id", &event.id.to_string(), text);
    member_xml("timestamp", "0.0", text);
    member_xml("class", event.class, text);
    member_xml("operation", event.operation, text);
    member_xml("ref", &event.reference.to_string(), text);
    if let Some(row) = &event.snapshot {
        text.extend_from_slice(b"<member><name>snapshot</name>");
        out.share(row.xml());
        out.text().extend_from_slice(b"</member>");
    }
    out.text().extend_from_slice(b"</struct></value>");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use datamodel::{ClassId, OpaqueRef};

    use super::*;

    fn rows(count: usize) -> Vec<Arc<Row>> {
        let class = ClassId::named("VM").unwrap();
        let reference = |place: usize| format!("OpaqueRef:00000000-0000-0000-0000-{place:012}").parse::<OpaqueRef>();
        (0..count).map(|place| Arc::new(Row::of_defaults(class, reference(place).unwrap()))).collect()
    }

    fn written(fill: impl FnOnce(&mut Body)) -> (Option<u64>, Vec<u8>, usize) {
        let mut body = Body::default();
        fill(&mut body);
        let length = body.length();
        let pieces: Vec<Bytes> = body.collect();
        (length, pieces.concat(), pieces.iter().map(Bytes::len).max().unwrap_or(0))
    }

    /// What a list looks like must not depend on how it is written.
    #[test]
    fn a_long_list_is_written_as_a_short_one_and_never_at_once() {
        for count in [0, 1, WRITTEN_AT_ONCE, WRITTEN_AT_ONCE + 1, 2_000] {
            let (length, bytes, largest) = written(|body| body.json(Reply::Records(rows(count))));
            assert_eq!(length.is_some(), count <= WRITTEN_AT_ONCE);
            assert!(length.is_none_or(|length| length == bytes.len() as u64));
            let read: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(read.as_object().unwrap().len(), count);
            assert!(count <= WRITTEN_AT_ONCE || largest < 2 * PIECE, "{largest} bytes at once");

            let (_, bytes, _) = written(|body| body.xml(Reply::Records(rows(count))));
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.starts_with("<value><struct>") && text.ends_with("</struct></value>"));
            assert_eq!(text.matches("<member><name>OpaqueRef:").count(), count);
        }
    }
}
