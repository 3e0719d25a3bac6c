//! The stores of an agent: volumes by name, each step done once, and failures on order.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use parking_lot::Mutex;
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::{DomainSpec, Refusal, Step, Store, StoreState, VolumeRef, VolumeState};
use tokio::sync::watch;

use crate::{AgentError, Performed};

pub(crate) const SIZE: u64 = 1 << 40;
/// Steps that undo others are numbered from here on.
const UNDOING: u32 = 1000;

/// How a step fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The agent says no.
    Refused(Reason),
    /// It is not there.
    Unreachable,
    /// It does the step, and nobody hears of it, however often it is asked.
    Lost,
}

type Outcome = Result<Performed, Refusal>;

#[derive(Default)]
struct Inner {
    volumes: BTreeMap<String, VolumeState>,
    attached: Vec<String>,
    created: Vec<String>,
    done: HashMap<(String, u32), Outcome>,
    /// What was asked for, in order, without repetitions.
    asked: Vec<(String, u32, Action)>,
    fault: Option<(usize, Fault)>,
    lost: Option<(String, u32)>,
    unreachable: bool,
    /// What undoing steps are refused with.
    undoing: Option<Reason>,
    specs: Vec<DomainSpec>,
}

/// Every store of a host.
pub(crate) struct Stores {
    inner: Mutex<Inner>,
    boot: watch::Sender<u32>,
    /// So many steps go on, and those after them wait; none: nobody waits.
    open_for: watch::Sender<Option<usize>>,
    waiting: watch::Sender<usize>,
}

impl Default for Stores {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            boot: watch::Sender::new(1),
            open_for: watch::Sender::new(None),
            waiting: watch::Sender::new(0),
        }
    }
}

fn refusal(reason: Reason, detail: impl Into<String>) -> Refusal {
    Refusal { reason: reason.into(), detail: detail.into(), needed: 2048, available: 1024 }
}

fn sr_of(store: Option<&Store>) -> String {
    store.map(|store| store.sr.clone()).unwrap_or_default()
}

/// An image is named after its disk.
fn named(vdi: &str, size: u64) -> VolumeState {
    VolumeState {
        vdi: vdi.to_owned(),
        location: format!("{vdi}.image"),
        virtual_size: size,
        physical_utilisation: 4096,
        ..VolumeState::default()
    }
}

impl Inner {
    fn there(&self, volume: Option<&VolumeRef>) -> Result<VolumeState, Refusal> {
        let vdi = volume.map(|volume| volume.vdi.as_str()).unwrap_or_default();
        self.volumes.get(vdi).cloned().ok_or_else(|| refusal(Reason::NoSuchVolume, vdi))
    }

    fn make(&mut self, vdi: &str, size: u64) -> Outcome {
        if self.volumes.contains_key(vdi) {
            return Err(refusal(Reason::VolumeExists, vdi));
        }
        let volume = named(vdi, size);
        self.volumes.insert(vdi.to_owned(), volume.clone());
        Ok(Performed::Volume(volume))
    }

    fn state(&self, sr: String) -> Performed {
        let volumes: Vec<VolumeState> = self.volumes.values().cloned().collect();
        Performed::Store(StoreState {
            sr,
            physical_size: SIZE,
            physical_utilisation: volumes.iter().map(|volume| volume.physical_utilisation).sum(),
            virtual_allocation: volumes.iter().map(|volume| volume.virtual_size).sum(),
            volumes,
            probed: Vec::new(),
        })
    }

