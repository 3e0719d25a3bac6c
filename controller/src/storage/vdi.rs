//! What is done to a disk: made, derived from another one, copied, resized, destroyed. One step each.

use datamodel::enums::{StorageOperations as SrOp, VdiOperations as VdiOp};
use datamodel::fields::vdi;
use datamodel::{ApiError, ClassKind, Ref, Sr, Value, Vdi, errors};
use raft_store::Row;

use super::{reach, rules, scan, volumes};
use crate::call::{Call, find};
use crate::failure::{Served, refuse};
use crate::operations::{Draft, Ending, Kind, Planned, Seen, run};

pub(super) const KINDS: &[&dyn Kind] = &[
    &Create,
    &Derive::Snapshot,
    &Derive::Clone,
    &Copy,
    &CopyInto,
    &Resize,
    &Destroy,
    &Move,
    &Look::Update,
    &Look::Introduce,
];

/// Marks a store, if the operation may begin on it.
pub(crate) fn hold_store(draft: &mut Draft<'_>, sr_ref: Ref<Sr>, operation: SrOp) -> Served<()> {
    let row = draft.row(sr_ref)?;
    rules::check_sr(draft.state, &row, operation)?;
    draft.hold(&row, operation.as_str());
    Ok(())
}

/// Marks a disk, if the operation may begin on it.
pub(crate) fn hold_disk(draft: &mut Draft<'_>, row: &Row, operation: VdiOp) -> Served<()> {
    rules::check_vdi(draft.state, row, operation)?;
    draft.hold(row, operation.as_str());
    Ok(())
}

/// The disk that an operation is about.
fn original(seen: &Seen<'_>) -> Served<std::sync::Arc<Row>> {
    find(seen.state, seen.journal.object::<Vdi>("vdi"))
}

fn answer(reference: Ref<Vdi>) -> Served<Value> {
    Ok(Value::Ref(reference.opaque()))
}

/// A new disk.
struct Create;

/// Makes a disk of a constructor's fields.
pub(crate) async fn create(call: &Call, fields: Vec<(u16, Value)>) -> Served<Ref<Vdi>> {
    let made = Row::of_defaults(Vdi::ID, datamodel::OpaqueRef::NULL).with_values(&fields);
    let sr_ref = made.get(vdi::SR);
    let (reference, uuid) = (call.reference::<Vdi>(), call.uuid());
    run(call, &Create, move |draft| {
        hold_store(draft, sr_ref, SrOp::VdiCreate)?;
        let host_ref = reach::worker(draft.state, &[sr_ref], None)?;
        draft.on(host_ref).note("sr", sr_ref).note("made", reference).note("uuid", uuid);
        draft.note_fields(Vdi::ID, &fields);
        Ok(())
    })
    .await?;
    Ok(reference)
}

impl Kind for Create {
    fn verb(&self) -> &'static str {
        "vdi_create"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let journal = seen.journal;
        let fields = journal.fields(Vdi::ID);
        let row = Row::of_defaults(Vdi::ID, datamodel::OpaqueRef::NULL).with_values(&fields);
        let wanted = (row.get(vdi::VIRTUAL_SIZE), row.get(vdi::TYPE), row.get(vdi::SM_CONFIG));
        Ok(vec![volumes::create(seen.state, journal.object("sr"), journal.parameter("uuid"), wanted, journal.host)?])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let journal = end.journal;
        let made = volumes::Made {
            uuid: journal.parameter("uuid"),
            sr: journal.object("sr"),
            volume: journal.volume(0)?,
            fields: journal.fields(Vdi::ID),
        };
        volumes::insert(end.state, end.change, journal.object("made"), made);
        answer(journal.object("made"))
    }
}

/// A disk that shares what another one holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Derive {
    Snapshot,
    Clone,
}

async fn derive(call: &Call, this: Ref<Vdi>, how: &'static Derive) -> Served<Ref<Vdi>> {
    let (reference, uuid) = (call.reference::<Vdi>(), call.uuid());
    run(call, how, move |draft| {
        let row = draft.row(this)?;
        let (of_disk, of_store) = match how {
            Derive::Snapshot => (VdiOp::Snapshot, SrOp::VdiSnapshot),
            Derive::Clone => (VdiOp::Clone, SrOp::VdiClone),
        };
        hold_disk(draft, &row, of_disk)?;
        hold_store(draft, row.get(vdi::SR), of_store)?;
        let host_ref = reach::worker_for(draft.state, &row)?;
        draft.on(host_ref).note("vdi", this).note("made", reference).note("uuid", uuid);
        Ok(())
    })
    .await?;
    Ok(reference)
}

