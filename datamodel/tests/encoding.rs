//! What travels: the exact bytes of every type on both wires.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::borrow::Cow;

use datamodel::{ClassId, Key, OpaqueRef, Timestamp, Value, encode, model};
use proptest::prelude::*;
use serde_json::Value as Json;

const REF: &str = "OpaqueRef:0f0e0d0c-0b0a-0908-0706-050403020100";

fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut out = b"before".to_vec();
    write(&mut out);
    let text = String::from_utf8(out).expect("UTF-8");
    text.strip_prefix("before").expect("what stood there stays").to_owned()
}

fn json(value: &Value) -> String {
    written(|out| encode::json(value, out))
}

fn xml(value: &Value) -> String {
    written(|out| encode::xml(value, out))
}

#[track_caller]
fn both(value: &Value, as_json: &str, as_xml: &str) {
    assert_eq!(json(value), as_json);
    assert_eq!(xml(value), format!("<value>{as_xml}</value>"));
}

#[test]
fn integers_are_numbers_in_json_and_bare_in_xml() {
    for (number, text) in [(0, "0"), (-1, "-1"), (i64::MAX, "9223372036854775807"), (i64::MIN, "-9223372036854775808")]
    {
        both(&Value::Int(number), text, text);
    }
}

#[test]
fn floats_keep_their_point_in_json_and_lose_it_in_xml() {
    for (number, as_json, as_xml) in [
        (0.0, "0.0", "0"),
        (1.0, "1.0", "1"),
        (-2.0, "-2.0", "-2"),
        (0.5, "0.5", "0.5"),
        (1.0 / 3.0, "0.3333333333333333", "0.3333333333333333"),
        (4_294_967_296.0, "4294967296.0", "4294967296"),
        (0.0001, "0.0001", "0.0001"),
        (f64::NAN, "NaN", "nan"),
        (f64::INFINITY, "Infinity", "inf"),
        (f64::NEG_INFINITY, "-Infinity", "-inf"),
    ] {
        both(&Value::Float(number), as_json, &format!("<double>{as_xml}</double>"));
    }
}

#[test]
fn booleans_are_words_in_json_and_digits_in_xml() {
    both(&Value::Bool(true), "true", "<boolean>1</boolean>");
    both(&Value::Bool(false), "false", "<boolean>0</boolean>");
}

#[test]
fn dates_have_one_form_with_the_zone_of_utc() {
    for (seconds, text) in [
        (0, "19700101T00:00:00Z"),
        (1_704_164_645, "20240102T03:04:05Z"),
        (-1, "19691231T23:59:59Z"),
        (951_782_400, "20000229T00:00:00Z"),
        (253_402_207_200, "99991230T22:00:00Z"),
    ] {
        let tagged = format!("<dateTime.iso8601>{text}</dateTime.iso8601>");
        both(&Value::Time(Timestamp(seconds)), &format!("\"{text}\""), &tagged);
    }
}

