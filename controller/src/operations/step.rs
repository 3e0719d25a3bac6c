//! One step: what it is, how it is sent to an agent, and how it is undone.

use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::member;
use datamodel::{ApiError, ClassKind, Host, Member, OpaqueRef, Pool, Ref, Sr, errors};
use proto::Message as _;
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::{Refusal, Step};
use raft_store::State;

use super::journal::Journal;
use super::{CLEAN_LIMIT, STEP_LIMIT};
use crate::agent::{AgentError, Performed};
use crate::controller::Shared;
use crate::failure::Failure;
use crate::storage::reach;

/// A copy of all bytes of a disk, or a guest's memory, has this long.
const LONG_LIMIT: Duration = Duration::from_secs(6 * 3600);
/// A lost answer is asked for again this often.
const ASKED_AGAIN: u32 = 5;
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// The number of the step that undoes step 0, and how far it is from there to that of the next try: an agent does each once.
const UNDOING: u32 = 1000;

/// A step of an operation. Its number is its place in the plan.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    pub(crate) host: Ref<Host>,
    /// The uuid of what it is about: a VM, an SR or a VDI.
    pub(crate) subject: String,
    pub(crate) action: Action,
    /// An answer that takes longer is taken for lost, and asked for again.
    pub(crate) limit: Duration,
    /// How it is undone, if a later step fails.
    pub(crate) undo: Option<Undo>,
    /// The operation goes on when the agent refuses it.
    pub(crate) may_fail: bool,
    /// It is undone only where it is known to be done.
    pub(super) undone_if_known: bool,
    /// Once it may be done nothing before it may be undone.
    pub(super) irrevocable: bool,
    /// It is done later.
    pub(super) owed: Owed,
}

/// When a step that is not done is done later, as a debt of its operation, which goes on without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owed {
    Never,
    /// It may have been done, and nobody knows.
    Lost,
    /// Whatever keeps it from being done, unless that is for good.
    Always,
}

impl Planned {
    /// A step that need not be undone.
    pub(crate) fn new(host: Ref<Host>, subject: impl Into<String>, action: Action) -> Self {
        let limit = limit(&action);
        Self {
            host,
            subject: subject.into(),
            action,
            limit,
            undo: None,
            may_fail: false,
            undone_if_known: false,
            irrevocable: false,
            owed: Owed::Never,
        }
    }

    /// It is undone by this, on the same host.
    #[must_use]
    pub(crate) fn undone_by(mut self, action: Action) -> Self {
        self.undo = Some(Undo { host: self.host, subject: self.subject.clone(), action, refused: 0 });
        self
    }

    /// Undoing it where it was not done would do harm.
    #[must_use]
    pub(crate) const fn undone_if_known(mut self) -> Self {
        self.undone_if_known = true;
        self
    }

    /// What steps before it made is all that is left of something once it may be done: from then on the operation goes
    /// forward, whoever cancels it. Until it is begun nothing is lost, and an agent that refuses it has not done it.
    #[must_use]
    pub(crate) const fn irrevocable(mut self) -> Self {
        self.irrevocable = true;
        self
    }

    /// Where nobody knows whether it was done it is done later.
    #[must_use]
    pub(crate) const fn owed_if_lost(mut self) -> Self {
        self.owed = Owed::Lost;
        self
    }

    /// It is done later where it cannot be done now.
    #[must_use]
    pub(crate) const fn owed(mut self) -> Self {
        self.owed = Owed::Always;
        self
    }

    /// As a debt, if it is one after what came of it.
    pub(super) fn debt(&self, failed: &StepError) -> Option<Undo> {
        let undo = Undo { host: self.host, subject: self.subject.clone(), action: self.action.clone(), refused: 0 };
        let owed = match failed {
            StepError::NotLeader => false,
            StepError::Lost(_) => self.owed != Owed::Never,
            StepError::NotReached(_) => self.owed == Owed::Always,
            StepError::Refused(refusal) => self.owed == Owed::Always && undo.is_worth_another_try(refusal.reason()),
        };
        owed.then_some(undo)
    }

    /// Its failure is no failure of the operation.
    #[must_use]
    pub(crate) const fn may_fail(mut self) -> Self {
        self.may_fail = true;
        self
    }
}

fn limit(action: &Action) -> Duration {
    match action {
        Action::Shutdown(_) | Action::Reboot(_) => CLEAN_LIMIT + STEP_LIMIT,
        Action::CopyVolume(_) | Action::Suspend(_) | Action::Resume(_) | Action::ScanStore(_) => LONG_LIMIT,
        Action::UnplugDisk(unplug) => STEP_LIMIT + Duration::from_millis(unplug.timeout_ms),
        _ => STEP_LIMIT,
    }
}

/// What undoes a step, or what is owed of one that could not be done.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Undo {
    pub(crate) host: Ref<Host>,
    pub(crate) subject: String,
    pub(crate) action: Action,
    /// So often its agent has said no. It would say so again if it were asked for the same try.
    pub(crate) refused: u32,
}

impl Undo {
    /// Whether an agent that refused it may do it yet: an image can be in use for a while, and its store is not there
    /// before the host has plugged it.
    pub(super) fn is_worth_another_try(&self, reason: Reason) -> bool {
        let never = matches!(reason, Reason::NoSuchVolume | Reason::WrongPool | Reason::Unsupported);
        matches!(self.action, Action::DestroyVolume(_) | Action::Destroy(_)) && !never
    }

