//! What watchers are told: everything, once, at once.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use datamodel::Input;

use super::{Pool, events_of, from_arguments, stored_classes, text};
use crate::call::{Event, Reply};

fn told(events: &[Event], about: &str) -> Vec<&'static str> {
    events.iter().filter(|event| event.reference.to_string() == about).map(|event| event.operation).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_batch_has_every_object_and_counts_every_class() {
    let pool = Pool::start().await;
    let batch = pool.events(&["*"], "", 30.0).await.unwrap();
    assert!(batch.events.iter().all(|event| event.operation == "add" && event.snapshot.is_some()));
    assert!(batch.events.iter().all(|event| !matches!(event.class, "session" | "user" | "secret" | "local_user")));
    let classes: HashSet<&str> = batch.events.iter().map(|event| event.class).collect();
    assert!(classes.is_superset(&HashSet::from(["pool", "host", "vm", "host_metrics", "sr", "pbd"])), "{classes:?}");
    let counted: Vec<&str> = batch.valid_ref_counts.iter().map(|(class, _)| *class).collect();
    assert_eq!(counted, stored_classes().map(|class| class.event_name).collect::<Vec<_>>());
    let vms = batch.events.iter().filter(|event| event.class == "vm").count();
    assert!(batch.valid_ref_counts.contains(&("vm", vms)));
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_one_object_between_two_calls_are_one_event() {
    let pool = Pool::start().await;
    let (kept, gone) = (pool.vm("kept").await.to_string(), pool.vm("gone").await.to_string());
    let token = pool.events(&["vm"], "", 0.0).await.unwrap().token;
    let (new, brief) = (pool.vm("new").await.to_string(), pool.vm("brief").await.to_string());
    for name in ["a", "b", "c"] {
        pool.ask("VM.set_name_label", vec![text(&kept), text(name)]).await.unwrap();
        pool.ask("VM.set_name_label", vec![text(&new), text(name)]).await.unwrap();
    }
    for vm in [&gone, &brief] {
        pool.ask("VM.destroy", vec![text(vm)]).await.unwrap();
    }
    let batch = pool.events(&["VM"], &token, 5.0).await.unwrap();
    assert_eq!(told(&batch.events, &kept), ["mod"]);
    assert_eq!(told(&batch.events, &new), ["add"]);
    assert_eq!(told(&batch.events, &gone), ["del"]);
    assert_eq!(told(&batch.events, &brief), [""; 0]);
    let snapshot = batch.events.iter().find(|event| event.operation == "mod").unwrap().snapshot.clone().unwrap();
    assert_eq!(snapshot.name_label(), "c");
    assert!(batch.events.iter().all(|event| event.snapshot.is_some() == (event.operation != "del")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_tokens_tells_every_change_once() {
    let pool = Pool::start().await;
    let vm = pool.vm("chain").await.to_string();
    let specification = format!("VM/{vm}");
    let mut token = pool.events(&[&specification], "", 0.0).await.unwrap().token;
    let writes = async {
        for number in 0..50 {
            pool.ask("VM.set_name_label", vec![text(&vm), text(number.to_string())]).await.unwrap();
        }
    };
    let reads = async {
        let mut last = (0, String::new());
        while last.1 != "49" {
            let batch = pool.events(&[&specification], &token, 10.0).await.unwrap();
            assert!(batch.events.len() <= 1, "{:?}", batch.events);
            for event in &batch.events {
                assert!(event.id > last.0, "told twice");
                last = (event.id, event.snapshot.as_ref().unwrap().name_label().to_owned());
            }
            assert!(batch.token > token, "{} after {token}", batch.token);
            token = batch.token;
        }
    };
    tokio::join!(writes, reads);
    let quiet = pool.events(&[&specification], &token, 0.0).await.unwrap();
    assert!(quiet.events.is_empty(), "{:?}", quiet.events);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_there_with_its_commit() {
    let pool = Pool::start().await;
    let vm = pool.vm("watched").await.to_string();
    let mut best = Duration::MAX;
    for round in 0..20 {
        let token = pool.events(&["vm"], "", 0.0).await.unwrap().token;
        let told = async {
            pool.events(&["vm"], &token, 10.0).await.unwrap();
            tokio::time::Instant::now()
        };
        let written = async {
            pool.ask("VM.set_name_label", vec![text(&vm), text(format!("round {round}"))]).await.unwrap();
            tokio::time::Instant::now()
        };
        let (told, written) = tokio::join!(told, written);
        best = best.min(told.saturating_duration_since(written));
    }
    // The best of some rounds: a busy machine delays single ones, a batching delay would delay them all.
    assert!(best < Duration::from_millis(20), "{best:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_wakes_those_who_wait_in_the_session() {
    let pool = Pool::start().await;
    let session = pool.login().await;
    let token = pool.events(&["sr"], "", 0.0).await.unwrap().token;
    let waits = pool.call_in(&session, "event.from", from_arguments(&["sr"], &token, 600.0));
    let ends = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        pool.call_in(&session, "session.logout", vec![]).await.unwrap();
    };
    let (waits, ()) = tokio::time::timeout(Duration::from_secs(20), async { tokio::join!(waits, ends) }).await.unwrap();
    assert_eq!(events_of(waits).unwrap_err().description(), ["SESSION_INVALID", session.as_str()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn time_that_is_up_and_classes_that_do_not_exist_are_no_errors() {
    let pool = Pool::start().await;
    let token = pool.events(&["*"], "", 0.0).await.unwrap().token;
    let nothing = pool.events(&["sr"], &token, 0.05).await.unwrap();
    assert!(nothing.events.is_empty());
    assert!(nothing.token >= token);
    for classes in [&["unicorn"][..], &[], &["vm/nonsense"], &["session"]] {
        assert!(pool.events(classes, "", 0.0).await.unwrap().events.is_empty(), "{classes:?}");
    }
    let future = format!("{:020},{:020}", 1_u64 << 40, 0);
    let waited = pool.events(&["*"], &future, 0.05).await.unwrap();
    assert_eq!((waited.events.len(), waited.token), (0, future));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_two_numbers_or_nothing() {
    let pool = Pool::start().await;
    for token in ["x", "1", "1,x", "-1,0", "1,2,3", " "] {
        let error = pool.events(&["*"], token, 0.0).await.unwrap_err();
        assert_eq!(error.description(), ["EVENT_FROM_TOKEN_PARSE_FAILURE", token]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_injected_token_is_just_before_the_event() {
    let pool = Pool::start().await;
    let object = pool.pool_ref();
    let datamodel::Value::Str(token) = pool.ask("event.inject", vec![text("pool"), text(&object)]).await.unwrap()
    else {
        panic!("no token")
    };
    let batch = pool.events(&["pool"], &token, 5.0).await.unwrap();
    assert_eq!(told(&batch.events, &object), ["mod"]);
    let unknown = pool.refusal("event.inject", vec![text("unicorn"), text(&object)]).await;
    assert_eq!(unknown, ["HANDLE_INVALID", "unicorn", object.as_str()]);
}

async fn next(pool: &Pool) -> Result<Vec<Event>, datamodel::ApiError> {
    match pool.call_in(&pool.root, "event.next", vec![]).await? {
        Reply::EventList(events) => Ok(events),
        other => panic!("{other:?}"),
    }
}

fn classes(of: &[&str]) -> Vec<Input> {
    vec![Input::Array(of.iter().map(|class| text(*class)).collect())]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_starts_now_and_reads_on() {
    let pool = Pool::start().await;
    let vm = pool.vm("registered").await.to_string();
    let unregistered = next(&pool).await.unwrap_err();
    assert_eq!(unregistered.description(), ["SESSION_NOT_REGISTERED", pool.root.as_str()]);
    pool.ask("event.register", classes(&["VM"])).await.unwrap();
    for name in ["first", "second"] {
        pool.ask("VM.set_name_label", vec![text(&vm), text(name)]).await.unwrap();
        let events = next(&pool).await.unwrap();
        assert_eq!(told(&events, &vm), ["mod"]);
        assert_eq!(events[0].snapshot.as_ref().unwrap().name_label(), name);
    }
    pool.ask("event.unregister", classes(&["VM"])).await.unwrap();
    assert_eq!(next(&pool).await.unwrap_err().code, "SESSION_NOT_REGISTERED");
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_one_registration_share_its_events() {
    let pool = Pool::start().await;
    let vm = pool.vm("shared").await.to_string();
    pool.ask("event.register", classes(&["VM"])).await.unwrap();
    let pool = Arc::new(pool);
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let pool = Arc::clone(&pool);
        readers.spawn(async move { next(&pool).await.unwrap() });
    }
    // Most telling when both wait already, but right in any order.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut told = Vec::new();
    for name in ["first", "second"] {
        pool.ask("VM.set_name_label", vec![text(&vm), text(name)]).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(20), readers.join_next()).await.unwrap();
        told.extend(answer.unwrap().unwrap().iter().map(|event| event.id));
    }
    assert_eq!(told.len(), 2);
    assert!(told[0] < told[1], "both readers were told the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_good_as_long_as_history_is_kept_and_is_refused_beyond_it() {
    const HOUR: i64 = 3600;
    let pool = Pool::remembering(raft_store::History { entries: 50, seconds: HOUR }).await;
    let vms = [pool.vm("first to go").await.to_string(), pool.vm("last to go").await.to_string()];
    let busy = pool.vm("changed meanwhile").await.to_string();
    let token = pool.events(&["vm"], "", 0.0).await.unwrap().token;
    pool.ask("VM.destroy", vec![text(&vms[0])]).await.unwrap();
    let changes = async |count: i64, seconds: i64| {
        for number in 0..count {
            pool.clock.advance(seconds);
            pool.ask("VM.set_name_description", vec![text(&busy), text(number.to_string())]).await.unwrap();
        }
    };
    let deletions = async || {
        let batch = pool.events(&["vm"], &token, 0.0).await?;
        Ok::<_, datamodel::ApiError>(batch.events.iter().filter(|event| event.operation == "del").count())
    };
    // Many changes within the hour: the hour counts.
    changes(60, 1).await;
    assert_eq!(deletions().await.unwrap(), 1);
    // A clock that is set forward makes nothing older than it is.
    pool.clock.set_by(100 * HOUR);
    changes(1, 0).await;
    pool.clock.set_by(-100 * HOUR);
    changes(10, 1).await;
    assert_eq!(deletions().await.unwrap(), 1);
    // Hours and few changes: the changes count.
    pool.ask("VM.destroy", vec![text(&vms[1])]).await.unwrap();
    let second = pool.events(&["vm"], "", 0.0).await.unwrap().token;
    changes(40, 60).await;
    assert_eq!(deletions().await.unwrap(), 2);
    // Both are exceeded for the first deletion.
    changes(40, 60).await;
    assert_eq!(deletions().await.unwrap_err().code, "EVENTS_LOST");
    let since = pool.events(&["vm"], &second, 0.0).await.unwrap();
    assert_eq!(told(&since.events, &busy), ["mod"]);
    assert_eq!(told(&pool.events(&["vm"], "", 0.0).await.unwrap().events, &vms[0]), [""; 0]);
}
