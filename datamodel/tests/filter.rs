//! The expression language of `get_all_records_where`, rule by rule.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use datamodel::{ClassId, Filter, Key, OpaqueRef, Timestamp, Value, errors};
use proptest::prelude::*;

const REF: &str = "OpaqueRef:0f0e0d0c-0b0a-0908-0706-050403020100";

/// A VM with something in a field of every type.
fn vm() -> (ClassId, Vec<Value>) {
    let class = ClassId::named("VM").unwrap();
    let fields = class
        .def()
        .fields
        .iter()
        .map(|field| match field.name {
            "uuid" => Value::str("u-1"),
            "name_label" => Value::str("web and not db"),
            "power_state" => Value::Enum("Running"),
            "is_a_template" => Value::Bool(true),
            "memory_static_max" => Value::Int(1024),
            "resident_on" => Value::Ref(REF.parse().unwrap()),
            "affinity" => Value::Ref(OpaqueRef::NULL),
            "tags" => Value::set([Value::str("a"), Value::str("b c")]),
            "other_config" => Value::map([(Key::from("k"), Value::str("v")), (Key::from("l"), Value::str(""))]),
            "snapshot_time" => Value::Time(Timestamp(1_704_067_200)),
            _ => field.ty.zero(),
        })
        .collect();
    (class, fields)
}

fn holds(expression: &str) -> bool {
    let (class, fields) = vm();
    Filter::parse(expression).unwrap_or_else(|error| panic!("{expression}: {error}")).matches(class.def(), &fields)
}

fn refusal(expression: &str) -> Vec<String> {
    let error = Filter::parse(expression).err().unwrap_or_else(|| panic!("accepted: {expression:.80}"));
    assert_eq!(error.code, errors::INVALID_VALUE);
    error.params
}

#[test]
fn constants_are_expressions() {
    assert!(holds("true"));
    assert!(!holds("false"));
    assert!(holds("((true))"));
}

