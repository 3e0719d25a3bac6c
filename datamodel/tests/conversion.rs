//! What clients may send: every leniency that a published client needs, and a refusal by name for all else.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use datamodel::{
    ApiError, Arguments, ClassId, Input, Key, MessageDef, Misfit, OpaqueRef, Timestamp, Type, Value, arguments,
    convert, errors, model,
};
use proptest::prelude::*;

const REF: &str = "OpaqueRef:0f0e0d0c-0b0a-0908-0706-050403020100";

fn text(text: &str) -> Input {
    Input::Str(text.to_owned())
}

fn class(name: &str) -> ClassId {
    ClassId::named(name).unwrap()
}

fn message(name: &str) -> &'static MessageDef {
    model().message(name).unwrap()
}

fn wrong() -> Misfit {
    Misfit::Refused(errors::field_type_error("p"))
}

fn invalid(text: &str) -> Misfit {
    Misfit::Refused(errors::invalid_value("p", text))
}

fn struct_of(members: &[(&str, Input)]) -> Input {
    Input::Struct(members.iter().map(|(name, input)| ((*name).to_owned(), input.clone())).collect())
}

fn set_of(element: Type) -> Type {
    Type::Set(Box::new(element))
}

fn map_of(key: Type, value: Type) -> Type {
    Type::Map(Box::new(key), Box::new(value))
}

#[test]
fn integers_come_as_numbers_and_as_decimal_or_hexadecimal_text() {
    for (input, wanted) in [
        (Input::Int(4), 4),
        (Input::Int(i64::MIN), i64::MIN),
        (Input::Float(5.0), 5),
        (Input::Float(-0.0), 0),
        (text("4"), 4),
        (text(" 4\n"), 4),
        (text("-4"), -4),
        (text("9223372036854775807"), i64::MAX),
        (text("-9223372036854775808"), i64::MIN),
        (text("0x10"), 16),
        (text("0Xff"), 255),
        (text("-0x10"), -16),
        (text("0x7fffffffffffffff"), i64::MAX),
        (text("-0x8000000000000000"), i64::MIN),
    ] {
        assert_eq!(convert(&Type::Int, input.clone(), "p"), Ok(Value::Int(wanted)), "{input:?}");
    }
}

#[test]
fn what_is_no_integer_is_a_wrong_type() {
    for input in [
        text(""),
        text("four"),
        text("4.5"),
        text("0x"),
        text("0x-1"),
        text("0x+1"),
        text("--4"),
        text("0xfg"),
        text("9223372036854775808"),
        text("0x8000000000000000"),
        text("٤"),
        Input::Float(4.5),
        Input::Float(1e300),
        Input::Float(f64::NAN),
        Input::Float(f64::INFINITY),
        Input::Bool(true),
        Input::Time("4".into()),
        Input::Nil,
        Input::Array(vec![Input::Int(4)]),
    ] {
        assert_eq!(convert(&Type::Int, input.clone(), "p"), Err(wrong()), "{input:?}");
    }
}

#[test]
fn floats_come_as_floats_integers_and_text() {
    for (input, wanted) in [
        (Input::Float(0.25), 0.25),
        (Input::Int(30), 30.0),
        (text("60.1"), 60.1),
        (text("-2"), -2.0),
        (text(" 1e3 "), 1000.0),
    ] {
        assert_eq!(convert(&Type::Float, input.clone(), "p"), Ok(Value::Float(wanted)), "{input:?}");
    }
    for input in [text(""), text("soon"), text("1,5"), Input::Bool(true), Input::Nil] {
        assert_eq!(convert(&Type::Float, input.clone(), "p"), Err(wrong()), "{input:?}");
    }
}

#[test]
fn a_boolean_is_a_boolean_and_nothing_else() {
    assert_eq!(convert(&Type::Bool, Input::Bool(false), "p"), Ok(Value::Bool(false)));
    assert_eq!(convert(&Type::Bool, Input::Bool(true), "p"), Ok(Value::Bool(true)));
    for input in [text("true"), text("1"), text(""), Input::Int(1), Input::Float(1.0), Input::Nil] {
        assert_eq!(convert(&Type::Bool, input.clone(), "p"), Err(wrong()), "{input:?}");
    }
}

#[test]
fn a_string_is_a_string_and_nothing_else() {
    for kept in ["", " spaces ", "0", "\u{1f984}", "a\u{0}b", "OpaqueRef:NULL"] {
        assert_eq!(convert(&Type::String, text(kept), "p"), Ok(Value::str(kept)));
    }
    for input in [Input::Int(1), Input::Float(1.0), Input::Bool(true), Input::Time(String::new()), Input::Nil] {
        assert_eq!(convert(&Type::String, input.clone(), "p"), Err(wrong()), "{input:?}");
    }
}

