//! Domains without processes: an honest state machine for tests of scale and of bad days.
//!
//! It keeps every rule that `qemu` keeps, and passes the same suite. Its domains are files, so they outlive the
//! agent as QEMU's processes do; and they are bound to the boot of their host, so a host that lost its power has
//! none. `faults` says how to make it slow or make it fail.

mod faults;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use async_trait::async_trait;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval, sleep};
use uuid::Uuid;

use super::domain::{
    Disk, DomainSpec, DomainState, GuestMetrics, ImageFormat, Medium, Power, Reason, Reboot, Refusal, StepKind,
};
use super::roster::{Feed, Roster};
use super::saved::Saved;
use super::{DomainIds, Features, Hypervisor, OpenError, Plugged, Site, Unplug};
use crate::facts::unix_seconds;
use crate::files::{self, Durability};
pub(crate) use faults::Faults;

/// How soon an order in `sim.toml` is seen without a step.
const LOOK: Duration = Duration::from_millis(100);
/// The longest a destroy waits for a start that is being given up.
const GIVE_UP: Duration = Duration::from_secs(30);

/// Where a simulated volume keeps a domain that was suspended to it.
const SUSPENDED: &str = "suspended";

/// The driver.
#[derive(Debug)]
pub struct Sim {
    roster: Arc<Roster>,
    ids: DomainIds,
    faults: Faults,
    domains: PathBuf,
    /// What each domain is made of, those included that are being built.
    specs: Mutex<HashMap<Uuid, DomainSpec>>,
}

/// A domain on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    state: DomainState,
    #[serde(default)]
    spec: DomainSpec,
}

