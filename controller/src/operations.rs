//! Operations on VMs: written down before they act, so that the next master can finish or undo them.
//!
//! An operation is a row of the internal class `operation`, made in the transaction that marks the VM
//! (current_operations, scheduled_to_be_resident_on) and deleted in the one that records the outcome. In
//! between, one step is sent to the agent under the row's uuid; the agent does it at most once and answers
//! a repetition with the first outcome. A master that finds operations of an earlier epoch repeats their
//! steps in its own epoch: that either finishes them or learns what became of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use datamodel::enums::{VmOperations, VmPowerState};
use datamodel::fields::{console, host, member, operation, task, vm, vm_metrics};
use datamodel::{
    Answer, ApiError, ClassKind, Console, Host, Member, Operation, Ref, Task, Value, Vm, VmMetrics, errors,
};
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::{DomainSpec, DomainState, PowerState, Step};
use raft_store::{CommitError, LogIndex, NewRow, Row, State, Transaction};
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::agent::AgentError;
use crate::call::{Call, find};
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::in_hand::Hold;
use crate::repeats::{self, ANSWER, Stage};
use crate::{lifecycle, placement, tasks};

/// A step that takes longer than this is taken for lost; the agent's answer is then asked for again.
const STEP_LIMIT: Duration = Duration::from_secs(60);
/// A guest that was asked to end has this long.
pub(crate) const CLEAN_LIMIT: Duration = Duration::from_secs(1200);
const ATTEMPTS: usize = 20;
/// What nobody has in hand is looked for this often.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The parameter of an operation that made its task itself, and so ends it.
const TASK: &str = "task";

/// What is done to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Start { paused: bool },
    Pause,
    Unpause,
    CleanShutdown,
    HardShutdown,
    CleanReboot,
    HardReboot,
}

impl Verb {
    const fn word(self) -> &'static str {
        match self {
            Self::Start { paused: false } => "start",
            Self::Start { paused: true } => "start_paused",
            Self::Pause => "pause",
            Self::Unpause => "unpause",
            Self::CleanShutdown => "clean_shutdown",
            Self::HardShutdown => "hard_shutdown",
            Self::CleanReboot => "clean_reboot",
            Self::HardReboot => "hard_reboot",
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        let all = [
            Self::Start { paused: false },
            Self::Start { paused: true },
            Self::Pause,
            Self::Unpause,
            Self::CleanShutdown,
            Self::HardShutdown,
            Self::CleanReboot,
            Self::HardReboot,
        ];
        all.into_iter().find(|verb| verb.word() == word)
    }

    fn limit(self) -> Duration {
        if matches!(self, Self::CleanShutdown | Self::CleanReboot) { CLEAN_LIMIT + STEP_LIMIT } else { STEP_LIMIT }
    }
}

/// One operation on one VM, begun by a call. A caller that hangs up or cancels its task stops waiting; what was
/// written down is still done to its end, or nobody would settle it before the next master.
pub(crate) async fn run(
    call: &Call,
    vm_ref: Ref<Vm>,
    what: VmOperations,
    verb: Verb,
    on: Option<Ref<Host>>,
) -> Served<()> {
    let call = call.fork();
    let work = async move {
        let whole = async {
            let (row, host_ref, _held) = begin(&call, vm_ref, what, verb, on).await?;
            finish(&call.shared, &row, verb, host_ref).await
        };
        tokio::select! {
            outcome = whole => outcome,
            // The process ends: the operation is the next master's.
            () = call.shared.shutdown.cancelled() => Err(Failure::NotLeader),
        }
    };
    let ended = tokio::spawn(work.in_current_span()).await;
    ended.unwrap_or_else(|_| refuse(errors::internal_error("a defect of the server; its log says more")))
}