#[test]
fn references_and_words_are_text() {
    both(&Value::Ref(OpaqueRef::NULL), r#""OpaqueRef:NULL""#, "OpaqueRef:NULL");
    both(&Value::Ref(REF.parse().unwrap()), &format!("\"{REF}\""), REF);
    both(&Value::Enum("<none/>"), r#""<none/>""#, "&lt;none/&gt;");
}

#[test]
fn void_is_the_empty_string() {
    both(&Value::Void, r#""""#, "");
    both(&Value::str(""), r#""""#, "");
}

#[test]
fn text_is_escaped_as_each_wire_demands() {
    for (text, as_json, as_xml) in [
        ("a<b>c&d", r#""a<b>c&d""#, "a&lt;b&gt;c&amp;d"),
        (r#"say "hi""#, r#""say \"hi\"""#, "say &quot;hi&quot;"),
        ("it's", r#""it's""#, "it's"),
        (r"C:\x", r#""C:\\x""#, r"C:\x"),
        ("&amp;", r#""&amp;""#, "&amp;amp;"),
        ("]]>", r#""]]>""#, "]]&gt;"),
        ("a\tb\nc", r#""a\tb\nc""#, "a\tb\nc"),
        // Bare, it would be read back as a line feed.
        ("a\rb", r#""a\rb""#, "a&#13;b"),
        ("ü€\u{1f984}", "\"ü€\u{1f984}\"", "ü€\u{1f984}"),
        ("<<<", r#""<<<""#, "&lt;&lt;&lt;"),
        (" x ", r#"" x ""#, " x "),
    ] {
        both(&Value::str(text), as_json, as_xml);
    }
}

#[test]
fn control_characters_are_dropped_from_both() {
    for code in (0..0x20_u8).filter(|code| !b"\t\n\r".contains(code)) {
        let control = char::from(code);
        both(&Value::str(format!("a{control}b{control}{control}")), r#""ab""#, "ab");
        both(&Value::str(control.to_string()), r#""""#, "");
        both(&Value::str(format!("{control}<")), r#""<""#, "&lt;");
    }
}

#[test]
fn what_xml_forbids_is_dropped_from_it_and_its_neighbours_stay() {
    for (text, as_xml) in [
        ("a\u{fffe}b", "ab"),
        ("\u{ffff}", ""),
        ("\u{fffe}\u{ffff}<", "&lt;"),
        ("\u{1}\u{fffe}\u{1}", ""),
        ("\u{fffd}\u{fffe}\u{ff5e}", "\u{fffd}\u{ff5e}"),
        ("\u{ffbe}\u{ffbf}", "\u{ffbe}\u{ffbf}"),
    ] {
        assert_eq!(xml(&Value::str(text)), format!("<value>{as_xml}</value>"), "{text:?}");
    }
}

#[test]
fn sets_keep_their_order_and_may_be_empty() {
    both(&Value::set([]), "[]", "<array><data></data></array>");
    let set = Value::set(vec![Value::str("b"), Value::str("a"), Value::set(vec![Value::Int(1)])]);
    both(
        &set,
        r#"["b","a",[1]]"#,
        "<array><data><value>b</value><value>a</value>\
         <value><array><data><value>1</value></data></array></value></data></array>",
    );
}

#[test]
fn the_keys_of_maps_are_text_of_every_type() {
    both(&Value::map([]), "{}", "<struct></struct>");
    for (key, as_json, as_xml) in [
        (Key::from("a\"<"), r#"a\"<"#, "a&quot;&lt;"),
        (Key::Int(-7), "-7", "-7"),
        (Key::Ref(REF.parse().unwrap()), REF, REF),
        (Key::Ref(OpaqueRef::NULL), "OpaqueRef:NULL", "OpaqueRef:NULL"),
        (Key::Enum("start"), "start", "start"),
    ] {
        both(
            &Value::map([(key, Value::Int(1))]),
            &format!("{{\"{as_json}\":1}}"),
            &format!("<struct><member><name>{as_xml}</name><value>1</value></member></struct>"),
        );
    }
    let two = Value::map([(Key::from("b"), Value::Void), (Key::from("a"), Value::Bool(true))]);
    assert_eq!(json(&two), r#"{"a":true,"b":""}"#);
}

#[test]
fn records_keep_their_order_and_leave_out_what_is_absent() {
    let record = |members: &[(&'static str, Value)]| {
        Value::Record(members.iter().map(|(name, value)| (Cow::Borrowed(*name), value.clone())).collect())
    };
    both(
        &record(&[("z", Value::Absent), ("b", Value::Int(1)), ("y", Value::Absent), ("a", Value::Void)]),
        r#"{"b":1,"a":""}"#,
        "<struct><member><name>b</name><value>1</value></member>\
         <member><name>a</name><value></value></member></struct>",
    );
    both(&record(&[("z", Value::Absent)]), "{}", "<struct></struct>");
}

fn zeros(class: ClassId) -> Vec<Value> {
    class.def().fields.iter().map(|field| field.ty.zero()).collect()
}

#[test]
fn every_record_of_every_class_shows_the_fields_that_clients_see_in_both_forms() {
    for class in model().classes() {
        let fields = zeros(class.id);
        let shown: Vec<(Cow<'static, str>, Value)> = class
            .fields
            .iter()
            .zip(&fields)
            .filter(|(field, value)| !field.hidden && **value != Value::Absent)
            .map(|(field, value)| (Cow::Borrowed(field.name), value.clone()))
            .collect();
        let record = Value::Record(shown.clone().into());
        assert_eq!(written(|out| encode::json_record(class, &fields, out)), json(&record), "{}", class.name);
        assert_eq!(written(|out| encode::xml_record(class, &fields, out)), xml(&record), "{}", class.name);
        let read: Json = serde_json::from_str(&json(&record)).unwrap();
        assert_eq!(read.as_object().unwrap().len(), shown.len(), "{}", class.name);
    }
}

#[test]
fn no_hidden_field_travels() {
    let session = ClassId::named("session").unwrap();
    let mut fields = zeros(session);
    for (field, value) in session.def().fields.iter().zip(&mut fields).filter(|(field, _)| field.hidden) {
        *value = Value::str(format!("hidden {}", field.name));
    }
    assert!(fields.iter().any(|value| value.as_str().is_some_and(|text| text.starts_with("hidden"))));
    for text in [
        written(|out| encode::json_record(session.def(), &fields, out)),
        written(|out| encode::xml_record(session.def(), &fields, out)),
    ] {
        assert!(text.contains("auth_user_name") && !text.contains("hidden"), "{text}");
    }
}

/// Text with every kind of character that either wire treats in its own way.
fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        prop::collection::vec(
            prop::sample::select("a<>&\"'\\\r\n\t\0\u{1b}\u{fffd}\u{fffe}\u{ffff}é".chars().collect::<Vec<_>>()),
            0..12
        )
        .prop_map(String::from_iter),
    ]
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any_text().prop_map(Value::str),
        any::<i64>().prop_map(Value::Int),
        // Eighths: the reader of this test rounds others; that they read back exactly is proved below.
        any::<i32>().prop_map(|eighths| Value::Float(f64::from(eighths) / 8.0)),
        any::<bool>().prop_map(Value::Bool),
        (-62_135_596_800_i64..253_402_207_200).prop_map(|seconds| Value::Time(Timestamp(seconds))),
        any::<[u8; 16]>().prop_map(|bits| Value::Ref(reference(bits))),
        Just(Value::Void),
    ];
    leaf.prop_recursive(4, 32, 5, |inner| {
        // Keys that differ in what is dropped only would be one on the wire.
        let key = prop_oneof![
            "[^\u{0}-\u{1f}]{0,8}".prop_map(|text| Key::from(text.as_str())),
            any::<i64>().prop_map(Key::Int)
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::set),
            prop::collection::btree_map(
                "[^\u{0}-\u{1f}]{0,8}".prop_map(|text| Key::from(text.as_str())),
                inner.clone(),
                0..5
            )
            .prop_map(Value::map),
            prop::collection::btree_map(key, inner, 0..1).prop_map(Value::map),
        ]
    })
}

fn reference(bits: [u8; 16]) -> OpaqueRef {
    let hex: String = bits.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("OpaqueRef:{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]).parse().unwrap()
}

/// What a client makes of a text: control characters but three do not travel.
fn travels(text: &str) -> String {
    text.chars().filter(|symbol| *symbol >= ' ' || "\t\n\r".contains(*symbol)).collect()
}

fn expected(value: &Value) -> Json {
    match value {
        Value::Str(text) => Json::from(travels(text)),
        Value::Enum(word) => Json::from(*word),
        Value::Int(number) => Json::from(*number),
        Value::Float(number) => Json::from(*number),
        Value::Bool(truth) => Json::from(*truth),
        Value::Time(time) => Json::from(time.to_string()),
        Value::Ref(reference) => Json::from(reference.to_string()),
        Value::Set(items) => items.iter().map(expected).collect(),
        Value::Map(entries) => entries.iter().map(|(key, held)| (key.text().into_owned(), expected(held))).collect(),
        Value::Record(members) => members.iter().map(|(name, held)| (name.to_string(), expected(held))).collect(),
        Value::Absent | Value::Void => Json::from(""),
    }
}

proptest! {
    #[test]
    fn json_reads_back_as_the_value_that_was_written(value in any_value()) {
        let text = json(&value);
        let read: Json = serde_json::from_str(&text).expect(&text);
        prop_assert_eq!(read, expected(&value));
    }

    #[test]
    fn xml_has_no_bare_markup_and_no_forbidden_character(text in any_text()) {
        let body = xml(&Value::str(text.as_str()));
        let inner = body.strip_prefix("<value>").and_then(|rest| rest.strip_suffix("</value>")).unwrap();
        let bare = inner.contains(['<', '>', '"', '\r', '\u{fffe}', '\u{ffff}']);
        prop_assert!(!bare, "{}", inner);
        prop_assert!(inner.chars().all(|symbol| symbol >= ' ' || "\t\n".contains(symbol)));
        let read = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#13;", "\r"), ("&amp;", "&")]
            .iter()
            .fold(inner.to_owned(), |so_far, (entity, symbol)| so_far.replace(entity, symbol));
        prop_assert_eq!(read, travels(&text).replace(['\u{fffe}', '\u{ffff}'], ""));
    }

    #[test]
    fn floats_read_back_exactly_from_both(number in any::<f64>()) {
        prop_assume!(number.is_finite());
        let value = Value::Float(number);
        let text = json(&value);
        prop_assert!(text.contains(['.', 'e']), "{} looks like an integer", text);
        prop_assert_eq!(text.parse::<f64>().unwrap(), number);
        let text = xml(&value);
        let inner = text.strip_prefix("<value><double>").unwrap().strip_suffix("</double></value>").unwrap();
        prop_assert_eq!(inner.parse::<f64>().unwrap(), number);
        prop_assert!(inner.len() < 30, "{} is long", inner);
    }
}