impl Sim {
    /// Takes up the domains of this boot.
    pub fn open(site: Site) -> Result<Arc<Self>, OpenError> {
        let state_dir = &site.config.state_dir;
        let domains = state_dir.join("sim-domains");
        fs::create_dir_all(&domains)?;
        let roster = Roster::new(site.capacity);
        let boot = state_dir.join("sim-boot");
        let same_boot = fs::read_to_string(&boot).is_ok_and(|kept| kept == site.boot_id);
        if !same_boot {
            files::replace(&boot, site.boot_id.as_bytes(), Durability::Process)?;
        }
        let mut specs = HashMap::new();
        for entry in fs::read_dir(&domains)? {
            let path = entry?.path();
            match fs::read(&path).ok().and_then(|content| serde_json::from_slice::<Kept>(&content).ok()) {
                Some(Kept { state, spec }) if same_boot => {
                    specs.insert(state.vm, spec);
                    roster.adopt(state);
                }
                _ => fs::remove_file(&path)?,
            }
        }
        let ids = DomainIds::open(state_dir, &site.boot_id)?;
        let faults = Faults::open(state_dir, "sim");
        let sim = Arc::new(Self { roster, ids, faults, domains, specs: Mutex::new(specs) });
        sim.carry_out_orders();
        let (watching, shutdown) = (Arc::clone(&sim), site.shutdown);
        site.tasks.spawn(async move {
            let mut look = interval(LOOK);
            look.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    _ = look.tick() => watching.carry_out_orders(),
                }
            }
        });
        Ok(sim)
    }

    fn carry_out_orders(&self) {
        for vm in self.faults.refresh() {
            if let Some(state) = self.roster.get(vm) {
                self.forget(&state.gone(Power::Crashed, "", "crashed"));
            }
        }
    }

    /// What every step begins with: its ordered failure, its delay.
    async fn begin(&self, step: StepKind) -> Result<(), Refusal> {
        self.carry_out_orders();
        self.faults.failure(step)?;
        let delay = self.faults.delay(step);
        if !delay.is_zero() {
            sleep(delay).await;
        }
        Ok(())
    }

    fn living(&self, vm: Uuid, step: StepKind, clean: bool) -> Result<DomainState, Refusal> {
        let state = self.roster.get(vm).ok_or_else(|| Refusal::no_such_domain(vm))?;
        step.check(state.power, clean)?;
        Ok(state)
    }

    fn path(&self, vm: Uuid) -> PathBuf {
        self.domains.join(format!("{vm}.json"))
    }

    /// The loss of power ends the domain anyway, so page cache is enough.
    fn keep(&self, state: &DomainState) -> io::Result<()> {
        let spec = self.specs.lock().get(&state.vm).cloned().unwrap_or_default();
        let kept = Kept { state: state.clone(), spec };
        files::replace(&self.path(state.vm), &serde_json::to_vec(&kept)?, Durability::Process)
    }

    fn forget(&self, last: &DomainState) {
        let _ = fs::remove_file(self.path(last.vm));
        self.specs.lock().remove(&last.vm);
        self.roster.remove(last.clone());
    }

    /// A step that takes a living domain from one state to another.
    async fn change(
        &self,
        vm: Uuid,
        step: StepKind,
        by: &str,
        change: impl FnOnce(&mut DomainState) + Send,
    ) -> Result<DomainState, Refusal> {
        let apply = |state: &mut DomainState, _: &mut DomainSpec| {
            change(state);
            Ok(())
        };
        self.change_machine(vm, step, by, apply).await
    }

    /// A step that makes it another machine, too.
    async fn change_machine(
        &self,
        vm: Uuid,
        step: StepKind,
        by: &str,
        change: impl FnOnce(&mut DomainState, &mut DomainSpec) -> Result<(), Refusal> + Send,
    ) -> Result<DomainState, Refusal> {
        self.living(vm, step, false)?;
        self.begin(step).await?;
        // The delay is over: the domain may be another by now.
        let mut state = self.living(vm, step, false)?;
        let mut spec = self.specs.lock().get(&vm).cloned().unwrap_or_default();
        change(&mut state, &mut spec)?;
        state.disks = vbds(&spec);
        self.specs.lock().insert(vm, spec);
        state.last_operation = by.to_owned();
        state.reason.clear();
        self.keep(&state).map_err(Refusal::failed)?;
        self.roster.publish(state.clone());
        Ok(state)
    }

    async fn build(&self, spec: DomainSpec, paused: bool, step: StepKind, by: &str) -> Result<DomainState, Refusal> {
        if spec.memory() == 0 {
            return Err(Refusal::new(Reason::BootFailed, "a domain needs memory"));
        }
        let reservation = self.roster.reserve(spec.vm, spec.memory())?;
        let vm = spec.vm;
        self.specs.lock().insert(vm, spec.clone());
        let built = async {
            tokio::select! {
                began = self.begin(step) => began?,
                () = reservation.cancelled() => return Err(Refusal::new(Reason::BadState, "halted")),
            }
            // Guests here have a balloon from their first instruction.
            let state = DomainState {
                power: if paused { Power::Paused } else { Power::Running },
                domid: self.ids.next().map_err(Refusal::failed)?,
                memory_actual: spec.target(),
                memory_target: spec.target(),
                start_time: unix_seconds(),
                generation: spec.generation,
                disks: vbds(&spec),
                guest: Some(metrics(&spec)),
                ..DomainState::halted(vm, by, "")
            };
            self.keep(&state).map_err(Refusal::failed)?;
            Ok(state)
        };
        match built.await {
            Ok(state) => {
                reservation.settle(state.clone());
                Ok(state)
            }
            Err(refusal) => {
                self.specs.lock().remove(&vm);
                Err(refusal)
            }
        }
    }

    /// Work on an image that is in use: here only its name changes.
    fn with_disk(&self, vm: Uuid, vbd: &str, change: impl FnOnce(&mut Disk)) -> Result<(), Refusal> {
        let state = self.roster.get(vm).ok_or_else(|| Refusal::no_such_domain(vm))?;
        {
            let mut specs = self.specs.lock();
            let disks = specs.get_mut(&vm).map(|spec| spec.disks.as_mut_slice()).unwrap_or_default();
            change(disk_of(disks, vbd)?);
        }
        self.keep(&state).map_err(Refusal::failed)
    }

    /// The guest is asked and obeys, or time is up. Gives the last state, if it went otherwise meanwhile.
    async fn guest_obeys(&self, vm: Uuid, domid: i64, limit: Duration) -> Result<Option<DomainState>, Refusal> {
        let Feed { all, mut changes } = self.roster.feed();
        if !all.iter().any(|domain| domain.vm == vm && domain.domid == domid) {
            return Err(Refusal::no_such_domain(vm));
        }
        let obeys = async {
            match self.faults.obeys_after() {
                Some(time) => sleep(time).await,
                None => std::future::pending().await,
            }
        };
        let goes = async {
            loop {
                match changes.recv().await {
                    Ok(state) if state.vm == vm && state.domid != domid => return state,
                    Ok(_) => {}
                    // Too many changes to follow: what counts is whether it is still there.
                    Err(_) => sleep(LOOK).await,
                }
                if self.roster.get(vm).is_none_or(|now| now.domid != domid) {
                    return DomainState::halted(vm, "", "");
                }
            }
        };
        tokio::select! {
            () = obeys => Ok(None),
            state = goes => Ok(Some(state)),
            () = sleep(limit) => {
                let detail = format!("the guest did not obey within {} ms", limit.as_millis());
                Err(Refusal::new(Reason::TimedOut, detail))
            }
        }
    }
}

