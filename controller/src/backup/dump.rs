//! A state as a file.

use std::io::{self, Write};

use datamodel::model;
use quick_xml::escape::{escape, partial_escape};
use raft_store::{Row, State};
use serde_json::{Map, Value as Json};

use super::{FORMAT, Treatment, text, treatment};

/// Writes a dump. The state does not change while it is written, however long that takes.
pub(crate) fn write(state: &State, out: &mut impl Write) -> io::Result<()> {
    let classes: Vec<_> = model().classes().iter().filter(|class| treatment(class) != Treatment::Own).collect();
    let rows: usize = classes.iter().map(|class| state.count(class.id)).sum();
    out.write_all(b"<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<database>\n<manifest>\n")?;
    let pairs = [
        ("format", FORMAT.to_string()),
        ("product", format!("Xenith {}", env!("CARGO_PKG_VERSION"))),
        ("log_index", state.applied.to_string()),
        ("rows", rows.to_string()),
    ];
    for (key, value) in pairs {
        writeln!(out, "<pair key=\"{key}\" value=\"{}\"/>", escape(value))?;
    }
    out.write_all(b"</manifest>\n")?;
    for class in classes {
        writeln!(out, "<table name=\"{}\">", class.name)?;
        for row in state.rows(class.id) {
            write!(out, "<row ref=\"{}\">", row.reference)?;
            out.write_all(partial_escape(json(row)?).as_bytes())?;
            out.write_all(b"</row>\n")?;
        }
        out.write_all(b"</table>\n")?;
    }
    out.write_all(b"</database>\n")
}

fn json(row: &Row) -> io::Result<String> {
    let class = row.class.def();
    let mut fields = Map::new();
    for (field, value) in class.fields.iter().zip(row.values()).filter(|(field, value)| field.default != **value) {
        // Kept by the other end of the relation, which is in the dump too.
        if matches!(field.relation, Some(datamodel::Relation::Follower { .. })) {
            continue;
        }
        let value = text::to_json(value);
        let value = value.ok_or_else(|| io::Error::other(format!("{}.{} holds no value", class.name, field.name)))?;
        fields.insert(field.name.to_owned(), value);
    }
    Ok(Json::Object(fields).to_string())
}
