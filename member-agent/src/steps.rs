//! A step is fenced by its epoch, and done at most once.
//!
//! The name of a step is (operation, subject, kind, number). The first time it comes it is noted, done by a task of its own, so
//! that a master that goes away does not leave it half done, and its outcome is kept. Whoever repeats it waits for,
//! or gets, the same outcome. A step that a former agent began and did not conclude is done again, and then the
//! domain or the store itself tells what had been done before. What only looks is done as often as it is asked for.

mod stores;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use uuid::Uuid;

use crate::hypervisor::Hypervisor;
use crate::hypervisor::domain::{DomainState, Medium, Reason, Refusal};
use crate::ledger::{Done, Ledger, Outcome, Past, StepKey};
use crate::storage::Stores;
use crate::storage::words::Access;
use crate::wire::Deed;
pub(crate) use stores::Domains;

/// A step could be neither done nor refused: it may be repeated.
#[derive(Debug, Error)]
pub(crate) enum StepError {
    /// The ledger cannot be written, so nothing may be done.
    #[error("the agent cannot write its ledger")]
    Ledger(#[from] io::Error),
    /// The agent is on its way out.
    #[error("the agent is stopping")]
    Stopping,
}

/// What a master says of itself with each step.
#[derive(Debug, Clone)]
pub(crate) struct Authority {
    pub pool: String,
    pub epoch: u64,
}

/// Does steps.
pub(crate) struct Steps {
    hypervisor: Arc<dyn Hypervisor>,
    stores: Stores,
    ledger: Ledger,
    pool: Option<Uuid>,
    running: Mutex<HashMap<StepKey, watch::Receiver<Option<Outcome>>>>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

impl Steps {
    /// Steps on a hypervisor and on stores, for one pool or for any.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        stores: Stores,
        ledger: Ledger,
        pool: Option<Uuid>,
        tasks: TaskTracker,
        shutdown: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self { hypervisor, stores, ledger, pool, running: Mutex::default(), tasks, shutdown })
    }

    /// Refuses a master that is not this pool's newest.
    pub async fn admit(&self, authority: &Authority) -> Result<Result<(), Refusal>, StepError> {
        let Authority { pool, epoch } = authority;
        if self.pool.is_some_and(|mine| pool.parse() != Ok(mine)) {
            return Ok(Err(Refusal::new(Reason::WrongPool, "this host belongs to another pool")));
        }
        let admitted = self.ledger.admit(pool, *epoch).await?;
        Ok(admitted.map_err(|held| {
            tracing::warn!(pool, epoch, held, "a deposed master is refused");
            Refusal::new(Reason::StaleEpoch, held.to_string())
        }))
    }

    /// Does a step, or answers with what came of it before.
    pub async fn perform(
        self: &Arc<Self>,
        authority: &Authority,
        operation: String,
        subject: Uuid,
        number: u32,
        deed: Deed,
    ) -> Result<Outcome, StepError> {
        if let Err(refusal) = self.admit(authority).await? {
            return Ok(Err(refusal));
        }
        let step = StepKey { operation, subject, kind: deed.kind(), number };
        let mut outcome = match self.begin_or_join(&step, deed) {
            Ok(known) => return Ok(known),
            Err(running) => running,
        };
        // The step's own limits end this wait; a sender that is gone without a word was stopped with the agent.
        let known = outcome.wait_for(Option::is_some).await.map_err(|_| StepError::Stopping)?;
        known.clone().ok_or(StepError::Stopping)
    }

    /// What came of it, or where that will be told.
    fn begin_or_join(
        self: &Arc<Self>,
        step: &StepKey,
        deed: Deed,
    ) -> Result<Outcome, watch::Receiver<Option<Outcome>>> {
        let mut running = self.running.lock();
        if let Some(running) = running.get(step) {
            return Err(running.clone());
        }
        let past = self.ledger.past(step);
        if let Some(Past::Done(outcome)) = past {
            return Ok(outcome);
        }
        let (tell, told) = watch::channel(None);
        running.insert(step.clone(), told.clone());
        let (steps, step) = (Arc::clone(self), step.clone());
        let task = async move {
            let done = steps.begin_and_conclude(&step, deed, past.is_some());
            let outcome = tokio::select! {
                outcome = done => outcome.map_err(StepError::from),
                () = steps.shutdown.cancelled() => Err(StepError::Stopping),
            };
            match outcome {
                Ok(outcome) => drop(tell.send_replace(Some(outcome))),
                Err(error) => tracing::warn!(?step, %error, "a step is left without outcome"),
            }
            steps.running.lock().remove(&step);
        };
        self.tasks.spawn(task.in_current_span());
        Err(told)
    }