#[test]
fn dates_come_typed_or_as_text_with_and_without_hyphens_and_zone() {
    let wanted = Ok(Value::Time(Timestamp(1_704_164_645)));
    for date in [
        "20240102T03:04:05Z",
        "2024-01-02T03:04:05Z",
        "20240102T03:04:05",
        "2024-01-02T03:04:05",
        "20240102T03:04:05.678Z",
        "20240102T05:04:05+02:00",
        "2024-01-01T22:34:05-0430",
        " 20240102T03:04:05Z ",
    ] {
        assert_eq!(convert(&Type::DateTime, text(date), "p"), wanted, "{date}");
        assert_eq!(convert(&Type::DateTime, Input::Time(date.into()), "p"), wanted, "{date}");
    }
}

#[test]
fn what_is_no_date_is_an_invalid_value_and_what_is_no_text_a_wrong_type() {
    for date in [
        "",
        "now",
        "20240102",
        "20240102T03:04Z",
        "20240230T00:00:00Z",
        "20240102T24:00:00Z",
        "20240102T03:04:05X",
        "20240102T03:04:05+1",
        "20240102T03:04:05:06Z",
        "20240102T03:04:05+99:99",
        "2-0-2-4-0-1-0-2T03:04:05Z",
        "2024-0102T03:04:05Z",
        "2024-01-02T03:04:05.xZ",
        "99991230T22:00:00-23:00",
    ] {
        assert_eq!(convert(&Type::DateTime, text(date), "p"), Err(invalid(date)), "{date}");
    }
    for input in [Input::Int(0), Input::Float(0.0), Input::Nil] {
        assert_eq!(convert(&Type::DateTime, input.clone(), "p"), Err(wrong()), "{input:?}");
    }
}

#[test]
fn a_word_of_an_enum_comes_in_any_case_and_is_kept_as_the_model_spells_it() {
    let ty = &message("VM.set_actions_after_shutdown").params[1].ty;
    assert!(matches!(ty, Type::Enum(_)), "{ty}");
    for word in ["destroy", "Destroy", "DESTROY"] {
        assert_eq!(convert(ty, text(word), "p"), Ok(Value::Enum("destroy")), "{word}");
    }
    for word in ["", "destroyed", " destroy", "zerstören"] {
        assert_eq!(convert(ty, text(word), "p"), Err(invalid(word)), "{word}");
    }
    assert_eq!(convert(ty, Input::Int(0), "p"), Err(wrong()));
}

#[test]
fn an_exact_word_wins_over_one_in_another_case() {
    for (_, words) in model().enums() {
        for word in &words.words {
            assert_eq!(words.word(word), Some(*word), "{}", words.name);
        }
    }
}

#[test]
fn a_null_reference_comes_as_itself_as_no_text_and_as_nil() {
    let ty = Type::Ref(class("SR"));
    for input in [text(""), text("OpaqueRef:NULL"), Input::Nil] {
        assert_eq!(convert(&ty, input.clone(), "p"), Ok(Value::Ref(OpaqueRef::NULL)), "{input:?}");
    }
    assert_eq!(convert(&ty, text(REF), "p"), Ok(Value::Ref(REF.parse().unwrap())));
    assert_eq!(REF.parse::<OpaqueRef>().unwrap().to_string(), REF);
}

#[test]
fn text_that_is_no_reference_is_no_handle_of_its_class() {
    for (name, ty) in [("VM", Type::Ref(class("VM"))), ("host", set_of(Type::Ref(class("host"))))] {
        let upper = REF.to_ascii_uppercase();
        for bad in ["x", "OpaqueRef:", "OpaqueRef:null", "opaqueref:NULL", &REF[10..], &REF[..40], &upper, " "] {
            let input = if matches!(ty, Type::Set(_)) { Input::Array(vec![text(REF), text(bad)]) } else { text(bad) };
            assert_eq!(convert(&ty, input, "p"), Err(Misfit::NoSuchHandle(errors::handle_invalid(name, bad))), "{bad}");
        }
    }
    assert_eq!(convert(&Type::Ref(class("VM")), Input::Int(0), "p"), Err(wrong()));
}

