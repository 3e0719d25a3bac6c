//! One handler for all classes: so all classes are walked.

use datamodel::{ClassId, Implicit, Input, Lifecycle, MessageDef, OpaqueRef, Value, errors, model};
use uuid::Uuid;

use super::{Pool, fits, plain, reference, stored_classes, text};
use crate::call::Reply;

/// An object of every class, all fields at their defaults.
async fn one_of_each(pool: &Pool) -> Vec<(ClassId, OpaqueRef, String)> {
    let made: Vec<_> = stored_classes()
        .map(|class| (class.id, OpaqueRef::from_uuid(Uuid::new_v4()), Uuid::new_v4().hyphenated().to_string()))
        .collect();
    pool.commit(|change| {
        for (class, reference, uuid) in &made {
            let fields = class.def().field("uuid").map(|index| (index, Value::str(uuid.as_str())));
            change.insert_values(*class, *reference, fields.into_iter().collect());
        }
    })
    .await;
    made
}

/// Messages of a class that were not removed.
fn served(class: ClassId) -> impl Iterator<Item = &'static MessageDef> {
    model().messages().iter().filter(move |message| message.class == class && message.state != Lifecycle::Removed)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_getter_of_every_class_answers_with_the_field() {
    let pool = Pool::start().await;
    let mut walked = 0;
    for (class, object, uuid) in one_of_each(&pool).await {
        let this = || vec![text(object.to_string())];
        for message in served(class) {
            let name = message.full_name;
            match message.implicit {
                Some(Implicit::Get(field)) => {
                    let answer = pool.ask(name, this()).await.unwrap();
                    let row = pool.row(class, object).await.unwrap();
                    assert_eq!(&answer, row.value(field), "{name}");
                    assert!(fits(&message.result, &answer), "{name}: {answer:?}");
                }
                Some(Implicit::GetRecord) => {
                    let reply = pool.call_in(&pool.root, name, this()).await.unwrap();
                    let Reply::Record(row) = reply else { panic!("{name}: {reply:?}") };
                    assert_eq!(row.reference, object, "{name}");
                }
                Some(Implicit::GetByUuid) => {
                    assert_eq!(reference(&pool.ask(name, vec![text(&uuid)]).await.unwrap()), object, "{name}");
                }
                Some(Implicit::GetAll) => {
                    let Value::Set(all) = pool.ask(name, vec![]).await.unwrap() else { panic!("{name}") };
                    assert!(all.contains(&Value::Ref(object)), "{name}");
                }
                Some(Implicit::GetAllRecords) => {
                    let reply = pool.call_in(&pool.root, name, vec![]).await.unwrap();
                    let Reply::Records(rows) = reply else { panic!("{name}: {reply:?}") };
                    assert!(rows.iter().any(|row| row.reference == object), "{name}");
                }
                _ => continue,
            }
            walked += 1;
        }
    }
    assert!(walked > 900, "only {walked} messages were walked");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_setter_is_read_back_and_every_map_takes_a_key_once() {
    let pool = Pool::start().await;
    let mut walked = 0;
    for (class, object, _) in one_of_each(&pool).await {
        for message in served(class) {
            // Those with a function of their own have rules of their own.
            if crate::api::handler(message.full_name).is_some() {
                continue;
            }
            let mut params = vec![text(object.to_string())];
            params.extend(message.params[1.min(message.params.len())..].iter().map(|param| plain(&param.ty)));
            let name = message.full_name;
            match message.implicit {
                Some(Implicit::Set(field)) => {
                    if fits(&datamodel::Type::String, pool.row(class, object).await.unwrap().value(field)) {
                        params[1] = text("written");
                    }
                    pool.ask(name, params.clone()).await.unwrap_or_else(|error| panic!("{name}: {error}"));
                    if params[1] == text("written") {
                        let row = pool.row(class, object).await.unwrap();
                        assert_eq!(row.value(field), &Value::str("written"), "{name}");
                    }
                }
                Some(Implicit::AddToMap(field)) => {
                    pool.ask(name, params.clone()).await.unwrap_or_else(|error| panic!("{name}: {error}"));
                    let twice = pool.ask(name, params).await.unwrap_err();
                    assert_eq!((twice.code, twice.params.len()), (errors::MAP_DUPLICATE_KEY, 4), "{name}");
                    let row = pool.row(class, object).await.unwrap();
                    assert!(matches!(row.value(field), Value::Map(entries) if entries.len() == 1), "{name}");
                }
                Some(Implicit::RemoveFromMap(_) | Implicit::AddToSet(_) | Implicit::RemoveFromSet(_)) => {
                    for _ in 0..2 {
                        pool.ask(name, params.clone()).await.unwrap_or_else(|error| panic!("{name}: {error}"));
                    }
                }
                _ => continue,
            }
            walked += 1;
        }
    }
    assert!(walked > 200, "only {walked} messages were walked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_constructor_fills_in_defaults_and_names_what_is_missing() {
    let pool = Pool::start().await;
    let short = pool.refusal("VBD.create", vec![Input::Struct(Vec::new())]).await;
    assert_eq!(short[0], "INTERNAL_ERROR");
    assert!(short[1].contains("VBD.create"), "{short:?}");
    let record = Input::Struct(vec![
        ("name_label".into(), text("net")),
        ("other_config".into(), Input::Struct(Vec::new())),
        ("surplus".into(), text("ignored")),
    ]);
    let made = reference(&pool.ask("network.create", vec![record]).await.unwrap());
    let row = pool.row(<datamodel::Network as datamodel::ClassKind>::ID, made).await.unwrap();
    assert_eq!(row.name_label(), "net");
    assert!(row.uuid().parse::<Uuid>().is_ok());
    pool.ask("network.destroy", vec![text(made.to_string())]).await.unwrap();
    let gone = pool.refusal("network.destroy", vec![text(made.to_string())]).await;
    assert_eq!(gone, ["HANDLE_INVALID", "network", made.to_string().as_str()]);
}
