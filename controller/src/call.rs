//! A call: who asks what, what it may look at, and how it is answered.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use datamodel::enums::TaskStatusType;
use datamodel::{
    ApiError, ClassKind, Input, MessageDef, OpaqueRef, Ref, Session, Task, Timestamp, Type, Value, errors, fields,
    model,
};
use parking_lot::Mutex;
use raft_store::{CommitError, Conflict, LogIndex, Member, NotLeader, Row, State, Transaction};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::repeats::{Repeat, Stage};
use crate::tasks;

/// Somebody else changed a row meanwhile: so often it is tried again.
pub(crate) const ATTEMPTS: usize = 16;

/// How a call reached this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Over the network: credentials count.
    Tcp,
    /// Over the host's own socket: whoever may open it is root.
    Unix,
}

/// Who asks.
#[derive(Debug, Clone)]
pub struct Caller {
    /// How the call came.
    pub transport: Transport,
    /// The client's address; none over the Unix socket.
    pub peer: Option<IpAddr>,
    /// What the client calls itself.
    pub user_agent: String,
    /// The `originator` header.
    pub originator: String,
    /// Sent on by another member: never sent on again.
    pub forwarded: bool,
    /// The `Idempotency-Key` header.
    pub idempotency_key: Option<String>,
}

/// A decoded call.
#[derive(Debug, Clone)]
pub struct Request {
    /// Who asks.
    pub caller: Caller,
    /// The method as the client spelled it.
    pub method: String,
    /// The arguments, the session among them.
    pub params: Vec<Input>,
}

/// An answer, in the form that costs least to put on the wire.
#[derive(Debug, Clone)]
pub enum Reply {
    /// A value.
    Value(Value),
    /// A record: the row's kept encoding.
    Record(Arc<Row>),
    /// A map from reference to record: the rows' kept encodings.
    Records(Vec<Arc<Row>>),
    /// What `event.from` answers.
    Events(EventBatch),
    /// What `event.next` answers.
    EventList(Vec<Event>),
    /// What `system.listMethods` answers: a bare array even over XML-RPC.
    Methods(Vec<String>),
}

/// One event.
#[derive(Debug, Clone)]
pub struct Event {
    /// The log index of the change.
    pub id: u64,
    /// Lower-case class.
    pub class: &'static str,
    /// `add`, `mod` or `del`.
    pub operation: &'static str,
    /// The object.
    pub reference: OpaqueRef,
    /// The object as it is; none for `del`.
    pub snapshot: Option<Arc<Row>>,
}

/// The answer of `event.from`.
#[derive(Debug, Clone)]
pub struct EventBatch {
    /// Events in the order of change.
    pub events: Vec<Event>,
    /// Live objects of every class, by lower-case name.
    pub valid_ref_counts: Vec<(&'static str, usize)>,
    /// Where the next call goes on.
    pub token: String,
}

/// A call that is not answered here with a result.
#[derive(Debug, Clone)]
pub enum Refusal {
    /// An error of the API.
    Api(ApiError),
    /// The master is elsewhere: the original bytes go to this member.
    Forward(Member),
    /// Leadership moved meanwhile: decode and ask again.
    Retry,
    /// The same, of a call that may have been done: its caller may no longer be told that nothing was.
    Begun(Box<Self>),
}

/// What a message's function works with.
pub(crate) struct Call {
    pub(crate) shared: Arc<Shared>,
    /// The pool as of the call's start; holds every write acknowledged before it.
    pub(crate) state: Arc<State>,
    pub(crate) caller: Arc<Caller>,
    pub(crate) message: &'static MessageDef,
    pub(crate) session: Ref<Session>,
    /// The task that the call runs under, if it has one.
    pub(crate) task: Ref<Task>,
    pub(crate) cancel: CancellationToken,
    /// How the call is known again, if its caller may repeat it.
    pub(crate) repeat: Option<Arc<Repeat>>,
    /// What the last transaction said of the call.
    stage: Mutex<Option<Stage>>,
    wrote: AtomicBool,
    /// Its last transaction came too late: a row was no longer as it had been looked at.
    overtaken: AtomicBool,
    /// It has an operation under way; the same for its forks.
    operates: Arc<AtomicBool>,
}

/// A call's operation is under way.
pub(crate) struct Operating(Arc<AtomicBool>);

impl Drop for Operating {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Call {
    pub(crate) fn new(
        shared: Arc<Shared>,
        state: Arc<State>,
        caller: Arc<Caller>,
        message: &'static MessageDef,
        session: Ref<Session>,
        task: Ref<Task>,
    ) -> Self {
        Self {
            shared,
            state,
            caller,
            message,
            session,
            task,
            cancel: CancellationToken::new(),
            repeat: None,
            stage: Mutex::new(None),
            wrote: AtomicBool::new(false),
            overtaken: AtomicBool::new(false),
            operates: Arc::default(),
        }
    }

