//! Between the wire's words and the agent's own.
//!
//! What a master leaves out has a meaning here; what it says wrongly is its error, told as `InvalidArgument`.

use std::time::Duration;

use proto::agent as wire;
use tonic::Status;
use uuid::Uuid;

mod stores;

use crate::hypervisor::domain::{
    Action, Console, Disk, DomainSpec, DomainState, GuestMetrics, ImageFormat, Power, Reason, Reboot, Refusal,
    StepKind, Vif,
};

use crate::hypervisor::Unplug;
use crate::ledger::{Done, Outcome};
use crate::storage::words::Volume;
pub(crate) use stores::StoreDeed;

/// How long a guest has to obey when the master does not say: as long as XenAPI allows a clean shutdown.
const PATIENCE: Duration = Duration::from_secs(1200);

/// What a step does, with all it needs.
#[derive(Debug, Clone)]
pub(crate) enum Deed {
    Start { spec: Box<DomainSpec>, volumes: Vec<Wanted>, paused: bool },
    Destroy,
    Pause,
    Unpause,
    Shutdown { limit: Duration },
    Reboot { reboot: Box<Reboot>, volumes: Vec<Wanted> },
    Suspend { into: Volume, keep_running: bool },
    Resume { spec: Box<DomainSpec>, volumes: Vec<Wanted>, from: Volume, paused: bool },
    MemoryTarget(u64),
    Vcpus(u32),
    Keys(char),
    PlugDisk { disk: Box<Disk>, volumes: Vec<Wanted> },
    UnplugDisk { vbd: String, how: Unplug },
    Medium { vbd: String, volume: Option<Volume> },
    Store(StoreDeed),
}

/// The volume that a disk of a domain is made of.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub vbd: String,
    pub volume: Volume,
}

impl Deed {
    /// Its kind.
    pub fn kind(&self) -> StepKind {
        match self {
            Self::Start { .. } => StepKind::Start,
            Self::Destroy => StepKind::Destroy,
            Self::Pause => StepKind::Pause,
            Self::Unpause => StepKind::Unpause,
            Self::Shutdown { .. } => StepKind::Shutdown,
            Self::Reboot { .. } => StepKind::Reboot,
            Self::Suspend { .. } => StepKind::Suspend,
            Self::Resume { .. } => StepKind::Resume,
            Self::MemoryTarget(_) => StepKind::MemoryTarget,
            Self::Vcpus(_) => StepKind::Vcpus,
            Self::Keys(_) => StepKind::Keys,
            Self::PlugDisk { .. } => StepKind::PlugDisk,
            Self::UnplugDisk { .. } => StepKind::UnplugDisk,
            Self::Medium { .. } => StepKind::Medium,
            Self::Store(deed) => deed.kind(),
        }
    }
}

/// The uuid of what a step is about.
pub(crate) fn subject(text: &str) -> Result<Uuid, Status> {
    text.parse().map_err(|_| Status::invalid_argument(format!("{text:?} is no uuid")))
}