#[test]
fn two_values_of_either_kind_are_compared() {
    assert!(holds(r#"field "uuid" = "u-1""#));
    assert!(holds(r#""u-1" = field "uuid""#));
    assert!(holds(r#""a" = "a""#));
    assert!(!holds(r#""a" = "A""#));
    assert!(holds(r#"field "uuid" = field "uuid""#));
    assert!(!holds(r#"field "uuid" = field "name_label""#));
    assert!(!holds(r#"field "uuid" = """#));
    assert!(!holds(r#"field "uuid" = " u-1""#));
}

#[test]
fn a_namespace_ends_with_one_underscore_or_two() {
    for name in ["name_label", "name__label"] {
        assert!(holds(&format!(r#"field "{name}" = "web and not db""#)), "{name}");
    }
    assert!(holds(r#"field "is_a_template" = "true""#));
    assert!(holds(r#"field "memory__static_max" = "1024""#));
}

#[test]
fn the_expressions_that_clients_send_are_understood() {
    assert!(holds(r#"(field "uuid"="X") or (field "name__label"="web and not db")"#));
    assert!(holds(r#"field"uuid"="u-1"and(not(field"power_state"="Halted"))"#));
    assert!(!holds(r#"not (field "is_a_template"="true") and field "is_control_domain"="false""#));
}

#[test]
fn values_are_compared_as_the_database_spells_them() {
    for (name, text) in [
        ("power_state", "Running"),
        ("is_a_template", "true"),
        ("is_a_snapshot", "false"),
        ("memory_static_max", "1024"),
        ("resident_on", REF),
        ("affinity", "OpaqueRef:NULL"),
        ("tags", "('a' 'b c')"),
        ("VBDs", "()"),
        ("other_config", "(('k' 'v') ('l' ''))"),
        ("platform", "()"),
        ("snapshot_time", "20240101T00:00:00Z"),
    ] {
        assert!(holds(&format!(r#"field "{name}" = "{text}""#)), "{name}");
        assert!(!holds(&format!(r#"field "{name}" = "{text} ""#)), "{name}");
    }
    assert!(!holds(r#"field "power_state" = "running""#));
}

#[test]
fn a_field_that_is_unknown_or_hidden_equals_nothing() {
    assert!(!holds(r#"field "no_such_field" = """#));
    assert!(!holds(r#"field "no_such_field" = field "no_such_field""#));
    assert!(holds(r#"not field "no_such_field" = "x""#));
    let session = ClassId::named("session").unwrap();
    let fields: Vec<Value> = session.def().fields.iter().map(|field| field.ty.zero()).collect();
    let matches = |expression: &str| Filter::parse(expression).unwrap().matches(session.def(), &fields);
    let hidden: Vec<_> = session.def().fields.iter().filter(|field| field.hidden).collect();
    assert!(!hidden.is_empty());
    for field in hidden {
        assert!(!matches(&format!(r#"field "{}" = """#, field.name)), "{}", field.name);
    }
    assert!(matches(r#"field "auth_user_name" = """#));
}

#[test]
fn and_and_or_bind_alike_from_left_to_right() {
    // Were `and` the stronger, the first would hold.
    assert!(!holds("true or true and false"));
    assert!(holds("true or (true and false)"));
    assert!(holds("false and false or true"));
    assert!(!holds("false and (false or true)"));
    assert!(!holds("true or false and false or false"));
}

#[test]
fn not_takes_all_that_follows() {
    assert!(holds("not true and false"));
    assert!(!holds("(not true) and false"));
    assert!(!holds("not false or true"));
    assert!(holds("(not false) or true"));
    // true and not (true or true)
    assert!(!holds("true and not true or true"));
    // not (false and (not (true)))
    assert!(holds("not false and not true"));
    assert!(holds("not not true"));
    assert!(!holds("(not true and false) and false"));
}

#[test]
fn white_space_is_space_tab_and_line_feed_anywhere_or_nowhere() {
    assert!(holds("\n\t true\n"));
    assert!(holds("field\t\"uuid\"\n=\n\"u-1\"  and\ttrue"));
    assert!(holds("(true)and(true)"));
}

#[test]
fn a_literal_is_anything_but_a_quote() {
    for text in ["", "and", "field", "()", "=", "\\", "'", "\n", "\u{1f984}", "not true"] {
        assert!(holds(&format!(r#""{text}" = "{text}""#)), "{text:?}");
        assert!(!holds(&format!(r#""{text}" = "{text}.""#)), "{text:?}");
    }
}

#[test]
fn what_is_no_expression_is_an_invalid_value_with_its_text_and_a_reason() {
    for bad in [
        "",
        " ",
        "()",
        "(",
        ")",
        "(true",
        "true)",
        "true true",
        "true and",
        "and true",
        "or",
        "not",
        "not and true",
        "true = true",
        "\"a\"",
        "\"a\" =",
        "= \"a\"",
        "\"a\" == \"a\"",
        "\"a\" = \"b\" = \"c\"",
        "\"a\" = true",
        "\"a\" = (\"a\")",
        "field",
        "field uuid = \"a\"",
        "field = \"a\"",
        "field \"uuid\"",
        "fields \"uuid\" = \"a\"",
        "\"a",
        "\"a\"b\" = \"c\"",
        "'a' = 'a'",
        "TRUE",
        "True",
        "true AND true",
        "true & true",
        "true, true",
        "1 = 1",
        "true;",
        "\u{a0}true",
        "é",
        "_",
        "\0",
    ] {
        let params = refusal(bad);
        assert_eq!(params.len(), 2, "{bad}");
        assert_eq!(params[0], bad);
        assert!(!params[1].is_empty() && params[1] != bad, "{bad}: {}", params[1]);
    }
}

#[test]
fn depth_is_bounded_and_length_is_not() {
    let nested = |depth: usize| format!("{}true{}", "(".repeat(depth), ")".repeat(depth));
    let negated = |depth: usize| format!("{}true", "not ".repeat(depth));
    assert!(holds(&nested(64)));
    assert!(holds(&negated(64)));
    for deep in [nested(65), negated(65), nested(200_000), negated(200_000), "(".repeat(200_000)] {
        assert_eq!(refusal(&deep)[1], "nested too deeply");
    }
    assert!(holds(&format!("false{}", " or false".repeat(100_000) + " or true")));
    assert!(!holds(&format!("true{}", " and true".repeat(100_000) + " and false")));
}

/// An expression, and what it means.
#[derive(Debug, Clone)]
enum Meant {
    Constant(bool),
    Equal(bool),
    Not(Box<Meant>),
    Both(Box<Meant>, Box<Meant>),
    Either(Box<Meant>, Box<Meant>),
}

impl Meant {
    /// Every sub-expression in brackets.
    fn text(&self) -> String {
        match self {
            Self::Constant(truth) => truth.to_string(),
            Self::Equal(true) => r#"field "uuid"="u-1""#.into(),
            Self::Equal(false) => r#""u-2" = field "uuid""#.into(),
            Self::Not(inner) => format!("not ({})", inner.text()),
            Self::Both(left, right) => format!("({}) and ({})", left.text(), right.text()),
            Self::Either(left, right) => format!("({})or({})", left.text(), right.text()),
        }
    }

    fn truth(&self) -> bool {
        match self {
            Self::Constant(truth) | Self::Equal(truth) => *truth,
            Self::Not(inner) => !inner.truth(),
            Self::Both(left, right) => left.truth() && right.truth(),
            Self::Either(left, right) => left.truth() || right.truth(),
        }
    }
}

fn any_meant() -> impl Strategy<Value = Meant> {
    let leaf = prop_oneof![any::<bool>().prop_map(Meant::Constant), any::<bool>().prop_map(Meant::Equal)];
    leaf.prop_recursive(8, 64, 2, |inner| {
        let pair = (inner.clone().prop_map(Box::new), inner.clone().prop_map(Box::new));
        prop_oneof![
            inner.prop_map(|meant| Meant::Not(Box::new(meant))),
            pair.clone().prop_map(|(left, right)| Meant::Both(left, right)),
            pair.prop_map(|(left, right)| Meant::Either(left, right)),
        ]
    })
}

proptest! {
    #[test]
    fn brackets_make_any_expression_mean_what_it_says(meant in any_meant()) {
        prop_assert_eq!(holds(&meant.text()), meant.truth(), "{}", meant.text());
    }

    #[test]
    fn a_chain_is_read_from_left_to_right(first: bool, rest in prop::collection::vec(any::<(bool, bool)>(), 0..20)) {
        let words: String =
            rest.iter().map(|(both, truth)| format!(" {} {truth}", if *both { "and" } else { "or" })).collect();
        let wanted = rest.iter().fold(first, |so_far, (both, truth)| {
            if *both { so_far && *truth } else { so_far || *truth }
        });
        prop_assert_eq!(holds(&format!("{first}{words}")), wanted);
        prop_assert_eq!(holds(&format!("not {first}{words}")), !wanted);
    }

    #[test]
    fn no_text_makes_the_parser_panic(text: String) {
        let _ = Filter::parse(&text);
    }

    #[test]
    fn no_sequence_of_words_makes_the_parser_panic(
        words in prop::collection::vec(
            prop::sample::select(vec!["true", "not", "and", "or", "(", ")", "=", "field", "\"uuid\"", "\"", " "]), 0..40,
        )
    ) {
        let text = words.concat();
        match Filter::parse(&text) {
            Ok(filter) => {
                let (class, fields) = vm();
                let _ = filter.matches(class.def(), &fields);
            }
            Err(error) => {
                prop_assert_eq!(error.code, errors::INVALID_VALUE);
                prop_assert_eq!(&error.params[0], &text);
            }
        }
    }
}