    /// A call that the pool makes itself, in nobody's session and under no task.
    pub(crate) fn of_the_pool(shared: &Arc<Shared>, state: Arc<State>, message: &str) -> Served<Self> {
        let message = model().message(message).ok_or_else(|| errors::message_method_unknown(message))?;
        let caller = Caller {
            transport: Transport::Unix,
            peer: None,
            user_agent: String::new(),
            originator: String::new(),
            forwarded: false,
            idempotency_key: None,
        };
        Ok(Self::new(Arc::clone(shared), state, Arc::new(caller), message, Ref::NULL, Ref::NULL))
    }

    /// The same call, for work that goes on when nobody waits for its answer any more.
    pub(crate) fn fork(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            state: Arc::clone(&self.state),
            caller: Arc::clone(&self.caller),
            message: self.message,
            session: self.session,
            task: self.task,
            cancel: self.cancel.clone(),
            repeat: self.repeat.clone(),
            stage: Mutex::new(self.stage()),
            wrote: AtomicBool::new(self.wrote()),
            overtaken: AtomicBool::new(false),
            operates: Arc::clone(&self.operates),
        }
    }

    /// It has an operation under way until what is returned is dropped.
    pub(crate) fn operating(&self) -> Operating {
        self.operates.store(true, Ordering::Release);
        Operating(Arc::clone(&self.operates))
    }

    /// Whether it has one.
    pub(crate) fn operates(&self) -> bool {
        self.operates.load(Ordering::Acquire)
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.shared.clock.now()
    }

    /// A fresh transaction.
    pub(crate) fn transaction(&self) -> Transaction {
        self.shared.transaction()
    }

    /// A fresh reference.
    pub(crate) fn reference<C>(&self) -> Ref<C> {
        Ref::new(self.shared.uuid())
    }

    pub(crate) fn uuid(&self) -> Uuid {
        self.shared.uuid()
    }

    /// Commits the change that the call is about. A call that goes on afterwards takes [`commit_as`](Self::commit_as).
    pub(crate) async fn commit(&self, transaction: Transaction) -> Served<LogIndex> {
        let stage = self.foreseen(&transaction);
        Ok(self.commit_as(transaction, stage).await?)
    }

    /// Commits, and says with it how far the call has come: to who repeats it, and to its task. From the first success
    /// on a call that nobody can recognise again can no longer be asked elsewhere.
    pub(crate) async fn commit_as(&self, mut transaction: Transaction, stage: Stage) -> Result<LogIndex, CommitError> {
        if self.shared.parting.load(Ordering::Acquire) {
            // It would be left behind.
            return Err(CommitError::NotLeader(NotLeader { leader: None }));
        }
        if let Some(repeat) = &self.repeat {
            repeat.record(&self.shared, &mut transaction, &stage);
        }
        let committed = match &stage {
            Stage::Done(value) if !self.task.is_null() => self.commit_with_task(transaction, value).await,
            _ => self.shared.store.commit(transaction).await,
        };
        if let (Err(_), Some(repeat)) = (&committed, &self.repeat) {
            repeat.refused();
        }
        match committed {
            Ok(index) => {
                self.wrote.store(true, Ordering::Relaxed);
                *self.stage.lock() = Some(stage);
                if let Some(repeat) = &self.repeat {
                    repeat.committed();
                }
                Ok(index)
            }
            Err(CommitError::Conflict(conflict)) => {
                self.overtaken.store(is_late(&conflict), Ordering::Relaxed);
                Err(CommitError::Conflict(conflict))
            }
            // Whoever asks again finds out.
            Err(CommitError::Unknown) if self.repeat.is_some() => {
                self.wrote.store(true, Ordering::Relaxed);
                Err(CommitError::NotLeader(NotLeader { leader: None }))
            }
            Err(error) => Err(error),
        }
    }

