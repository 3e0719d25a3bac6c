//! Steps of stores and volumes, and the volumes behind the disks of a domain.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use uuid::Uuid;

use super::Steps;
use crate::hypervisor::Hypervisor;
use crate::hypervisor::domain::Disk;
use crate::ledger::{Done, Outcome};
use crate::step::{Reason, Refusal};
use crate::storage::words::{Access, BlockSource, Volume, VolumeState};
use crate::storage::{Opened, Source, Store, User, Users};
use crate::wire::{StoreDeed, Wanted};

/// The domains of this host as stores see them.
pub(crate) struct Domains(pub Arc<dyn Hypervisor>);

#[async_trait]
impl Users for Domains {
    fn all(&self) -> Vec<User> {
        let plugged = self.0.plugged().into_iter().filter(|plugged| !plugged.disk.path.is_empty());
        let user = |it: crate::hypervisor::Plugged| User {
            vm: it.vm,
            vbd: it.disk.vbd,
            path: it.disk.path.into(),
            read_only: it.disk.read_only || it.disk.cdrom,
        };
        plugged.map(user).collect()
    }

    async fn relink(&self, user: &User, overlay: &Path) -> Result<(), Refusal> {
        self.0.relink_disk(user.vm, &user.vbd, overlay).await
    }

    async fn resize(&self, user: &User, bytes: u64) -> Result<(), Refusal> {
        self.0.resize_disk(user.vm, &user.vbd, bytes).await
    }

    async fn join(&self, user: &User, base: Option<&Path>) -> Result<(), Refusal> {
        self.0.join_disk(user.vm, &user.vbd, base).await
    }
}

impl Steps {
    /// Opens the volumes of a domain's disks. What is given is held until the hypervisor has them open itself.
    pub(super) async fn open_disks(
        &self,
        vm: Uuid,
        disks: &mut [Disk],
        volumes: &[Wanted],
    ) -> Result<Vec<Opened>, Refusal> {
        let mut held = Vec::new();
        for wanted in volumes {
            let Some(disk) = disks.iter_mut().find(|disk| disk.vbd == wanted.vbd) else { continue };
            let read_only = disk.read_only || disk.cdrom;
            let access = Access { read_only, sharable: disk.sharable, vm: Some(vm) };
            let opened = self.open_volume(&wanted.volume, access).await?;
            let BlockSource { path, format, read_only, sharable } = &opened.source;
            disk.path = path.display().to_string();
            (disk.format, disk.read_only, disk.sharable) = (*format, *read_only, *sharable);
            held.push(opened);
        }
        Ok(held)
    }

    /// Opens one volume.
    pub(super) async fn open_volume(&self, volume: &Volume, access: Access) -> Result<Opened, Refusal> {
        let (store, location) = self.resolve(volume).await?;
        store.open(&location, access).await
    }

    async fn resolve(&self, volume: &Volume) -> Result<(Arc<dyn Store>, String), Refusal> {
        let store = self.stores.store(&volume.store).await?;
        if !volume.location.is_empty() {
            return Ok((store, volume.location.clone()));
        }
        let none = || Refusal::new(Reason::NoSuchVolume, volume.vdi.to_string());
        let location = store.location(volume.vdi).await.ok_or_else(none)?;
        Ok((store, location))
    }

    /// Does a step of a store. `again`: a former agent had begun it.
    pub(super) async fn store_step(&self, deed: StoreDeed, again: bool) -> Outcome {
        let stores = &self.stores;
        Ok(match deed {
            StoreDeed::Attach(store) => Done::Store(stores.attach(&store).await?),
            StoreDeed::Detach(store) => Done::Store(stores.detach(&store).await?),
            StoreDeed::Create { store, physical_size } => Done::Store(stores.create(&store, physical_size).await?),
            StoreDeed::Destroy(store) => Done::Store(stores.destroy(&store).await?),
            StoreDeed::Probe(store) => Done::Store(stores.probe(&store).await?),
            StoreDeed::Scan(store) => Done::Store(stores.store(&store).await?.scan().await?),
            StoreDeed::CreateVolume { store, new } => {
                let store = stores.store(&store).await?;
                let made = store.create_volume(&new).await;
                Done::Volume(done_before(&*store, made, new.vdi, again).await?)
            }
            StoreDeed::Branch { volume, into, snapshot } => {
                let (store, location) = self.resolve(&volume).await?;
                let made = store.branch(&location, into, snapshot).await;
                Done::Volume(done_before(&*store, made, into, again).await?)
            }
            StoreDeed::Copy { from, into } => {
                let (store, location) = self.resolve(&from).await?;
                let state = store.volume(&location).await?;
                let access = Access { read_only: true, sharable: false, vm: None };
                let source = Source { opened: store.open(&location, access).await?, state };
                let target = stores.store(&into.store).await?;
                Done::Volume(target.fill(&source, into.vdi, &into.location).await?)
            }
            StoreDeed::Resize { volume, virtual_size } => {
                let (store, location) = self.resolve(&volume).await?;
                Done::Volume(store.resize(&location, virtual_size).await?)
            }
            StoreDeed::DestroyVolume(volume) => {
                match self.resolve(&volume).await {
                    Ok((store, location)) => store.destroy_volume(&location).await?,
                    Err(refusal) if refusal.reason == Reason::NoSuchVolume => {}
                    Err(refusal) => return Err(refusal),
                }
                Done::Volume(VolumeState { vdi: Some(volume.vdi), location: volume.location, ..Default::default() })
            }
            StoreDeed::Revert { volume, snapshot } => {
                let (store, location) = self.resolve(&volume).await?;
                let snapshot = match snapshot.location.as_str() {
                    "" => store.location(snapshot.vdi).await.unwrap_or_default(),
                    said => said.to_owned(),
                };
                Done::Volume(store.revert(&location, &snapshot).await?)
            }
        })
    }
}

/// A volume that a former agent made by the same step is what the step was for.
async fn done_before(
    store: &dyn Store,
    made: Result<VolumeState, Refusal>,
    vdi: Uuid,
    again: bool,
) -> Result<VolumeState, Refusal> {
    match made {
        Err(refusal) if again && refusal.reason == Reason::VolumeExists => {
            let location = store.location(vdi).await.ok_or(refusal)?;
            store.volume(&location).await
        }
        made => made,
    }
}