pub(crate) async fn snapshot(call: &Call, this: Ref<Vdi>) -> Served<Ref<Vdi>> {
    derive(call, this, &Derive::Snapshot).await
}

pub(crate) async fn clone(call: &Call, this: Ref<Vdi>) -> Served<Ref<Vdi>> {
    derive(call, this, &Derive::Clone).await
}

impl Kind for Derive {
    fn verb(&self) -> &'static str {
        match self {
            Self::Snapshot => "vdi_snapshot",
            Self::Clone => "vdi_clone",
        }
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (row, uuid, host_ref) = (original(seen)?, seen.journal.parameter("uuid"), seen.journal.host);
        Ok(vec![match self {
            Self::Snapshot => volumes::snapshot(seen.state, &row, uuid, host_ref)?,
            Self::Clone => volumes::clone(seen.state, &row, uuid, host_ref)?,
        }])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let (row, journal) = (original(&end.seen())?, end.journal);
        let fields = match self {
            Self::Snapshot => volumes::of_snapshot(&row, end.shared.now()),
            Self::Clone => volumes::inherited(&row),
        };
        let (uuid, volume) = (journal.parameter("uuid"), journal.volume(0)?);
        let made = volumes::Made { uuid, sr: row.get(vdi::SR), volume, fields };
        volumes::insert(end.state, end.change, journal.object("made"), made);
        answer(journal.object("made"))
    }
}

/// All bytes of a disk, in a new one.
struct Copy;

pub(crate) async fn copy(call: &Call, this: Ref<Vdi>, into: Ref<Sr>) -> Served<Ref<Vdi>> {
    let (reference, uuid) = (call.reference::<Vdi>(), call.uuid());
    run(call, &Copy, move |draft| {
        let row = draft.row(this)?;
        hold_disk(draft, &row, VdiOp::Copy)?;
        hold_store(draft, into, SrOp::VdiCreate)?;
        let host_ref = reach::worker(draft.state, &[row.get(vdi::SR), into], None)?;
        draft.on(host_ref).note("vdi", this).note("sr", into).note("made", reference).note("uuid", uuid);
        Ok(())
    })
    .await?;
    Ok(reference)
}

impl Kind for Copy {
    fn verb(&self) -> &'static str {
        "vdi_copy"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (row, journal) = (original(seen)?, seen.journal);
        Ok(vec![volumes::copy(seen.state, &row, journal.object("sr"), journal.parameter("uuid"), journal.host)?])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let (row, journal) = (original(&end.seen())?, end.journal);
        let (uuid, volume, fields) = (journal.parameter("uuid"), journal.volume(0)?, volumes::inherited(&row));
        let made = volumes::Made { uuid, sr: journal.object("sr"), volume, fields };
        volumes::insert(end.state, end.change, journal.object("made"), made);
        answer(journal.object("made"))
    }

    fn cancellable(&self) -> bool {
        true
    }
}

/// The bytes of a disk, or what differs from another one, over a disk that is there.
struct CopyInto;

pub(crate) async fn copy_into(call: &Call, this: Ref<Vdi>, into: Ref<Vdi>, base: Ref<Vdi>) -> Served<Ref<Vdi>> {
    run(call, &CopyInto, move |draft| {
        let (row, target) = (draft.row(this)?, draft.row(into)?);
        if target.get(vdi::READ_ONLY) {
            return refuse(errors::vdi_readonly(into));
        }
        if target.get(vdi::VIRTUAL_SIZE) < row.get(vdi::VIRTUAL_SIZE) {
            return refuse(errors::vdi_too_small(into, row.get(vdi::VIRTUAL_SIZE).to_string()));
        }
        hold_disk(draft, &row, VdiOp::Copy)?;
        // Nobody else may use what is being written.
        rules::check_vdi(draft.state, &target, VdiOp::Destroy).map_err(|error| in_use_by_copy(error, into))?;
        draft.hold(&target, VdiOp::Mirror.as_str());
        let host_ref = reach::worker(draft.state, &[row.get(vdi::SR), target.get(vdi::SR)], None)?;
        draft.on(host_ref).note("vdi", this).note("into", into).note("base", base);
        Ok(())
    })
    .await?;
    Ok(into)
}

fn in_use_by_copy(error: ApiError, into: Ref<Vdi>) -> ApiError {
    if error.code == errors::VDI_IN_USE { errors::vdi_in_use(into, "copy") } else { error }
}

