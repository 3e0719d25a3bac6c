//! Three nodes over real TLS on loopback: what is acknowledged stays, whoever dies.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod formats;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use datamodel::fields::network;
use datamodel::{Network, Ref, Timestamp};
use raft_store::{
    ChangeKind, CommitError, Dial, Folder, Leadership, LogIndex, Member, NewRow, OpenError, PeerChannel, PeerTls,
    Store, StoreConfig, Transaction,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tower::ServiceExt as _;
use tower::util::BoxCloneSyncService;
use uuid::Uuid;

fn certificates() -> PeerTls {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(vec![]).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["xenith-peer".into()]).unwrap().signed_by(&key, &issuer).unwrap();
    PeerTls { ca: ca_certificate.pem(), certificate: certificate.pem(), key: key.serialize_pem() }
}

/// The way to peers, on which every call's answer may come late. What is asked arrives at once.
struct Line {
    tls: PeerTls,
    late: Arc<AtomicU64>,
}

impl Dial for Line {
    fn channel(&self, target: u64, address: &str) -> Result<PeerChannel, OpenError> {
        let (channel, late) = (Dial::channel(&self.tls, target, address)?, Arc::clone(&self.late));
        Ok(BoxCloneSyncService::new(tower::service_fn(move |request| {
            let (channel, late) = (channel.clone(), Arc::clone(&late));
            async move {
                let answer = channel.oneshot(request).await;
                tokio::time::sleep(Duration::from_millis(late.load(Ordering::Relaxed))).await;
                answer
            }
        })))
    }
}

/// A node with a runtime of its own: its end takes every connection with it, as the end of a process would.
struct Node {
    store: Store,
    runtime: tokio::runtime::Runtime,
}

struct Pool {
    tls: PeerTls,
    dirs: Vec<tempfile::TempDir>,
    members: Vec<Member>,
    nodes: Vec<Option<Node>>,
    /// What each node reads; none: all that there is.
    reads: Vec<Option<u32>>,
    /// Milliseconds by which answers are late.
    late: Arc<AtomicU64>,
}

impl Pool {
    async fn start(size: u64) -> Self {
        Self::start_of((0..size).map(|_| None).collect()).await
    }

