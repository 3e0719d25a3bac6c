//! Calls against a real store of one node, a clock that is set by hand and an agent that does as it is told.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agent;
mod appliances;
mod backup;
mod dispatch;
mod events;
mod guests;
mod implicit;
mod interfaces;
mod lifecycle;
mod membership;
mod operations;
mod repeats;
mod schedules;
mod sessions;
mod storage;
mod storage_faults;
mod storage_rules;
mod stores;
mod suspended;
mod tasks;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use datamodel::fields::{host_metrics, vm};
use datamodel::{
    ApiError, ClassId, ClassKind, HostMetrics, Input, OpaqueRef, Ref, Session, Timestamp, Type, Value, Vm, model,
};
use raft_store::{Leadership, LogIndex, Member, PeerTls, Row, Store, StoreConfig, Transaction};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::call::{Caller, EventBatch, Refusal, Reply, Request, Transport};
use crate::{Agents, Clock, Controller, ControllerConfig, Guest, InitialMember, certificates, password};

pub(crate) const PASSWORD: &str = "a good password";
const PATIENCE: Duration = Duration::from_secs(20);

/// Clocks that stand still until they are moved: the one on the wall, and the steady one.
pub(crate) struct HandClock {
    wall: AtomicI64,
    steady: AtomicI64,
}

impl HandClock {
    /// Time passes.
    pub(crate) fn advance(&self, seconds: i64) {
        self.set_by(seconds);
        self.steady.fetch_add(seconds, Ordering::Relaxed);
    }

    /// Somebody sets the clock on the wall.
    pub(crate) fn set_by(&self, seconds: i64) {
        self.wall.fetch_add(seconds, Ordering::Relaxed);
    }
}

impl Clock for HandClock {
    fn now(&self) -> Timestamp {
        Timestamp(self.wall.load(Ordering::Relaxed))
    }

    fn steady(&self) -> Duration {
        Duration::from_secs(self.steady.load(Ordering::Relaxed).try_into().unwrap())
    }
}

/// A pool of one host, in this process.
pub(crate) struct Pool {
    pub(crate) controller: Controller,
    pub(crate) clock: Arc<HandClock>,
    pub(crate) agent: Arc<agent::Obedient>,
    pub(crate) root: String,
    shutdown: CancellationToken,
    _dir: tempfile::TempDir,
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shutdown.cancel();
        // The database's threads must not outlive the test: its process ends right after.
        let store = self.store().clone();
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(store.abandon()));
    }
}

impl Pool {
    pub(crate) async fn start() -> Self {
        Self::remembering(raft_store::History::default()).await
    }

