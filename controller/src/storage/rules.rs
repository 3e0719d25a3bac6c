//! What may be done to disks, drives and stores, and when: tables, and the checks around them in the documented order.

use std::collections::BTreeMap;
use std::fmt::Display;

use datamodel::enums::{
    OnBoot, StorageOperations as SrOp, VbdMode, VbdOperations as VbdOp, VbdType, VdiOperations as VdiOp, VdiType,
    VmOperations, VmPowerState as Power,
};
use datamodel::fields::{host, pbd, sm, sr, vbd, vdi, vm};
use datamodel::{ApiError, Host, Pbd, Ref, Sm, Sr, Vbd, Vdi, Vm, errors};
use raft_store::{Row, State};

/// Who may have a disk open while something is done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    Nobody,
    Readers,
    Anybody,
}

/// For each operation on a disk: what its driver must be able to do, and who may use the disk meanwhile.
pub(crate) const DISKS: &[(VdiOp, &str, Use)] = &[
    (VdiOp::Snapshot, "VDI_SNAPSHOT", Use::Anybody),
    (VdiOp::Clone, "VDI_CLONE", Use::Anybody),
    (VdiOp::Copy, "", Use::Readers),
    (VdiOp::Resize, "VDI_RESIZE", Use::Nobody),
    (VdiOp::ResizeOnline, "VDI_RESIZE_ONLINE", Use::Anybody),
    (VdiOp::Destroy, "VDI_DELETE", Use::Nobody),
    (VdiOp::Forget, "", Use::Nobody),
    (VdiOp::Update, "VDI_UPDATE", Use::Anybody),
    (VdiOp::Mirror, "VDI_MIRROR", Use::Anybody),
    (VdiOp::GenerateConfig, "VDI_GENERATE_CONFIG", Use::Nobody),
    (VdiOp::SetOnBoot, "VDI_RESET_ON_BOOT", Use::Nobody),
    (VdiOp::EnableCbt, "VDI_CONFIG_CBT", Use::Anybody),
    (VdiOp::DisableCbt, "VDI_CONFIG_CBT", Use::Anybody),
    (VdiOp::DataDestroy, "VDI_CONFIG_CBT", Use::Anybody),
    (VdiOp::ListChangedBlocks, "VDI_CONFIG_CBT", Use::Anybody),
];

/// Which hosts must be connected to a store for what is done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Connected {
    /// At least one.
    Some,
    /// None; there is a PBD.
    NoneOfThem,
    /// It does not matter.
    Any,
}

/// Whether an operation on a store goes with others. What makes or removes one image, and a host that is connected, do:
/// a host that has booted does not wait until a copy is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Company {
    Alone,
    Together,
}

/// For each operation on a store: what its driver must be able to do, who must be connected, and whether it goes with others.
pub(crate) const STORES: &[(SrOp, &str, Connected, Company)] = &[
    (SrOp::Scan, "", Connected::Some, Company::Alone),
    (SrOp::Update, "SR_UPDATE", Connected::Some, Company::Alone),
    (SrOp::Destroy, "", Connected::NoneOfThem, Company::Alone),
    (SrOp::Forget, "", Connected::NoneOfThem, Company::Alone),
    (SrOp::Plug, "", Connected::Any, Company::Together),
    (SrOp::Unplug, "", Connected::Any, Company::Alone),
    (SrOp::PbdCreate, "", Connected::Any, Company::Alone),
    (SrOp::PbdDestroy, "", Connected::Any, Company::Alone),
    (SrOp::VdiCreate, "VDI_CREATE", Connected::Some, Company::Together),
    (SrOp::VdiIntroduce, "VDI_INTRODUCE", Connected::Some, Company::Together),
    (SrOp::VdiDestroy, "VDI_DELETE", Connected::Some, Company::Together),
    (SrOp::VdiResize, "VDI_RESIZE", Connected::Some, Company::Together),
    (SrOp::VdiClone, "VDI_CLONE", Connected::Some, Company::Together),
    (SrOp::VdiSnapshot, "VDI_SNAPSHOT", Connected::Some, Company::Together),
    (SrOp::VdiMirror, "VDI_MIRROR", Connected::Some, Company::Together),
    (SrOp::VdiEnableCbt, "VDI_CONFIG_CBT", Connected::Some, Company::Together),
    (SrOp::VdiDisableCbt, "VDI_CONFIG_CBT", Connected::Some, Company::Together),
    (SrOp::VdiDataDestroy, "VDI_CONFIG_CBT", Connected::Some, Company::Together),
    (SrOp::VdiListChangedBlocks, "VDI_CONFIG_CBT", Connected::Some, Company::Together),
    (SrOp::VdiSetOnBoot, "VDI_RESET_ON_BOOT", Connected::Some, Company::Together),
];