/// Checks, and writes the operation down. Retries while others change the same VM.
async fn begin(
    call: &Call,
    vm_ref: Ref<Vm>,
    what: VmOperations,
    verb: Verb,
    on: Option<Ref<Host>>,
) -> Served<(Arc<Row>, Ref<Host>, Hold)> {
    for _ in 0..ATTEMPTS {
        let state = call.latest().await?;
        let vm_row = find(&state, vm_ref)?;
        lifecycle::check(&vm_row, what)?;
        let host_ref = match verb {
            Verb::Start { .. } => place(call, &state, &vm_row, on)?,
            _ => vm_row.get(vm::RESIDENT_ON),
        };
        let mut change = call.transaction();
        let task_ref = if call.task.is_null() {
            tasks::insert(call, &mut change, call.message.full_name.to_owned(), String::new())
        } else {
            call.task
        };
        let reference: Ref<Operation> = call.reference();
        let held = call.shared.in_hand.hold(reference.opaque());
        let uuid = call.uuid();
        change.expect_row(&vm_row).put(vm_ref, vm::CURRENT_OPERATIONS, task_ref.to_string(), what).set(
            vm_ref,
            vm::ALLOWED_OPERATIONS,
            vec![VmOperations::HardShutdown; usize::from(what == VmOperations::CleanShutdown)],
        );
        if matches!(verb, Verb::Start { .. }) {
            // The host's other starts are decided against this one: two that together do not fit cannot both commit.
            let host_row = find(&state, host_ref)?;
            change.expect_row(&host_row).touch(Host::ID, host_ref.opaque());
            change.set(vm_ref, vm::SCHEDULED_TO_BE_RESIDENT_ON, host_ref);
        }
        let epoch = call.shared.epoch().ok_or(Failure::NotLeader)?;
        change.insert(
            NewRow::new(reference, uuid)
                .with(operation::VERB, verb.word().to_owned())
                .with(operation::VM, vm_ref)
                .with(operation::HOST, host_ref)
                .with(operation::TASK, task_ref)
                .with(operation::EPOCH, i64::try_from(epoch.0).unwrap_or(i64::MAX))
                .with(operation::STEP, what.as_str().to_owned())
                .with(operation::PARAMETERS, parameters(call))
                .with(operation::CREATED, call.now()),
        );
        match call.commit_as(change, Stage::Open).await {
            Ok(_) => {
                let state = call.latest().await?;
                return Ok((find(&state, reference)?, host_ref, held));
            }
            Err(CommitError::Conflict(conflict)) => {
                // Met by itself, or by another call? The latter is looked at anew.
                if let repeated @ Failure::Repeated = CommitError::Conflict(conflict).into() {
                    return Err(repeated);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    refuse(errors::other_operation_in_progress("VM", vm_ref, what.as_str(), "OpaqueRef:NULL"))
}

/// Whether the operation made its task itself, and so ends it; the answer that it closes, if its call may be repeated.
fn parameters(call: &Call) -> BTreeMap<String, String> {
    let own = call.task.is_null().then(|| (TASK.to_owned(), "own".to_owned()));
    let answer = call.repeat.as_ref().map(|repeat| (ANSWER.to_owned(), repeat.reference().to_string()));
    own.into_iter().chain(answer).collect()
}

fn place(call: &Call, state: &State, vm_row: &Row, on: Option<Ref<Host>>) -> Served<Ref<Host>> {
    match on {
        Some(host_ref) => {
            let host_row = find(state, host_ref)?;
            placement::check(state, vm_row, &host_row)?;
            Ok(host_ref)
        }
        None => {
            let master =
                state.all::<datamodel::Pool>().next().map_or(Ref::NULL, |row| row.get(datamodel::fields::pool::MASTER));
            let draw = f64::from(u32::try_from(call.uuid().as_u128() & 0xffff_ffff).unwrap_or(0)) / f64::from(u32::MAX);
            Ok(placement::choose(state, vm_row, master, draw * 0.999_999)?.typed())
        }
    }
}

/// Sends the step and records what came of it. Also how a new master finishes what the last one began.
async fn finish(shared: &Arc<Shared>, row: &Arc<Row>, verb: Verb, host_ref: Ref<Host>) -> Served<()> {
    let outcome = step(shared, row, verb, host_ref).await;
    if let Err(Failure::NotLeader) = outcome {
        return Err(Failure::NotLeader);
    }
    record(shared, row, host_ref, &outcome).await?;
    outcome.map(drop)
}

async fn step(shared: &Arc<Shared>, row: &Arc<Row>, verb: Verb, host_ref: Ref<Host>) -> Served<DomainState> {
    let state = shared.store.read().await?;
    let vm_row = find(&state, row.get(operation::VM))?;
    let uuid = vm_row.uuid().to_owned();
    if host_ref.is_null() {
        // Suspended or halted: there is no domain to act on.
        return Ok(DomainState { vm: uuid, state: PowerState::Halted.into(), domid: -1, ..DomainState::default() });
    }
    let spec = spec(&vm_row, row.created);
    let clean = u64::try_from(CLEAN_LIMIT.as_millis()).unwrap_or(u64::MAX);
    let action = match verb {
        Verb::Start { paused } => Action::Start(proto::agent::StartDomain { spec: Some(spec), paused }),
        Verb::Pause => Action::Pause(proto::agent::PauseDomain {}),
        Verb::Unpause => Action::Unpause(proto::agent::UnpauseDomain {}),
        Verb::CleanShutdown => Action::Shutdown(proto::agent::ShutdownDomain { timeout_ms: clean }),
        Verb::HardShutdown => Action::Destroy(proto::agent::DestroyDomain {}),
        Verb::CleanReboot => {
            Action::Reboot(proto::agent::RebootDomain { clean: true, timeout_ms: clean, spec: Some(spec) })
        }
        Verb::HardReboot => {
            Action::Reboot(proto::agent::RebootDomain { clean: false, timeout_ms: 0, spec: Some(spec) })
        }
    };
    let pool = state.all::<datamodel::Pool>().next().map(|row| row.uuid().to_owned()).unwrap_or_default();
    let address = state
        .all::<Member>()
        .find(|row| row.get(member::HOST) == host_ref)
        .map(|row| row.get(member::AGENT_ADDRESS))
        .ok_or_else(|| errors::host_offline(host_ref))?;
    let agent = shared.agents.at(&address).map_err(|_| errors::host_offline(host_ref))?;
    let mut unknown = 0;
    loop {
        let epoch = shared.epoch().ok_or(Failure::NotLeader)?;
        let step = Step {
            pool: pool.clone(),
            epoch: epoch.0,
            operation: row.uuid().to_owned(),
            vm: uuid.clone(),
            traceparent: String::new(),
            number: 0,
            action: Some(action.clone()),
        };
        match agent.perform(step, verb.limit()).await {
            Ok(domain) => return Ok(domain),
            Err(AgentError::Refused(refusal)) => return refuse_step(&vm_row, host_ref, &refusal),
            Err(AgentError::Unreachable(reason)) => {
                tracing::warn!(host = %host_ref, reason, "the agent is not reached");
                return refuse(errors::host_offline(host_ref));
            }
            Err(AgentError::Unknown(reason)) => {
                // Asking again is safe: the agent does a step once. The reconciler tells when the host is gone for good.
                unknown += 1;
                tracing::warn!(host = %host_ref, reason, "the agent's answer is lost; asking again");
                if unknown >= 5 {
                    return refuse(errors::host_offline(host_ref));
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

fn refuse_step(vm_row: &Row, host_ref: Ref<Host>, refusal: &proto::agent::Refusal) -> Served<DomainState> {
    let vm_ref = vm_row.typed::<Vm>();
    refuse(match refusal.reason() {
        Reason::StaleEpoch => return Err(Failure::NotLeader),
        Reason::NotEnoughMemory => {
            errors::host_not_enough_free_memory(refusal.needed.to_string(), refusal.available.to_string())
        }
        Reason::TimedOut => errors::vm_shutdown_timeout(vm_ref, CLEAN_LIMIT.as_secs().to_string()),
        Reason::NoSuchDomain => errors::vm_bad_power_state(vm_ref, "running", "halted"),
        Reason::DomainExists => errors::domain_exists(vm_ref, refusal.detail.as_str()),
        Reason::BadState => errors::vm_bad_power_state(vm_ref, "running", refusal.detail.to_ascii_lowercase()),
        Reason::BootFailed => errors::bootloader_failed(vm_ref, refusal.detail.as_str()),
        Reason::WrongPool => errors::internal_error(format!("host {host_ref} belongs to another pool")),
        _ => errors::internal_error(refusal.detail.as_str()),
    })
}

fn unsigned<T: TryFrom<i64> + Default>(number: i64) -> T {
    T::try_from(number).unwrap_or_default()
}

/// What the agent is to make of a VM.
fn spec(row: &Row, generation: LogIndex) -> DomainSpec {
    let boot = row.get(vm::HVM_BOOT_PARAMS);
    DomainSpec {
        vm: row.uuid().to_owned(),
        name: row.name_label().to_owned(),
        memory_static_max: unsigned(row.get(vm::MEMORY_STATIC_MAX)),
        memory_target: unsigned(row.get(vm::MEMORY_DYNAMIC_MAX)),
        vcpus_max: unsigned(row.get(vm::VCPUS_MAX)),
        vcpus_at_startup: unsigned(row.get(vm::VCPUS_AT_STARTUP)),
        kernel: row.get(vm::PV_KERNEL),
        ramdisk: row.get(vm::PV_RAMDISK),
        kernel_args: row.get(vm::PV_ARGS),
        platform: row.get(vm::PLATFORM).into_iter().collect(),
        generation: generation.0,
        firmware: boot.get("firmware").cloned().unwrap_or_else(|| "bios".into()),
        boot_order: boot.get("order").cloned().unwrap_or_else(|| "cd".into()),
        disks: Vec::new(),
        vifs: Vec::new(),
        on_shutdown: row.get(vm::ACTIONS_AFTER_SHUTDOWN).as_str().to_owned(),
        on_reboot: row.get(vm::ACTIONS_AFTER_REBOOT).as_str().to_owned(),
        on_crash: row.get(vm::ACTIONS_AFTER_CRASH).as_str().to_owned(),
    }
}

/// Records an operation's outcome: the VM as it is, its task, the journal. Retries while others change the VM.
async fn record(
    shared: &Arc<Shared>,
    row: &Arc<Row>,
    host_ref: Ref<Host>,
    outcome: &Served<DomainState>,
) -> Served<()> {
    let vm_ref: Ref<Vm> = row.get(operation::VM);
    let task_ref: Ref<Task> = row.get(operation::TASK);
    for _ in 0..ATTEMPTS {
        let state = shared.store.read().await?;
        if state.row_of(Operation::ID, row.reference).is_none() {
            return Ok(());
        }
        let mut change = shared.transaction();
        change.expect_exists(Operation::ID, row.reference).delete_row(Operation::ID, row.reference);
        if let Some(vm_row) = state.row(vm_ref) {
            change.expect_row(vm_row);
            let mut after = Shadow::new(vm_row);
            after.operations.remove(&task_ref.to_string());
            change.take(vm_ref, vm::CURRENT_OPERATIONS, task_ref.to_string());
            change.set(vm_ref, vm::SCHEDULED_TO_BE_RESIDENT_ON, Ref::NULL);
            if let Ok(domain) = outcome {
                show(shared, &state, &mut change, vm_row, host_ref, domain, &mut after);
            }
            change.set(vm_ref, vm::ALLOWED_OPERATIONS, after.allowed(vm_row));
        }
        let parameters = row.get(operation::PARAMETERS);
        let result = outcome.as_ref().map(|_| &Value::Void).map_err(|failure| failure.clone().into_api());
        let result = result.as_ref().copied();
        if let Some(answer) = parameters.get(ANSWER).and_then(|text| text.parse().ok())
            && let Some(row) = state.row(Ref::<Answer>::from_opaque(answer))
        {
            repeats::close(&mut change, row.typed(), result);
        }
        if parameters.contains_key(TASK) {
            change.delete(task_ref);
        } else if let Some(task_row) = state.row(task_ref)
            && task_row.get(task::STATUS) == datamodel::enums::TaskStatusType::Pending
            // A call that runs here may try something else.
            && (result.is_ok() || !shared.tasks.runs(task_ref))
        {
            tasks::finish(&mut change, task_ref, result, shared.now());
        }
        match shared.store.commit(change).await {
            Ok(_) => return Ok(()),
            Err(CommitError::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    refuse(errors::internal_error("the outcome of the operation could not be recorded"))
}

/// The fields of a VM that decide what is allowed, as they will be after a transaction.
pub(crate) struct Shadow {
    pub(crate) power: VmPowerState,
    pub(crate) operations: std::collections::BTreeMap<String, VmOperations>,
}

impl Shadow {
    pub(crate) fn new(row: &Row) -> Self {
        Self { power: row.get(vm::POWER_STATE), operations: row.get(vm::CURRENT_OPERATIONS) }
    }

    /// What is allowed once the VM is so.
    pub(crate) fn allowed(&self, row: &Row) -> Vec<VmOperations> {
        lifecycle::allowed_operations(&row.with_values(&[
            (vm::POWER_STATE.index(), Value::Enum(self.power.as_str())),
            (vm::CURRENT_OPERATIONS.index(), datamodel::FieldValue::into_value(self.operations.clone())),
        ]))
    }
}

/// Makes a VM's rows say what a domain is.
pub(crate) fn show(
    shared: &Shared,
    state: &State,
    change: &mut Transaction,
    vm_row: &Row,
    host_ref: Ref<Host>,
    domain: &DomainState,
    after: &mut Shadow,
) {
    let vm_ref = vm_row.typed::<Vm>();
    let power = match domain.state() {
        PowerState::Running => VmPowerState::Running,
        PowerState::Paused => VmPowerState::Paused,
        PowerState::Halted | PowerState::Crashed | PowerState::Unspecified => VmPowerState::Halted,
    };
    after.power = power;
    change.set(vm_ref, vm::POWER_STATE, power);
    let metrics: Ref<VmMetrics> = vm_row.get(vm::METRICS);
    let has_domain = placement::has_domain(power);
    if has_domain {
        change.set(vm_ref, vm::RESIDENT_ON, host_ref).set(vm_ref, vm::DOMID, domain.domid);
        if state.row(metrics).is_some() {
            let started = datamodel::Timestamp(i64::try_from(domain.start_time).unwrap_or(0));
            change
                .set(metrics, vm_metrics::START_TIME, started)
                .set(metrics, vm_metrics::MEMORY_ACTUAL, i64::try_from(domain.memory_actual).unwrap_or(0))
                .set(metrics, vm_metrics::VCPUS_NUMBER, vm_row.get(vm::VCPUS_AT_STARTUP))
                .set(metrics, vm_metrics::LAST_UPDATED, shared.now());
        }
    } else {
        change.set(vm_ref, vm::RESIDENT_ON, Ref::NULL).set(vm_ref, vm::DOMID, -1);
        if state.row(metrics).is_some() {
            change.set(metrics, vm_metrics::MEMORY_ACTUAL, 0).set(metrics, vm_metrics::VCPUS_NUMBER, 0);
        }
    }
    show_consoles(shared, state, change, vm_row, host_ref, domain, has_domain);
}

/// A console for each of the domain's; none without a domain.
fn show_consoles(
    shared: &Shared,
    state: &State,
    change: &mut Transaction,
    vm_row: &Row,
    host_ref: Ref<Host>,
    domain: &DomainState,
    has_domain: bool,
) {
    let known: Vec<Ref<Console>> = vm_row.get(vm::CONSOLES);
    let same_host = vm_row.get(vm::RESIDENT_ON) == host_ref;
    if has_domain && same_host && known.len() == domain.consoles.len() {
        return;
    }
    for reference in known {
        change.delete(reference);
    }
    if !has_domain {
        return;
    }
    let address = state.row(host_ref).map(|row| row.get(host::ADDRESS)).unwrap_or_default();
    for shown in &domain.consoles {
        let Ok(protocol) = shown.protocol.parse() else { continue };
        let uuid = shared.uuid();
        change.insert(
            NewRow::new(Ref::<Console>::new(shared.uuid()), uuid)
                .with(console::PROTOCOL, protocol)
                .with(console::LOCATION, format!("https://{address}/console?uuid={}", uuid.hyphenated()))
                .with(console::VM, vm_row.typed::<Vm>()),
        );
    }
}

/// Finishes what nobody has in hand, and fails the tasks and answers that nobody stands for: what the last master left, and
/// what was let go of here, because a proof of the lead came too late or a caller hung up. Looks again and again; ends
/// when dropped, with all that it has begun.
pub(crate) async fn adopt(shared: &Arc<Shared>) {
    let mut adopted = JoinSet::new();
    loop {
        if let Err(error) = adopt_what_is_left(shared, &mut adopted).await {
            tracing::info!(?error, "what is left is looked at again");
        }
        tokio::time::sleep(LOOK_AGAIN).await;
        while adopted.try_join_next().is_some() {}
    }
}

async fn adopt_what_is_left(shared: &Arc<Shared>, adopted: &mut JoinSet<()>) -> Served<()> {
    let state = shared.store.read().await?;
    let mut tasks = Vec::new();
    for row in state.all::<Operation>() {
        tasks.push(row.get(operation::TASK));
        if !shared.in_hand.has(row.reference) {
            let held = shared.in_hand.hold(row.reference);
            let (shared, row) = (Arc::clone(shared), Arc::clone(row));
            adopted.spawn(async move {
                adopt_one(&shared, &row).await;
                drop(held);
            });
        }
    }
    tasks::fail_orphans(shared, &state, &tasks).await?;
    repeats::fail_orphans(shared, &state).await
}

async fn adopt_one(shared: &Arc<Shared>, row: &Arc<Row>) {
    let verb = Verb::from_word(&row.get(operation::VERB));
    tracing::info!(operation = row.uuid(), verb = row.get(operation::VERB), "adopting an operation");
    let host_ref = row.get(operation::HOST);
    let ended = match verb {
        Some(verb) => finish(shared, row, verb, host_ref).await,
        None => {
            let unknown: ApiError = errors::internal_error("an operation of a kind that this version does not know");
            record(shared, row, host_ref, &refuse(unknown)).await
        }
    };
    match ended {
        Ok(()) | Err(Failure::Api(_)) => {}
        Err(Failure::NotLeader | Failure::Repeated) => {
            tracing::info!(operation = row.uuid(), "left until the lead is proven again, or to the next master")
        }
    }
}