    async fn start_of(reads: Vec<Option<u32>>) -> Self {
        let _ = tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).try_init();
        let mut pool = Self {
            tls: certificates(),
            dirs: Vec::new(),
            members: Vec::new(),
            nodes: Vec::new(),
            reads: Vec::new(),
            late: Arc::default(),
        };
        for reads in reads {
            let index = pool.add(reads);
            pool.boot(index).await;
        }
        pool.nodes[0].as_ref().unwrap().store.initialize(&pool.members).await.unwrap();
        pool
    }

    /// One more node, with an empty disk; it is no member yet.
    fn add(&mut self, reads: Option<u32>) -> usize {
        let node_id = self.members.len() as u64 + 1;
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let peer_address = free.local_addr().unwrap().to_string();
        self.members.push(Member { node_id, peer_address, api_address: format!("127.0.0.{node_id}") });
        self.dirs.push(tempfile::tempdir().unwrap());
        self.nodes.push(None);
        self.reads.push(reads);
        self.members.len() - 1
    }

    async fn boot(&mut self, index: usize) {
        let member = &self.members[index];
        let mut config = StoreConfig::new(self.dirs[index].path().into(), member.node_id, self.tls.clone());
        config.snapshot_every = 300;
        config.keep_entries = 100;
        config.reads = self.reads[index];
        let address = member.peer_address.parse().unwrap();
        let tls = self.tls.server();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let place = Arc::new(Folder::new(&config.dir));
        let peers = Arc::new(Line { tls: self.tls.clone(), late: Arc::clone(&self.late) });
        let store = runtime.spawn(async move { Store::open_in(config, place, peers).await.unwrap() }).await.unwrap();
        let service = store.service();
        runtime.spawn(async move {
            tonic::transport::Server::builder()
                .tls_config(tls)
                .unwrap()
                .add_service(service)
                .serve(address)
                .await
                .unwrap();
        });
        self.nodes[index] = Some(Node { store, runtime });
    }

    /// Ends a node without any goodbye to its peers.
    async fn kill(&mut self, index: usize) {
        let node = self.nodes[index].take().unwrap();
        node.runtime.spawn(node.store.abandon()).await.unwrap();
        node.runtime.shutdown_background();
    }

    async fn leader(&self) -> usize {
        let start = Instant::now();
        loop {
            for (index, node) in self.nodes.iter().enumerate() {
                if let Some(node) = node
                    && matches!(*node.store.leadership().borrow(), Leadership::Leader { .. })
                {
                    return index;
                }
            }
            assert!(start.elapsed() < Duration::from_secs(10), "nobody leads");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Commits at whoever leads: on a busy machine the lead may move by itself.
    async fn commit(&self, transaction: Transaction) {
        let start = Instant::now();
        loop {
            match self.store(self.leader().await).commit(transaction.clone()).await {
                Ok(_) => return,
                Err(CommitError::Conflict(conflict)) => panic!("{conflict}"),
                Err(error) => assert!(start.elapsed() < Duration::from_secs(10), "{error}"),
            }
        }
    }

    async fn end(mut self) {
        for index in 0..self.nodes.len() {
            if self.nodes[index].is_some() {
                self.kill(index).await;
            }
        }
    }

    fn store(&self, index: usize) -> Store {
        self.nodes[index].as_ref().unwrap().store.clone()
    }
}

fn insert(label: &str) -> (Transaction, Ref<Network>) {
    let reference = Ref::new(Uuid::new_v4());
    let mut transaction = Transaction::new(Uuid::new_v4(), Timestamp(1_700_000_000));
    transaction.insert(NewRow::new(reference, Uuid::new_v4()).with(network::NAME_LABEL, label.to_owned()));
    (transaction, reference)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledged_write_outlives_the_leader_and_a_restart_of_all() {
    let mut pool = Pool::start(3).await;
    let mut written = Vec::new();
    for round in 0..3 {
        for number in 0..20 {
            let (transaction, reference) = insert(&format!("round {round} number {number}"));
            pool.commit(transaction).await;
            written.push(reference);
        }
        let leader = pool.leader().await;
        let killed = Instant::now();
        pool.kill(leader).await;
        let successor = pool.leader().await;
        assert_ne!(successor, leader);
        assert!(killed.elapsed() < Duration::from_secs(3), "the lead was taken after {:?}", killed.elapsed());
        let state = pool.store(successor).read().await.unwrap();
        for reference in &written {
            assert!(state.row(*reference).is_some(), "a write is lost");
        }
        pool.boot(leader).await;
    }
    for index in 0..3 {
        pool.kill(index).await;
    }
    for index in 0..3 {
        pool.boot(index).await;
    }
    let leader = pool.leader().await;
    let state = pool.store(leader).read().await.unwrap();
    assert_eq!(state.count(<Network as datamodel::ClassKind>::ID), written.len());
    pool.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_log_was_purged_away_catches_up_by_snapshot() {
    let mut pool = Pool::start(3).await;
    let leader = pool.leader().await;
    let away = (leader + 1) % 3;
    pool.kill(away).await;
    for number in 0..900 {
        let (transaction, _) = insert(&format!("number {number}"));
        pool.commit(transaction).await;
    }
    let target = pool.store(pool.leader().await).state().applied;
    pool.boot(away).await;
    let mut applied = pool.store(away).applied();
    tokio::time::timeout(Duration::from_secs(20), applied.wait_for(|index| *index >= target)).await.unwrap().unwrap();
    assert_eq!(pool.store(away).state().count(<Network as datamodel::ClassKind>::ID), 900);
    pool.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_lost_what_it_acknowledged_is_part_of_no_majority_until_it_has_it_again() {
    let mut pool = Pool::start(3).await;
    let leader = pool.leader().await;
    let (damaged, away) = ((leader + 1) % 3, (leader + 2) % 3);
    pool.kill(away).await;
    for number in 0..50 {
        let (transaction, _) = insert(&format!("acknowledged by two: {number}"));
        pool.commit(transaction).await;
    }
    pool.kill(damaged).await;
    pool.kill(leader).await;
    let files = std::fs::read_dir(pool.dirs[damaged].path()).unwrap().map(|file| file.unwrap().path());
    let log = files.filter(|file| file.extension().is_some_and(|ending| ending == "log")).max().unwrap();
    let log = std::fs::OpenOptions::new().write(true).open(log).unwrap();
    // As a crash would leave it that had torn the last write, but for what was acknowledged.
    log.set_len(log.metadata().unwrap().len() / 2).unwrap();

    // Two of three, and neither has what the third acknowledged with one of them.
    pool.boot(damaged).await;
    pool.boot(away).await;
    assert!(pool.store(damaged).is_fenced());
    let watched = Instant::now();
    while watched.elapsed() < Duration::from_secs(2) {
        for index in [damaged, away] {
            let leads = matches!(*pool.store(index).leadership().borrow(), Leadership::Leader { .. });
            assert!(!leads, "a leader without what was acknowledged");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    pool.boot(leader).await;
    let start = Instant::now();
    while pool.store(damaged).is_fenced() {
        assert!(start.elapsed() < Duration::from_secs(10), "it is not sent what it lost");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(pool.store(damaged).state().count(kept_class()), 50);
    pool.kill(away).await;
    let (transaction, _) = insert("acknowledged by the one that was damaged");
    pool.commit(transaction).await;
    pool.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_collapse_and_conflicts_have_no_effect_and_a_repeated_transaction_is_applied_once() {
    let pool = Pool::start(1).await;
    let store = pool.store(pool.leader().await);
    let token = store.state().applied;
    let (transaction, kept) = insert("kept");
    let first = store.commit(transaction.clone()).await.unwrap();
    assert_eq!(store.commit(transaction).await, Ok(first));
    let (transaction, short_lived) = insert("short-lived");
    store.commit(transaction).await.unwrap();
    let mut change = Transaction::new(Uuid::new_v4(), Timestamp(1_700_000_001));
    change.set(kept, network::NAME_LABEL, "renamed".to_owned()).delete(short_lived);
    store.commit(change).await.unwrap();
    let state = store.read().await.unwrap();
    let changes: Vec<_> = state.changes_since(token).collect();
    assert_eq!(changes.len(), 1);
    assert_eq!(changes[0].kind, ChangeKind::Added);
    assert_eq!(changes[0].row.as_ref().unwrap().get(network::NAME_LABEL), "renamed");
    assert_eq!(state.by_name_label(kept_class(), "renamed").len(), 1);
    assert!(state.by_name_label(kept_class(), "kept").is_empty());

    let mut stale = Transaction::new(Uuid::new_v4(), Timestamp(1_700_000_002));
    stale.set(kept, network::NAME_LABEL, "lost".to_owned()).expect_unmodified(kept_class(), kept.opaque(), LogIndex(1));
    assert!(matches!(store.commit(stale).await, Err(CommitError::Conflict(_))));
    assert_eq!(store.state().row(kept).unwrap().get(network::NAME_LABEL), "renamed");
    pool.end().await;
}

fn kept_class() -> datamodel::ClassId {
    <Network as datamodel::ClassKind>::ID
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lead_moves_on_request() {
    let pool = Pool::start(3).await;
    let leader = pool.leader().await;
    let heir = (leader + 1) % 3;
    pool.store(leader).transfer_leader(pool.members[heir].node_id).await.unwrap();
    assert_eq!(pool.leader().await, heir);
    pool.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lead_that_is_handed_to_who_cannot_take_it_comes_back() {
    let pool = Pool::start(1).await;
    pool.commit(insert("before").0).await;
    pool.store(0).transfer_leader(99).await.unwrap_err();
    pool.commit(insert("after").0).await;
    pool.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_answers_are_late_goes_on_leading_and_writing() {
    let pool = Pool::start(3).await;
    pool.commit(insert("before").0).await;
    let leader = pool.store(pool.leader().await);
    let epoch = leader.leadership().borrow().clone();
    // Heartbeats are sent every 50 ms, and a lease is 300 ms.
    pool.late.store(120, Ordering::Relaxed);
    for round in 0..4 {
        // Long enough that nothing but heartbeats can have kept the lease.
        tokio::time::sleep(Duration::from_millis(700)).await;
        let (transaction, reference) = insert("late");
        leader.commit(transaction).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        let state = leader.read().await.unwrap();
        assert!(state.row(reference).is_some());
    }
    assert_eq!(*leader.leadership().borrow(), epoch, "another leader, or the same anew");
    pool.end().await;
}

/// Commits until told to stop, at whoever leads: what was asked, and what was answered.
async fn write_until(
    stores: Vec<Store>,
    stop: Arc<AtomicBool>,
) -> Vec<(Uuid, Ref<Network>, Result<LogIndex, CommitError>)> {
    let mut told = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let leads = |store: &&Store| matches!(*store.leadership().borrow(), Leadership::Leader { .. });
        let Some(store) = stores.iter().find(leads) else {
            tokio::task::yield_now().await;
            continue;
        };
        let (transaction, reference) = insert("written while the lead moves");
        told.push((transaction.id(), reference, store.commit(transaction).await));
    }
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn who_commits_while_the_lead_moves_is_told_whether_it_was_applied() {
    let pool = Pool::start(3).await;
    pool.leader().await;
    let stop = Arc::new(AtomicBool::new(false));
    let stores: Vec<Store> = (0..3).map(|index| pool.store(index)).collect();
    let writers: Vec<_> = (0..8).map(|_| tokio::spawn(write_until(stores.clone(), stop.clone()))).collect();
    for _ in 0..15 {
        let leader = pool.leader().await;
        // A lead that moved by itself meanwhile is just as good.
        let _ = pool.store(leader).transfer_leader(pool.members[(leader + 1) % 3].node_id).await;
        pool.leader().await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut told = Vec::new();
    for writer in writers {
        told.extend(writer.await.unwrap());
    }
    let (last, _) = insert("after all of them");
    pool.commit(last).await;
    let state = pool.store(pool.leader().await).read().await.unwrap();
    let mut refused = 0;
    for (id, reference, answer) in told {
        match answer {
            Ok(index) => {
                assert_eq!(state.row(reference).map(|row| row.created), Some(index), "{id}");
            }
            Err(CommitError::NotLeader(_)) => {
                refused += 1;
                assert!(state.row(reference).is_none(), "{id} was applied, and its caller told that it was not");
            }
            Err(error) => panic!("{id}: {error}"),
        }
    }
    assert!(refused > 0, "no commit met a moving lead");
    pool.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_survivor_begins_anew_with_every_write_that_reached_it_also_those_it_was_not_told_are_committed() {
    let mut pool = Pool::start(3).await;
    let leader = pool.leader().await;
    let (survivor, other) = ((leader + 1) % 3, (leader + 2) % 3);
    pool.kill(other).await;
    let mut written = Vec::new();
    let lead = pool.store(leader);
    for number in 0..50 {
        let (transaction, reference) = insert(&format!("number {number}"));
        // From here on every acknowledged write is on the survivor's disk.
        lead.commit(transaction).await.unwrap();
        written.push(reference);
    }
    drop(lead);
    pool.kill(leader).await;
    let store = pool.store(survivor);
    let before = store.state();
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("db");
    let decide = |begin: LogIndex, _: &raft_store::State| {
        let alone = Member { node_id: begin.0, peer_address: "127.0.0.1:9".into(), api_address: "127.0.0.1".into() };
        (alone, Transaction::new(Uuid::new_v4(), Timestamp(1_700_000_001)))
    };
    let node_id = store.begin_anew(&place, decide).await.unwrap();
    drop(store);
    pool.end().await;

    let anew = Store::open(StoreConfig::new(place, node_id, certificates())).await.unwrap();
    let mut leadership = anew.leadership();
    let leads = leadership.wait_for(|now| matches!(now, Leadership::Leader { .. }));
    tokio::time::timeout(Duration::from_secs(10), leads).await.expect("it leads alone").unwrap();
    let state = anew.read().await.unwrap();
    for reference in &written {
        assert!(state.row(*reference).is_some(), "an acknowledged write is lost");
    }
    assert!(state.applied.0 > before.applied.0 + 1_000_000, "its log goes on far behind the old one");
    let (transaction, reference) = insert("written anew");
    anew.commit(transaction).await.unwrap();
    assert!(anew.read().await.unwrap().row(reference).is_some());
    assert_eq!(anew.voters().into_iter().collect::<Vec<_>>(), [node_id]);
    anew.abandon().await;
}