impl Kind for CopyInto {
    fn verb(&self) -> &'static str {
        "vdi_copy_into"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (row, journal) = (original(seen)?, seen.journal);
        let into = find(seen.state, journal.object::<Vdi>("into"))?;
        let base = seen.state.row(journal.object::<Vdi>("base"));
        Ok(vec![volumes::copy_into(seen.state, &row, &into, base.map(|row| &**row), journal.host)?])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let into = find(end.state, end.journal.object::<Vdi>("into"))?;
        volumes::show(end.state, end.change, &into, end.journal.volume(0)?);
        answer(into.typed())
    }
}

/// More room.
struct Resize;

pub(crate) async fn resize(call: &Call, this: Ref<Vdi>, size: i64, operation: VdiOp) -> Served<()> {
    run(call, &Resize, move |draft| {
        let row = draft.row(this)?;
        hold_disk(draft, &row, operation)?;
        hold_store(draft, row.get(vdi::SR), SrOp::VdiResize)?;
        if size < row.get(vdi::VIRTUAL_SIZE) {
            return refuse(errors::vdi_too_small(this, row.get(vdi::VIRTUAL_SIZE).to_string()));
        }
        let host_ref = reach::worker_for(draft.state, &row)?;
        draft.on(host_ref).note("vdi", this).note("size", size);
        Ok(())
    })
    .await
    .map(drop)
}

impl Kind for Resize {
    fn verb(&self) -> &'static str {
        "vdi_resize"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (row, journal) = (original(seen)?, seen.journal);
        Ok(vec![volumes::resize(seen.state, &row, journal.number("size"), journal.host)?])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let row = original(&end.seen())?;
        volumes::show(end.state, end.change, &row, end.journal.volume(0)?);
        Ok(Value::Void)
    }
}

/// Its end.
struct Destroy;

pub(crate) async fn destroy(call: &Call, this: Ref<Vdi>) -> Served<()> {
    run(call, &Destroy, move |draft| {
        let row = draft.row(this)?;
        hold_disk(draft, &row, VdiOp::Destroy)?;
        hold_store(draft, row.get(vdi::SR), SrOp::VdiDestroy)?;
        let host_ref = reach::worker_for(draft.state, &row)?;
        draft.on(host_ref).note("vdi", this);
        Ok(())
    })
    .await
    .map(drop)
}

impl Kind for Destroy {
    fn verb(&self) -> &'static str {
        "vdi_destroy"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        // Also of one that is missing: whoever looked may have been mistaken, and where there is none nothing is done.
        let row = original(seen)?;
        Ok(vec![volumes::destroy(seen.state, &row, seen.journal.host)?.owed_if_lost()])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let row = original(&end.seen())?;
        volumes::remove(end.state, end.change, &row);
        Ok(Value::Void)
    }
}

/// A disk that nobody uses, from one store to another: copied, and then the old one goes. Its drives follow.
struct Move;

pub(crate) async fn relocate(call: &Call, this: Ref<Vdi>, into: Ref<Sr>) -> Served<Ref<Vdi>> {
    let (reference, uuid) = (call.reference::<Vdi>(), call.uuid());
    run(call, &Move, move |draft| {
        let row = draft.row(this)?;
        hold_disk(draft, &row, VdiOp::Destroy)?;
        hold_store(draft, row.get(vdi::SR), SrOp::VdiDestroy)?;
        if into != row.get(vdi::SR) {
            hold_store(draft, into, SrOp::VdiCreate)?;
        }
        let host_ref = reach::worker(draft.state, &[row.get(vdi::SR), into], None)?;
        draft.on(host_ref).note("vdi", this).note("sr", into).note("made", reference).note("uuid", uuid);
        Ok(())
    })
    .await?;
    Ok(reference)
}

