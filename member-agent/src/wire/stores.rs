//! The wire's words for stores and volumes.

use proto::agent as wire;
use tonic::Status;
use uuid::Uuid;

use crate::step::StepKind;
use crate::storage::words::{NewVolume, Probed, StoreSpec, StoreState, Volume, VolumeState};

/// What a step does with a store or a volume.
#[derive(Debug, Clone)]
pub(crate) enum StoreDeed {
    Attach(StoreSpec),
    Detach(StoreSpec),
    Create { store: StoreSpec, physical_size: u64 },
    Destroy(StoreSpec),
    Probe(StoreSpec),
    Scan(StoreSpec),
    CreateVolume { store: StoreSpec, new: NewVolume },
    Branch { volume: Volume, into: Uuid, snapshot: bool },
    Copy { from: Volume, into: Volume },
    Resize { volume: Volume, virtual_size: u64 },
    DestroyVolume(Volume),
    Revert { volume: Volume, snapshot: Volume },
}

impl StoreDeed {
    /// Its kind.
    pub fn kind(&self) -> StepKind {
        match self {
            Self::Attach(_) => StepKind::AttachStore,
            Self::Detach(_) => StepKind::DetachStore,
            Self::Create { .. } => StepKind::CreateStore,
            Self::Destroy(_) => StepKind::DestroyStore,
            Self::Probe(_) => StepKind::ProbeStore,
            Self::Scan(_) => StepKind::ScanStore,
            Self::CreateVolume { .. } => StepKind::CreateVolume,
            Self::Branch { snapshot: true, .. } => StepKind::SnapshotVolume,
            Self::Branch { .. } => StepKind::CloneVolume,
            Self::Copy { .. } => StepKind::CopyVolume,
            Self::Resize { .. } => StepKind::ResizeVolume,
            Self::DestroyVolume(_) => StepKind::DestroyVolume,
            Self::Revert { .. } => StepKind::RevertVolume,
        }
    }
}

/// What a step wants done with stores; the other way round, an action that is about none.
pub(super) fn store_deed(action: wire::step::Action) -> Result<StoreDeed, Status> {
    use wire::step::Action as Wanted;
    Ok(match action {
        Wanted::AttachStore(it) => StoreDeed::Attach(store(it.store)?),
        Wanted::DetachStore(it) => StoreDeed::Detach(store(it.store)?),
        Wanted::CreateStore(it) => StoreDeed::Create { store: store(it.store)?, physical_size: it.physical_size },
        Wanted::DestroyStore(it) => StoreDeed::Destroy(store(it.store)?),
        Wanted::ProbeStore(it) => StoreDeed::Probe(looked_for(it.store)?),
        // What the pool has no row of is told like everything else, so that it need not be known here.
        Wanted::ScanStore(it) => StoreDeed::Scan(store(it.store)?),
        Wanted::CreateVolume(it) => {
            let Volume { store, vdi, .. } = volume(it.volume)?;
            // A domain's memory is written as it is, and so is what several guests write to at the same time.
            let raw = it.kind == "suspend" || it.sm_config.get("type").is_some_and(|format| format == "raw");
            let new = NewVolume { vdi, virtual_size: it.virtual_size, kind: it.kind, raw };
            StoreDeed::CreateVolume { store, new }
        }
        Wanted::SnapshotVolume(it) => {
            StoreDeed::Branch { volume: volume(it.volume)?, into: vdi(&it.into)?, snapshot: true }
        }
        Wanted::CloneVolume(it) => {
            StoreDeed::Branch { volume: volume(it.volume)?, into: vdi(&it.into)?, snapshot: false }
        }
        // With a base only what differs would have to be copied; copying all of it has the same outcome.
        Wanted::CopyVolume(it) => StoreDeed::Copy { from: volume(it.from)?, into: volume(it.into)? },
        Wanted::ResizeVolume(it) => StoreDeed::Resize { volume: volume(it.volume)?, virtual_size: it.virtual_size },
        Wanted::DestroyVolume(it) => StoreDeed::DestroyVolume(volume(it.volume)?),
        Wanted::RevertVolume(it) => StoreDeed::Revert { volume: volume(it.volume)?, snapshot: volume(it.snapshot)? },
        _ => return Err(Status::unimplemented("this agent does not know such a step")),
    })
}

fn vdi(text: &str) -> Result<Uuid, Status> {
    text.parse().map_err(|_| Status::invalid_argument(format!("{text:?} is no uuid of a VDI")))
}

fn store(store: Option<wire::Store>) -> Result<StoreSpec, Status> {
    let store = store.ok_or_else(|| Status::invalid_argument("the step says not which store"))?;
    let sr = store.sr.parse();
    let sr = sr.map_err(|_| Status::invalid_argument(format!("{:?} is no uuid of an SR", store.sr)))?;
    Ok(StoreSpec { sr, driver: store.driver, device_config: store.device_config.into_iter().collect() })
}

/// Where to look: what is there has no SR yet.
fn looked_for(place: Option<wire::Store>) -> Result<StoreSpec, Status> {
    let place = place.map(|place| wire::Store { sr: Uuid::nil().to_string(), ..place });
    store(place)
}

/// A volume that has to be said.
pub(crate) fn volume(volume: Option<wire::VolumeRef>) -> Result<Volume, Status> {
    let volume = volume.ok_or_else(|| Status::invalid_argument("the step says not which volume"))?;
    // An image that came without the pool may have no VDI yet.
    let vdi = if volume.vdi.is_empty() { Uuid::nil() } else { vdi(&volume.vdi)? };
    Ok(Volume { store: store(volume.store)?, vdi, location: volume.location })
}

/// A store's state.
pub(super) fn store_state(state: StoreState) -> wire::StoreState {
    wire::StoreState {
        sr: state.sr.to_string(),
        physical_size: state.physical_size,
        physical_utilisation: state.physical_utilisation,
        virtual_allocation: state.virtual_allocation,
        volumes: state.volumes.into_iter().map(volume_state).collect(),
        probed: state.probed.into_iter().map(probed).collect(),
    }
}

/// A volume's state.
pub(super) fn volume_state(state: VolumeState) -> wire::VolumeState {
    wire::VolumeState {
        vdi: state.vdi.map(|vdi| vdi.to_string()).unwrap_or_default(),
        location: state.location,
        virtual_size: state.virtual_size,
        physical_utilisation: state.physical_utilisation,
        read_only: state.read_only,
        parent: state.parent,
        name: state.name,
        kind: state.kind,
    }
}

fn probed(probed: Probed) -> wire::ProbeResult {
    wire::ProbeResult {
        device_config: probed.device_config.into_iter().collect(),
        complete: probed.complete,
        sr: probed.sr.map(|sr| sr.to_string()).unwrap_or_default(),
        extra: probed.extra.into_iter().collect(),
    }
}