    /// The task ends with the effect that it stands for, or, if it was cancelled, neither happens.
    async fn commit_with_task(&self, transaction: Transaction, value: &Value) -> Result<LogIndex, CommitError> {
        let mut whole = transaction.clone();
        whole.expect(self.task, fields::task::STATUS, TaskStatusType::Pending);
        tasks::finish(&mut whole, self.task, Ok(value), self.now());
        match self.shared.store.commit(whole).await {
            // Its owner has thrown the task away, and not what it stands for.
            Err(CommitError::Conflict(Conflict::Missing(Task::NAME, _))) => self.shared.store.commit(transaction).await,
            committed => committed,
        }
    }

    /// What the call will answer if this is its last transaction: nothing, or the object that it makes.
    fn foreseen(&self, transaction: &Transaction) -> Stage {
        match &self.message.result {
            Type::Void => Stage::Done(Value::Void),
            Type::Ref(class) => transaction.inserted(*class).map_or(Stage::Open, |made| Stage::Done(Value::Ref(made))),
            _ => Stage::Open,
        }
    }

    /// What the last committed transaction said of the call.
    pub(crate) fn stage(&self) -> Option<Stage> {
        self.stage.lock().clone()
    }

    /// What was committed so far was only the way to the call itself.
    pub(crate) fn forget_stage(&self) {
        *self.stage.lock() = None;
    }

    /// Whether anything was committed, or may have been.
    pub(crate) fn wrote(&self) -> bool {
        self.wrote.load(Ordering::Relaxed)
    }

    /// Whether it failed since somebody else was faster, and has done nothing of what it is about: it may be decided anew.
    pub(crate) fn take_overtaken(&self) -> bool {
        self.overtaken.swap(false, Ordering::Relaxed) && self.stage.lock().is_none()
    }

    /// The pool as of now.
    pub(crate) async fn latest(&self) -> Served<Arc<State>> {
        Ok(self.shared.store.read().await?)
    }

    /// The session's row; none for calls without a session.
    pub(crate) fn session_row(&self) -> Option<&Arc<Row>> {
        self.state.row(self.session)
    }

    /// A row that must exist.
    pub(crate) fn row<C: ClassKind>(&self, reference: Ref<C>) -> Served<Arc<Row>> {
        find(&self.state, reference)
    }
}

/// Whether the same call may well succeed on the newest state. A task that was ended stays so.
fn is_late(conflict: &Conflict) -> bool {
    match conflict {
        Conflict::Changed(class, _) => *class != Task::NAME,
        Conflict::ClassChanged(_) | Conflict::KeyExists(..) | Conflict::NotEmpty(_) => true,
        Conflict::Missing(..) | Conflict::Exists(..) | Conflict::Unstaged => false,
    }
}

/// A row that must exist.
///
/// # Errors
/// `HANDLE_INVALID(class, reference)`.
pub(crate) fn find<C: ClassKind>(state: &State, reference: Ref<C>) -> Served<Arc<Row>> {
    state.row(reference).cloned().ok_or_else(|| Failure::Api(errors::handle_invalid(C::NAME, reference)))
}

/// Decides on the newest state and commits; decides anew where somebody was faster. The call's one effect.
pub(crate) async fn persist(cx: &Call, decide: impl Fn(&State, &mut Transaction) -> Served<()>) -> Served<()> {
    for _ in 0..ATTEMPTS {
        let state = cx.latest().await?;
        let mut change = cx.transaction();
        decide(&state, &mut change)?;
        if change.is_empty() {
            return Ok(());
        }
        match cx.commit_as(change, Stage::Done(Value::Void)).await {
            Ok(_) => return Ok(()),
            Err(CommitError::Conflict(raft_store::Conflict::Exists(class, reference))) => {
                return Err(CommitError::Conflict(raft_store::Conflict::Exists(class, reference)).into());
            }
            Err(CommitError::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    refuse(errors::too_many_pending_tasks())
}