    fn act(&mut self, action: &Action) -> Outcome {
        match action {
            Action::AttachStore(step) => {
                let sr = sr_of(step.store.as_ref());
                self.attached.push(sr.clone());
                Ok(self.state(sr))
            }
            Action::DetachStore(step) => {
                let sr = sr_of(step.store.as_ref());
                self.attached.retain(|attached| *attached != sr);
                Ok(self.state(sr))
            }
            Action::CreateStore(step) => {
                let sr = sr_of(step.store.as_ref());
                self.created.push(sr.clone());
                Ok(self.state(sr))
            }
            Action::DestroyStore(step) => {
                let sr = sr_of(step.store.as_ref());
                self.created.retain(|created| *created != sr);
                Ok(self.state(sr))
            }
            Action::ScanStore(step) => Ok(self.state(sr_of(step.store.as_ref()))),
            Action::CreateVolume(step) => {
                let vdi = step.volume.as_ref().map(|volume| volume.vdi.clone()).unwrap_or_default();
                self.make(&vdi, step.virtual_size)
            }
            Action::SnapshotVolume(step) => {
                let size = self.there(step.volume.as_ref())?.virtual_size;
                self.make(&step.into, size)
            }
            Action::CloneVolume(step) => {
                let size = self.there(step.volume.as_ref())?.virtual_size;
                self.make(&step.into, size)
            }
            Action::CopyVolume(step) => {
                let size = self.there(step.from.as_ref())?.virtual_size;
                let vdi = step.into.as_ref().map(|volume| volume.vdi.clone()).unwrap_or_default();
                if let Ok(there) = self.there(step.into.as_ref()) {
                    return Ok(Performed::Volume(there));
                }
                self.make(&vdi, size)
            }
            Action::ResizeVolume(step) => {
                let mut volume = self.there(step.volume.as_ref())?;
                volume.virtual_size = step.virtual_size;
                self.volumes.insert(volume.vdi.clone(), volume.clone());
                Ok(Performed::Volume(volume))
            }
            Action::DestroyVolume(step) => {
                let vdi = step.volume.as_ref().map(|volume| volume.vdi.clone()).unwrap_or_default();
                self.volumes.remove(&vdi);
                Ok(Performed::Volume(VolumeState { vdi, ..VolumeState::default() }))
            }
            Action::RevertVolume(step) => Ok(Performed::Volume(self.there(step.volume.as_ref())?)),
            _ => Ok(Performed::Domain(proto::agent::DomainState::default())),
        }
    }
}

fn is_of_a_store(action: &Action) -> bool {
    matches!(
        action,
        Action::AttachStore(_)
            | Action::DetachStore(_)
            | Action::CreateStore(_)
            | Action::DestroyStore(_)
            | Action::ScanStore(_)
            | Action::CreateVolume(_)
            | Action::SnapshotVolume(_)
            | Action::CloneVolume(_)
            | Action::CopyVolume(_)
            | Action::ResizeVolume(_)
            | Action::DestroyVolume(_)
            | Action::RevertVolume(_)
            | Action::PlugDisk(_)
            | Action::UnplugDisk(_)
            | Action::Medium(_)
    )
}

impl Stores {
    /// After so many steps the next ones wait.
    pub(crate) fn hold_after(&self, steps: usize) {
        self.open_for.send_replace(Some(steps));
    }

    /// Waits until a step waits.
    pub(crate) async fn held(&self) {
        let mut waiting = self.waiting.subscribe();
        let one = waiting.wait_for(|waiting| *waiting > 0);
        tokio::time::timeout(Duration::from_secs(20), one).await.expect("no step waits").unwrap();
    }

    /// Steps that wait go on.
    pub(crate) fn release(&self) {
        self.open_for.send_replace(None);
    }

    /// Waits for the step's turn.
    pub(crate) async fn turn(&self, step: &Step) {
        if !step.action.as_ref().is_some_and(is_of_a_store) {
            return;
        }
        let mut open_for = self.open_for.subscribe();
        let take = |left: &mut Option<usize>| match left {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        };
        self.waiting.send_modify(|waiting| *waiting += 1);
        loop {
            let held = open_for.borrow_and_update().is_some();
            if !held || self.open_for.send_if_modified(take) {
                break;
            }
            open_for.changed().await.unwrap();
        }
        self.waiting.send_modify(|waiting| *waiting -= 1);
    }

