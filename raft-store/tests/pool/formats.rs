//! Formats of what is replicated: members that read different ones, and what takes a newer one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use datamodel::fields::network;
use datamodel::{Ref, Staged, Timestamp, fields};
use raft_store::{CommitError, FORMATS, LogIndex, NewRow, Replacement, StagedRow, Store, StoreConfig, Transaction};
use uuid::Uuid;

use crate::{Node, Pool, insert, kept_class, write_until};

/// Makes the same rows in another way: staged, and then all at once.
fn staged(labels: &[&str], replaces: &[(datamodel::ClassId, datamodel::OpaqueRef)]) -> (Vec<Transaction>, Transaction) {
    let rows: Vec<StagedRow> = labels
        .iter()
        .map(|label| StagedRow {
            class: kept_class(),
            reference: datamodel::OpaqueRef::from_uuid(Uuid::new_v4()),
            fields: vec![(network::NAME_LABEL.index(), datamodel::Value::str(*label))],
        })
        .collect();
    let parts = (0..).zip(rows.chunks(2)).map(|(place, rows)| {
        let mut part = Transaction::new(Uuid::new_v4(), Timestamp(1_700_000_000));
        part.insert(
            NewRow::new(Ref::<Staged>::new(Uuid::new_v4()), Uuid::new_v4())
                .with(fields::staged::STAGE, "this".to_owned())
                .with(fields::staged::PLACE, place)
                .with(fields::staged::CONTENT, StagedRow::part(rows, 2).unwrap()),
        );
        part
    });
    let parts: Vec<_> = parts.collect();
    let mut last = Transaction::new(Uuid::new_v4(), Timestamp(1_700_000_000));
    last.replace(Replacement {
        stage: "this".into(),
        parts: parts.len() as u64,
        classes: vec![(kept_class(), vec![])],
        keep: replaces.to_vec(),
    });
    (parts, last)
}

fn labels(store: &Store) -> Vec<String> {
    let mut labels: Vec<_> = store.state().rows(kept_class()).map(|row| row.name_label().to_owned()).collect();
    labels.sort();
    labels
}

