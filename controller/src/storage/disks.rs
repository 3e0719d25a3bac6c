//! The disks of a VM: what its domain is made of, who uses them from its start to its end.

use std::sync::Arc;

use datamodel::enums::{DomainType, VbdMode, VbdOperations as VbdOp, VbdType};
use datamodel::fields::{vbd, vdi, vm};
use datamodel::{ClassKind, Host, Ref, Sr, Vbd, Vdi, Vm, errors};
use proto::agent::Disk;
use raft_store::{Row, State, Transaction};

use super::{device, reach, rules};
use crate::call::find;
use crate::failure::{Served, refuse};
use crate::lifecycle;
use crate::operations::Draft;

/// The drives of a VM, in the order of their places.
pub(crate) fn drives(state: &State, vm_row: &Row) -> Vec<Arc<Row>> {
    let rows = vm_row.get(vm::VBDS).into_iter().filter_map(|reference: Ref<Vbd>| state.row(reference).cloned());
    let mut rows: Vec<Arc<Row>> = rows.collect();
    rows.sort_by_key(|row| (device::place(&row.get(vbd::USERDEVICE)).unwrap_or(u32::MAX), row.reference));
    rows
}

/// The disk in a drive; none where the drive is empty.
///
/// # Errors
/// The drive's disk is gone.
pub(crate) fn disk_in(state: &State, drive: &Row) -> Served<Option<Arc<Row>>> {
    let reference: Ref<Vdi> = drive.get(vbd::VDI);
    if drive.get(vbd::EMPTY) || (reference.is_null() && drive.get(vbd::TYPE) == VbdType::Cd) {
        return Ok(None);
    }
    find(state, reference).map(Some)
}

/// A drive as an agent is told of it.
///
/// # Errors
/// Its disk is gone, or the host does not reach it.
pub(crate) fn told(state: &State, vm_row: &Row, drive: &Row, host_ref: Ref<Host>) -> Served<Disk> {
    let disk = disk_in(state, drive)?;
    Ok(Disk {
        vbd: drive.uuid().to_owned(),
        device: device::name(vm_row, drive),
        path: String::new(),
        read_only: drive.get(vbd::MODE) == VbdMode::Ro,
        cdrom: drive.get(vbd::TYPE) == VbdType::Cd,
        sharable: disk.as_ref().is_some_and(|disk| disk.get(vdi::SHARABLE)),
        bootable: drive.get(vbd::BOOTABLE),
        volume: disk.map(|disk| reach::volume(state, &disk, host_ref)).transpose()?,
    })
}

/// The drives that a VM's domain is made with.
fn of_machine(state: &State, vm_row: &Row) -> Vec<Arc<Row>> {
    let all = drives(state, vm_row).into_iter();
    all.filter(|drive| lifecycle::is_made_with(vm_row, drive.get(vbd::CURRENTLY_ATTACHED))).collect()
}

/// What an agent is told of them.
///
/// # Errors
/// As for [`told`].
pub(crate) fn of_domain(state: &State, vm_row: &Row, host_ref: Ref<Host>) -> Served<Vec<Disk>> {
    of_machine(state, vm_row).iter().map(|drive| told(state, vm_row, drive, host_ref)).collect()
}

/// Marks the drives of a VM that starts or is resumed: each has its disk for itself, as far as that must be, decided against the
/// disk's row as it is.
pub(crate) fn hold_all(draft: &mut Draft<'_>, vm_row: &Row) -> Served<()> {
    for drive in of_machine(draft.state, vm_row) {
        hold(draft, vm_row, &drive, VbdOp::Attach)?;
    }
    Ok(())
}

/// The drives of a VM that goes on as the machine that they make stay as they are until it does: nothing is under way at
/// them, and what begins from now on sees the VM's operation.
pub(crate) fn keep_all(draft: &mut Draft<'_>, vm_row: &Row) -> Served<()> {
    for drive in drives(draft.state, vm_row) {
        rules::check_at_rest(&drive)?;
        draft.change.expect_row(&drive);
    }
    Ok(())
}

/// Marks a drive that is to be attached.
pub(crate) fn hold(draft: &mut Draft<'_>, vm_row: &Row, drive: &Row, operation: VbdOp) -> Served<()> {
    rules::check_vbd(draft.state, drive, operation)?;
    let this = drive.typed::<Vbd>();
    let hvm = vm_row.get(vm::DOMAIN_TYPE) == DomainType::Hvm;
    if hvm && drive.get(vbd::TYPE) == VbdType::Disk && drive.get(vbd::MODE) == VbdMode::Ro {
        return refuse(errors::disk_vbd_must_be_readwrite_for_hvm(this));
    }
    if let Some(disk) = disk_in(draft.state, drive)? {
        use_disk(draft, &disk);
    }
    draft.hold(drive, operation.as_str());
    Ok(())
}

/// Two that are about to use one disk are decided against each other.
pub(crate) fn use_disk(draft: &mut Draft<'_>, disk: &Row) {
    draft.change.expect_row(disk).touch(Vdi::ID, disk.reference);
}

/// Every drive of a VM is part of its domain.
pub(crate) fn attached(state: &State, change: &mut Transaction, vm_row: &Row) {
    for drive in drives(state, vm_row) {
        let this = drive.typed::<Vbd>();
        change.expect_row(&drive).set(this, vbd::CURRENTLY_ATTACHED, true).set(
            this,
            vbd::DEVICE,
            device::name(vm_row, &drive),
        );
    }
}

/// A VM that is halted uses nothing; nor does it what is being plugged just now.
pub(crate) fn detached(state: &State, change: &mut Transaction, vm_row: &Row) {
    for drive in drives(state, vm_row) {
        change.expect_row(&drive);
        if drive.get(vbd::CURRENTLY_ATTACHED) {
            change.set(drive.typed::<Vbd>(), vbd::CURRENTLY_ATTACHED, false);
        }
    }
}

/// The SR of a drive's disk, if a host does not reach it.
pub(crate) fn out_of_reach_of(state: &State, drive: &Row, host_ref: Ref<Host>) -> Option<Ref<Sr>> {
    let sr_ref = state.row::<Vdi>(drive.get(vbd::VDI))?.get(vdi::SR);
    (!reach::reaches(state, host_ref, sr_ref)).then_some(sr_ref)
}

/// The VM of a drive.
pub(crate) fn vm_of(state: &State, drive: &Row) -> Served<Arc<Row>> {
    find(state, drive.get::<Vbd, Ref<Vm>>(vbd::VM))
}
