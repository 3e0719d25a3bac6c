//! Values as bytes: appended, compact, in one pass.
//!
//! A row keeps what these make, so that a read is a copy.

mod json;
mod xml;

pub use json::{json, json_record, json_string};
pub use xml::{xml, xml_record, xml_text};

use crate::ClassDef;
use crate::Value;

/// The fields of a record that clients see, with their values. What is optional and absent is left out.
fn visible<'a>(class: &'a ClassDef, fields: &'a [Value]) -> impl Iterator<Item = (&'static str, &'a Value)> {
    class
        .fields
        .iter()
        .zip(fields)
        .filter(|(field, value)| !field.hidden && !matches!(value, Value::Absent))
        .map(|(field, value)| (field.name, value))
}
