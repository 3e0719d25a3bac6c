//! `allowed_operations`, always as the rows are.
//!
//! What is allowed on an object follows from its own row and its neighbours': a disk of a VM that starts can no longer
//! be destroyed. So it is worked out in one place, from the pool as a transaction is going to leave it, and written by
//! that very transaction.

use std::collections::BTreeSet;

use datamodel::fields::{pbd, sr, vbd, vdi, vm};
use datamodel::{ClassId, ClassKind, FieldValue, OpaqueRef, Pbd, Ref, Sr, Value, Vbd, Vdi, Vm, VmAppliance};
use raft_store::{State, Transaction};

use crate::{appliances, lifecycle, storage};

type Object = (ClassId, OpaqueRef);

/// Adds to a transaction what will be allowed once it is applied, on every object that it concerns; and that those are
/// still as they were seen.
pub(crate) fn refresh(state: &State, change: &mut Transaction) {
    // One that cannot be applied need not be complete: its commit says why.
    let Some((after, touched)) = state.preview(change) else { return };
    let mut concerned = BTreeSet::new();
    for object in touched {
        concern(&after, object, &mut concerned);
        // What left an appliance concerns it, too.
        if let (Vm::ID, Some(row)) = (object.0, state.row_of(object.0, object.1)) {
            concerned.insert((VmAppliance::ID, row.get(vm::APPLIANCE).opaque()));
        }
    }
    if lifecycle::clones_suspended(state) != lifecycle::clones_suspended(&after) {
        concerned.extend(after.all::<Vm>().map(|row| (Vm::ID, row.reference)));
    }
    for (class, reference) in concerned {
        let Some(row) = after.row_of(class, reference) else { continue };
        let Some(field) = class.def().field("allowed_operations") else { continue };
        let Some(allowed) = allowed(&after, (class, reference)) else { continue };
        let differs = *row.value(field) != allowed;
        if let Some(before) = state.row_of(class, reference)
            && (differs || before.modified != row.modified)
        {
            change.expect_row(before);
        }
        if differs {
            change.set_value(class, reference, field, allowed);
        }
    }
}

/// An object, and those whose possibilities depend on it.
fn concern(state: &State, object: Object, concerned: &mut BTreeSet<Object>) {
    let (class, reference) = object;
    if class == Pbd::ID {
        // Whether anybody is connected to a store decides on all its disks.
        if let Some(row) = state.row_of(class, reference) {
            let sr_ref: Ref<Sr> = row.get(pbd::SR);
            concerned.insert((Sr::ID, sr_ref.opaque()));
            let disks = state.row(sr_ref).map(|row| row.get(sr::VDIS)).unwrap_or_default();
            concerned.extend(disks.into_iter().map(|disk: Ref<Vdi>| (Vdi::ID, disk.opaque())));
        }
        return;
    }
    if ![Vm::ID, Vdi::ID, Vbd::ID, Sr::ID, VmAppliance::ID].contains(&class) || !concerned.insert(object) {
        return;
    }
    let Some(row) = state.row_of(class, reference) else { return };
    if class == Vm::ID {
        concerned.insert((VmAppliance::ID, row.get(vm::APPLIANCE).opaque()));
        for device in row.get(vm::VBDS) {
            concerned.insert((Vbd::ID, device.opaque()));
            if let Some(device) = state.row(device) {
                concerned.insert((Vdi::ID, device.get(vbd::VDI).opaque()));
            }
        }
    } else if class == Vbd::ID {
        concerned.insert((Vdi::ID, row.get(vbd::VDI).opaque()));
    } else if class == Vdi::ID {
        concerned.extend(row.get(vdi::VBDS).into_iter().map(|device| (Vbd::ID, device.opaque())));
    }
}

fn allowed(state: &State, (class, reference): Object) -> Option<Value> {
    let row = state.row_of(class, reference)?;
    Some(match class {
        Vm::ID => lifecycle::allowed_operations(state, row).into_value(),
        VmAppliance::ID => appliances::allowed_operations(state, row).into_value(),
        Vdi::ID => storage::rules::vdi_allowed(state, row).into_value(),
        Vbd::ID => storage::rules::vbd_allowed(state, row).into_value(),
        Sr::ID => storage::rules::sr_allowed(state, row).into_value(),
        _ => return None,
    })
}