#[async_trait]
impl Hypervisor for Sim {
    fn features(&self) -> Features {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Features { name: "sim", version, accelerator: "none", abilities: &[] }
    }

    fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    async fn start(&self, spec: DomainSpec, paused: bool, by: &str) -> Result<DomainState, Refusal> {
        self.build(spec, paused, StepKind::Start, by).await
    }

    async fn destroy(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal> {
        self.begin(StepKind::Destroy).await?;
        self.roster.cancel_building(vm, GIVE_UP).await?;
        let Some(state) = self.roster.get(vm) else {
            return Ok(DomainState::halted(vm, by, ""));
        };
        let last = state.gone(Power::Halted, by, "destroyed");
        self.forget(&last);
        Ok(last)
    }

    async fn pause(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal> {
        self.change(vm, StepKind::Pause, by, |state| state.power = Power::Paused).await
    }

    async fn unpause(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal> {
        self.change(vm, StepKind::Unpause, by, |state| state.power = Power::Running).await
    }

    async fn shutdown(&self, vm: Uuid, limit: Duration, by: &str) -> Result<DomainState, Refusal> {
        self.living(vm, StepKind::Shutdown, true)?;
        self.begin(StepKind::Shutdown).await?;
        let state = self.living(vm, StepKind::Shutdown, true)?;
        if let Some(gone) = self.guest_obeys(vm, state.domid, limit).await? {
            return Ok(gone);
        }
        let last = state.gone(Power::Halted, by, "guest-shutdown");
        self.forget(&last);
        Ok(last)
    }

    async fn reboot(&self, vm: Uuid, reboot: Reboot, by: &str) -> Result<DomainState, Refusal> {
        let state = self.living(vm, StepKind::Reboot, reboot.clean)?;
        if reboot.clean && self.guest_obeys(vm, state.domid, reboot.limit).await?.is_some() {
            return Err(Refusal::new(Reason::BadState, "halted"));
        }
        let now = self.specs.lock().get(&vm).cloned().unwrap_or_default();
        let again = reboot.spec.filter(|spec| !spec.same_machine(&now));
        if let Some(spec) = again {
            self.forget(&state.gone(Power::Halted, by, "guest-shutdown"));
            return self.start(spec, false, by).await;
        }
        self.change(vm, StepKind::Reboot, by, |state| {
            state.power = Power::Running;
            state.start_time = unix_seconds();
        })
        .await
    }

    async fn suspend(&self, vm: Uuid, into: &Path, keep_running: bool, by: &str) -> Result<DomainState, Refusal> {
        let done_before = |saved: Saved| saved.vm == vm && saved.by == by;
        if self.roster.get(vm).is_none() && suspended(into).is_ok_and(done_before) {
            return Ok(DomainState::halted(vm, by, "suspended"));
        }
        self.living(vm, StepKind::Suspend, false)?;
        volume(into)?;
        self.begin(StepKind::Suspend).await?;
        let state = self.living(vm, StepKind::Suspend, false)?;
        let spec = self.specs.lock().get(&vm).cloned().unwrap_or_default();
        let saved = Saved {
            memory: spec.memory(),
            memory_actual: state.memory_actual,
            memory_target: state.memory_target,
            vcpus: spec.vcpus_at_startup,
            ..Saved::new("sim", env!("CARGO_PKG_VERSION"), vm, by)
        };
        let mut content = volume(into)?;
        content.insert(SUSPENDED.to_owned(), serde_json::to_value(saved).map_err(Refusal::failed)?);
        let content = serde_json::to_vec(&content).map_err(Refusal::failed)?;
        files::replace(into, &content, Durability::Process).map_err(Refusal::failed)?;
        if keep_running {
            let mut state = self.living(vm, StepKind::Suspend, false)?;
            by.clone_into(&mut state.last_operation);
            self.keep(&state).map_err(Refusal::failed)?;
            self.roster.publish(state.clone());
            return Ok(state);
        }
        let last = state.gone(Power::Halted, by, "suspended");
        self.forget(&last);
        Ok(last)
    }

    async fn resume(&self, mut spec: DomainSpec, from: &Path, paused: bool, by: &str) -> Result<DomainState, Refusal> {
        let saved = suspended(from)?;
        if saved.vm != spec.vm {
            return Err(Refusal::new(Reason::Damaged, format!("{} is of VM {}", from.display(), saved.vm)));
        }
        spec.memory_static_max = saved.memory;
        spec.memory_target = saved.memory_target;
        spec.vcpus_at_startup = saved.vcpus;
        self.build(spec, paused, StepKind::Resume, by).await
    }

    async fn set_memory_target(&self, vm: Uuid, bytes: u64, by: &str) -> Result<DomainState, Refusal> {
        let step = StepKind::MemoryTarget;
        let roster = &self.roster;
        let change = |state: &mut DomainState, spec: &mut DomainSpec| {
            let target = DomainSpec { memory_target: bytes, ..spec.clone() }.target();
            if target > spec.memory() {
                let detail = format!("the domain was built for {} bytes", spec.memory());
                return Err(Refusal::new(Reason::Unsupported, detail));
            }
            roster.retarget(vm, target)?;
            spec.memory_target = bytes;
            (state.memory_target, state.memory_actual) = (target, target);
            Ok(())
        };
        self.change_machine(vm, step, by, change).await
    }

    async fn set_vcpus(&self, vm: Uuid, number: u32, by: &str) -> Result<DomainState, Refusal> {
        let change = |_: &mut DomainState, spec: &mut DomainSpec| {
            if number == 0 || number > spec.vcpus_max.max(spec.vcpus_at_startup) {
                let detail = format!("the domain was built for 1 to {} vCPUs", spec.vcpus_max);
                return Err(Refusal::new(Reason::Unsupported, detail));
            }
            spec.vcpus_at_startup = number;
            Ok(())
        };
        self.change_machine(vm, StepKind::Vcpus, by, change).await
    }

    async fn send_sysrq(&self, vm: Uuid, letter: char, by: &str) -> Result<DomainState, Refusal> {
        if !letter.is_ascii_alphanumeric() {
            return Err(Refusal::new(Reason::Unsupported, format!("no key is {letter:?}")));
        }
        self.change(vm, StepKind::Keys, by, |_| {}).await
    }

    async fn plug_disk(&self, vm: Uuid, disk: Disk, by: &str) -> Result<DomainState, Refusal> {
        let change = |_: &mut DomainState, spec: &mut DomainSpec| {
            if disk_of(&mut spec.disks, &disk.vbd).is_ok() {
                return Ok(());
            }
            if disk.cdrom {
                return Err(Refusal::new(Reason::Unsupported, "a CD drive comes with its domain"));
            }
            if disk.path.is_empty() {
                return Err(Refusal::new(Reason::NoSuchVolume, "a disk needs an image"));
            }
            spec.disks.push(disk);
            Ok(())
        };
        self.change_machine(vm, StepKind::PlugDisk, by, change).await
    }

    async fn unplug_disk(&self, vm: Uuid, vbd: &str, how: Unplug, by: &str) -> Result<DomainState, Refusal> {
        let state = self.living(vm, StepKind::UnplugDisk, false)?;
        let drive =
            self.specs.lock().get_mut(&vm).is_some_and(|spec| disk_of(&mut spec.disks, vbd).is_ok_and(|it| it.cdrom));
        let there = state.disks.iter().any(|disk| disk == vbd) && !drive;
        // A guest that stands still lets go of nothing.
        if there && !how.force && (state.power == Power::Paused || self.faults.obeys_after().is_none()) {
            sleep(how.limit).await;
            let detail = format!("the guest did not obey within {} ms", how.limit.as_millis());
            return Err(Refusal::new(Reason::TimedOut, detail));
        }
        let change = |_: &mut DomainState, spec: &mut DomainSpec| {
            if disk_of(&mut spec.disks, vbd).is_ok_and(|disk| disk.cdrom) {
                return Err(Refusal::new(Reason::Unsupported, "a CD drive goes with its domain"));
            }
            spec.disks.retain(|disk| disk.vbd != vbd);
            Ok(())
        };
        self.change_machine(vm, StepKind::UnplugDisk, by, change).await
    }

    async fn change_medium(
        &self,
        vm: Uuid,
        vbd: &str,
        medium: Option<Medium>,
        by: &str,
    ) -> Result<DomainState, Refusal> {
        let change = |_: &mut DomainState, spec: &mut DomainSpec| {
            let disk = disk_of(&mut spec.disks, vbd)?;
            if !disk.cdrom {
                return Err(Refusal::new(Reason::Unsupported, "only a CD drive changes its medium"));
            }
            *disk = disk.with(medium.as_ref());
            Ok(())
        };
        self.change_machine(vm, StepKind::Medium, by, change).await
    }

    fn plugged(&self) -> Vec<Plugged> {
        let specs = self.specs.lock();
        let disks = specs.iter().flat_map(|(vm, spec)| spec.disks.iter().map(|disk| (*vm, disk.clone())));
        disks.map(|(vm, disk)| Plugged { vm, disk }).collect()
    }

    async fn relink_disk(&self, vm: Uuid, vbd: &str, overlay: &Path) -> Result<(), Refusal> {
        let path = overlay.to_str().ok_or_else(|| Refusal::failed("a path that is no text"))?.to_owned();
        self.with_disk(vm, vbd, |disk| (disk.path, disk.format) = (path, ImageFormat::Qcow2))
    }

    async fn resize_disk(&self, vm: Uuid, vbd: &str, _bytes: u64) -> Result<(), Refusal> {
        self.with_disk(vm, vbd, |_| {})
    }

    async fn join_disk(&self, vm: Uuid, vbd: &str, _base: Option<&Path>) -> Result<(), Refusal> {
        self.with_disk(vm, vbd, |_| {})
    }
}

/// A simulated volume is a record; a domain that is suspended to it is a field of that.
fn volume(path: &Path) -> Result<serde_json::Map<String, serde_json::Value>, Refusal> {
    let content = fs::read(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Refusal::new(Reason::NoSuchVolume, path.display().to_string()),
        _ => Refusal::failed(error),
    })?;
    serde_json::from_slice(&content).map_err(|error| Refusal::new(Reason::Damaged, error.to_string()))
}

fn suspended(path: &Path) -> Result<Saved, Refusal> {
    let saved = volume(path)?.remove(SUSPENDED).and_then(|saved| serde_json::from_value(saved).ok());
    saved.ok_or_else(|| Refusal::new(Reason::Damaged, format!("{} holds no suspended domain", path.display())))
}

fn vbds(spec: &DomainSpec) -> Vec<String> {
    spec.disks.iter().map(|disk| disk.vbd.clone()).collect()
}

fn disk_of<'a>(disks: &'a mut [Disk], vbd: &str) -> Result<&'a mut Disk, Refusal> {
    let disk = disks.iter_mut().find(|disk| disk.vbd == vbd);
    disk.ok_or_else(|| Refusal::new(Reason::NoSuchDisk, vbd))
}

/// What a simulated guest says of itself.
fn metrics(spec: &DomainSpec) -> GuestMetrics {
    let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    let features =
        ["feature-shutdown", "feature-poweroff", "feature-reboot", "feature-suspend", "feature-vcpu-hotplug"];
    let networks = spec.vifs.iter().enumerate().map(|(position, vif)| {
        let number: usize = vif.device.parse().unwrap_or(position);
        (format!("{number}/ip"), format!("10.0.{number}.15"))
    });
    GuestMetrics {
        os_version: map(&[("name", "Simulated guest"), ("distro", "sim"), ("major", "1"), ("minor", "0")]),
        pv_drivers_version: map(&[("major", "1"), ("minor", "0"), ("micro", "0"), ("build", "0")]),
        networks: networks.collect(),
        other: features.map(|feature| (feature.to_owned(), "1".to_owned())).into(),
        agent_live: true,
        can_balloon: true,
        can_plug_disks: true,
    }
}
