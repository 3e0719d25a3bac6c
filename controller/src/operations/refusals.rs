//! What an agent refuses, in the API's words.

use datamodel::{ApiError, ClassKind, OpaqueRef, Sr, Vbd, Vdi, Vm, errors};
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::{Disk, DomainSpec, Refusal, Store, VolumeRef};
use raft_store::State;

use super::CLEAN_LIMIT;
use super::step::Planned;

/// What a step names: the objects by which its refusal is told.
#[derive(Default)]
struct Named<'a> {
    sr: Option<&'a str>,
    vdi: Option<&'a str>,
    vbd: Option<&'a str>,
    /// The step is about a VM's domain, and not about stores alone.
    domain: bool,
}

fn in_store(store: Option<&Store>) -> Named<'_> {
    Named { sr: store.map(|store| store.sr.as_str()), ..Named::default() }
}

fn of_volume(volume: Option<&VolumeRef>) -> Named<'_> {
    let Some(volume) = volume else { return Named::default() };
    Named { vdi: Some(&volume.vdi), ..in_store(volume.store.as_ref()) }
}

fn of_disk(disk: Option<&Disk>) -> Named<'_> {
    let Some(disk) = disk else { return Named::default() };
    Named { vbd: Some(&disk.vbd), domain: true, ..of_volume(disk.volume.as_ref()) }
}

fn of_spec<'a>(spec: Option<&'a DomainSpec>, refusal: &Refusal) -> Named<'a> {
    // The disk that it is about is the one whose location the agent tells.
    let told = |disk: &&Disk| {
        disk.volume
            .as_ref()
            .is_some_and(|volume| !volume.location.is_empty() && refusal.detail.contains(&volume.location))
    };
    let first = |spec: &'a DomainSpec| {
        spec.disks.iter().find(told).or_else(|| spec.disks.iter().find(|disk| disk.volume.is_some()))
    };
    Named { domain: true, ..of_disk(spec.and_then(first)) }
}

fn named<'a>(action: &'a Action, refusal: &Refusal) -> Named<'a> {
    let domain = Named { domain: true, ..Named::default() };
    match action {
        Action::Start(start) => of_spec(start.spec.as_ref(), refusal),
        Action::Reboot(reboot) => of_spec(reboot.spec.as_ref(), refusal),
        Action::Resume(resume) => of_spec(resume.spec.as_ref(), refusal),
        Action::Suspend(suspend) => Named { domain: true, ..of_volume(suspend.into.as_ref()) },
        Action::PlugDisk(plug) => of_disk(plug.disk.as_ref()),
        Action::UnplugDisk(unplug) => Named { vbd: Some(&unplug.vbd), ..domain },
        Action::Medium(medium) => Named { vbd: Some(&medium.vbd), domain: true, ..of_volume(medium.volume.as_ref()) },
        Action::AttachStore(step) => in_store(step.store.as_ref()),
        Action::DetachStore(step) => in_store(step.store.as_ref()),
        Action::CreateStore(step) => in_store(step.store.as_ref()),
        Action::DestroyStore(step) => in_store(step.store.as_ref()),
        Action::ProbeStore(step) => in_store(step.store.as_ref()),
        Action::ScanStore(step) => in_store(step.store.as_ref()),
        Action::CreateVolume(step) => of_volume(step.volume.as_ref()),
        Action::SnapshotVolume(step) => of_volume(step.volume.as_ref()),
        Action::CloneVolume(step) => of_volume(step.volume.as_ref()),
        Action::CopyVolume(step) => of_volume(step.into.as_ref()),
        Action::ResizeVolume(step) => of_volume(step.volume.as_ref()),
        Action::DestroyVolume(step) => of_volume(step.volume.as_ref()),
        Action::RevertVolume(step) => of_volume(step.volume.as_ref()),
        _ => domain,
    }
}

/// Errors of stores that clients know by their numbers: what is wrong, in words that do not change.
pub(crate) const OF_STORES: &[(&str, &str)] = &[
    ("SR_BACKEND_FAILURE_46", "The VDI is not available"),
    ("SR_BACKEND_FAILURE_47", "The SR is not available"),
    ("SR_BACKEND_FAILURE_80", "The VDI already exists"),
    ("SR_BACKEND_FAILURE_100", "The storage driver failed"),
    ("SR_BACKEND_FAILURE_101", "A key of the device_config is missing or wrong"),
];

