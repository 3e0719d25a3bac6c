//! What members of older versions can read of a value.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use datamodel::{EnumDef, Key, Type, Value, model};

fn with_a_newer_word() -> &'static EnumDef {
    Box::leak(Box::new(EnumDef { name: "door_state", words: vec!["open", "ajar"], newer: vec![("ajar", 3)] }))
}

#[test]
fn a_newer_word_is_found_wherever_it_stands_in_a_value() {
    let words = with_a_newer_word();
    let (word, text) = (|| Box::new(Type::Enum(words)), || Box::new(Type::String));
    for (held, format) in [("open", 1), ("ajar", 3)] {
        let (value, key) = (Value::Enum(held), Key::Enum(held));
        let named = |key: Key, value: Value| Value::map(BTreeMap::from([(key, value)]));
        assert_eq!(Type::Enum(words).format(&value), format);
        assert_eq!(Type::Set(word()).format(&Value::set(vec![Value::Enum("open"), value.clone()])), format);
        assert_eq!(Type::Map(text(), word()).format(&named(Key::Str("front".into()), value.clone())), format);
        assert_eq!(Type::Map(word(), text()).format(&named(key, Value::str("front"))), format);
        assert_eq!(Type::Option(word()).format(&value), format);
    }
    assert_eq!(Type::Set(Box::new(Type::Set(word()))).newest_word(), 3);
    assert_eq!(Type::Set(text()).newest_word(), 1);
}

#[test]
fn a_default_is_of_the_format_of_its_field() {
    for class in model().classes() {
        for field in &class.fields {
            // Whoever lacks a field's value takes the default for it, and must know the word.
            let needs = field.ty.format(&field.default);
            assert!(needs <= field.format.max(class.format), "{}.{}", class.name, field.name);
        }
    }
}
