//! Messages of the class VBD.

use datamodel::enums::{VbdMode, VbdOperations as VbdOp, VbdType, VdiType, VmPowerState};
use datamodel::fields::{vbd, vdi, vm};
use datamodel::{ClassKind, OpaqueRef, Ref, Value, Vbd, Vdi, Vm, errors};
use raft_store::Row;

use crate::call::Call;
use crate::failure::{Served, refuse};
use crate::implicit;
use crate::operations::refresh;
use crate::storage::{choose_device, rules, vbd as drive};

/// A drive of a VM. It is plugged by another call, or with the VM's start.
pub(super) async fn create(cx: &Call, record: Value) -> Served<Ref<Vbd>> {
    let mut fields = implicit::chosen(cx, Vbd::ID, record)?;
    let made = Row::of_defaults(Vbd::ID, OpaqueRef::NULL).with_values(&fields);
    let vm_row = cx.row(made.get::<Vbd, Ref<Vm>>(vbd::VM))?;
    let cd = made.get(vbd::TYPE) == VbdType::Cd;
    if cd && made.get(vbd::MODE) == VbdMode::Rw {
        return refuse(errors::vbd_cds_must_be_readonly());
    }
    let vdi_ref: Ref<Vdi> = made.get(vbd::VDI);
    let empty = made.get(vbd::EMPTY) || vdi_ref.is_null();
    if empty && !cd {
        return refuse(errors::vbd_not_removable_media("in constructor"));
    }
    if !empty {
        check_disk(&*cx.row(vdi_ref)?, made.get(vbd::MODE))?;
    }
    let userdevice = choose_device(&cx.state, &vm_row, &made.get(vbd::USERDEVICE))?;
    let suspended = vm_row.get(vm::POWER_STATE) == VmPowerState::Suspended;
    let own = [vbd::USERDEVICE.index(), vbd::EMPTY.index(), vbd::VDI.index(), vbd::UUID.index()];
    let for_suspended = [vbd::CURRENTLY_ATTACHED.index(), vbd::DEVICE.index()];
    fields.retain(|(index, _)| !own.contains(index) && (suspended || !for_suspended.contains(index)));
    fields.extend([
        (vbd::USERDEVICE.index(), Value::str(userdevice)),
        (vbd::EMPTY.index(), Value::Bool(empty)),
        (vbd::VDI.index(), Value::Ref(if empty { OpaqueRef::NULL } else { vdi_ref.opaque() })),
        (vbd::UUID.index(), Value::str(cx.uuid().hyphenated().to_string())),
    ]);
    let reference = cx.reference::<Vbd>();
    let mut change = cx.transaction();
    // Two drives for one place are decided against each other.
    change.expect_row(&vm_row);
    if !empty {
        change.expect_exists(Vdi::ID, vdi_ref.opaque());
    }
    change.insert_values(Vbd::ID, reference.opaque(), fields);
    refresh(&cx.state, &mut change);
    cx.commit(change).await?;
    Ok(reference)
}

fn check_disk(disk: &Row, mode: VbdMode) -> Served<()> {
    let this = disk.typed::<Vdi>();
    if mode == VbdMode::Rw && disk.get(vdi::READ_ONLY) {
        return refuse(errors::vdi_readonly(this));
    }
    let ty = disk.get(vdi::TYPE);
    if matches!(ty, VdiType::HaStatefile | VdiType::RedoLog | VdiType::CbtMetadata) {
        return refuse(errors::vdi_incompatible_type(this, ty.as_str()));
    }
    Ok(())
}

pub(super) async fn destroy(cx: &Call, this: Ref<Vbd>) -> Served<()> {
    let row = cx.row(this)?;
    if row.get(vbd::CURRENTLY_ATTACHED) {
        return refuse(errors::operation_not_allowed(format!("VBD '{}' still attached", row.uuid())));
    }
    if let Some((task, operation)) = row.get(vbd::CURRENT_OPERATIONS).iter().next() {
        return refuse(errors::other_operation_in_progress("VBD", this, operation.as_str(), task.as_str()));
    }
    let mut change = cx.transaction();
    change.expect_row(&row).delete(this);
    refresh(&cx.state, &mut change);
    cx.commit(change).await.map(drop)
}

pub(super) async fn plug(cx: &Call, this: Ref<Vbd>) -> Served<()> {
    drive::plug(cx, this).await
}

pub(super) async fn unplug(cx: &Call, this: Ref<Vbd>) -> Served<()> {
    drive::unplug(cx, this, false).await
}

pub(super) async fn unplug_force(cx: &Call, this: Ref<Vbd>) -> Served<()> {
    drive::unplug(cx, this, true).await
}

pub(super) async fn insert(cx: &Call, this: Ref<Vbd>, medium: Ref<Vdi>) -> Served<()> {
    drive::insert(cx, this, medium).await
}

pub(super) async fn eject(cx: &Call, this: Ref<Vbd>) -> Served<()> {
    drive::eject(cx, this).await
}

/// Whether the drive's disk could be used now, whatever its VM does.
pub(super) async fn assert_attachable(cx: &Call, this: Ref<Vbd>) -> Served<()> {
    let row = cx.row(this)?;
    Ok(rules::check_vbd(&cx.state, &row, VbdOp::Attach)?)
}

/// How the next start opens the disk.
pub(super) async fn set_mode(cx: &Call, this: Ref<Vbd>, value: VbdMode) -> Served<()> {
    let row = cx.row(this)?;
    let vm_row = cx.row(row.get::<Vbd, Ref<Vm>>(vbd::VM))?;
    let power = vm_row.get(vm::POWER_STATE);
    if power != VmPowerState::Halted {
        return refuse(errors::vm_bad_power_state(vm_row.typed::<Vm>(), "halted", power.as_str().to_ascii_lowercase()));
    }
    if value == VbdMode::Rw {
        if row.get(vbd::TYPE) == VbdType::Cd {
            return refuse(errors::vbd_cds_must_be_readonly());
        }
        if let Some(disk) = cx.state.row::<Vdi>(row.get(vbd::VDI)) {
            check_disk(disk, value)?;
        }
    }
    let mut change = cx.transaction();
    change.expect_row(&row).set(this, vbd::MODE, value);
    refresh(&cx.state, &mut change);
    cx.commit(change).await.map(drop)
}