    /// Whether it is the end of a domain whose start may have been done.
    pub(super) const fn ends_domain(&self) -> bool {
        matches!(self.action, Action::Destroy(_))
    }

    /// Whether it can still be done: by a host of the pool, in a store that the host is to be connected to.
    pub(super) fn is_possible(&self, state: &State) -> bool {
        let uuid = match &self.action {
            Action::DestroyVolume(step) => step.volume.as_ref().and_then(|volume| volume.store.as_ref()),
            _ => None,
        };
        let connected = uuid.is_none_or(|store| {
            let sr_row = state.by_uuid(Sr::ID, &store.sr);
            sr_row.is_some_and(|sr_row| reach::connection(state, sr_row, self.host).is_some())
        });
        state.row(self.host).is_some() && connected
    }

    /// As it stands in the journal: a step that says whose it is where the pool stands otherwise.
    pub(super) fn encode(&self) -> Vec<u8> {
        let step = Step {
            pool: self.host.to_string(),
            vm: self.subject.clone(),
            action: Some(self.action.clone()),
            number: self.refused,
            ..Step::default()
        };
        step.encode_to_vec()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let step = Step::decode(bytes).ok()?;
        let host: OpaqueRef = step.pool.parse().ok()?;
        Some(Self { host: Ref::from_opaque(host), subject: step.vm, action: step.action?, refused: step.number })
    }
}

/// Why a step came to nothing.
#[derive(Debug)]
pub(super) enum StepError {
    /// The agent said no: nothing was done.
    Refused(Box<Refusal>),
    /// It was not reached, by any master: nothing was done.
    NotReached(ApiError),
    /// Its answer was lost: it may have been done.
    Lost(ApiError),
    /// This node does not lead any more.
    NotLeader,
}

impl From<Failure> for StepError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Api(error) => Self::NotReached(error),
            Failure::NotLeader | Failure::Repeated => Self::NotLeader,
        }
    }
}

/// Does a step of an operation.
pub(super) async fn perform(shared: &Arc<Shared>, journal: &Journal, step: &Planned) -> Result<Performed, StepError> {
    let asked =
        ask(shared, &journal.uuid, journal.position(), step.host, &step.subject, &step.action, step.limit).await;
    asked.map_err(|failed| match failed {
        // A master before this one may have reached the agent.
        StepError::NotReached(error) if journal.adopted => StepError::Lost(error),
        failed => failed,
    })
}

/// Undoes one.
pub(super) async fn undo(
    shared: &Arc<Shared>,
    journal: &Journal,
    number: u32,
    undo: &Undo,
) -> Result<Performed, StepError> {
    let tries = undo.refused.saturating_add(1);
    let (number, limit) = (number.saturating_add(UNDOING.saturating_mul(tries)), limit(&undo.action));
    ask(shared, &journal.uuid, number, undo.host, &undo.subject, &undo.action, limit).await
}

/// Where the agent of a host is.
fn address(state: &State, host_ref: Ref<Host>) -> Option<String> {
    let row = state.all::<Member>().find(|row| row.get(member::HOST) == host_ref)?;
    Some(row.get(member::AGENT_ADDRESS))
}

async fn ask(
    shared: &Arc<Shared>,
    operation: &str,
    number: u32,
    host_ref: Ref<Host>,
    subject: &str,
    action: &Action,
    limit: Duration,
) -> Result<Performed, StepError> {
    let state = shared.store.read().await.map_err(|_| StepError::NotLeader)?;
    let offline = || errors::host_offline(host_ref);
    let pool = state.all::<Pool>().next().map(|row| row.uuid().to_owned()).unwrap_or_default();
    let address = address(&state, host_ref).ok_or_else(|| StepError::NotReached(offline()))?;
    let agent = shared.agents.at(&address).map_err(|_| StepError::NotReached(offline()))?;
    let mut unknown = 0;
    loop {
        let epoch = shared.epoch().ok_or(StepError::NotLeader)?;
        let step = Step {
            pool: pool.clone(),
            epoch: epoch.0,
            operation: operation.to_owned(),
            vm: subject.to_owned(),
            traceparent: String::new(),
            number,
            action: Some(action.clone()),
        };
        match agent.perform(step, limit).await {
            Ok(performed) => return Ok(performed),
            Err(AgentError::Refused(refusal)) => return Err(StepError::Refused(Box::new(refusal))),
            Err(AgentError::Unreachable(reason)) => {
                tracing::warn!(host = %host_ref, reason, "the agent is not reached");
                // What was asked before it went away may have been done.
                let error = if unknown == 0 { StepError::NotReached } else { StepError::Lost };
                return Err(error(offline()));
            }
            Err(AgentError::Unknown(reason)) => {
                // Asking again is safe: the agent does a step once. The reconciler tells when the host is gone for good.
                unknown += 1;
                tracing::warn!(host = %host_ref, reason, "the agent's answer is lost; asking again");
                if unknown >= ASKED_AGAIN {
                    return Err(StepError::Lost(offline()));
                }
                tokio::time::sleep(ASK_AGAIN_AFTER).await;
            }
        }
    }
}
