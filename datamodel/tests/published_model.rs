//! The model is the published one: name by name and type by type, where the published file is at hand.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use datamodel::{Lifecycle, Qualifier, errors, model};
use serde_json::Value as Json;

fn published() -> Option<Json> {
    let Ok(text) = std::fs::read_to_string("../../shared/reference/xenapi-datamodel.json") else {
        eprintln!("the published model is not at hand: only the counts are checked");
        return None;
    };
    Some(serde_json::from_str(&text).expect("the published model is JSON"))
}

fn class_file(name: &str) -> toml::Table {
    let path = Path::new("classes").join(format!("{name}.toml"));
    std::fs::read_to_string(path).unwrap().parse().unwrap()
}

fn text<'a>(json: &'a Json, key: &str) -> &'a str {
    json[key].as_str().unwrap_or("")
}

fn state(state: Lifecycle) -> &'static str {
    match state {
        Lifecycle::Live => "",
        Lifecycle::Prototyped => "prototyped",
        Lifecycle::Deprecated => "deprecated",
        Lifecycle::Removed => "removed",
    }
}

#[test]
fn the_model_has_every_class_field_message_enum_and_error() {
    let model = model();
    let classes: Vec<_> = model.classes().iter().filter(|class| !class.internal).collect();
    assert_eq!(classes.len(), 67);
    assert_eq!(classes.iter().flat_map(|class| &class.fields).filter(|field| !field.hidden).count(), 845);
    let listed: Vec<_> = model.messages().iter().filter(|message| !message.hidden).collect();
    assert_eq!(listed.len(), 1828);
    assert_eq!(listed.iter().filter(|message| message.implicit.is_some()).count(), 1349);
    assert_eq!(model.enums().len(), 66);
    assert_eq!(errors::ALL.len(), 603);
}

#[test]
fn classes_fields_and_enums_are_the_published_ones() {
    let Some(published) = published() else { return };
    let published = published.as_object().unwrap();
    let ours: BTreeSet<_> = model().classes().iter().filter(|class| !class.internal).map(|class| class.name).collect();
    assert_eq!(ours, published.keys().map(String::as_str).collect());
    for class in model().classes().iter().filter(|class| !class.internal) {
        let theirs = &published[class.name];
        let ours = class_file(class.name);
        let mut fields: BTreeSet<&str> = theirs["fields"].as_object().unwrap().keys().map(String::as_str).collect();
        for field in class.fields.iter().filter(|field| !field.hidden) {
            let name = format!("{}.{}", class.name, field.name);
            assert!(fields.remove(field.name), "{name} is not published");
            let their = &theirs["fields"][field.name];
            assert_eq!(field.ty.to_string(), text(their, "type"), "{name}");
            let qualifier = match field.qualifier {
                Qualifier::ReadWrite => "RW",
                Qualifier::Constructor => "RO/constructor",
                Qualifier::Runtime => "RO/runtime",
            };
            assert_eq!(qualifier, text(their, "qualifier"), "{name}");
            assert_eq!(field.has_default, their.get("default").is_some(), "{name}: default");
            let default = ours["fields"][field.name].get("default").and_then(toml::Value::as_str);
            assert_eq!(default, their.get("default").and_then(Json::as_str), "{name}: default");
            assert_eq!(field.since, text(their, "since"), "{name}");
            assert_eq!(state(field.state), text(their, "state"), "{name}");
        }
        assert!(fields.is_empty(), "{}: missing {fields:?}", class.name);
        let enums: BTreeMap<&str, Vec<&str>> = model()
            .enums()
            .iter()
            .filter(|(owner, _)| *owner == class.id)
            .map(|(_, def)| (def.name, def.words.clone()))
            .collect();
        let their_enums: BTreeMap<&str, Vec<&str>> = theirs["enums"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, words)| {
                (name.as_str(), words.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect())
            })
            .collect();
        assert_eq!(enums, their_enums, "{}", class.name);
    }
}

#[test]
fn messages_are_the_published_ones() {
    let Some(published) = published() else { return };
    let mut theirs: BTreeMap<String, &Json> = BTreeMap::new();
    for (class, content) in published.as_object().unwrap() {
        for (message, content) in content["messages"].as_object().unwrap() {
            theirs.insert(format!("{class}.{message}"), content);
        }
    }
    for message in model().messages().iter().filter(|message| !message.hidden) {
        let name = message.full_name;
        let their = theirs.remove(name).unwrap_or_else(|| panic!("{name} is not published"));
        let mut params: Vec<(String, String)> = Vec::new();
        if message.takes_session {
            params.push(("session_id".into(), "session ref".into()));
        }
        params.extend(message.params.iter().map(|param| (param.name.to_owned(), param.ty.to_string())));
        let their_params: Vec<(String, String)> = their["params"]
            .as_array()
            .unwrap()
            .iter()
            .map(|param| (param[0].as_str().unwrap().to_owned(), param[1].as_str().unwrap().to_owned()))
            .collect();
        assert_eq!(params, their_params, "{name}");
        assert_eq!(message.result.to_string(), text(their, "result"), "{name}");
        assert_eq!(message.implicit.is_some(), their["implicit"].as_bool().unwrap(), "{name}");
        assert_eq!(message.min_role.map_or("", |role| role.name()), text(their, "min_role"), "{name}");
        assert_eq!(message.since, text(their, "since"), "{name}");
        assert_eq!(state(message.state), text(their, "state"), "{name}");
        let errors: Vec<&str> =
            their["errors"].as_array().into_iter().flatten().map(|error| error.as_str().unwrap()).collect();
        assert_eq!(message.errors, errors, "{name}");
    }
    assert!(theirs.is_empty(), "missing: {:?}", theirs.keys().collect::<Vec<_>>());
}

#[test]
fn both_ends_of_each_relation_fit_together() {
    use datamodel::{Relation, Type};
    let mut owners = 0;
    for class in model().classes() {
        for (field, index) in class.fields.iter().zip(0_u16..) {
            let name = format!("{}.{}", class.name, field.name);
            match field.relation {
                Some(Relation::Owner { class: other, follower }) => {
                    owners += 1;
                    assert_eq!(field.ty, Type::Ref(other), "{name}");
                    let end = other.def().field_def(follower).unwrap();
                    let holds_us = end.ty == Type::Ref(class.id) || end.ty == Type::Set(Box::new(Type::Ref(class.id)));
                    assert!(holds_us, "{name} → {}", end.name);
                    assert_eq!(end.relation, Some(Relation::Follower { class: class.id, owner: index }), "{name}");
                }
                Some(Relation::Follower { class: other, owner }) => {
                    let end = other.def().field_def(owner).unwrap();
                    assert_eq!(end.relation, Some(Relation::Owner { class: class.id, follower: index }), "{name}");
                }
                Some(Relation::Pair { class: other, field: twin }) => {
                    let end = other.def().field_def(twin).unwrap();
                    assert_eq!(end.relation, Some(Relation::Pair { class: class.id, field: index }), "{name}");
                }
                None => {}
            }
        }
    }
    assert!(owners > 40, "{owners} relations");
}

#[test]
fn the_model_is_read_in_a_moment() {
    let start = std::time::Instant::now();
    assert!(model().message("VM.start").is_some());
    assert!(model().message("event_from").is_some());
    assert!(start.elapsed() < std::time::Duration::from_millis(500), "{:?}", start.elapsed());
    eprintln!("model read in {:?}", start.elapsed());
}