/// Waits until every node is at this format and has applied what the leader has.
async fn all_at(pool: &Pool, format: u32) {
    let leader = pool.store(pool.leader().await);
    let deadline = Instant::now() + Duration::from_secs(20);
    let there = |node: &Option<Node>| {
        node.as_ref()
            .is_none_or(|node| node.store.format() == format && node.store.state().applied >= leader.state().applied)
    };
    while !pool.nodes.iter().all(there) {
        let formats: Vec<_> = pool.nodes.iter().flatten().map(|node| node.store.format()).collect();
        assert!(Instant::now() < deadline, "not all at format {format}: {formats:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn classes_are_replaced_at_once_or_not_at_all_on_every_node_and_after_a_restart() {
    let mut pool = Pool::start(3).await;
    all_at(&pool, *FORMATS.end()).await;
    let (gone, _) = insert("gone");
    let (stays, stay) = insert("stays");
    pool.commit(gone).await;
    pool.commit(stays).await;
    let (parts, last) = staged(&["a", "b", "c"], &[(kept_class(), stay.opaque())]);
    for part in &parts {
        pool.commit(part.clone()).await;
    }
    // One part is missing: nothing happens.
    let mut short = Transaction::new(Uuid::new_v4(), Timestamp(1_700_000_000));
    short.replace(Replacement { stage: "this".into(), parts: 3, classes: vec![(kept_class(), vec![])], keep: vec![] });
    let leader = pool.store(pool.leader().await);
    assert!(matches!(leader.commit(short).await, Err(CommitError::Conflict(_))));
    assert_eq!(labels(&leader), ["gone", "stays"]);
    let before = leader.state().applied;
    drop(leader);
    pool.commit(last).await;
    let leader = pool.store(pool.leader().await);
    assert_eq!(labels(&leader), ["a", "b", "c", "stays"]);
    let changes: Vec<_> = leader.state().changes_since(before).filter(|change| change.class == kept_class()).collect();
    assert_eq!(changes.len(), 4, "three came, one went, one was left alone");
    assert_eq!(leader.state().count(<Staged as datamodel::ClassKind>::ID), 0);
    all_at(&pool, *FORMATS.end()).await;
    for index in 0..3 {
        assert_eq!(labels(&pool.store(index)), ["a", "b", "c", "stays"]);
    }
    // Who holds a store holds its database.
    drop(leader);
    for index in 0..3 {
        pool.kill(index).await;
    }
    for index in 0..3 {
        pool.boot(index).await;
    }
    pool.leader().await;
    for index in 0..3 {
        let store = pool.store(index);
        let mut applied = store.applied();
        let there = applied.wait_for(|index| *index > before);
        tokio::time::timeout(Duration::from_secs(20), there).await.unwrap().unwrap();
        assert_eq!(labels(&store), ["a", "b", "c", "stays"]);
    }
    pool.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_member_is_sent_only_what_it_reads_and_the_pool_goes_over_when_the_last_one_is_upgraded() {
    let mut pool = Pool::start_of(vec![None, None, Some(1)]).await;
    pool.leader().await;
    let stop = Arc::new(AtomicBool::new(false));
    let stores: Vec<Store> = (0..2).map(|index| pool.store(index)).collect();
    let load = tokio::spawn(write_until(stores, stop.clone()));
    let (parts, _) = staged(&["a"], &[]);
    // The lead moves, too: whoever leads writes the old format.
    for round in 0..3 {
        let heir = round % 3;
        let leader = pool.leader().await;
        let _ = pool.store(leader).transfer_leader(pool.members[heir].node_id).await;
        let leader = pool.store(pool.leader().await);
        for _ in 0..20 {
            let (transaction, _) = insert("under load");
            pool.commit(transaction).await;
        }
        assert_eq!(leader.format(), 1);
        match leader.commit(parts[0].clone()).await {
            Err(CommitError::NotYet(2) | CommitError::NotLeader(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    all_at(&pool, 1).await;

    pool.kill(2).await;
    pool.reads[2] = None;
    pool.boot(2).await;
    all_at(&pool, *FORMATS.end()).await;
    stop.store(true, Ordering::Relaxed);
    load.await.unwrap();
    pool.commit(parts[0].clone()).await;
    all_at(&pool, *FORMATS.end()).await;

    // Back to the old version: it does not start, and says why. Nothing of its database is touched.
    pool.kill(2).await;
    let mut old = StoreConfig::new(pool.dirs[2].path().into(), pool.members[2].node_id, pool.tls.clone());
    old.reads = Some(1);
    let refused = Store::open(old).await.err().expect("an old version opened a newer database").to_string();
    assert!(refused.contains(&format!("format {}", FORMATS.end())) && refused.contains("upgrade"), "{refused}");
    pool.boot(2).await;
    all_at(&pool, *FORMATS.end()).await;
    pool.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_an_older_version_that_comes_late_gets_nothing_and_loses_nothing() {
    let mut pool = Pool::start(3).await;
    all_at(&pool, *FORMATS.end()).await;
    // As a new host that was installed from an old medium.
    let late = pool.add(Some(1));
    pool.boot(late).await;
    pool.store(pool.leader().await).add_learner(&pool.members[late]).await.unwrap();
    for _ in 0..50 {
        let (transaction, _) = insert("goes on");
        pool.commit(transaction).await;
    }
    assert_eq!(pool.store(late).state().applied, LogIndex(0), "nothing that it cannot read has reached it");
    pool.kill(late).await;
    pool.reads[late] = None;
    pool.boot(late).await;
    all_at(&pool, *FORMATS.end()).await;
    assert_eq!(labels(&pool.store(late)).len(), 50);
    pool.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_pool_takes_what_is_newer_at_once_and_one_that_has_not_heard_from_a_member_says_no_in_time() {
    let mut pool = Pool::start(3).await;
    let (parts, _) = staged(&["a"], &[]);
    // Nobody waits for the pool to go over: whoever commits does.
    pool.store(pool.leader().await).commit(parts[0].clone()).await.unwrap();
    all_at(&pool, *FORMATS.end()).await;
    pool.end().await;

    pool = Pool::start_of(vec![Some(1), Some(1), None]).await;
    all_at(&pool, 1).await;
    for index in 0..2 {
        pool.kill(index).await;
        pool.reads[index] = None;
    }
    // The first one that is upgraded has not been heard since.
    pool.boot(1).await;
    let (parts, _) = staged(&["a"], &[]);
    let leader = pool.store(pool.leader().await);
    let started = Instant::now();
    let refused = leader.commit(parts[0].clone()).await;
    assert!(matches!(refused, Err(CommitError::NotYet(2))), "{refused:?}");
    assert!(started.elapsed() < Duration::from_secs(5));
    pool.boot(0).await;
    pool.commit(parts[0].clone()).await;
    drop(leader);
    all_at(&pool, *FORMATS.end()).await;
    pool.end().await;
}
