//! A file as the rows of a dump: all of it is understood, or it is refused.

use std::collections::{BTreeMap, HashSet};
use std::io::BufRead;

use datamodel::{ApiError, ClassId, OpaqueRef, errors};
use quick_xml::escape::resolve_predefined_entity;
use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion};
use serde_json::Value as Json;

use super::{DumpRow, FORMAT, Treatment, text, treatment};

/// No row's text is longer.
const LARGEST_ROW: usize = 64 << 20;

/// Reads a dump.
///
/// # Errors
/// `IMPORT_ERROR_PREMATURE_EOF` where it ends before its end, `RESTORE_INCOMPATIBLE_VERSION` where this version does
/// not understand all of it: then nothing of it is used.
pub(crate) fn read(source: impl BufRead) -> Result<Vec<DumpRow>, ApiError> {
    let mut reader = Reader::from_reader(source);
    reader.config_mut().check_end_names = true;
    let mut reading = Reading::default();
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        match reader.read_event_into(&mut buffer).map_err(unreadable)? {
            Event::Start(tag) => reading.begin(&tag)?,
            Event::Empty(tag) => {
                reading.begin(&tag)?;
                reading.end()?;
            }
            Event::End(_) => reading.end()?,
            Event::Text(text) => reading.text(&text)?,
            Event::GeneralRef(entity) => {
                let mut bytes = [0; 4];
                let text = match entity.resolve_char_ref().map_err(|error| refused(&error))? {
                    Some(character) => &*character.encode_utf8(&mut bytes),
                    None => resolve_predefined_entity(&entity).ok_or_else(|| refused(&"an unknown entity"))?,
                };
                reading.text(text)?;
            }
            Event::Decl(_) | Event::Comment(_) => {}
            Event::Eof => return reading.finish(),
            Event::CData(_) | Event::PI(_) | Event::DocType(_) => return Err(refused(&"not a dump")),
        }
    }
}

/// What ends inside a tag, or with the connection, is cut short.
fn unreadable(error: quick_xml::Error) -> ApiError {
    match error {
        quick_xml::Error::Io(_) | quick_xml::Error::Syntax(_) => errors::import_error_premature_eof(),
        other => refused(&other),
    }
}

fn refused(why: &dyn std::fmt::Display) -> ApiError {
    tracing::info!(%why, "a dump is refused");
    errors::restore_incompatible_version()
}

/// Where in the file the reader is.
#[derive(Default, PartialEq, Eq, Clone, Copy)]
enum Place {
    #[default]
    Outside,
    Database,
    Manifest,
    Pair,
    Table(ClassId),
    Row(ClassId, OpaqueRef),
    After,
}

#[derive(Default)]
struct Reading {
    place: Place,
    manifest: BTreeMap<String, String>,
    known: HashSet<(ClassId, OpaqueRef)>,
    rows: Vec<DumpRow>,
    open: String,
}

impl Reading {
    fn begin(&mut self, tag: &BytesStart<'_>) -> Result<(), ApiError> {
        self.place = match (self.place, tag.name().as_ref() as &str) {
            (Place::Outside, "database") => Place::Database,
            (Place::Database, "manifest") if self.manifest.is_empty() => Place::Manifest,
            (Place::Manifest, "pair") => {
                self.manifest.insert(attribute(tag, "key")?, attribute(tag, "value")?);
                Place::Pair
            }
            (Place::Database, "table") => {
                // Only here is it known whether the rest can be understood.
                self.check_format()?;
                let name = attribute(tag, "name")?;
                let class = ClassId::named(&name).filter(|class| treatment(class.def()) != Treatment::Own);
                Place::Table(class.ok_or_else(|| refused(&format!("no class {name}")))?)
            }
            (Place::Table(class), "row") => {
                let reference: OpaqueRef = attribute(tag, "ref")?.parse().map_err(|error| refused(&error))?;
                if reference.is_null() || !self.known.insert((class, reference)) {
                    return Err(refused(&format!("{reference} is there twice")));
                }
                Place::Row(class, reference)
            }
            _ => return Err(refused(&"not a dump of this product")),
        };
        Ok(())
    }

    fn text(&mut self, text: &str) -> Result<(), ApiError> {
        if let Place::Row(..) = self.place {
            self.open.push_str(text);
            return if self.open.len() > LARGEST_ROW { Err(refused(&"a row without end")) } else { Ok(()) };
        }
        if text.trim().is_empty() { Ok(()) } else { Err(refused(&"text where there should be none")) }
    }

    fn end(&mut self) -> Result<(), ApiError> {
        self.place = match self.place {
            Place::Row(class, reference) => {
                let text = std::mem::take(&mut self.open);
                self.rows.push(DumpRow { class, reference, fields: fields(class, &text)? });
                Place::Table(class)
            }
            Place::Pair => Place::Manifest,
            Place::Table(_) | Place::Manifest => Place::Database,
            _ => Place::After,
        };
        Ok(())
    }

    fn check_format(&self) -> Result<(), ApiError> {
        match self.manifest.get("format").and_then(|format| format.parse::<u32>().ok()) {
            Some(format) if (1..=FORMAT).contains(&format) => Ok(()),
            other => Err(refused(&format!("format {other:?}, this version reads up to {FORMAT}"))),
        }
    }

    fn finish(self) -> Result<Vec<DumpRow>, ApiError> {
        if self.place != Place::After {
            return Err(errors::import_error_premature_eof());
        }
        self.check_format()?;
        let stated = self.manifest.get("rows").and_then(|rows| rows.parse().ok());
        if stated != Some(self.rows.len()) {
            return Err(refused(&format!("{} rows where {stated:?} were written", self.rows.len())));
        }
        Ok(self.rows)
    }
}

fn attribute(tag: &BytesStart<'_>, name: &str) -> Result<String, ApiError> {
    let found = tag.try_get_attribute(name).map_err(|error| refused(&error))?;
    let found = found.ok_or_else(|| refused(&format!("no attribute {name}")))?;
    let value = found.normalized_value(XmlVersion::Implicit1_0).map_err(|error| refused(&error))?;
    Ok(value.into_owned())
}

fn fields(class: ClassId, text: &str) -> Result<Vec<(u16, datamodel::Value)>, ApiError> {
    let def = class.def();
    let json: Json = serde_json::from_str(text).map_err(|error| refused(&error))?;
    let Json::Object(members) = json else { return Err(refused(&"a row that is no record")) };
    members
        .iter()
        .map(|(name, json)| {
            let index = def.field(name).ok_or_else(|| refused(&format!("no field {}.{name}", def.name)))?;
            let value = def.field_def(index).and_then(|field| text::from_json(&field.ty, json));
            Ok((index, value.ok_or_else(|| refused(&format!("{}.{name} holds another type", def.name)))?))
        })
        .collect()
}
