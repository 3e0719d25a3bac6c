//! Who is let in, for how long, and how many.

use datamodel::fields::session;
use datamodel::{ClassKind, Input, Ref, Session};
use raft_store::NewRow;
use uuid::Uuid;

use super::{PASSWORD, Pool, reference, text, value};
use crate::sessions;

const DAY: i64 = 24 * 3600;

async fn alive(pool: &Pool, session: &str) -> bool {
    match pool.call_in(session, "pool.get_all", vec![]).await {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.description(), ["SESSION_INVALID", session]);
            false
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_takes_two_three_or_four_arguments() {
    let pool = Pool::start().await;
    let all = ["root", PASSWORD, "1.0", "me"];
    for count in [2, 3, 4] {
        let params: Vec<Input> = all[..count].iter().map(|argument| text(*argument)).collect();
        let session = reference(&value(pool.call("session.login_with_password", params).await.unwrap()));
        let row = pool.row(Session::ID, session).await.unwrap();
        assert_eq!(row.get(session::ORIGINATOR), if count == 4 { "me" } else { "" });
        assert!(row.get(session::IS_LOCAL_SUPERUSER));
    }
    let one = pool.call("session.login_with_password", vec![text("root")]).await.unwrap_err();
    assert_eq!(one.code, "MESSAGE_PARAMETER_COUNT_MISMATCH");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_and_an_unknown_name_are_told_alike_and_hold_nobody_up() {
    let pool = Pool::start().await;
    let wrong = |name: &'static str| pool.call("session.login_with_password", vec![text(name), text("wrong")]);
    let begun = tokio::time::Instant::now();
    let good = async {
        pool.login().await;
        begun.elapsed()
    };
    let (first, second, good) = tokio::join!(wrong("root"), wrong("nobody"), good);
    let both = begun.elapsed();
    let (first, second) = (first.unwrap_err(), second.unwrap_err());
    assert_eq!((first.code, first.params[0].as_str()), ("SESSION_AUTHENTICATION_FAILED", "root"));
    assert_eq!((second.code, second.params[0].as_str()), ("SESSION_AUTHENTICATION_FAILED", "nobody"));
    assert_eq!(first.params[1], second.params[1]);
    assert!(good < both, "a good login waited for the bad ones");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_name_is_hashed_like_a_known_one_and_refused_even_with_a_good_password() {
    let pool = Pool::start().await;
    let state = pool.store().read().await.unwrap();
    let ((root, roots), (nobody, nobodys)) = (sessions::hash_for(&state, "root"), sessions::hash_for(&state, "nobody"));
    assert!(root && !nobody && !roots.is_empty());
    assert_eq!(roots, nobodys);
    let login = pool.call("session.login_with_password", vec![text("nobody"), text(PASSWORD)]).await.unwrap_err();
    assert_eq!((login.code, login.params[0].as_str()), ("SESSION_AUTHENTICATION_FAILED", "nobody"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_of_silence_ends_a_session_and_use_keeps_it() {
    let pool = Pool::start().await;
    let idle = pool.login().await;
    pool.clock.advance(DAY / 2);
    assert!(alive(&pool, &pool.root).await);
    pool.clock.advance(DAY / 2 + 1);
    sessions::pass(&pool.controller.shared).await.unwrap();
    assert!(!alive(&pool, &idle).await);
    assert!(alive(&pool, &pool.root).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn use_is_written_back_so_that_the_next_master_knows_of_it() {
    let pool = Pool::start().await;
    pool.clock.advance(601);
    assert!(alive(&pool, &pool.root).await);
    sessions::pass(&pool.controller.shared).await.unwrap();
    let row = pool.row(Session::ID, pool.root.parse().unwrap()).await.unwrap();
    assert_eq!(row.get(session::LAST_ACTIVE), crate::Clock::now(&*pool.clock));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_of_too_many_sessions_go_and_other_originators_stay() {
    let pool = Pool::start().await;
    let now = crate::Clock::now(&*pool.clock);
    pool.commit(|change| {
        for age in 0..503_i64 {
            let row = NewRow::new(Ref::<Session>::new(Uuid::new_v4()), Uuid::new_v4())
                .with(session::LAST_ACTIVE, datamodel::Timestamp(now.0 - age))
                .with(session::ORIGINATOR, "flood".to_owned());
            change.insert(row);
        }
    })
    .await;
    sessions::pass(&pool.controller.shared).await.unwrap();
    let state = pool.store().read().await.unwrap();
    let left: Vec<i64> = state
        .all::<Session>()
        .filter(|row| row.get(session::ORIGINATOR) == "flood")
        .map(|row| now.0 - row.get(session::LAST_ACTIVE).0)
        .collect();
    assert_eq!((left.len(), left.iter().max()), (500, Some(&499)));
    assert!(alive(&pool, &pool.root).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_password_counts_at_once_and_only_root_changes_it() {
    let pool = Pool::start().await;
    let other = pool.session_as("pool-admin").await;
    let change = vec![text("ignored"), text("another")];
    let refused = pool.call_in(&other, "session.change_password", change.clone()).await.unwrap_err();
    assert_eq!(refused.code, "USER_IS_NOT_LOCAL_SUPERUSER");
    pool.ask("session.change_password", change).await.unwrap();
    let old = pool.call("session.login_with_password", vec![text("root"), text(PASSWORD)]).await;
    assert_eq!(old.unwrap_err().code, "SESSION_AUTHENTICATION_FAILED");
    pool.call("session.login_with_password", vec![text("root"), text("another")]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ended_is_gone_for_good() {
    let pool = Pool::start().await;
    let session = pool.login().await;
    pool.call_in(&session, "session.logout", vec![]).await.unwrap();
    assert!(!alive(&pool, &session).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_set_ends_nothing_before_its_time_and_keeps_nothing_for_ever() {
    use crate::call::{Caller, Transport};
    let pool = Pool::start().await;
    let shared = &pool.controller.shared;
    let vm = pool.vm("original").await.to_string();
    let key = Caller { idempotency_key: Some("once".into()), ..super::caller(Transport::Tcp) };
    let clone = async || {
        let parameters = vec![text(&pool.root), text(&vm), text("copy")];
        super::value(pool.call_from(key.clone(), "VM.clone", parameters).await.unwrap())
    };
    let made = clone().await;
    let task = super::reference(&pool.ask("task.create", vec![text("mine"), text("")]).await.unwrap());
    let collect = async || {
        sessions::pass(shared).await.unwrap();
        crate::tasks::pass(shared).await.unwrap();
        crate::repeats::pass(shared).await.unwrap();
    };
    for jump in [10 * DAY, -20 * DAY, 10 * DAY] {
        pool.clock.set_by(jump);
        collect().await;
        assert_eq!(clone().await, made, "after a jump of {jump} s");
        let status = pool.row(datamodel::Task::ID, task).await.unwrap().get(datamodel::fields::task::STATUS);
        assert_eq!(status, datamodel::enums::TaskStatusType::Pending);
    }
    let idle = pool.login().await;
    pool.clock.advance(DAY + 1);
    collect().await;
    assert!(!alive(&pool, &idle).await);
}
