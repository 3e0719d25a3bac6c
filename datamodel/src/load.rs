//! Reads the embedded class files into the model.
//!
//! The files are part of the program, so that a mistake in one is a defect of the build: loading
//! panics with the file's name and what is wrong, and a test loads them all.
#![allow(clippy::expect_used, clippy::panic)]

use std::collections::HashMap;

use serde::Deserialize;

use crate::derive;
use crate::model::{ClassDef, FieldDef, Lifecycle, MessageDef, Model, Param, Qualifier, RbacRole, Relation};
use crate::notation;
use crate::{ClassId, EnumDef, Type};

include!(concat!(env!("OUT_DIR"), "/sources.rs"));

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClassFile {
    name: String,
    #[serde(default)]
    pub(crate) since: String,
    #[serde(default)]
    pub(crate) state: Option<String>,
    #[serde(default = "yes")]
    stored: bool,
    #[serde(default)]
    internal: bool,
    /// The replicated format that brought it.
    #[serde(default = "first")]
    format: u32,
    #[serde(default)]
    pub(crate) role: Option<String>,
    /// Lowest role that may read; `read-only` unless said.
    #[serde(default)]
    pub(crate) reading_role: Option<String>,
    #[serde(default)]
    pub(crate) generated: Vec<String>,
    #[serde(default)]
    pub(crate) generated_roles: HashMap<String, String>,
    #[serde(default)]
    pub(crate) generated_since: HashMap<String, String>,
    #[serde(default)]
    enums: toml::Table,
    /// Words that came later, by enum: the replicated format that brought each.
    #[serde(default)]
    word_formats: HashMap<String, HashMap<String, u32>>,
    #[serde(default)]
    fields: toml::Table,
    #[serde(default)]
    messages: toml::Table,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FieldEntry {
    r#type: String,
    access: String,
    /// The replicated format that brought it.
    #[serde(default = "first")]
    format: u32,
    default: Option<String>,
    /// What a new row holds where the published model names no default.
    initial: Option<String>,
    follows: Option<String>,
    pairs_with: Option<String>,
    role: Option<String>,
    reading_role: Option<String>,
    #[serde(default = "yes")]
    getter: bool,
    #[serde(default)]
    hidden: bool,
    #[serde(default)]
    since: String,
    state: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MessageEntry {
    params: Vec<String>,
    /// Between hosts, or of a host's own console: served, and not listed.
    #[serde(default)]
    hidden: bool,
    #[serde(default = "yes")]
    session: bool,
    result: Option<String>,
    #[serde(default)]
    errors: Vec<String>,
    role: Option<String>,
    since: String,
    state: Option<String>,
    #[serde(default, rename = "client_cert")]
    _client_cert: bool,
    #[serde(default = "yes")]
    r#async: bool,
}

fn yes() -> bool {
    true
}

fn first() -> u32 {
    1
}

pub(crate) fn leak(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

pub(crate) fn lifecycle(state: Option<&str>) -> Lifecycle {
    match state {
        None => Lifecycle::Live,
        Some("prototyped") => Lifecycle::Prototyped,
        Some("deprecated") => Lifecycle::Deprecated,
        Some("removed") => Lifecycle::Removed,
        Some(other) => panic!("unknown state {other}"),
    }
}

pub(crate) fn role(name: &str) -> RbacRole {
    RbacRole::named(name).unwrap_or_else(|| panic!("unknown role {name}"))
}

pub(crate) fn load() -> Model {
    let files: Vec<ClassFile> = SOURCES
        .iter()
        .map(|(name, text)| toml::from_str(text).unwrap_or_else(|error| panic!("class file {name}: {error}")))
        .collect();
    let ids: HashMap<&str, ClassId> =
        files.iter().zip(0..).map(|(file, index)| (file.name.as_str(), ClassId(index))).collect();
    let (enums, words) = enums(&files);
    let class = |name: &str| ids.get(name).copied();
    let word = |name: &str| words.get(name).copied();
    let parse = |text: &str| Type::parse(text, &class, &word);

    let mut classes = Vec::with_capacity(files.len());
    for (file, index) in files.iter().zip(0..) {
        let entries = field_entries(file);
        let class_role = role(file.role.as_deref().unwrap_or("pool-admin"));
        let reading_role = role(file.reading_role.as_deref().unwrap_or("read-only"));
        let fields = entries
            .iter()
            .map(|(name, entry)| {
                let ty = parse(&entry.r#type).unwrap_or_else(|error| panic!("{}.{name}: {error}", file.name));
                let written = entry.default.as_deref().or(entry.initial.as_deref()).map(|text| {
                    notation::parse_default(&ty, text)
                        .unwrap_or_else(|| panic!("{}.{name}: bad default {text}", file.name))
                });
                FieldDef {
                    name: leak(name.clone()),
                    qualifier: match entry.access.as_str() {
                        "RW" => Qualifier::ReadWrite,
                        "constructor" => Qualifier::Constructor,
                        "runtime" => Qualifier::Runtime,
                        other => panic!("{}.{name}: unknown access {other}", file.name),
                    },
                    has_default: entry.default.is_some(),
                    default: written.unwrap_or_else(|| ty.zero()),
                    newest_word: ty.newest_word(),
                    ty,
                    since: leak(entry.since.clone()),
                    state: lifecycle(entry.state.as_deref()),
                    relation: None,
                    role: entry.role.as_deref().map_or(class_role, role),
                    reading_role: entry.reading_role.as_deref().map_or(reading_role, role),
                    getter: entry.getter,
                    hidden: entry.hidden || file.internal,
                    format: entry.format,
                }
            })
            .collect();
        let event_name = leak(file.name.to_ascii_lowercase());
        classes.push(ClassDef::new(
            ClassId(index),
            leak(file.name.clone()),
            event_name,
            file.stored,
            file.internal,
            file.format,
            fields,
        ));
    }
    relate(&files, &mut classes);

    let mut messages = Vec::new();
    for (file, class) in files.iter().zip(&classes) {
        for (name, entry) in &file.messages {
            let entry: MessageEntry =
                entry.clone().try_into().unwrap_or_else(|error| panic!("{}.{name}: {error}", file.name));
            messages.push(explicit(class, name, entry, &parse));
        }
        derive::implicit(file, class, &mut messages);
    }
    Model::new(classes, messages, enums)
}

type Enums = (Vec<(ClassId, &'static EnumDef)>, HashMap<String, &'static EnumDef>);

fn enums(files: &[ClassFile]) -> Enums {
    let mut listed = Vec::new();
    let mut words: HashMap<String, &'static EnumDef> = HashMap::new();
    for (file, name) in files.iter().flat_map(|file| file.word_formats.keys().map(move |name| (file, name))) {
        assert!(file.enums.contains_key(name), "{}: word_formats of enum {name}, which it does not have", file.name);
    }
    for (file, index) in files.iter().zip(0..) {
        for (name, values) in &file.enums {
            let values = values.as_array().unwrap_or_else(|| panic!("{}: enum {name} is no list", file.name));
            let values: Vec<_> =
                values.iter().map(|value| leak(value.as_str().expect("words are strings").to_owned())).collect();
            let newer = file.word_formats.get(name).into_iter().flatten().map(|(word, format)| {
                let known = values.iter().copied().find(|known| known == word);
                (known.unwrap_or_else(|| panic!("{}: enum {name} has no word {word}", file.name)), *format)
            });
            let newer = newer.collect();
            let def: &'static EnumDef = Box::leak(Box::new(EnumDef { name: leak(name.clone()), words: values, newer }));
            listed.push((ClassId(index), def));
            let first = words.entry(name.clone()).or_insert(def);
            assert!(first.newer.len() == def.newer.len(), "{}: enum {name} has other formats elsewhere", file.name);
        }
    }
    (listed, words)
}

fn field_entries(file: &ClassFile) -> Vec<(String, FieldEntry)> {
    let entry = |(name, value): (&String, &toml::Value)| {
        let entry = value.clone().try_into().unwrap_or_else(|error| panic!("{}.{name}: {error}", file.name));
        (name.clone(), entry)
    };
    file.fields.iter().map(entry).collect()
}

/// Ties both ends of each relation. A follower names its owner; a pair names its twin.
fn relate(files: &[ClassFile], classes: &mut [ClassDef]) {
    let find = |classes: &[ClassDef], path: &str| -> (ClassId, u16) {
        let (class, field) = path.split_once('.').unwrap_or_else(|| panic!("relation {path} names no field"));
        let class = classes
            .iter()
            .find(|known| known.name == class)
            .unwrap_or_else(|| panic!("relation {path}: no such class"));
        (class.id, class.field(field).unwrap_or_else(|| panic!("relation {path}: no such field")))
    };
    for (file, index) in files.iter().zip(0_u16..) {
        for (name, entry) in field_entries(file) {
            let class = ClassId(index);
            let field = classes[usize::from(index)].field(&name).expect("the field was just made");
            if let Some(owner) = entry.follows {
                let (owner_class, owner_field) = find(classes, &owner);
                classes[usize::from(index)].fields[usize::from(field)].relation =
                    Some(Relation::Follower { class: owner_class, owner: owner_field });
                classes[usize::from(owner_class.0)].fields[usize::from(owner_field)].relation =
                    Some(Relation::Owner { class, follower: field });
            } else if let Some(twin) = entry.pairs_with {
                let (twin_class, twin_field) = find(classes, &twin);
                classes[usize::from(index)].fields[usize::from(field)].relation =
                    Some(Relation::Pair { class: twin_class, field: twin_field });
            }
        }
    }
}

fn explicit(
    class: &ClassDef,
    name: &str,
    entry: MessageEntry,
    parse: &dyn Fn(&str) -> Result<Type, String>,
) -> MessageDef {
    let full_name = leak(format!("{}.{name}", class.name));
    let ty = |text: &str| parse(text).unwrap_or_else(|error| panic!("{full_name}: {error}"));
    let params = entry.params.iter().map(|param| {
        let (param, rest) =
            param.split_once(": ").unwrap_or_else(|| panic!("{full_name}: parameter without type: {param}"));
        let (text, default) = rest.split_once(" = ").map_or((rest, None), |(text, default)| (text, Some(default)));
        let ty = ty(text);
        let default = default.map(|default| {
            notation::parse_default(&ty, default).unwrap_or_else(|| panic!("{full_name}: bad default {default}"))
        });
        Param { name: leak(param.to_owned()), ty, default }
    });
    MessageDef {
        class: class.id,
        params: params.collect(),
        takes_session: entry.session,
        result: ty(entry.result.as_deref().unwrap_or("void")),
        errors: entry.errors.into_iter().map(leak).collect(),
        min_role: entry.role.as_deref().map(role),
        implicit: None,
        asynchronous: entry.r#async,
        since: leak(entry.since),
        state: lifecycle(entry.state.as_deref()),
        hidden: entry.hidden,
        name: leak(name.to_owned()),
        full_name,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn file(text: &str) -> ClassFile {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn a_word_that_came_later_says_which_format_brought_it() {
        let file = file(
            "name = \"door\"\n[enums]\ndoor_state = [\"open\", \"shut\", \"ajar\"]\n[word_formats.door_state]\najar = 3\n",
        );
        let (_, words) = enums(&[file]);
        let formats = ["open", "shut", "ajar"].map(|word| words["door_state"].format(word));
        assert_eq!(formats, [1, 1, 3]);
    }

    #[test]
    #[should_panic(expected = "no word agape")]
    fn a_format_of_a_word_that_is_not_there_is_a_defect_of_the_build() {
        enums(&[file("name = \"door\"\n[enums]\ndoor_state = [\"open\"]\n[word_formats.door_state]\nagape = 3\n")]);
    }
}