fn of_store(code: &str, refusal: &Refusal) -> ApiError {
    match OF_STORES.iter().find(|(known, _)| *known == code) {
        Some((code, text)) => {
            let more = format!("{text} [opterr={}]", refusal.detail);
            ApiError::new(code, vec![String::new(), more, String::new()])
        }
        None => errors::sr_backend_failure("", refusal.detail.as_str(), ""),
    }
}

/// The documented error of a step that was refused. A deposed master's is not for here.
pub(crate) fn error(state: &State, step: &Planned, refusal: &Refusal) -> ApiError {
    let names = named(&step.action, refusal);
    let object = |class: datamodel::ClassId, uuid: Option<&str>| {
        uuid.and_then(|uuid| state.by_uuid(class, uuid)).map_or(OpaqueRef::NULL, |row| row.reference)
    };
    let vm_ref = object(Vm::ID, Some(&step.subject));
    let (sr_ref, vdi_ref, vbd_ref) = (object(Sr::ID, names.sr), object(Vdi::ID, names.vdi), object(Vbd::ID, names.vbd));
    let detail = refusal.detail.as_str();
    match refusal.reason() {
        Reason::NotEnoughMemory => {
            errors::host_not_enough_free_memory(refusal.needed.to_string(), refusal.available.to_string())
        }
        Reason::TimedOut if matches!(step.action, Action::UnplugDisk(_)) => {
            errors::device_detach_timeout("VBD", vbd_ref)
        }
        Reason::TimedOut => errors::vm_shutdown_timeout(vm_ref, CLEAN_LIMIT.as_secs().to_string()),
        Reason::NoSuchDomain => errors::vm_bad_power_state(vm_ref, "running", "halted"),
        Reason::DomainExists => errors::domain_exists(vm_ref, detail),
        Reason::BadState if matches!(step.action, Action::UnplugDisk(_)) => {
            errors::device_detach_rejected("VBD", vbd_ref, detail)
        }
        Reason::BadState => {
            let now = detail.to_ascii_lowercase();
            let expected = match step.action {
                Action::Unpause(_) => "paused",
                // It was to go off, and somebody has reset it.
                Action::Shutdown(_) if now == "running" => "halted",
                _ => "running",
            };
            errors::vm_bad_power_state(vm_ref, expected, now)
        }
        Reason::BootFailed => errors::bootloader_failed(vm_ref, detail),
        Reason::WrongPool => errors::internal_error(format!("host {} belongs to another pool", step.host)),
        Reason::NoSpace if matches!(step.action, Action::Suspend(_)) => errors::sr_suspend_space_insufficient(sr_ref),
        Reason::NoSpace => errors::sr_full(refusal.needed.to_string(), refusal.available.to_string()),
        // A place that is looked into, or where one is to be made.
        Reason::NoSuchStore if sr_ref.is_null() => of_store("SR_BACKEND_FAILURE_47", refusal),
        Reason::NoSuchStore if matches!(step.action, Action::AttachStore(_)) => errors::sr_attach_failed(sr_ref),
        Reason::NoSuchStore => errors::sr_not_attached(sr_ref),
        Reason::NoSuchVolume if vdi_ref.is_null() => of_store("SR_BACKEND_FAILURE_46", refusal),
        Reason::NoSuchVolume => errors::vdi_missing(sr_ref, vdi_ref),
        Reason::InUse if vdi_ref.is_null() => errors::sr_device_in_use(),
        Reason::InUse => errors::vdi_in_use(vdi_ref, if names.domain { "attach" } else { word(&step.action) }),
        Reason::VolumeExists => of_store("SR_BACKEND_FAILURE_80", refusal),
        Reason::BadConfig => of_store("SR_BACKEND_FAILURE_101", refusal),
        Reason::Damaged => errors::vdi_not_available(vdi_ref),
        Reason::NoSuchDisk => errors::device_already_detached(vbd_ref),
        Reason::NoGuestSupport => errors::vm_missing_pv_drivers(vm_ref),
        Reason::Unsupported if !sr_ref.is_null() => errors::sr_operation_not_supported(sr_ref),
        Reason::Unspecified | Reason::StaleEpoch | Reason::Unsupported | Reason::Failed => {
            if names.sr.is_none() {
                errors::internal_error(detail)
            } else {
                of_store("SR_BACKEND_FAILURE_100", refusal)
            }
        }
    }
}

/// The word of `vdi_operations` for what a step does to a volume.
fn word(action: &Action) -> &'static str {
    match action {
        Action::DestroyVolume(_) => "destroy",
        Action::ResizeVolume(_) => "resize",
        Action::CloneVolume(_) => "clone",
        Action::SnapshotVolume(_) => "snapshot",
        Action::CopyVolume(_) => "copy",
        _ => "attach",
    }
}
