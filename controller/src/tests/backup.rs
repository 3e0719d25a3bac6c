//! The database as a file: all of it comes back, and what does not fit is refused before anything is changed.

use std::collections::BTreeMap;

use datamodel::enums::{TaskStatusType, VmPowerState};
use datamodel::fields::{host, pif, pool as pool_fields, staged, task, vm};
use datamodel::{ApiError, ClassId, ClassKind, Host, OpaqueRef, Pif, Ref, Session, Staged, Task, Value, Vm, model};
use futures::StreamExt;
use raft_store::{NewRow, State};
use uuid::Uuid;

use super::{Pool, caller, reference, text};
use crate::call::Transport;
use crate::handlers::{Credentials, Declined, HANDLERS, Inquiry, Opened, Verb};
use crate::{backup, tasks};

const PATH: &str = "/pool/xmldbdump";

fn inquiry(verb: Verb, credentials: Credentials, query: &[(&str, &str)], body: &[u8]) -> Inquiry {
    // In pieces, as it comes over a wire.
    let pieces: Vec<_> = body.chunks(1000).map(|piece| Ok(bytes::Bytes::copy_from_slice(piece))).collect();
    Inquiry {
        caller: caller(Transport::Tcp),
        handler: HANDLERS.iter().find(|handler| handler.verb == verb && handler.path == PATH).unwrap(),
        query: query.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        credentials,
        body: futures::stream::iter(pieces).boxed(),
    }
}

impl Pool {
    /// A pool that has gone over to the newest format.
    async fn newest() -> Self {
        let pool = Self::start().await;
        let store = pool.store().clone();
        pool.until(|_| store.format() >= Staged::ID.def().format).await;
        pool
    }

    async fn dump(&self) -> String {
        let asked = inquiry(Verb::Get, Credentials::Session(self.root.clone()), &[], b"");
        let Ok(Opened::Download { mut body, .. }) = self.controller.open(asked).await else { panic!("no dump") };
        let mut out = Vec::new();
        while let Some(piece) = body.next().await {
            out.extend_from_slice(&piece.unwrap());
        }
        String::from_utf8(out).unwrap()
    }

    async fn restore(&self, dump: &str, query: &[(&str, &str)]) -> Result<(), ApiError> {
        let asked = inquiry(Verb::Put, Credentials::Session(self.root.clone()), query, dump.as_bytes());
        match self.controller.open(asked).await {
            Ok(Opened::Upload(outcome)) => outcome.await,
            Ok(Opened::Download { .. }) => panic!("a download"),
            Err(why) => panic!("{why:?}"),
        }
    }

    async fn task(&self) -> Ref<Task> {
        Ref::from_opaque(reference(&self.ask("task.create", vec![text("transfer"), text("")]).await.unwrap()))
    }

    async fn outcome(&self, of: Ref<Task>) -> (TaskStatusType, String, Vec<String>) {
        let row = self.store().read().await.unwrap().row(of).cloned().unwrap();
        (row.get(task::STATUS), row.get(task::RESULT), row.get(task::ERROR_INFO))
    }

    /// An interface of the one host.
    async fn interface(&self, device: &str) {
        let on = self.store().state().all::<Host>().next().unwrap().typed::<Host>();
        self.commit(|change| {
            change.insert(
                NewRow::new(Ref::<Pif>::new(Uuid::new_v4()), Uuid::new_v4())
                    .with(pif::HOST, on)
                    .with(pif::DEVICE, device.to_owned())
                    .with(pif::PHYSICAL, true),
            );
        })
        .await;
    }
}

/// Everything that a dump is about.
fn contents(state: &State) -> BTreeMap<(ClassId, OpaqueRef), Vec<Value>> {
    let own = ["session", "task", "host_metrics", "role", "user"];
    let classes =
        model().classes().iter().filter(|class| class.stored && !class.internal && !own.contains(&class.name));
    classes
        .flat_map(|class| state.rows(class.id))
        .map(|row| ((row.class, row.reference), row.values().to_vec()))
        .collect()
}