#[test]
fn sets_and_maps_convert_what_they_hold() {
    let numbers = Input::Array(vec![text("2"), Input::Int(1), text("0x2")]);
    let wanted = Value::set(vec![Value::Int(2), Value::Int(1), Value::Int(2)]);
    assert_eq!(convert(&set_of(Type::Int), numbers, "p"), Ok(wanted));
    assert_eq!(convert(&set_of(Type::Int), Input::Array(Vec::new()), "p"), Ok(Value::set([])));
    assert_eq!(convert(&set_of(Type::Int), Input::Array(vec![text("x")]), "p"), Err(wrong()));
    for input in [text(""), Input::Nil, Input::Struct(Vec::new())] {
        assert_eq!(convert(&set_of(Type::Int), input.clone(), "p"), Err(wrong()), "{input:?}");
    }

    let by_number = map_of(Type::Int, Type::String);
    let wanted = Value::map([(Key::Int(16), Value::str("v"))]);
    assert_eq!(convert(&by_number, struct_of(&[("0x10", text("v"))]), "p"), Ok(wanted));
    assert_eq!(convert(&by_number, struct_of(&[("k", text("v"))]), "p"), Err(wrong()));
    let by_reference = map_of(Type::Ref(class("VDI")), Type::Ref(class("SR")));
    let wanted = Value::map([(Key::Ref(REF.parse().unwrap()), Value::Ref(OpaqueRef::NULL))]);
    assert_eq!(convert(&by_reference, struct_of(&[(REF, text(""))]), "p"), Ok(wanted));
    let no_handle = Misfit::NoSuchHandle(errors::handle_invalid("VDI", "k"));
    assert_eq!(convert(&by_reference, struct_of(&[("k", text(REF))]), "p"), Err(no_handle));
    let strings = map_of(Type::String, Type::String);
    assert_eq!(convert(&strings, struct_of(&[("k", Input::Int(1))]), "p"), Err(wrong()));
    for input in [text(""), Input::Nil, Input::Array(Vec::new())] {
        assert_eq!(convert(&strings, input.clone(), "p"), Err(wrong()), "{input:?}");
    }
    // The last of two members with one name counts.
    let wanted = Value::map([(Key::from("k"), Value::str("b"))]);
    assert_eq!(convert(&strings, struct_of(&[("k", text("a")), ("k", text("b"))]), "p"), Ok(wanted));
}

#[test]
fn an_option_may_be_nil() {
    let option = Type::Option(Box::new(Type::Int));
    assert_eq!(convert(&option, Input::Nil, "p"), Ok(Value::Absent));
    assert_eq!(convert(&option, text("3"), "p"), Ok(Value::Int(3)));
    assert_eq!(convert(&option, text("x"), "p"), Err(wrong()));
}

#[test]
fn what_no_client_can_send_is_refused() {
    for ty in [Type::Void, Type::AnyRecord, Type::EventBatch] {
        for input in [Input::Nil, text(""), Input::Struct(Vec::new())] {
            assert_eq!(convert(&ty, input, "p"), Err(wrong()), "{ty}");
        }
    }
}

#[test]
fn a_record_loses_members_that_are_surplus_or_the_pools_own() {
    let sent = struct_of(&[
        ("name_label", text("disk")),
        ("SR", text("")),
        ("virtual_size", text("4096")),
        ("type", text("User")),
        // The whole record is sent back by some clients, unreadable members and all.
        ("uuid", text("x")),
        ("physical_utilisation", text("not a number")),
        ("allowed_operations", Input::Nil),
        ("no_such_field", Input::Nil),
        ("other_config", struct_of(&[("a", text("b"))])),
    ]);
    let record = convert(&Type::Record(class("VDI")), sent, "args").unwrap();
    let wanted = Value::Record(Box::new([
        ("name_label".into(), Value::str("disk")),
        ("SR".into(), Value::Ref(OpaqueRef::NULL)),
        ("virtual_size".into(), Value::Int(4096)),
        ("type".into(), Value::Enum("user")),
        ("other_config".into(), Value::map([(Key::from("a"), Value::str("b"))])),
    ]));
    assert_eq!(record, wanted);
}

#[test]
fn a_record_may_leave_members_out_and_misfits_name_the_field() {
    let ty = Type::Record(class("VDI"));
    assert_eq!(convert(&ty, Input::Struct(Vec::new()), "args"), Ok(Value::Record(Box::default())));
    let misfit = convert(&ty, struct_of(&[("sharable", text("true"))]), "args");
    assert_eq!(misfit, Err(Misfit::Refused(errors::field_type_error("sharable"))));
    let misfit = convert(&ty, struct_of(&[("type", text("floppy"))]), "args");
    assert_eq!(misfit, Err(Misfit::Refused(errors::invalid_value("type", "floppy"))));
    let misfit = convert(&ty, struct_of(&[("SR", text("local"))]), "args");
    assert_eq!(misfit, Err(Misfit::NoSuchHandle(errors::handle_invalid("SR", "local"))));
    assert_eq!(convert(&ty, text(""), "args"), Err(Misfit::Refused(errors::field_type_error("args"))));
}