/// What a step wants done.
pub(crate) fn deed(vm: Uuid, action: Option<wire::step::Action>) -> Result<Deed, Status> {
    use wire::step::Action as Step;
    let missing = || Status::invalid_argument("the step says not what to do");
    Ok(match action.ok_or_else(missing)? {
        Step::Start(start) => {
            let spec = start.spec.ok_or_else(|| Status::invalid_argument("a start needs a spec"))?;
            let (spec, volumes) = spec_of(vm, spec)?;
            Deed::Start { spec: Box::new(spec), volumes, paused: start.paused }
        }
        Step::Destroy(_) => Deed::Destroy,
        Step::Pause(_) => Deed::Pause,
        Step::Unpause(_) => Deed::Unpause,
        Step::Shutdown(shutdown) => Deed::Shutdown { limit: limit(shutdown.timeout_ms) },
        Step::Reboot(reboot) => {
            let (spec, volumes) = match reboot.spec {
                Some(spec) => spec_of(vm, spec).map(|(spec, volumes)| (Some(spec), volumes))?,
                None => (None, Vec::new()),
            };
            let reboot = Reboot { clean: reboot.clean, limit: limit(reboot.timeout_ms), spec };
            Deed::Reboot { reboot: Box::new(reboot), volumes }
        }
        Step::Suspend(suspend) => {
            Deed::Suspend { into: stores::volume(suspend.into)?, keep_running: suspend.keep_running }
        }
        Step::Resume(resume) => {
            let spec = resume.spec.ok_or_else(|| Status::invalid_argument("a resume needs a spec"))?;
            let (spec, volumes) = spec_of(vm, spec)?;
            let from = stores::volume(resume.from)?;
            Deed::Resume { spec: Box::new(spec), volumes, from, paused: resume.paused }
        }
        Step::MemoryTarget(target) => Deed::MemoryTarget(target.bytes),
        Step::Vcpus(vcpus) => Deed::Vcpus(vcpus.number),
        Step::Keys(keys) => {
            let mut letters = keys.sysrq.chars();
            match (letters.next(), letters.next()) {
                (Some(letter), None) => Deed::Keys(letter),
                _ => return Err(Status::invalid_argument("SysRq takes one letter")),
            }
        }
        Step::PlugDisk(plug) => {
            let said = plug.disk.ok_or_else(|| Status::invalid_argument("the step says not which disk"))?;
            let volumes = wanted(&said).into_iter().collect::<Result<_, _>>()?;
            Deed::PlugDisk { disk: Box::new(disk(said)), volumes }
        }
        Step::UnplugDisk(unplug) => {
            let how = Unplug { force: unplug.force, limit: limit(unplug.timeout_ms) };
            Deed::UnplugDisk { vbd: unplug.vbd, how }
        }
        Step::Medium(medium) => {
            let volume = medium.volume.map(|volume| stores::volume(Some(volume))).transpose()?;
            Deed::Medium { vbd: medium.vbd, volume }
        }
        other => Deed::Store(stores::store_deed(other)?),
    })
}

fn limit(milliseconds: u64) -> Duration {
    if milliseconds == 0 { PATIENCE } else { Duration::from_millis(milliseconds).min(10 * PATIENCE) }
}

/// What a domain is made of, and the volumes that its disks are.
fn spec_of(vm: Uuid, spec: wire::DomainSpec) -> Result<(DomainSpec, Vec<Wanted>), Status> {
    if subject(&spec.vm)? != vm {
        return Err(Status::invalid_argument("the spec is another VM's"));
    }
    let volumes = spec.disks.iter().filter_map(wanted).collect::<Result<_, _>>()?;
    let spec = DomainSpec {
        vm,
        name: spec.name,
        memory_static_max: spec.memory_static_max,
        memory_target: spec.memory_target,
        vcpus_max: spec.vcpus_max,
        vcpus_at_startup: spec.vcpus_at_startup,
        kernel: spec.kernel,
        ramdisk: spec.ramdisk,
        kernel_args: spec.kernel_args,
        platform: spec.platform.into_iter().collect(),
        generation: spec.generation,
        firmware: spec.firmware,
        boot_order: spec.boot_order,
        disks: spec.disks.into_iter().map(disk).collect(),
        vifs: spec.vifs.into_iter().map(vif).collect(),
        on_shutdown: action(&spec.on_shutdown, Action::Destroy)?,
        on_reboot: action(&spec.on_reboot, Action::Restart)?,
        on_crash: action(&spec.on_crash, Action::Destroy)?,
    };
    Ok((spec, volumes))
}

fn wanted(disk: &wire::Disk) -> Option<Result<Wanted, Status>> {
    let volume = stores::volume(Some(disk.volume.clone()?));
    Some(volume.map(|volume| Wanted { vbd: disk.vbd.clone(), volume }))
}

fn action(text: &str, unsaid: Action) -> Result<Action, Status> {
    match text {
        "" => Ok(unsaid),
        "destroy" => Ok(Action::Destroy),
        "restart" => Ok(Action::Restart),
        other => Err(Status::invalid_argument(format!("{other:?} is not what can follow a guest's end"))),
    }
}

fn disk(disk: wire::Disk) -> Disk {
    // A master of before names paths; the name says the format, as it did then.
    let format = if disk.path.ends_with(".qcow2") { ImageFormat::Qcow2 } else { ImageFormat::Raw };
    Disk {
        vbd: disk.vbd,
        device: disk.device,
        path: disk.path,
        format,
        read_only: disk.read_only,
        cdrom: disk.cdrom,
        sharable: disk.sharable,
        bootable: disk.bootable,
    }
}