fn differences(before: &State, after: &State) -> Vec<String> {
    let (before, after) = (contents(before), contents(after));
    let keys: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let mut out = Vec::new();
    for key in keys {
        let (old, new) = (before.get(key), after.get(key));
        if old != new {
            let field = |place: usize| key.0.def().fields[place].name;
            let which: Vec<_> = match (old, new) {
                (Some(old), Some(new)) => (0..old.len())
                    .filter(|place| old[*place] != new[*place])
                    .map(|place| format!("{}: {:?} {:?}", field(place), old[place], new[place]))
                    .collect(),
                _ => vec![format!("there before: {}, after: {}", old.is_some(), new.is_some())],
            };
            out.push(format!("{} {}: {which:?}", key.0.def().name, key.1));
        }
    }
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_dump_makes_the_pool_what_it_was() {
    let pool = Pool::newest().await;
    // The agent's own.
    pool.until(|state| state.count(Pif::ID) == 1).await;
    let (kept, lost, odd) = (pool.vm("kept").await, pool.vm("lost").await, pool.vm("odd").await);
    // What XML, JSON and the wire have trouble with.
    let label = "<&>\"' \r\n\t\u{1}\u{7f}\u{fffe} ü 𝄞";
    pool.commit(|change| {
        change.set(odd, vm::NAME_LABEL, label.to_owned()).set(odd, vm::HVM_SHADOW_MULTIPLIER, 0.1 + 0.2);
        change.put(odd, vm::OTHER_CONFIG, "\u{2}key".to_owned(), String::new());
    })
    .await;
    pool.ask("pool.set_name_label", vec![text(pool.pool_ref()), text("before")]).await.unwrap();
    let before = pool.store().read().await.unwrap();
    let dump = pool.dump().await;

    pool.ask("VM.destroy", vec![text(lost.to_string())]).await.unwrap();
    pool.ask("VM.set_name_label", vec![text(kept.to_string()), text("changed")]).await.unwrap();
    pool.ask("pool.set_name_label", vec![text(pool.pool_ref()), text("after")]).await.unwrap();
    pool.ask("pool.add_to_other_config", vec![text(pool.pool_ref()), text("new"), text("")]).await.unwrap();
    let new = pool.vm("new").await;
    assert!(!differences(&before, &pool.store().read().await.unwrap()).is_empty());
    let token = pool.store().state().applied;

    pool.restore(&dump, &[]).await.unwrap();
    let after = pool.store().read().await.unwrap();
    assert_eq!(differences(&before, &after), Vec::<String>::new());
    assert_eq!(after.count(Staged::ID), 0);
    // Watchers hear of what changed, and of nothing else.
    let changed: Vec<_> = after.changes_since(token).filter(|change| !change.class.def().internal).collect();
    assert!(changed.iter().any(|change| change.reference == new.opaque()));
    assert!(!changed.iter().any(|change| change.reference == odd.opaque()), "what is as it was has not changed");
    // And again: what comes out is what went in.
    let rows = |dump: &str| dump.split_once("</manifest>").unwrap().1.to_owned();
    assert_eq!(rows(&pool.dump().await), rows(&dump));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_changes_nothing() {
    let pool = Pool::newest().await;
    let dump = pool.dump().await;
    let kept = pool.vm("made since").await;
    let before = pool.store().state().applied;
    pool.restore(&dump, &[("dry_run", "true")]).await.unwrap();
    assert!(pool.restore(&dump[..dump.len() / 2], &[("dry_run", "true")]).await.is_err());
    let after = pool.store().read().await.unwrap();
    assert!(after.row(kept).is_some());
    assert!(after.changes_since(before).all(|change| change.class == datamodel::HostMetrics::ID));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_by_name_and_changes_nothing() {
    let pool = Pool::newest().await;
    // The agent's own.
    pool.until(|state| state.count(Pif::ID) == 1).await;
    pool.vm("there").await;
    let dump = pool.dump().await;
    pool.interface("eth1").await;
    let with_two = pool.dump().await;
    let before = pool.store().read().await.unwrap();

    let incompatible = ["RESTORE_INCOMPATIBLE_VERSION"].as_slice();
    let cut = ["IMPORT_ERROR_PREMATURE_EOF"].as_slice();
    let turned = |from: &str, to: &str| {
        assert!(dump.contains(from), "{from}");
        dump.replacen(from, to, 1)
    };
    let pif_table = dump.find("<table name=\"PIF\">").unwrap();
    let pif_row = pif_table + dump[pif_table..].find("<row").unwrap();
    let pif_end = pif_row + dump[pif_row..].find("</row>\n").unwrap() + 7;
    let rows: usize = dump.split("key=\"rows\" value=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap();
    let without_pif = format!("{}{}", &dump[..pif_row], &dump[pif_end..])
        .replace(&format!("key=\"rows\" value=\"{rows}\""), &format!("key=\"rows\" value=\"{}\"", rows - 1));
    let row = &dump[pif_row..pif_end];
    let table: Vec<(&str, String, &[&str])> = vec![
        ("nothing", String::new(), cut),
        ("no XML", "hello".to_owned(), incompatible),
        ("other XML", "<html><body/></html>".to_owned(), incompatible),
        ("the incumbent's", "<?xml version=\"1.0\"?><database><manifest><pair key=\"schema_major_vsn\" value=\"5\"/></manifest><table name=\"VM\"/></database>".to_owned(), incompatible),
        ("half of it", dump[..dump.len() / 2].to_owned(), cut),
        ("without its end", dump.trim_end().trim_end_matches("</database>").to_owned(), cut),
        ("a newer format", turned("key=\"format\" value=\"1\"", "key=\"format\" value=\"2\""), incompatible),
        ("a document type", turned("<database>", "<!DOCTYPE a [<!ENTITY b \"c\">]><database>"), incompatible),
        ("an unknown class", turned("<table name=\"PIF\">", "<table name=\"PIFF\">"), incompatible),
        ("a class that is the pool's own", turned("<table name=\"PIF\">", "<table name=\"session\">"), incompatible),
        ("an internal class", turned("<table name=\"PIF\">", "<table name=\"local_user\">"), incompatible),
        ("an unknown field", turned("\"name_label\":\"there\"", "\"nome_label\":\"there\""), incompatible),
        ("a wrong type", turned("\"name_label\":\"there\"", "\"name_label\":7"), incompatible),
        ("a bad reference", turned("<row ref=\"OpaqueRef:", "<row ref=\"Ref:"), incompatible),
        ("a row too few", dump.replacen(row, "", 1), incompatible),
        ("a row twice", dump.replacen(row, &format!("{row}{row}"), 1), incompatible),
        ("another device", turned("\"device\":\"eth0\"", "\"device\":\"eth7\""), &["RESTORE_TARGET_MISSING_DEVICE", "eth7"]),
        ("no management interface", without_pif, &["RESTORE_TARGET_MGMT_IF_NOT_IN_BACKUP"]),
    ];
    for (what, bad, expected) in table {
        for dry_run in ["true", "false"] {
            let refused = pool.restore(&bad, &[("dry_run", dry_run)]).await.expect_err(what);
            assert_eq!(refused.description(), expected, "{what}");
        }
    }
    let after = pool.store().read().await.unwrap();
    assert_eq!(differences(&before, &after), Vec::<String>::new());
    assert_eq!(after.count(Staged::ID), 0);
    // An interface that the dump does not know is no reason, and stays.
    pool.restore(&dump, &[]).await.unwrap();
    assert_eq!(pool.store().state().count(Pif::ID), 2);
    pool.restore(&with_two, &[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_goes_on_running_and_is_never_forgotten() {
    let pool = Pool::newest().await;
    let known = pool.vm("known").await;
    let dump = pool.dump().await;
    let start = |of: Ref<Vm>| vec![text(of.to_string()), datamodel::Input::Bool(false), datamodel::Input::Bool(false)];
    pool.ask("VM.start", start(known)).await.unwrap();
    let before = pool.store().read().await.unwrap().row(known).cloned().unwrap();
    pool.restore(&dump, &[]).await.unwrap();
    let after = pool.store().read().await.unwrap().row(known).cloned().unwrap();
    for field in ["power_state", "resident_on", "domid", "allowed_operations"] {
        let index = Vm::ID.def().field(field).unwrap();
        assert_eq!(after.value(index), before.value(index), "{field}");
    }
    assert_eq!(after.get(vm::POWER_STATE), VmPowerState::Running);

    let unknown = pool.vm("unknown").await;
    pool.ask("VM.start", start(unknown)).await.unwrap();
    let refused = pool.restore(&dump, &[]).await.unwrap_err();
    assert_eq!(refused.description(), ["VM_BAD_POWER_STATE", &unknown.to_string(), "halted", "running"]);
    pool.ask("VM.hard_shutdown", vec![text(unknown.to_string())]).await.unwrap();
    pool.restore(&dump, &[]).await.unwrap();
    assert!(pool.store().state().row(unknown).is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_fits_a_pool_that_was_founded_anew() {
    let lost = Pool::newest().await;
    let (halted, running) = (lost.vm("halted").await, lost.vm("running").await);
    let suspended = lost.vm("suspended").await;
    lost.commit(|change| {
        change.set(suspended, vm::POWER_STATE, VmPowerState::Suspended);
    })
    .await;
    let start = vec![text(running.to_string()), datamodel::Input::Bool(false), datamodel::Input::Bool(false)];
    lost.ask("VM.start", start).await.unwrap();
    let old_host = lost.store().state().all::<Host>().next().unwrap().typed::<Host>();
    lost.ask("host.set_name_label", vec![text(old_host.to_string()), text("the old name")]).await.unwrap();
    lost.ask("VM.set_affinity", vec![text(halted.to_string()), text(old_host.to_string())]).await.unwrap();
    let dump = lost.dump().await;

    let pool = Pool::newest().await;
    let before = pool.store().read().await.unwrap();
    let host_row = before.all::<Host>().next().unwrap();
    pool.restore(&dump, &[]).await.unwrap();
    let after = pool.store().read().await.unwrap();
    let new_host = after.all::<Host>().next().unwrap();
    assert_eq!(after.count(Host::ID), 1);
    assert_eq!((new_host.reference, new_host.uuid()), (host_row.reference, host_row.uuid()));
    assert_eq!(new_host.name_label(), "the old name");
    assert_eq!(new_host.get(host::CONTROL_DOMAIN), host_row.get(host::CONTROL_DOMAIN));
    assert!(after.row(new_host.get(host::CONTROL_DOMAIN)).is_some());
    let pool_row = after.all::<datamodel::Pool>().next().unwrap();
    assert_eq!(pool_row.reference.to_string(), pool.pool_ref());
    assert_eq!(pool_row.get(pool_fields::MASTER), new_host.typed());
    let power = |of: Ref<Vm>| after.row(of).unwrap().get(vm::POWER_STATE);
    assert_eq!((power(halted), power(running)), (VmPowerState::Halted, VmPowerState::Halted));
    assert_eq!(power(suspended), VmPowerState::Suspended);
    assert_eq!(after.row(running).unwrap().get(vm::RESIDENT_ON), Ref::NULL);
    assert_eq!(after.row(halted).unwrap().get(vm::AFFINITY), new_host.typed(), "references are the pool's");
    // What came is good for use.
    let start = vec![text(running.to_string()), datamodel::Input::Bool(false), datamodel::Input::Bool(false)];
    pool.ask("VM.start", start).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_ends_other_sessions_and_the_callers_task() {
    let pool = Pool::newest().await;
    let other = pool.login().await;
    let dump = pool.dump().await;
    let failed = pool.task().await;
    pool.restore("nonsense", &[("task_id", &failed.to_string())]).await.unwrap_err();
    let (status, _, error) = pool.outcome(failed).await;
    assert_eq!((status, error), (TaskStatusType::Failure, vec!["RESTORE_INCOMPATIBLE_VERSION".to_owned()]));
    let done = pool.task().await;
    pool.restore(&dump, &[("task_id", &done.to_string())]).await.unwrap();
    assert_eq!(pool.outcome(done).await, (TaskStatusType::Success, String::new(), Vec::new()));
    let sessions: Vec<_> = pool.store().state().all::<Session>().map(|row| row.reference.to_string()).collect();
    assert_eq!(sessions, std::slice::from_ref(&pool.root));
    let refused = pool.call_in(&other, "pool.get_all", vec![]).await.unwrap_err();
    assert_eq!(refused.description(), ["SESSION_INVALID", &other]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_ends_its_task_and_who_may_not_is_told_so() {
    let pool = Pool::newest().await;
    let done = pool.task().await;
    let credentials = Credentials::Session(pool.root.clone());
    let query = [("task_id", done.to_string())];
    let query = query.each_ref().map(|(name, value)| (*name, value.as_str()));
    let opened = pool.controller.open(inquiry(Verb::Get, credentials, &query, b"")).await;
    let Ok(Opened::Download { body, .. }) = opened else { panic!("no dump") };
    assert!(body.count().await > 0);
    pool.until(|state| state.row(done).unwrap().get(task::STATUS) == TaskStatusType::Success).await;

    let waiting = pool.task().await;
    let query = [("task_id", waiting.to_string())];
    let query = query.each_ref().map(|(name, value)| (*name, value.as_str()));
    let nobody = Credentials::Session("OpaqueRef:11111111-2222-3333-4444-555555555555".into());
    let declined = pool.controller.open(inquiry(Verb::Get, nobody, &query, b"")).await.err();
    assert_eq!(declined, Some(Declined::Unauthorized));
    assert_eq!(pool.outcome(waiting).await.2, ["SESSION_AUTHENTICATION_FAILED"]);

    let reader = Credentials::Session(pool.session_as("read-only").await);
    match pool.controller.open(inquiry(Verb::Get, reader, &[], b"")).await.err() {
        Some(Declined::Forbidden(error)) => {
            assert_eq!((error.code, error.params[0].as_str()), ("RBAC_PERMISSION_DENIED", "http/get_pool_xml_db_sync"));
        }
        other => panic!("{other:?}"),
    }
    let password = Credentials::Password("root".into(), super::PASSWORD.into());
    assert!(pool.controller.open(inquiry(Verb::Get, password, &[], b"")).await.is_ok());
    let wrong = Credentials::Password("root".into(), "wrong".into());
    assert_eq!(pool.controller.open(inquiry(Verb::Get, wrong, &[], b"")).await.err(), Some(Declined::Unauthorized));
    assert_eq!(
        pool.controller.open(inquiry(Verb::Get, Credentials::None, &[], b"")).await.err(),
        Some(Declined::Unauthorized)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_leaves_no_task_pending() {
    let pool = Pool::newest().await;
    let left = pool.task().await;
    let query = [("task_id", left.to_string())];
    let query = query.each_ref().map(|(name, value)| (*name, value.as_str()));
    let credentials = Credentials::Session(pool.root.clone());
    let opened = pool.controller.open(inquiry(Verb::Get, credentials, &query, b"")).await;
    drop(opened);
    pool.until(|state| state.row(left).unwrap().get(task::STATUS) == TaskStatusType::Failure).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_master_left_of_a_restore_is_thrown_away_and_its_task_fails() {
    let pool = Pool::newest().await;
    pool.commit(|change| {
        let part = NewRow::new(Ref::<Staged>::new(Uuid::new_v4()), Uuid::new_v4());
        change.insert(part.with(staged::STAGE, "left".to_owned()).with(staged::CONTENT, "AAAA".to_owned()));
    })
    .await;
    let orphan = pool.task().await;
    let query = vec![("task_id".to_owned(), orphan.to_string())];
    let state = pool.store().read().await.unwrap();
    let shared = &pool.controller.shared;
    let adopted =
        tasks::adopt(shared, &state, &query, "Reading", tokio_util::sync::CancellationToken::new()).await.unwrap();
    // As if the process that ran it had ended.
    drop(adopted);

    backup::forget_stages(shared).await;
    let state = pool.store().read().await.unwrap();
    tasks::fail_orphans(shared, &state, &[]).await.unwrap();
    assert_eq!(pool.store().state().count(Staged::ID), 0);
    assert_eq!(pool.outcome(orphan).await.0, TaskStatusType::Failure);
}