impl Kind for Move {
    fn verb(&self) -> &'static str {
        "vdi_move"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let (row, journal) = (original(seen)?, seen.journal);
        let copy = volumes::copy(seen.state, &row, journal.object("sr"), journal.parameter("uuid"), journal.host)?;
        Ok(vec![copy, volumes::destroy(seen.state, &row, journal.host)?.irrevocable()])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        use datamodel::fields::vbd;
        let (row, journal) = (original(&end.seen())?, end.journal);
        let made: Ref<Vdi> = journal.object("made");
        let mut fields = volumes::inherited(&row);
        for index in [vdi::IS_A_SNAPSHOT.index(), vdi::SNAPSHOT_OF.index(), vdi::SNAPSHOT_TIME.index()] {
            fields.push((index, row.value(index).clone()));
        }
        let (uuid, volume) = (journal.parameter("uuid"), journal.volume(0)?);
        let new = volumes::Made { uuid, sr: journal.object("sr"), volume, fields };
        volumes::insert(end.state, end.change, made, new);
        for drive in row.get(vdi::VBDS).into_iter().filter(|drive| end.state.row(*drive).is_some()) {
            end.change.set(drive, vbd::VDI, made);
        }
        for snapshot in row.get(vdi::SNAPSHOTS).into_iter().filter(|disk| end.state.row(*disk).is_some()) {
            end.change.set(snapshot, vdi::SNAPSHOT_OF, made);
        }
        // Where nobody knows whether the image is gone, the row stays to be seen.
        if journal.was_done(1) {
            let (size, used) = (row.get(vdi::VIRTUAL_SIZE), row.get(vdi::PHYSICAL_UTILISATION));
            volumes::account(end.state, end.change, row.get(vdi::SR), size.saturating_neg(), used.saturating_neg());
            end.change.delete(row.typed::<Vdi>());
        }
        answer(made)
    }

    fn cancellable(&self) -> bool {
        true
    }
}

/// Looks into a store for one disk: to bring its row up to date, or to make it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Update,
    Introduce,
}

pub(crate) async fn update(call: &Call, this: Ref<Vdi>) -> Served<()> {
    run(call, &Look::Update, move |draft| {
        let row = draft.row(this)?;
        hold_disk(draft, &row, VdiOp::Update)?;
        hold_store(draft, row.get(vdi::SR), SrOp::VdiIntroduce)?;
        let host_ref = reach::worker_for(draft.state, &row)?;
        draft.on(host_ref).note("vdi", this).note("sr", row.get(vdi::SR));
        Ok(())
    })
    .await
    .map(drop)
}

/// Makes the row of an image that is there already, from a constructor's fields.
pub(crate) async fn introduce(call: &Call, uuid: String, fields: Vec<(u16, Value)>) -> Served<Ref<Vdi>> {
    let reference = call.reference::<Vdi>();
    let made = Row::of_defaults(Vdi::ID, datamodel::OpaqueRef::NULL).with_values(&fields);
    let (sr_ref, location) = (made.get(vdi::SR), made.get(vdi::LOCATION));
    run(call, &Look::Introduce, move |draft| {
        hold_store(draft, sr_ref, SrOp::VdiIntroduce)?;
        let taken = |row: &std::sync::Arc<Row>| {
            row.get(vdi::SR) == sr_ref && (row.uuid() == uuid || row.get(vdi::LOCATION) == location)
        };
        if draft.state.all::<Vdi>().any(taken) {
            return refuse(errors::location_not_unique(sr_ref, location.as_str()));
        }
        let host_ref = reach::worker(draft.state, &[sr_ref], None)?;
        draft.on(host_ref).note("sr", sr_ref).note("made", reference).note("uuid", &uuid).note("location", &location);
        draft.note_fields(Vdi::ID, &fields);
        Ok(())
    })
    .await?;
    Ok(reference)
}

impl Kind for Look {
    fn verb(&self) -> &'static str {
        match self {
            Self::Update => "vdi_update",
            Self::Introduce => "vdi_introduce",
        }
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        Ok(vec![scan::step(seen.state, seen.journal.object("sr"), seen.journal.host)?])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let journal = end.journal;
        let (store, sr_ref) = (journal.store(0)?, journal.object::<Sr>("sr"));
        if *self == Self::Update {
            let row = original(&end.seen())?;
            match store.volumes.iter().find(|volume| scan::is_of(volume, &row)) {
                Some(volume) => volumes::show(end.state, end.change, &row, volume),
                None => return refuse(errors::vdi_missing(sr_ref, row.typed::<Vdi>())),
            }
            return Ok(Value::Void);
        }
        let (uuid, location) = (journal.parameter("uuid"), journal.parameter("location"));
        let found = store.volumes.iter().find(|volume| volume.location == location || volume.vdi == uuid);
        let Some(volume) = found else { return refuse(errors::vdi_location_missing(sr_ref, location)) };
        let made = volumes::Made { uuid, sr: sr_ref, volume, fields: journal.fields(Vdi::ID) };
        volumes::insert(end.state, end.change, journal.object("made"), made);
        answer(journal.object("made"))
    }
}
