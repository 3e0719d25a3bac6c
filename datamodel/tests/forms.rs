//! What travels: the exact forms of values, what clients may send, and the filter language.
#![allow(clippy::unwrap_used, missing_docs)]

use datamodel::{
    ClassKind, Filter, Input, Key, Misfit, OpaqueRef, Timestamp, Type, Value, Vm, arguments, convert, encode, errors,
    model,
};
use proptest::prelude::*;

fn json(value: &Value) -> String {
    let mut out = Vec::new();
    encode::json(value, &mut out);
    String::from_utf8(out).unwrap()
}

fn xml(value: &Value) -> String {
    let mut out = Vec::new();
    encode::xml(value, &mut out);
    String::from_utf8(out).unwrap()
}

#[test]
fn each_type_has_the_form_that_clients_parse() {
    let map = Value::map([(Key::Int(1), Value::Float(0.5))]);
    for (value, json_form, xml_form) in [
        (Value::str("a<\"&\u{1}b"), "\"a<\\\"&b\"", "<value>a&lt;&quot;&amp;b</value>"),
        (Value::Int(-5), "-5", "<value>-5</value>"),
        (Value::Float(1.0), "1.0", "<value><double>1</double></value>"),
        (Value::Bool(true), "true", "<value><boolean>1</boolean></value>"),
        (
            Value::Time(Timestamp(0)),
            "\"19700101T00:00:00Z\"",
            "<value><dateTime.iso8601>19700101T00:00:00Z</dateTime.iso8601></value>",
        ),
        (Value::Ref(OpaqueRef::NULL), "\"OpaqueRef:NULL\"", "<value>OpaqueRef:NULL</value>"),
        (Value::set([Value::Int(1)]), "[1]", "<value><array><data><value>1</value></data></array></value>"),
        (
            map,
            "{\"1\":0.5}",
            "<value><struct><member><name>1</name><value><double>0.5</double></value></member></struct></value>",
        ),
        (Value::Void, "\"\"", "<value></value>"),
    ] {
        assert_eq!(json(&value), json_form);
        assert_eq!(xml(&value), xml_form);
    }
    assert_eq!(xml(&Value::str("a\u{fffe}\u{ffff}b")), "<value>ab</value>");
}

fn text(text: &str) -> Input {
    Input::Str(text.to_owned())
}

#[test]
fn clients_may_send_what_clients_send() {
    assert_eq!(convert(&Type::Int, text("42"), "n"), Ok(Value::Int(42)));
    assert_eq!(convert(&Type::Int, text("0x1f"), "n"), Ok(Value::Int(31)));
    assert_eq!(convert(&Type::Float, Input::Int(5), "n"), Ok(Value::Float(5.0)));
    assert_eq!(convert(&Type::Ref(Vm::ID), text(""), "n"), Ok(Value::Ref(OpaqueRef::NULL)));
    assert_eq!(convert(&Type::DateTime, text("2024-01-01T00:00:00Z"), "n"), Ok(Value::Time(Timestamp(1_704_067_200))));
    let surplus = Input::Struct(vec![("name_label".into(), text("x")), ("nonsense".into(), Input::Nil)]);
    let Ok(Value::Record(members)) = convert(&Type::Record(Vm::ID), surplus, "args") else { panic!("refused") };
    assert_eq!(members.len(), 1);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    assert_eq!(convert(&Type::Bool, text("true"), "flag"), Err(Misfit::Refused(errors::field_type_error("flag"))));
    assert_eq!(convert(&Type::String, Input::Int(1), "label"), Err(Misfit::Refused(errors::field_type_error("label"))));
    assert_eq!(
        convert(&Type::DateTime, text("soon"), "when"),
        Err(Misfit::Refused(errors::invalid_value("when", "soon")))
    );
    let handle = errors::handle_invalid("VM", "OpaqueRef:x");
    assert_eq!(convert(&Type::Ref(Vm::ID), text("OpaqueRef:x"), "vm"), Err(Misfit::NoSuchHandle(handle)));
}

#[test]
fn arguments_are_counted_without_the_session_and_trailing_ones_have_defaults() {
    let login = model().message("session.login_with_password").unwrap();
    for count in 2..=4 {
        let words = vec![text("a"); count];
        assert_eq!(arguments(login, words).unwrap().values.len(), 4, "{count} arguments");
    }
    let start = model().message("VM.start").unwrap();
    let error = arguments(start, vec![text("session"), text("vm")]).unwrap_err();
    assert_eq!(error, errors::message_parameter_count_mismatch("VM.start", "3", "1"));
}

#[test]
fn the_filter_language_is_the_documented_one() {
    let fields: Vec<Value> = Vm::ID.def().fields.iter().map(|field| field.default.clone()).collect();
    let holds = |expression: &str| Filter::parse(expression).map(|filter| filter.matches(Vm::ID.def(), &fields));
    assert_eq!(holds("true"), Ok(true));
    assert_eq!(holds("field \"power_state\"=\"Halted\""), Ok(true));
    assert_eq!(holds("(field \"uuid\"=\"X\") or (field \"name__label\"=\"\")"), Ok(true));
    assert_eq!(holds("not true and false"), Ok(true));
    assert_eq!(holds("false and true or true"), Ok(true));
    assert_eq!(holds("field \"no_such_field\"=\"\""), Ok(false));
    for bad in ["", "true true", "field", "\"open", "(true", "a = b", &"(".repeat(5000), &"not ".repeat(5000)] {
        assert_eq!(holds(bad).unwrap_err().code, errors::INVALID_VALUE, "{bad:.40}");
    }
}

proptest! {
    #[test]
    fn json_text_reads_back_as_it_was_written(written in "[^\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f]{0,60}") {
        let read: String = serde_json::from_str(&json(&Value::str(written.as_str()))).unwrap();
        prop_assert_eq!(read, written);
    }

    #[test]
    fn no_expression_makes_the_filter_panic(expression in ".{0,80}") {
        let _ = Filter::parse(&expression);
    }
}