    /// None for what is about a domain alone.
    pub(crate) fn perform(&self, step: &Step) -> Option<Result<Performed, AgentError>> {
        let action = step.action.clone()?;
        let inner = &mut *self.inner.lock();
        if inner.unreachable {
            return Some(Err(AgentError::Unreachable("off".into())));
        }
        if let Action::Start(start) = &action {
            let spec = start.spec.clone().unwrap_or_default();
            let volumes = spec.disks.iter().filter_map(|disk| disk.volume.as_ref());
            let missing = volumes.into_iter().find_map(|volume| inner.there(Some(volume)).err());
            inner.specs.push(spec);
            return missing.map(|refusal| Err(AgentError::Refused(refusal)));
        }
        if !is_of_a_store(&action) {
            return None;
        }
        let key = (step.operation.clone(), step.number);
        if inner.lost.as_ref() == Some(&key) {
            return Some(Err(AgentError::Unknown("lost".into())));
        }
        if let Some(outcome) = inner.done.get(&key) {
            return Some(outcome.clone().map_err(AgentError::Refused));
        }
        inner.asked.push((key.0.clone(), key.1, action.clone()));
        if let Some(reason) = inner.undoing.filter(|_| step.number >= UNDOING) {
            let refusal = refusal(reason, "on order");
            inner.done.insert(key, Err(refusal.clone()));
            return Some(Err(AgentError::Refused(refusal)));
        }
        let fault = match &mut inner.fault {
            Some((left, fault)) if step.number < UNDOING => {
                let fault = *fault;
                *left -= 1;
                (*left == 0).then_some(fault)
            }
            _ => None,
        };
        if fault.is_some() {
            inner.fault = None;
        }
        match fault {
            Some(Fault::Refused(reason)) => {
                let refusal = refusal(reason, "on order");
                inner.done.insert(key, Err(refusal.clone()));
                return Some(Err(AgentError::Refused(refusal)));
            }
            Some(Fault::Unreachable) => return Some(Err(AgentError::Unreachable("on order".into()))),
            Some(Fault::Lost) => inner.lost = Some(key.clone()),
            None => {}
        }
        let outcome = inner.act(&action);
        inner.done.insert(key, outcome.clone());
        if fault == Some(Fault::Lost) {
            return Some(Err(AgentError::Unknown("on order".into())));
        }
        Some(outcome.map_err(AgentError::Refused))
    }

    /// The `place`th step from now on fails, counted from one.
    pub(crate) fn fail(&self, place: usize, fault: Fault) {
        self.inner.lock().fault = Some((place, fault));
    }

    /// From now on nothing is undone, or everything is again.
    pub(crate) fn refuse_undoing(&self, reason: Option<Reason>) {
        self.inner.lock().undoing = reason;
    }

    /// Nobody reaches the agent for a step.
    pub(crate) fn cut(&self, off: bool) {
        self.inner.lock().unreachable = off;
    }

    /// Uuids of all volumes.
    pub(crate) fn volumes(&self) -> Vec<String> {
        self.inner.lock().volumes.keys().cloned().collect()
    }

    /// A volume that is there.
    pub(crate) fn volume(&self, vdi: &str) -> VolumeState {
        self.inner.lock().volumes.get(vdi).cloned().unwrap()
    }

    /// An image appears that the pool did not make.
    pub(crate) fn appear(&self, volume: VolumeState) {
        let key = if volume.vdi.is_empty() { volume.location.clone() } else { volume.vdi.clone() };
        self.inner.lock().volumes.insert(key, volume);
    }

    /// An image is gone.
    pub(crate) fn vanish(&self, vdi: &str) {
        self.inner.lock().volumes.remove(vdi);
    }

    /// SRs that are attached.
    pub(crate) fn attached(&self) -> Vec<String> {
        self.inner.lock().attached.clone()
    }

    /// Stores that were made.
    pub(crate) fn created(&self) -> Vec<String> {
        self.inner.lock().created.clone()
    }

    /// What was asked for, in order.
    pub(crate) fn asked(&self) -> Vec<Action> {
        self.inner.lock().asked.iter().map(|(_, _, action)| action.clone()).collect()
    }

    /// What domains were made of.
    pub(crate) fn specs(&self) -> Vec<DomainSpec> {
        self.inner.lock().specs.clone()
    }

    /// The host boots: nothing is attached any more.
    pub(crate) fn boot(&self) {
        self.inner.lock().attached.clear();
        self.boot.send_modify(|boot| *boot += 1);
    }

    pub(crate) fn boot_id(&self) -> String {
        format!("boot-{}", *self.boot.borrow())
    }

    pub(crate) fn booted(&self) -> watch::Receiver<u32> {
        self.boot.subscribe()
    }
}