#[test]
fn no_hidden_field_can_be_set_by_a_constructor() {
    for class in model().classes().iter().filter(|class| class.stored) {
        for field in class.fields.iter().filter(|field| field.hidden) {
            let sent = struct_of(&[(field.name, Input::Nil)]);
            let record = convert(&Type::Record(class.id), sent, "args");
            assert_eq!(record, Ok(Value::Record(Box::default())), "{}.{}", class.name, field.name);
        }
    }
}

fn login(words: &[&str]) -> Result<Arguments, ApiError> {
    arguments(message("session.login_with_password"), words.iter().map(|word| text(word)).collect())
}

#[test]
fn a_login_takes_two_three_or_four_arguments_and_any_version() {
    let strings = |words: [&str; 4]| words.iter().map(|word| Value::str(*word)).collect::<Vec<_>>();
    for (words, wanted) in [
        (&["u", "p"][..], ["u", "p", "1.1", ""]),
        (&["u", "p", ""], ["u", "p", "", ""]),
        (&["u", "p", "2.19.14"], ["u", "p", "2.19.14", ""]),
        (&["u", "p", "1.0", "me"], ["u", "p", "1.0", "me"]),
        // A message that has optional parameters ignores what is too much.
        (&["u", "p", "1.0", "me", "more"], ["u", "p", "1.0", "me"]),
    ] {
        let read = login(words).unwrap();
        assert_eq!((read.session.as_str(), read.values, read.deferred), ("", strings(wanted), None), "{words:?}");
    }
}

#[test]
fn a_count_mismatch_tells_numbers_without_the_session_and_the_optional_ones() {
    let mismatch = |name: &str, expected: &str, received: &str| {
        Err(errors::message_parameter_count_mismatch(name, expected, received))
    };
    assert_eq!(login(&[]), mismatch("session.login_with_password", "2", "0"));
    assert_eq!(login(&["u"]), mismatch("session.login_with_password", "2", "1"));
    let start = |count: usize| {
        let all = [text("s"), text(REF), Input::Bool(false), Input::Bool(false), text("surplus")];
        arguments(message("VM.start"), all[..count].to_vec())
    };
    assert_eq!(start(0), mismatch("VM.start", "3", "0"));
    assert_eq!(start(1), mismatch("VM.start", "3", "0"));
    assert_eq!(start(3), mismatch("VM.start", "3", "2"));
    assert_eq!(start(5), mismatch("VM.start", "3", "4"));
    let read = start(4).unwrap();
    assert_eq!(read.session, "s");
    assert_eq!(read.values, [Value::Ref(REF.parse().unwrap()), Value::Bool(false), Value::Bool(false)]);
    // However the method is spelled, the model's name is told.
    let spelled = arguments(message("VM_start"), vec![text("s")]);
    assert_eq!(spelled, mismatch("VM.start", "3", "0"));
}

#[test]
fn a_count_is_looked_at_before_types_and_a_session_is_text() {
    let two = arguments(message("VM.start"), vec![text("s"), Input::Int(1), Input::Int(2)]);
    assert_eq!(two.unwrap_err().code, errors::MESSAGE_PARAMETER_COUNT_MISMATCH);
    for session in [Input::Nil, Input::Int(1), Input::Array(Vec::new())] {
        let refused = arguments(message("VM.get_all"), vec![session]);
        assert_eq!(refused, Err(errors::field_type_error("session_id")));
    }
    let any = arguments(message("VM.get_all"), vec![text("no session at all")]).unwrap();
    assert_eq!(any.session, "no session at all");
}

#[test]
fn a_wrong_handle_waits_for_the_session_and_a_wrong_type_does_not() {
    let start =
        |vm: Input, paused: Input| arguments(message("VM.start"), vec![text("s"), vm, paused, Input::Bool(true)]);
    let read = start(text("nonsense"), Input::Bool(true)).unwrap();
    assert_eq!(read.deferred, Some(errors::handle_invalid("VM", "nonsense")));
    assert_eq!(read.session, "s");
    assert_eq!(read.values.len(), 3);
    let refused = start(text("nonsense"), text("true"));
    assert_eq!(refused, Err(errors::field_type_error("start_paused")));
    let refused = start(Input::Int(1), Input::Bool(true));
    assert_eq!(refused, Err(errors::field_type_error("vm")));
    let read = start(text(REF), Input::Bool(true)).unwrap();
    assert_eq!(read.deferred, None);
}