const HALTED: u8 = 1;
const PAUSED: u8 = 2;
const SUSPENDED: u8 = 4;
const RUNNING: u8 = 8;

/// For each operation on a drive: the power states of its VM in which it is possible, and, where it matters, whether the
/// drive is attached, and whether it is empty. What needs to know whether it is empty is for removable media alone.
pub(crate) const DRIVES: &[(VbdOp, u8, Option<bool>, Option<bool>)] = &[
    (VbdOp::Attach, HALTED | SUSPENDED | RUNNING | PAUSED, None, None),
    (VbdOp::Plug, RUNNING, Some(false), None),
    (VbdOp::Unplug, RUNNING, Some(true), None),
    (VbdOp::UnplugForce, RUNNING, Some(true), None),
    (VbdOp::Insert, HALTED | RUNNING | PAUSED, None, Some(true)),
    (VbdOp::Eject, HALTED | RUNNING | PAUSED, None, Some(false)),
];

fn bit(power: Power) -> u8 {
    match power {
        Power::Halted => HALTED,
        Power::Paused => PAUSED,
        Power::Suspended => SUSPENDED,
        Power::Running => RUNNING,
    }
}

/// The error of what is under way already, if it does not go with what is asked for.
fn busy<O: Display + Copy>(
    class: &'static str,
    row: &Row,
    current: &BTreeMap<String, O>,
    goes_with: impl Fn(O) -> bool,
) -> Result<(), ApiError> {
    match current.iter().find(|(_, under_way)| !goes_with(**under_way)) {
        None => Ok(()),
        Some((task, under_way)) => {
            Err(errors::other_operation_in_progress(class, row.reference, under_way.to_string(), task.as_str()))
        }
    }
}

/// Whether the driver of a store can do something.
pub(crate) fn can(state: &State, sr_row: &Row, feature: &str) -> bool {
    let ty = sr_row.get(sr::TYPE);
    feature.is_empty()
        || state.all::<Sm>().any(|row| row.get(sm::TYPE) == ty && row.get(sm::FEATURES).contains_key(feature))
}

fn connections<'a>(state: &'a State, sr_row: &Row) -> impl Iterator<Item = &'a std::sync::Arc<Row>> {
    sr_row.get(sr::PBDS).into_iter().filter_map(|reference: Ref<Pbd>| state.row(reference))
}

/// Whether an operation may begin on a store; the first obstacle in the documented order.
pub(crate) fn check_sr(state: &State, row: &Row, operation: SrOp) -> Result<(), ApiError> {
    let this = row.typed::<Sr>();
    let Some((_, feature, connected, company)) = STORES.iter().find(|(op, ..)| *op == operation) else {
        return Err(errors::sr_operation_not_supported(this));
    };
    let goes = |op| STORES.iter().any(|(other, .., company)| *other == op && *company == Company::Together);
    busy("SR", row, &row.get(sr::CURRENT_OPERATIONS), |under_way| *company == Company::Together && goes(under_way))?;
    if !can(state, row, feature) {
        return Err(errors::sr_operation_not_supported(this));
    }
    let attached = connections(state, row).any(|row| row.get(pbd::CURRENTLY_ATTACHED));
    match connected {
        Connected::Some if !attached => return Err(errors::sr_has_no_pbds(this)),
        Connected::NoneOfThem if attached => return Err(errors::sr_has_pbd(this)),
        _ => {}
    }
    if operation == SrOp::Destroy {
        check_destruction(state, row)?;
    }
    Ok(())
}

fn check_destruction(state: &State, row: &Row) -> Result<(), ApiError> {
    let this = row.typed::<Sr>();
    if connections(state, row).next().is_none() {
        return Err(errors::sr_has_no_pbds(this));
    }
    let kept = |reference: Ref<Vdi>| {
        state.row(reference).is_some_and(|row| row.get(vdi::MANAGED) && row.get(vdi::TYPE) != VdiType::Rrd)
    };
    if row.get(sr::VDIS).into_iter().any(kept) {
        return Err(errors::sr_not_empty());
    }
    if row.get(sr::OTHER_CONFIG).get("indestructible").is_some_and(|value| value == "true") {
        return Err(errors::sr_indestructible(this));
    }
    match state.all::<Host>().find(|host_row| host_row.get(host::LOCAL_CACHE_SR) == this) {
        Some(host_row) => Err(errors::sr_is_cache_sr(host_row.typed::<Host>())),
        None => Ok(()),
    }
}

/// Every operation that would be allowed on a store now.
pub(crate) fn sr_allowed(state: &State, row: &Row) -> Vec<SrOp> {
    STORES.iter().map(|(operation, ..)| *operation).filter(|op| check_sr(state, row, *op).is_ok()).collect()
}

