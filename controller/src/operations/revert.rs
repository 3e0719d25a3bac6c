//! A VM becomes what a snapshot of it is: its disks, its memory where the snapshot has it, and what it is made of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use datamodel::enums::{StorageOperations as SrOp, VbdType, VmOperations, VmPowerState};
use datamodel::fields::{vbd, vdi, vm};
use datamodel::{ApiError, Host, OpaqueRef, Ref, Value, Vbd, Vdi, Vif, Vm, errors};
use proto::agent::step::Action;
use proto::agent::{DestroyDomain, RevertVolume};
use raft_store::{Row, State};

use super::checkpoint::copy_image;
use super::duplicate::{self, Duplicate};
use super::shown::show_gone;
use super::suspend::{make_image, note_image, show_image};
use super::{Draft, Ending, Kind, Planned, Seen, run};
use crate::call::{Call, find};
use crate::failure::{Served, refuse};
use crate::lifecycle;
use crate::storage::vdi::hold_store;
use crate::storage::{disks, reach, volumes};

/// The parameters of the operation.
const SNAPSHOT: &str = "snapshot";
const LIVE: &str = "live";
const KEPT: &str = "kept";

pub(super) const KINDS: &[&dyn Kind] = &[&Revert];

struct Revert;

/// What a VM takes of its snapshot; everything else stays as it is.
fn restored() -> [u16; 30] {
    [
        vm::NAME_DESCRIPTION.index(),
        vm::USER_VERSION.index(),
        vm::MEMORY_OVERHEAD.index(),
        vm::MEMORY_TARGET.index(),
        vm::MEMORY_STATIC_MAX.index(),
        vm::MEMORY_DYNAMIC_MAX.index(),
        vm::MEMORY_DYNAMIC_MIN.index(),
        vm::MEMORY_STATIC_MIN.index(),
        vm::VCPUS_PARAMS.index(),
        vm::VCPUS_MAX.index(),
        vm::VCPUS_AT_STARTUP.index(),
        vm::ACTIONS_AFTER_SHUTDOWN.index(),
        vm::ACTIONS_AFTER_REBOOT.index(),
        vm::ACTIONS_AFTER_CRASH.index(),
        vm::PV_BOOTLOADER.index(),
        vm::PV_KERNEL.index(),
        vm::PV_RAMDISK.index(),
        vm::PV_ARGS.index(),
        vm::PV_BOOTLOADER_ARGS.index(),
        vm::HVM_BOOT_POLICY.index(),
        vm::HVM_BOOT_PARAMS.index(),
        vm::HVM_SHADOW_MULTIPLIER.index(),
        vm::PLATFORM.index(),
        vm::OTHER_CONFIG.index(),
        vm::RECOMMENDATIONS.index(),
        vm::XENSTORE_DATA.index(),
        vm::HARDWARE_PLATFORM_VERSION.index(),
        vm::HAS_VENDOR_DEVICE.index(),
        vm::DOMAIN_TYPE.index(),
        vm::NVRAM.index(),
    ]
}

/// `VM.revert`.
pub(crate) async fn revert(call: &Call, this: Ref<Vm>) -> Served<()> {
    run(call, &Revert, move |draft| begin(draft, this)).await.map(drop)
}

fn begin(draft: &mut Draft<'_>, this: Ref<Vm>) -> Served<()> {
    let row = draft.row(this)?;
    lifecycle::check(draft.state, &row, VmOperations::Revert)?;
    let of: Ref<Vm> = row.get(vm::SNAPSHOT_OF);
    let Some(original) = draft.state.row(of).cloned() else {
        return refuse(errors::vm_revert_failed(of, this));
    };
    lifecycle::check(draft.state, &original, VmOperations::Reverting)?;
    draft.hold(&row, VmOperations::Revert.as_str());
    draft.hold(&original, VmOperations::Reverting.as_str());
    draft.about(of).note(SNAPSHOT, this);
    let host_ref = original.get(vm::RESIDENT_ON);
    if !host_ref.is_null() {
        draft.note(LIVE, host_ref);
    }
    for disk in pairs(draft.state, &row, &original)? {
        for row in [&disk.snapshot].into_iter().chain(&disk.now) {
            disks::use_disk(draft, row);
        }
        let Some(now) = disk.now else {
            // What it was taken of is gone.
            return refuse(errors::vm_revert_failed(of, this));
        };
        hold_store(draft, now.get(vdi::SR), SrOp::VdiSnapshot)?;
    }
    let memory: Ref<Vdi> = row.get(vm::SUSPEND_VDI);
    if row.get(vm::POWER_STATE) == VmPowerState::Suspended
        && let Some(memory_row) = draft.state.row(memory).cloned()
    {
        let host_ref = reach::worker_for(draft.state, &memory_row)?;
        draft.on(host_ref).note(KEPT, memory);
        note_image(draft, memory_row.get(vdi::SR))?;
    }
    if let Some(old) = draft.state.row(original.get(vm::SUSPEND_VDI)) {
        hold_store(draft, old.get(vdi::SR), SrOp::VdiDestroy)?;
    }
    Ok(())
}

/// A drive of a snapshot, its disk, and the disk that this was taken of.
struct Pair {
    drive: Ref<Vbd>,
    snapshot: Arc<Row>,
    now: Option<Arc<Row>>,
}