    /// A pool that remembers deletions for so long.
    pub(crate) async fn remembering(history: raft_store::History) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = certificates::create_authority("test").unwrap();
        let issued = certificates::issue(&authority, "host", &["127.0.0.1".parse().unwrap()]).unwrap();
        let tls = PeerTls { ca: authority.certificate.clone(), certificate: issued.certificate, key: issued.key };
        let settings = StoreConfig { history, ..StoreConfig::new(dir.path().into(), 1, tls) };
        let store = Store::open(settings).await.unwrap();
        let alone = Member { node_id: 1, peer_address: "127.0.0.1:9".into(), api_address: "127.0.0.1".into() };
        store.initialize(&[alone]).await.unwrap();
        let host_uuid = Uuid::new_v4();
        let agent = Arc::new(agent::Obedient::new(host_uuid));
        let config = ControllerConfig {
            initial_members: vec![InitialMember {
                node_id: 1,
                host_uuid,
                api_address: "127.0.0.1".parse().unwrap(),
                peer_address: "127.0.0.1:9".into(),
                agent_address: "127.0.0.1:10".into(),
                replica: true,
            }],
            initial_password_hash: password::hash(PASSWORD).unwrap(),
            guest: Guest::default(),
            election_wait: Duration::from_millis(200),
            redirect_sessions: false,
            ca_certificate: authority.certificate,
            certificate: String::new(),
            ca_key: authority.key,
            voters: crate::VoterPolicy::default(),
            surroundings: None,
        };
        let clock = Arc::new(HandClock { wall: AtomicI64::new(1_800_000_000), steady: AtomicI64::new(0) });
        let shutdown = CancellationToken::new();
        let at = Arc::clone(&agent);
        let agents = Agents::with(move |_| Ok(Arc::clone(&at) as Arc<dyn crate::Agent>));
        let controller = Controller::new(store, agents, config, Arc::clone(&clock) as Arc<dyn Clock>, shutdown.clone());
        let runs = controller.clone();
        tokio::spawn(async move { runs.run().await });
        let mut pool = Self { controller, clock, agent, root: String::new(), shutdown, _dir: dir };
        let mut leadership = pool.store().leadership();
        let leads = leadership.wait_for(|now| matches!(now, Leadership::Leader { .. }));
        tokio::time::timeout(PATIENCE, leads).await.unwrap().unwrap();
        pool.until(|state| state.all::<HostMetrics>().any(|row| row.get(host_metrics::LIVE))).await;
        // Its stores are plugged, and then it rests.
        pool.until(|state| {
            state.all::<datamodel::Pbd>().all(|row| row.get(datamodel::fields::pbd::CURRENTLY_ATTACHED))
                && state.count(datamodel::Operation::ID) == 0
        })
        .await;
        pool.root = pool.login().await;
        pool
    }

    pub(crate) fn store(&self) -> &Store {
        &self.controller.shared.store
    }

    /// Waits until the pool is so.
    pub(crate) async fn until(&self, holds: impl Fn(&raft_store::State) -> bool) {
        let mut applied = self.store().applied();
        let waiting = async {
            while !holds(&self.store().state()) {
                applied.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("the pool did not become so");
    }

    /// What the gateway does: asks again while the lead is in doubt.
    pub(crate) async fn call_from(&self, caller: Caller, method: &str, params: Vec<Input>) -> Result<Reply, ApiError> {
        let give_up = tokio::time::Instant::now() + PATIENCE;
        loop {
            let request = Request { caller: caller.clone(), method: method.to_owned(), params: params.clone() };
            match self.controller.call(request).await {
                Ok(reply) => return Ok(reply),
                Err(Refusal::Api(error)) => return Err(error),
                Err(Refusal::Retry | Refusal::Forward(_) | Refusal::Begun(_)) => {
                    assert!(tokio::time::Instant::now() < give_up, "{method}: nobody leads");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    pub(crate) async fn call(&self, method: &str, params: Vec<Input>) -> Result<Reply, ApiError> {
        self.call_from(caller(Transport::Tcp), method, params).await
    }

    /// A call in a session.
    pub(crate) async fn call_in(&self, session: &str, method: &str, mut params: Vec<Input>) -> Result<Reply, ApiError> {
        params.insert(0, text(session));
        self.call(method, params).await
    }

    /// A call in root's session.
    pub(crate) async fn ask(&self, method: &str, params: Vec<Input>) -> Result<Value, ApiError> {
        self.call_in(&self.root, method, params).await.map(value)
    }

    /// The error of a call in root's session.
    pub(crate) async fn refusal(&self, method: &str, params: Vec<Input>) -> Vec<String> {
        self.ask(method, params).await.expect_err(method).description()
    }

    pub(crate) async fn login(&self) -> String {
        let reply = self.call("session.login_with_password", vec![text("root"), text(PASSWORD)]).await.unwrap();
        reference(&value(reply)).to_string()
    }

    pub(crate) async fn events(&self, classes: &[&str], token: &str, limit: f64) -> Result<EventBatch, ApiError> {
        events_of(self.call_in(&self.root, "event.from", from_arguments(classes, token, limit)).await)
    }

    pub(crate) async fn commit(&self, fill: impl Fn(&mut Transaction)) -> LogIndex {
        let mut change = self.controller.shared.transaction();
        fill(&mut change);
        self.store().commit(change).await.unwrap()
    }

    pub(crate) async fn row(&self, class: ClassId, reference: OpaqueRef) -> Option<Arc<Row>> {
        self.store().read().await.unwrap().row_of(class, reference).cloned()
    }

    /// The one pool object.
    pub(crate) fn pool_ref(&self) -> String {
        self.store().state().all::<datamodel::Pool>().next().unwrap().reference.to_string()
    }

    /// A halted VM, made of the small template.
    pub(crate) async fn vm(&self, name: &str) -> Ref<Vm> {
        let template = self.store().state().by_name_label(Vm::ID, "Xenith guest").first().unwrap().reference;
        let made = self.ask("VM.clone", vec![text(template.to_string()), text(name)]).await.unwrap();
        let reference = reference(&made);
        self.ask("VM.provision", vec![text(reference.to_string())]).await.unwrap();
        assert!(!self.row(Vm::ID, reference).await.unwrap().get(vm::IS_A_TEMPLATE));
        Ref::from_opaque(reference)
    }

    /// A VM that runs.
    pub(crate) async fn running(&self, name: &str) -> Ref<Vm> {
        let this = self.vm(name).await;
        self.ask("VM.start", vec![text(this.to_string()), Input::Bool(false), Input::Bool(false)]).await.unwrap();
        this
    }

    /// A row that must be there.
    pub(crate) async fn get<C: ClassKind>(&self, reference: Ref<C>) -> Arc<Row> {
        self.row(C::ID, reference.opaque()).await.unwrap()
    }

    /// A session of somebody who is not root.
    pub(crate) async fn session_as(&self, role: &str) -> String {
        use datamodel::fields::session;
        let reference: Ref<Session> = Ref::new(Uuid::new_v4());
        let now = self.clock.now();
        self.commit(|change| {
            let row = raft_store::NewRow::new(reference, Uuid::new_v4())
                .with(session::LAST_ACTIVE, now)
                .with(session::AUTH_USER_NAME, format!("somebody with {role}"))
                .with(session::ROLE, role.to_owned());
            change.insert(row);
        })
        .await;
        reference.to_string()
    }
}

pub(crate) fn caller(transport: Transport) -> Caller {
    Caller {
        transport,
        peer: None,
        user_agent: "test".into(),
        originator: String::new(),
        forwarded: false,
        idempotency_key: None,
    }
}

pub(crate) fn text(text: impl Into<String>) -> Input {
    Input::Str(text.into())
}

pub(crate) fn value(reply: Reply) -> Value {
    match reply {
        Reply::Value(value) => value,
        // Kept encodings: what a walk over all messages needs to know is that there is an answer.
        _ => Value::Absent,
    }
}

pub(crate) fn reference(value: &Value) -> OpaqueRef {
    let Value::Ref(reference) = value else { panic!("{value:?} is no reference") };
    *reference
}

pub(crate) fn from_arguments(classes: &[&str], token: &str, limit: f64) -> Vec<Input> {
    vec![Input::Array(classes.iter().map(|class| text(*class)).collect()), text(token), Input::Float(limit)]
}

pub(crate) fn events_of(reply: Result<Reply, ApiError>) -> Result<EventBatch, ApiError> {
    reply.map(|reply| match reply {
        Reply::Events(batch) => batch,
        other => panic!("{other:?}"),
    })
}

/// An argument that fits a type.
pub(crate) fn plain(ty: &Type) -> Input {
    match ty {
        Type::String => text(""),
        Type::Int => Input::Int(0),
        Type::Float => Input::Float(0.0),
        Type::Bool => Input::Bool(false),
        Type::DateTime => text("19700101T00:00:00Z"),
        Type::Enum(words) => text(words.words[0]),
        Type::Ref(_) => text("OpaqueRef:NULL"),
        Type::Set(_) => Input::Array(Vec::new()),
        Type::Option(inner) => plain(inner),
        _ => Input::Struct(Vec::new()),
    }
}

/// Whether a value is of a type.
pub(crate) fn fits(ty: &Type, value: &Value) -> bool {
    match (ty, value) {
        (Type::String, Value::Str(_))
        | (Type::Int, Value::Int(_))
        | (Type::Float, Value::Float(_))
        | (Type::Bool, Value::Bool(_))
        | (Type::DateTime, Value::Time(_))
        | (Type::Ref(_), Value::Ref(_))
        | (Type::Void, Value::Void)
        | (Type::Record(_) | Type::AnyRecord, Value::Record(_)) => true,
        (Type::Enum(words), Value::Enum(word)) => words.words.contains(word),
        (Type::Set(inner), Value::Set(members)) => members.iter().all(|member| fits(inner, member)),
        (Type::Map(_, inner), Value::Map(entries)) => entries.values().all(|entry| fits(inner, entry)),
        (Type::Option(inner), value) => matches!(value, Value::Absent) || fits(inner, value),
        _ => false,
    }
}

/// Classes whose objects clients see.
pub(crate) fn stored_classes() -> impl Iterator<Item = &'static datamodel::ClassDef> {
    model().classes().iter().filter(|class| class.stored && !class.internal)
}