/// The drives of a disk.
fn drives<'a>(state: &'a State, vdi_row: &Row) -> impl Iterator<Item = &'a std::sync::Arc<Row>> {
    vdi_row.get(vdi::VBDS).into_iter().filter_map(|reference: Ref<Vbd>| state.row(reference))
}

/// Whether a disk is in use, as far as an operation cares.
fn is_used(state: &State, row: &Row, may: Use) -> bool {
    let counts = |drive: &Row| match may {
        Use::Nobody => true,
        // Nothing is written for a VM that is suspended.
        Use::Readers => drive.get(vbd::MODE) == VbdMode::Rw && !is_suspended(state, drive),
        Use::Anybody => false,
    };
    drives(state, row).any(|drive| drive.get(vbd::CURRENTLY_ATTACHED) && counts(drive))
}

/// Whether a drive is one of a VM that is suspended.
fn is_suspended(state: &State, drive: &Row) -> bool {
    let vm_row = state.row::<Vm>(drive.get(vbd::VM));
    vm_row.is_some_and(|row| row.get(vm::POWER_STATE) == Power::Suspended)
}

/// Whether an operation may begin on a disk; the first obstacle in the documented order.
pub(crate) fn check_vdi(state: &State, row: &Row, operation: VdiOp) -> Result<(), ApiError> {
    let this = row.typed::<Vdi>();
    let sr_ref: Ref<Sr> = row.get(vdi::SR);
    let Some((_, feature, may)) = DISKS.iter().find(|(op, ..)| *op == operation) else {
        return Err(errors::sr_operation_not_supported(sr_ref));
    };
    let copies = |op| op == VdiOp::Copy;
    busy("VDI", row, &row.get(vdi::CURRENT_OPERATIONS), |under_way| {
        copies(under_way) && (copies(operation) || operation == VdiOp::Clone)
    })?;
    if !row.get(vdi::MANAGED) {
        return Err(errors::vdi_not_managed(this));
    }
    let sr_row = state.row(sr_ref).ok_or_else(|| errors::handle_invalid("SR", sr_ref))?;
    if operation != VdiOp::Forget && !connections(state, sr_row).any(|row| row.get(pbd::CURRENTLY_ATTACHED)) {
        return Err(errors::sr_has_no_pbds(sr_ref));
    }
    if is_used(state, row, *may) {
        return Err(errors::vdi_in_use(this, operation.as_str()));
    }
    // A drive that is being attached or detached is about to change who uses the disk.
    if *may != Use::Anybody {
        for drive in drives(state, row) {
            check_at_rest(drive)?;
        }
    }
    if !can(state, sr_row, feature) {
        return Err(errors::sr_operation_not_supported(sr_ref));
    }
    let ty = row.get(vdi::TYPE);
    if ty == VdiType::CbtMetadata && operation != VdiOp::Destroy && operation != VdiOp::Forget {
        return Err(errors::vdi_incompatible_type(this, ty.as_str()));
    }
    match operation {
        VdiOp::Destroy if sr_row.get(sr::TYPE) == "udev" => Err(errors::vdi_is_a_physical_device(this)),
        VdiOp::Destroy if sr_row.get(sr::IS_TOOLS_SR) => Err(errors::sr_operation_not_supported(sr_ref)),
        VdiOp::Destroy if ty == VdiType::Rrd => Err(errors::vdi_has_rrds(this)),
        VdiOp::Destroy | VdiOp::Forget if matches!(ty, VdiType::HaStatefile | VdiType::RedoLog) => {
            Err(errors::ha_is_enabled())
        }
        VdiOp::Snapshot if row.get(vdi::SHARABLE) => Err(ApiError::new("VDI_IS_SHARABLE", vec![this.to_string()])),
        VdiOp::Snapshot if row.get(vdi::ON_BOOT) == OnBoot::Reset => {
            Err(errors::vdi_on_boot_mode_incompatible_with_operation())
        }
        VdiOp::DataDestroy if !row.get(vdi::IS_A_SNAPSHOT) || !row.get(vdi::CBT_ENABLED) => {
            Err(errors::vdi_no_cbt_metadata(this))
        }
        _ => Ok(()),
    }
}

/// Every operation that would be allowed on a disk now.
pub(crate) fn vdi_allowed(state: &State, row: &Row) -> Vec<VdiOp> {
    DISKS.iter().map(|(operation, ..)| *operation).filter(|op| check_vdi(state, row, *op).is_ok()).collect()
}

