//! What is done to a drive of a VM: plugged, unplugged, filled, emptied.

use std::time::Duration;

use datamodel::enums::{VbdOperations as VbdOp, VmPowerState};
use datamodel::fields::{vbd, vdi, vm};
use datamodel::{ClassKind, Host, Ref, Value, Vbd, Vdi, errors};
use proto::agent::step::Action;
use proto::agent::{ChangeMedium, PlugDisk, UnplugDisk};
use raft_store::Row;

use super::{device, disks, reach, rules};
use crate::call::{Call, find};
use crate::failure::{Served, refuse};
use crate::operations::{Draft, Ending, Kind, Planned, Seen, run};

/// A guest has so long to let go of a disk.
const LETS_GO: Duration = Duration::from_secs(30);

pub(super) const KINDS: &[&dyn Kind] =
    &[&Drive::Plug, &Drive::Unplug, &Drive::UnplugForce, &Drive::Insert, &Drive::Eject];

/// What is done to a drive of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drive {
    Plug,
    Unplug,
    UnplugForce,
    Insert,
    Eject,
}

impl Drive {
    const fn operation(self) -> VbdOp {
        match self {
            Self::Plug => VbdOp::Plug,
            Self::Unplug => VbdOp::Unplug,
            Self::UnplugForce => VbdOp::UnplugForce,
            Self::Insert => VbdOp::Insert,
            Self::Eject => VbdOp::Eject,
        }
    }
}

async fn act(call: &Call, this: Ref<Vbd>, what: &'static Drive, medium: Ref<Vdi>) -> Served<()> {
    run(call, what, move |draft| begin(draft, this, *what, medium)).await.map(drop)
}

fn begin(draft: &mut Draft<'_>, this: Ref<Vbd>, what: Drive, medium: Ref<Vdi>) -> Served<()> {
    let drive = draft.row(this)?;
    let vm_row = disks::vm_of(draft.state, &drive)?;
    // Whoever takes the VM's drives as they are, to reboot it, is decided against this.
    draft.change.expect_row(&vm_row);
    match what {
        Drive::Plug => disks::hold(draft, &vm_row, &drive, VbdOp::Plug)?,
        Drive::Insert => {
            let filled = filled(&drive, medium);
            rules::check_vbd(draft.state, &drive, VbdOp::Insert)?;
            let disk = draft.row(medium)?;
            rules::check_vbd(draft.state, &filled, VbdOp::Attach)?;
            check_medium(&drive, &disk)?;
            disks::use_disk(draft, &disk);
            draft.hold(&drive, VbdOp::Insert.as_str());
        }
        _ => {
            rules::check_vbd(draft.state, &drive, what.operation())?;
            draft.hold(&drive, what.operation().as_str());
        }
    }
    let host_ref: Ref<Host> = vm_row.get(vm::RESIDENT_ON);
    if what == Drive::Plug
        && let Some(sr_ref) = disks::out_of_reach_of(draft.state, &drive, host_ref)
    {
        return refuse(errors::vm_requires_sr(vm_row.typed::<datamodel::Vm>(), sr_ref));
    }
    draft.about(vm_row.typed()).on(host_ref).note("vbd", this).note("vdi", medium);
    Ok(())
}

/// A drive as it will be with a medium in it.
fn filled(drive: &Row, medium: Ref<Vdi>) -> Row {
    drive.with_values(&[(vbd::VDI.index(), Value::Ref(medium.opaque())), (vbd::EMPTY.index(), Value::Bool(false))])
}

/// Whether a disk can be a medium in that drive.
fn check_medium(drive: &Row, disk: &Row) -> Served<()> {
    use datamodel::enums::VbdMode;
    let this = disk.typed::<Vdi>();
    if drive.get(vbd::MODE) == VbdMode::Rw && disk.get(vdi::READ_ONLY) {
        return refuse(errors::vdi_readonly(this));
    }
    Ok(())
}