    async fn begin_and_conclude(&self, step: &StepKey, deed: Deed, again: bool) -> io::Result<Outcome> {
        if step.kind.looks() {
            return Ok(self.carry_out(step, deed, again).await);
        }
        self.ledger.begin(step).await?;
        tracing::info!(kind = ?step.kind, again, "step begins");
        let start = match &deed {
            Deed::Reboot { reboot, volumes } => reboot.spec.clone().map(|spec| (spec, volumes.clone())),
            _ => None,
        };
        let mut outcome = self.carry_out(step, deed, again).await;
        if again && let Err(refusal) = &outcome {
            let refusal = refusal.clone();
            outcome = match (refusal.reason, start) {
                // Between going and coming again the agent died.
                (Reason::NoSuchDomain, Some((spec, volumes))) => {
                    let start = Deed::Start { spec: Box::new(spec), volumes, paused: false };
                    self.carry_out(step, start, again).await
                }
                _ => self.what_it_did(step).ok_or(refusal),
            };
        }
        if let Err(refusal) = &outcome {
            tracing::warn!(kind = ?step.kind, %refusal, "step refused");
        }
        self.ledger.conclude(step, &outcome).await?;
        Ok(outcome)
    }

    async fn carry_out(&self, step: &StepKey, deed: Deed, again: bool) -> Outcome {
        let (vm, by) = (step.subject, step.operation.as_str());
        // What is open for a domain is held until the hypervisor has it open, or does not want it.
        let state = match deed {
            Deed::Start { mut spec, volumes, paused } => {
                let _held = self.open_disks(vm, &mut spec.disks, &volumes).await?;
                self.hypervisor.start(*spec, paused, by).await
            }
            Deed::Destroy => self.hypervisor.destroy(vm, by).await,
            Deed::Pause => self.hypervisor.pause(vm, by).await,
            Deed::Unpause => self.hypervisor.unpause(vm, by).await,
            Deed::Shutdown { limit } => self.hypervisor.shutdown(vm, limit, by).await,
            Deed::Reboot { mut reboot, volumes } => {
                let disks = reboot.spec.as_mut().map(|spec| spec.disks.as_mut_slice());
                let _held = self.open_disks(vm, disks.unwrap_or_default(), &volumes).await?;
                self.hypervisor.reboot(vm, *reboot, by).await
            }
            Deed::Suspend { into, keep_running } => {
                let image = self.open_volume(&into, Access { read_only: false, sharable: false, vm: None }).await?;
                self.hypervisor.suspend(vm, &image.source.path, keep_running, by).await
            }
            Deed::Resume { mut spec, volumes, from, paused } => {
                let image = self.open_volume(&from, Access { read_only: true, sharable: false, vm: None }).await?;
                let _held = self.open_disks(vm, &mut spec.disks, &volumes).await?;
                self.hypervisor.resume(*spec, &image.source.path, paused, by).await
            }
            Deed::MemoryTarget(bytes) => self.hypervisor.set_memory_target(vm, bytes, by).await,
            Deed::Vcpus(number) => self.hypervisor.set_vcpus(vm, number, by).await,
            Deed::Keys(letter) => self.hypervisor.send_sysrq(vm, letter, by).await,
            Deed::PlugDisk { mut disk, volumes } => {
                let _held = self.open_disks(vm, std::slice::from_mut(&mut *disk), &volumes).await?;
                self.hypervisor.plug_disk(vm, *disk, by).await
            }
            Deed::UnplugDisk { vbd, how } => self.hypervisor.unplug_disk(vm, &vbd, how, by).await,
            Deed::Medium { vbd, volume } => {
                let access = Access { read_only: true, sharable: false, vm: Some(vm) };
                let image = match &volume {
                    Some(volume) => Some(self.open_volume(volume, access).await?),
                    None => None,
                };
                let medium = image
                    .as_ref()
                    .map(|it| Medium { path: it.source.path.display().to_string(), format: it.source.format });
                self.hypervisor.change_medium(vm, &vbd, medium, by).await
            }
            Deed::Store(deed) => return self.store_step(deed, again).await,
        };
        state.map(Done::from)
    }

    /// The effect of a step that was begun by a former agent, if the domain shows it.
    fn what_it_did(&self, step: &StepKey) -> Option<Done> {
        use crate::hypervisor::domain::StepKind;
        let now = self.hypervisor.roster().get(step.subject);
        let state = match step.kind {
            StepKind::Shutdown if now.is_none() => {
                Some(DomainState::halted(step.subject, &step.operation, "guest-shutdown"))
            }
            StepKind::Start | StepKind::Resume | StepKind::Pause | StepKind::Unpause => {
                now.filter(|domain| domain.last_operation == step.operation)
            }
            _ => None,
        };
        state.map(Done::from)
    }
}