#[test]
fn the_first_of_several_wrong_handles_is_told() {
    let read = arguments(message("VM.copy"), vec![text("s"), text("a"), text("name"), text("b")]).unwrap();
    assert_eq!(read.deferred, Some(errors::handle_invalid("VM", "a")));
    // No text is the null reference: the SR where the disks are already.
    let read = arguments(message("VM.copy"), vec![text("s"), text(REF), text("name"), text("")]).unwrap();
    assert_eq!((read.deferred, &read.values[2]), (None, &Value::Ref(OpaqueRef::NULL)));
}

#[test]
fn a_timeout_comes_as_a_float_or_an_integer() {
    let classes = Input::Array(vec![text("*")]);
    for timeout in [Input::Float(30.0), Input::Int(30), text("30")] {
        let read = arguments(message("event_from"), vec![text("s"), classes.clone(), text(""), timeout]).unwrap();
        assert_eq!(read.values[2], Value::Float(30.0));
    }
}

fn any_input() -> impl Strategy<Value = Input> {
    let leaf = prop_oneof![
        ".{0,12}".prop_map(Input::Str),
        "(OpaqueRef:)?[0-9a-fNUL-]{0,40}".prop_map(Input::Str),
        "[0-9+x:TZ.-]{0,24}".prop_map(Input::Str),
        any::<i64>().prop_map(Input::Int),
        any::<f64>().prop_map(Input::Float),
        any::<bool>().prop_map(Input::Bool),
        "[0-9é+:TZ.-]{0,24}".prop_map(Input::Time),
        Just(Input::Nil),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Input::Array),
            prop::collection::vec(("[a-zA-Z_]{0,12}", inner), 0..4).prop_map(Input::Struct),
        ]
    })
}

/// Whether a value is what its type says.
fn fits(ty: &Type, value: &Value) -> bool {
    match (ty, value) {
        (Type::String, Value::Str(_))
        | (Type::Int, Value::Int(_))
        | (Type::Float, Value::Float(_))
        | (Type::Bool, Value::Bool(_))
        | (Type::DateTime, Value::Time(_))
        | (Type::Ref(_), Value::Ref(_))
        | (Type::Option(_), Value::Absent) => true,
        (Type::Enum(words), Value::Enum(word)) => words.words.contains(word),
        (Type::Set(element), Value::Set(items)) => items.iter().all(|item| fits(element, item)),
        (Type::Map(key, value), Value::Map(entries)) => {
            entries.iter().all(|(name, held)| fits(key, &name.to_value()) && fits(value, held))
        }
        (Type::Record(class), Value::Record(members)) => members.iter().all(|(name, held)| {
            let field = class.def().field(name).and_then(|index| class.def().field_def(index));
            field.is_some_and(|field| fits(&field.ty, held))
        }),
        (Type::Option(inner), held) => fits(inner, held),
        _ => false,
    }
}

proptest! {
    #[test]
    fn whatever_is_accepted_has_the_type_that_was_meant(
        which in any::<prop::sample::Index>(),
        inputs in prop::collection::vec(any_input(), 0..6),
    ) {
        let messages = model().messages();
        let message = &messages[which.index(messages.len())];
        let sent = std::iter::once(text("s")).filter(|_| message.takes_session).chain(inputs).collect();
        if let Ok(read) = arguments(message, sent) {
            prop_assert_eq!(read.values.len(), message.params.len());
            for (param, value) in message.params.iter().zip(&read.values) {
                // A record that was no handle is nothing; nobody sees it, since the call is refused.
                let unseen = read.deferred.is_some() && matches!(value, Value::Absent);
                prop_assert!(unseen || fits(&param.ty, value), "{}: {value:?} is no {}", param.name, param.ty);
            }
        }
    }

    #[test]
    fn every_integer_reads_back_from_its_text(number in any::<i64>()) {
        prop_assert_eq!(convert(&Type::Int, Input::Str(number.to_string()), "p"), Ok(Value::Int(number)));
        let hexadecimal = if number < 0 {
            format!("-0x{:x}", number.unsigned_abs())
        } else {
            format!("0x{number:X}")
        };
        prop_assert_eq!(convert(&Type::Int, Input::Str(hexadecimal), "p"), Ok(Value::Int(number)));
    }

    #[test]
    fn every_date_reads_back_from_its_text(seconds in -62_135_596_800_i64..=253_402_207_200) {
        let moment = Timestamp(seconds);
        prop_assert_eq!(convert(&Type::DateTime, Input::Str(moment.to_string()), "p"), Ok(Value::Time(moment)));
    }
}