fn pairs(state: &State, snapshot: &Row, _original: &Row) -> Served<Vec<Pair>> {
    let mut all = Vec::new();
    for drive in disks::drives(state, snapshot) {
        if drive.get(vbd::TYPE) == VbdType::Cd {
            continue;
        }
        if let Some(disk) = disks::disk_in(state, &drive)? {
            let now = state.row(disk.get(vdi::SNAPSHOT_OF)).cloned();
            all.push(Pair { drive: drive.typed(), snapshot: disk, now });
        }
    }
    Ok(all)
}

/// How many steps come before those of the disks.
fn before(seen: &Seen<'_>) -> (bool, bool) {
    (!seen.journal.parameter(LIVE).is_empty(), !seen.journal.parameter(KEPT).is_empty())
}

/// The number of the step that makes the image of memory: after the end of the domain.
fn image_place(seen: &Seen<'_>) -> usize {
    usize::from(before(seen).0)
}

impl Kind for Revert {
    fn verb(&self) -> &'static str {
        "revert"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (state, journal) = (seen.state, seen.journal);
        let (row, snapshot) = (find(state, journal.vm)?, find(state, journal.object::<Vm>(SNAPSHOT))?);
        let (live, remembers) = before(seen);
        let mut steps = Vec::new();
        if live {
            let end = Action::Destroy(DestroyDomain {});
            steps.push(Planned::new(journal.object::<Host>(LIVE), row.uuid(), end));
        }
        if remembers {
            let kept = find(state, journal.object::<Vdi>(KEPT))?;
            steps.push(make_image(seen, kept.get(vdi::VIRTUAL_SIZE))?);
            if !journal.was_done(image_place(seen)) {
                return Ok(steps);
            }
            steps.push(copy_image(seen, &kept, image_place(seen))?);
        }
        for disk in pairs(state, &snapshot, &row)? {
            let Some(now) = disk.now else { continue };
            let host_ref = reach::worker(state, &[now.get(vdi::SR)], None)?;
            let revert = RevertVolume {
                volume: Some(reach::volume(state, &now, host_ref)?),
                snapshot: Some(reach::volume(state, &disk.snapshot, host_ref)?),
            };
            steps.push(Planned::new(host_ref, now.uuid(), Action::RevertVolume(revert)));
        }
        // The memory that the VM was suspended with is of no use any more.
        if let Some(old) = state.row(row.get(vm::SUSPEND_VDI))
            && let Ok(host_ref) = reach::worker_for(state, old)
        {
            steps.push(volumes::destroy(state, old, host_ref)?.owed());
        }
        Ok(steps)
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let (state, journal) = (end.state, end.journal);
        let (row, snapshot) = (find(state, journal.vm)?, find(state, journal.object::<Vm>(SNAPSHOT))?);
        let (live, remembers) = before(&end.seen());
        let mut place = usize::from(live) + 2 * usize::from(remembers);
        let mut made = BTreeMap::new();
        for disk in pairs(state, &snapshot, &row)? {
            let Some(now) = disk.now else { continue };
            volumes::show(state, end.change, &now, journal.volume(place)?);
            made.insert(disk.drive, now.typed::<Vdi>());
            place += 1;
        }
        let old = state.row::<Vdi>(row.get(vm::SUSPEND_VDI));
        if let Some(old) = old.filter(|_| journal.outcomes.len() > place) {
            volumes::remove(state, end.change, old);
        }
        let memory = if remembers { show_image(end, &row, image_place(&end.seen()))? } else { Ref::NULL };
        let power = if remembers { VmPowerState::Suspended } else { VmPowerState::Halted };
        show_gone(end.shared, state, end.change, &row, power);
        take_over(end, &row, &snapshot, power, &made);
        end.change.set(journal.vm, vm::SUSPEND_VDI, memory).set(journal.vm, vm::PARENT, snapshot.typed::<Vm>());
        Ok(Value::Void)
    }

    fn fail(&self, end: &mut Ending<'_>, _error: &ApiError) {
        // Its domain is gone where that was done, and so it is halted.
        let (live, _) = before(&end.seen());
        if live
            && end.journal.was_done(0)
            && let Some(row) = end.state.row(end.journal.vm)
        {
            show_gone(end.shared, end.state, end.change, row, VmPowerState::Halted);
        }
    }
}

/// What a VM is made of, its drives and its interfaces, as its snapshot has them.
fn take_over(
    end: &mut Ending<'_>,
    row: &Row,
    snapshot: &Row,
    power: VmPowerState,
    made: &BTreeMap<Ref<Vbd>, Ref<Vdi>>,
) {
    let this = row.typed::<Vm>();
    for index in restored() {
        end.change.set_value(row.class, row.reference, index, snapshot.value(index).clone());
    }
    end.change.set(this, vm::HA_ALWAYS_RUN, false);
    let drives: BTreeSet<OpaqueRef> = disks::drives(end.state, row).iter().map(|drive| drive.reference).collect();
    for drive in drives {
        end.change.delete(Ref::<Vbd>::from_opaque(drive));
    }
    let interfaces: Vec<Ref<Vif>> = row.get(vm::VIFS);
    for interface in interfaces {
        end.change.delete(interface);
    }
    duplicate::insert_drives(end.shared, end.state, end.change, snapshot, this, power, made);
    duplicate::insert_interfaces(end.shared, end.state, end.change, snapshot, this, power, Duplicate::Snapshot);
}