fn vif(vif: wire::Vif) -> Vif {
    Vif { vif: vif.vif, device: vif.device, mac: vif.mac, bridge: vif.bridge, mtu: vif.mtu }
}

/// What came of a step.
pub(crate) fn outcome(outcome: Outcome) -> wire::Outcome {
    use wire::outcome::Result as Came;
    let result = match outcome {
        Ok(Done::Domain(state)) => Came::Domain(state_of(*state)),
        Ok(Done::Store(state)) => Came::Store(stores::store_state(state)),
        Ok(Done::Volume(state)) => Came::Volume(stores::volume_state(state)),
        Err(refusal) => Came::Refusal(refusal_of(refusal)),
    };
    wire::Outcome { result: Some(result) }
}

/// A domain's state.
pub(crate) fn state_of(state: DomainState) -> wire::DomainState {
    let power = match state.power {
        Power::Halted => wire::PowerState::Halted,
        Power::Paused => wire::PowerState::Paused,
        Power::Running => wire::PowerState::Running,
        Power::Crashed => wire::PowerState::Crashed,
    };
    let console = |it: Console| wire::Console { protocol: it.protocol, location: it.location };
    wire::DomainState {
        vm: state.vm.to_string(),
        state: power.into(),
        domid: state.domid,
        memory_actual: state.memory_actual,
        start_time: state.start_time,
        last_operation: state.last_operation,
        reason: state.reason,
        consoles: state.consoles.into_iter().map(console).collect(),
        generation: state.generation,
        guest: state.guest.map(metrics_of),
        disks: state.disks,
    }
}

fn metrics_of(guest: GuestMetrics) -> wire::GuestMetrics {
    wire::GuestMetrics {
        os_version: guest.os_version.into_iter().collect(),
        pv_drivers_version: guest.pv_drivers_version.into_iter().collect(),
        networks: guest.networks.into_iter().collect(),
        other: guest.other.into_iter().collect(),
        agent_live: guest.agent_live,
        can_balloon: guest.can_balloon,
        can_plug_disks: guest.can_plug_disks,
    }
}

fn refusal_of(refusal: Refusal) -> wire::Refusal {
    use wire::refusal::Reason as Told;
    let reason = match refusal.reason {
        Reason::StaleEpoch => Told::StaleEpoch,
        Reason::NoSuchDomain => Told::NoSuchDomain,
        Reason::DomainExists => Told::DomainExists,
        Reason::NotEnoughMemory => Told::NotEnoughMemory,
        Reason::TimedOut => Told::TimedOut,
        Reason::BadState => Told::BadState,
        Reason::BootFailed => Told::BootFailed,
        Reason::WrongPool => Told::WrongPool,
        Reason::Unsupported => Told::Unsupported,
        Reason::Failed => Told::Failed,
        Reason::NoSpace => Told::NoSpace,
        Reason::NoSuchStore => Told::NoSuchStore,
        Reason::NoSuchVolume => Told::NoSuchVolume,
        Reason::InUse => Told::InUse,
        Reason::VolumeExists => Told::VolumeExists,
        Reason::BadConfig => Told::BadConfig,
        Reason::Damaged => Told::Damaged,
        Reason::NoSuchDisk => Told::NoSuchDisk,
        Reason::NoGuestSupport => Told::NoGuestSupport,
    };
    wire::Refusal {
        reason: reason.into(),
        detail: refusal.detail,
        needed: refusal.needed,
        available: refusal.available,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_for_one_vm_cannot_build_another() {
        let spec = wire::DomainSpec { vm: Uuid::from_u128(2).to_string(), ..Default::default() };
        let action = wire::step::Action::Start(wire::StartDomain { spec: Some(spec), paused: false });
        let status = deed(Uuid::from_u128(1), Some(action)).expect_err("another VM");
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
    }

    #[test]
    fn what_follows_a_guests_end_has_the_defaults_of_a_plain_vm() {
        let vm = Uuid::from_u128(1);
        let (spec, _) = spec_of(vm, wire::DomainSpec { vm: vm.to_string(), ..Default::default() }).expect("spec");
        assert_eq!(
            (spec.on_shutdown, spec.on_reboot, spec.on_crash),
            (Action::Destroy, Action::Restart, Action::Destroy)
        );
        let odd = wire::DomainSpec { vm: vm.to_string(), on_crash: "explode".into(), ..Default::default() };
        assert!(spec_of(vm, odd).is_err());
    }
}