/// Whether another drive's use of a disk keeps this one from using it: one writer, or many readers, unless it is sharable.
pub(crate) fn check_sharing(state: &State, drive: &Row) -> Result<(), ApiError> {
    let vdi_ref: Ref<Vdi> = drive.get(vbd::VDI);
    let Some(disk) = state.row(vdi_ref).filter(|disk| !disk.get(vdi::SHARABLE)) else { return Ok(()) };
    let writes = drive.get(vbd::MODE) == VbdMode::Rw;
    let in_the_way = drives(state, disk).filter(|other| other.reference != drive.reference).any(|other| {
        let used = other.get(vbd::CURRENTLY_ATTACHED) || !other.get(vbd::CURRENT_OPERATIONS).is_empty();
        used && !is_suspended(state, other) && (writes || other.get(vbd::MODE) == VbdMode::Rw)
    });
    if in_the_way { Err(errors::vdi_in_use(vdi_ref, "attach")) } else { Ok(()) }
}

/// Whether nothing is under way at a drive.
pub(crate) fn check_at_rest(drive: &Row) -> Result<(), ApiError> {
    busy("VBD", drive, &drive.get(vbd::CURRENT_OPERATIONS), |_: VbdOp| false)
}

/// Operations of a VM during which its drives stay as they are.
const ENDING: &[VmOperations] = &[
    VmOperations::CleanShutdown,
    VmOperations::HardShutdown,
    VmOperations::Shutdown,
    VmOperations::Suspend,
    VmOperations::Checkpoint,
    VmOperations::Pause,
    VmOperations::CleanReboot,
    VmOperations::HardReboot,
];

/// Whether an operation may begin on a drive, whoever else uses its disk; the first obstacle in the documented order.
fn check_vbd_alone(state: &State, row: &Row, operation: VbdOp) -> Result<(), ApiError> {
    let this = row.typed::<Vbd>();
    check_at_rest(row)?;
    let Some((_, states, attached, empty)) = DRIVES.iter().find(|(op, ..)| *op == operation) else {
        return Err(errors::sr_operation_not_supported(Ref::<Sr>::NULL));
    };
    let vm_row = state.row::<Vm>(row.get(vbd::VM)).ok_or_else(|| errors::handle_invalid("VM", row.get(vbd::VM)))?;
    if matches!(operation, VbdOp::Unplug | VbdOp::UnplugForce) && !row.get(vbd::UNPLUGGABLE) {
        return Err(errors::vbd_not_unpluggable(this));
    }
    let cd = row.get(vbd::TYPE) == VbdType::Cd;
    if let Some(expected) = empty {
        if !cd {
            return Err(errors::vbd_not_removable_media(this));
        }
        if row.get(vbd::EMPTY) != *expected {
            return Err(if *expected { errors::vbd_not_empty(this) } else { errors::vbd_is_empty(this) });
        }
    }
    let power = vm_row.get(vm::POWER_STATE);
    if power == Power::Running && attached.is_some_and(|attached| attached != row.get(vbd::CURRENTLY_ATTACHED)) {
        let already = row.get(vbd::CURRENTLY_ATTACHED);
        return Err(if already {
            errors::device_already_attached(this)
        } else {
            errors::device_already_detached(this)
        });
    }
    if states & bit(power) == 0 {
        return Err(errors::vm_bad_power_state(vm_row.typed::<Vm>(), "running", power.as_str().to_ascii_lowercase()));
    }
    if attached.is_some() || empty.is_some() {
        if let Some(under_way) = vm_row.get(vm::CURRENT_OPERATIONS).values().find(|op| ENDING.contains(op)) {
            return Err(errors::operation_not_allowed(format!("The VM is busy with {under_way}")));
        }
        if cd && operation == VbdOp::Plug {
            return Err(errors::operation_not_allowed("A CD drive comes with the VM's start: insert into it instead"));
        }
    }
    let Some(disk) = state.row::<Vdi>(row.get(vbd::VDI)) else { return Ok(()) };
    if !disk.get(vdi::MANAGED) {
        return Err(errors::vdi_not_managed(disk.typed::<Vdi>()));
    }
    if matches!(operation, VbdOp::Attach | VbdOp::Plug | VbdOp::Insert) {
        busy("VDI", disk, &disk.get(vdi::CURRENT_OPERATIONS), |op| matches!(op, VdiOp::Copy | VdiOp::Mirror))?;
    }
    Ok(())
}

/// Whether an operation may begin on a drive.
pub(crate) fn check_vbd(state: &State, row: &Row, operation: VbdOp) -> Result<(), ApiError> {
    check_vbd_alone(state, row, operation)?;
    if matches!(operation, VbdOp::Attach | VbdOp::Plug) { check_sharing(state, row) } else { Ok(()) }
}

/// Every operation that would be allowed on a drive now. Whether its disk is free is looked at when it is asked for.
pub(crate) fn vbd_allowed(state: &State, row: &Row) -> Vec<VbdOp> {
    DRIVES.iter().map(|(operation, ..)| *operation).filter(|op| check_vbd_alone(state, row, *op).is_ok()).collect()
}