pub(crate) async fn plug(call: &Call, this: Ref<Vbd>) -> Served<()> {
    act(call, this, &Drive::Plug, Ref::NULL).await
}

pub(crate) async fn unplug(call: &Call, this: Ref<Vbd>, force: bool) -> Served<()> {
    act(call, this, if force { &Drive::UnplugForce } else { &Drive::Unplug }, Ref::NULL).await
}

/// In a VM without a domain a medium is a matter of rows.
pub(crate) async fn insert(call: &Call, this: Ref<Vbd>, medium: Ref<Vdi>) -> Served<()> {
    act(call, this, &Drive::Insert, medium).await
}

pub(crate) async fn eject(call: &Call, this: Ref<Vbd>) -> Served<()> {
    act(call, this, &Drive::Eject, Ref::NULL).await
}

impl Kind for Drive {
    fn verb(&self) -> &'static str {
        match self {
            Self::Plug => "vbd_plug",
            Self::Unplug => "vbd_unplug",
            Self::UnplugForce => "vbd_unplug_force",
            Self::Insert => "vbd_insert",
            Self::Eject => "vbd_eject",
        }
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (state, journal) = (seen.state, seen.journal);
        if journal.host.is_null() {
            return Ok(Vec::new());
        }
        let drive = find(state, journal.object::<Vbd>("vbd"))?;
        let vm_row = disks::vm_of(state, &drive)?;
        let vbd = drive.uuid().to_owned();
        let unplug = |force| {
            let timeout_ms = u64::try_from(LETS_GO.as_millis()).unwrap_or(u64::MAX);
            Action::UnplugDisk(UnplugDisk { vbd: vbd.clone(), force, timeout_ms })
        };
        let action = match self {
            Self::Plug => {
                let disk = Some(disks::told(state, &vm_row, &drive, journal.host)?);
                let plug = Planned::new(journal.host, vm_row.uuid(), Action::PlugDisk(PlugDisk { disk }));
                // Whose answer is lost may be plugged.
                return Ok(vec![plug.undone_by(unplug(true))]);
            }
            Self::Unplug => unplug(false),
            Self::UnplugForce => unplug(true),
            Self::Insert => {
                let disk = find(state, journal.object::<Vdi>("vdi"))?;
                let volume = Some(reach::volume(state, &disk, journal.host)?);
                Action::Medium(ChangeMedium { vbd, volume })
            }
            Self::Eject => Action::Medium(ChangeMedium { vbd, volume: None }),
        };
        Ok(vec![Planned::new(journal.host, vm_row.uuid(), action)])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let this: Ref<Vbd> = end.journal.object("vbd");
        let drive = find(end.state, this)?;
        let vm_row = disks::vm_of(end.state, &drive)?;
        // A domain that has ended meanwhile has nothing plugged any more, and one that ends now is seen to.
        end.change.expect_row(&vm_row);
        let live = vm_row.get(vm::RESIDENT_ON) == end.journal.host
            && matches!(vm_row.get(vm::POWER_STATE), VmPowerState::Running | VmPowerState::Paused);
        match self {
            Self::Plug if live => {
                let name = device::name(&vm_row, &drive);
                end.change.set(this, vbd::CURRENTLY_ATTACHED, true).set(this, vbd::DEVICE, name);
            }
            Self::Plug => {}
            Self::Unplug | Self::UnplugForce => {
                end.change.set(this, vbd::CURRENTLY_ATTACHED, false);
            }
            Self::Insert => {
                let medium: Ref<Vdi> = end.journal.object("vdi");
                end.change.expect_exists(Vdi::ID, medium.opaque());
                end.change.set(this, vbd::VDI, medium).set(this, vbd::EMPTY, false);
            }
            Self::Eject => {
                end.change.set(this, vbd::VDI, Ref::NULL).set(this, vbd::EMPTY, true);
            }
        }
        Ok(Value::Void)
    }
}
