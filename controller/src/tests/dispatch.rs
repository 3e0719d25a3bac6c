//! Every row of the table of errors, in the order in which a call is checked.

use datamodel::enums::VmPowerState;
use datamodel::{
    ClassKind, Input, Lifecycle, MessageDef, OpaqueRef, RbacRole, Session, Value, Vm, errors, fields, model,
};
use raft_store::Row;

use super::{Pool, fits, plain, reference, text, value};
use crate::call::{Reply, Transport};
use crate::membership::emergency;
use crate::{api, dispatch, events};

const NO_SESSION: &str = "OpaqueRef:00000000-0000-4000-8000-000000000000";

#[tokio::test(flavor = "multi_thread")]
async fn each_mistake_has_its_documented_error() {
    let pool = Pool::start().await;
    let vm = pool.vm("one").await.to_string();
    let pool_ref = pool.pool_ref();
    let cases: Vec<(&str, Vec<Input>, Vec<&str>)> = vec![
        ("VM.dance", vec![], vec!["MESSAGE_METHOD_UNKNOWN", "VM.dance"]),
        ("vm.start", vec![], vec!["MESSAGE_METHOD_UNKNOWN", "vm.start"]),
        ("local_user.get_all", vec![], vec!["MESSAGE_METHOD_UNKNOWN", "local_user.get_all"]),
        ("VM.start", vec![text(&vm)], vec!["MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.start", "3", "1"]),
        ("VM.get_all", vec![text("more")], vec!["MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.get_all", "0", "1"]),
        ("VM.start", vec![text(&vm), text("x"), Input::Bool(true)], vec!["FIELD_TYPE_ERROR", "start_paused"]),
        ("VM.get_record", vec![text("nonsense")], vec!["HANDLE_INVALID", "VM", "nonsense"]),
        ("VM.get_record", vec![text(NO_SESSION)], vec!["HANDLE_INVALID", "VM", NO_SESSION]),
        ("host.get_uuid", vec![text("OpaqueRef:NULL")], vec!["HANDLE_INVALID", "host", "OpaqueRef:NULL"]),
        ("VM.get_by_uuid", vec![text("none")], vec!["UUID_INVALID", "VM", "none"]),
        ("Async.VM.get_all", vec![], vec!["Fault", "No async mode for this operation (rpc: VM.get_all)"]),
        ("host.reboot", vec![text(&vm)], vec!["NOT_IMPLEMENTED", "host.reboot"]),
    ];
    for (method, params, wanted) in cases {
        assert_eq!(pool.refusal(method, params).await, wanted, "{method}");
    }
    let add = vec![text(&pool_ref), text("key"), text("value")];
    pool.ask("pool.add_to_other_config", add.clone()).await.unwrap();
    let twice = pool.refusal("pool.add_to_other_config", add).await;
    assert_eq!(twice, ["MAP_DUPLICATE_KEY", "pool", "other_config", pool_ref.as_str(), "key"]);
    pool.ask("pool.remove_from_other_config", vec![text(&pool_ref), text("absent")]).await.unwrap();
    let filter = pool.refusal("VM.get_all_records_where", vec![text("field name")]).await;
    assert_eq!(filter[..2], ["INVALID_VALUE", "field name"]);
    let removed = model().messages().iter().find(|message| message.state == Lifecycle::Removed).unwrap();
    let params = removed.params.iter().map(|param| plain(&param.ty)).collect();
    assert_eq!(pool.refusal(removed.full_name, params).await, ["MESSAGE_REMOVED"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn types_are_checked_before_the_session_and_handles_after_it() {
    let pool = Pool::start().await;
    let error = |reply: Result<Reply, datamodel::ApiError>| reply.unwrap_err().description();
    let bad_type = vec![text("OpaqueRef:NULL"), text("no"), text("no")];
    assert_eq!(error(pool.call_in(NO_SESSION, "VM.start", bad_type).await)[0], "FIELD_TYPE_ERROR");
    let bad_handle = pool.call_in(NO_SESSION, "VM.get_record", vec![text("nonsense")]).await;
    assert_eq!(error(bad_handle), ["SESSION_INVALID", NO_SESSION]);
    assert_eq!(error(pool.call_in("what", "VM.get_all", vec![]).await), ["SESSION_INVALID", "what"]);
    assert_eq!(error(pool.call("VM.get_all", vec![]).await)[0], "MESSAGE_PARAMETER_COUNT_MISMATCH");
}

#[tokio::test(flavor = "multi_thread")]
async fn system_calls_need_no_session_and_underscores_are_dots() {
    let pool = Pool::start().await;
    let Reply::Methods(names) = pool.call("system.listMethods", vec![]).await.unwrap() else { panic!("no list") };
    for name in ["pool.get_all_records", "event.from", "Async.VM.start", "VM.get_all_records"] {
        assert!(names.iter().any(|listed| listed == name), "{name}");
    }
    assert_eq!(value(pool.call("system.isAlive", vec![text("hello")]).await.unwrap()), Value::str("hello"));
    assert_eq!(pool.ask("VM_get_all", vec![]).await.unwrap(), pool.ask("VM.get_all", vec![]).await.unwrap());
}

/// Calls that end or block the session that the walk needs.
fn is_for_itself(message: &MessageDef) -> bool {
    matches!(message.full_name, "session.logout" | "session.local_logout" | "event.next" | "session.change_password")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_message_takes_arguments_of_its_types_and_answers_with_its_own() {
    let pool = Pool::start().await;
    for message in model().messages().iter().filter(|message| !message.class.def().internal && !is_for_itself(message))
    {
        let name = message.full_name;
        let mut params: Vec<Input> = message.params.iter().map(|param| plain(&param.ty)).collect();
        if message.takes_session {
            params.insert(0, text(&pool.root));
        }
        let served = api::handler(name).is_some()
            || message.implicit.is_some()
            || events::serves(message)
            || emergency::serves(name);
        match pool.call(name, params).await {
            Ok(Reply::Value(answer)) => assert!(fits(&message.result, &answer), "{name}: {answer:?}"),
            Ok(_) => {}
            Err(error) if message.state == Lifecycle::Removed && !served => {
                assert_eq!(error.code, errors::MESSAGE_REMOVED, "{name}")
            }
            Err(error) => {
                assert_eq!(error.code == errors::NOT_IMPLEMENTED, !served, "{name}: {error}");
                let misfit = error.code == errors::FIELD_TYPE_ERROR && error.params == ["argument"];
                assert!(!misfit, "{name}: its function has other parameters than the model");
            }
        }
    }
}

#[test]
fn a_message_is_for_its_role_and_those_above_and_says_who_they_are() {
    let roles = ["read-only", "vm-operator", "vm-admin", "vm-power-admin", "pool-operator", "pool-admin"];
    let role_field = Session::ID.def().field("role").unwrap();
    let superuser_field = Session::ID.def().field("is_local_superuser").unwrap();
    let nobody = Row::of_defaults(Session::ID, OpaqueRef::NULL);
    for message in model().messages() {
        let needed = message.min_role.map_or(0, |role| roles.iter().position(|name| *name == role.name()).unwrap());
        for (place, role) in roles.iter().enumerate() {
            let session = nobody.with_values(&[(role_field, Value::str(*role))]);
            match dispatch::check_role(&session, message) {
                Ok(()) => assert!(place >= needed, "{role} may {}", message.full_name),
                Err(failure) => {
                    assert!(place < needed, "{role} may not {}", message.full_name);
                    let error = failure.into_api();
                    assert_eq!(error.code, errors::RBAC_PERMISSION_DENIED);
                    assert_eq!(error.params[0], message.full_name.to_ascii_lowercase());
                    assert!(error.params[1].ends_with("pool-admin)"), "{}", error.params[1]);
                }
            }
        }
        let root = nobody.with_values(&[(superuser_field, Value::Bool(true))]);
        assert_eq!(dispatch::check_role(&root, message), Ok(()), "root may {}", message.full_name);
        assert!(message.min_role.is_none_or(|role| role >= RbacRole::ReadOnly));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_reads_and_does_nothing_else() {
    let pool = Pool::start().await;
    let vm = pool.vm("read").await.to_string();
    let reader = pool.session_as("read-only").await;
    pool.call_in(&reader, "VM.get_record", vec![text(&vm)]).await.unwrap();
    let rename = vec![text(&vm), text("other")];
    for method in ["VM.set_name_label", "Async.VM.clone"] {
        let error = pool.call_in(&reader, method, rename.clone()).await.unwrap_err();
        assert_eq!(error.code, errors::RBAC_PERMISSION_DENIED, "{method}");
    }
    let row = pool.row(Vm::ID, vm.parse().unwrap()).await.unwrap();
    assert_eq!((row.name_label(), row.get(fields::vm::POWER_STATE)), ("read", VmPowerState::Halted));
}

#[tokio::test(flavor = "multi_thread")]
async fn over_the_socket_anybody_is_root() {
    let pool = Pool::start().await;
    let login = vec![text("nobody"), text("nonsense")];
    let session =
        pool.call_from(super::caller(Transport::Unix), "session.login_with_password", login).await.map(value).unwrap();
    let user = pool.ask("session.get_auth_user_name", vec![text(reference(&session).to_string())]).await.unwrap();
    assert_eq!(user, Value::str("root"));
}
