//! Stores without bytes: their volumes are small files that say how large an image would be, in a directory that
//! hosts share where their configurations say the same. Sizes are honest: a volume takes what it was made for, a
//! snapshot or a clone takes nothing, and a store is full when it is full.
//!
//! `sim.toml` makes it slow or makes it fail, step by step, as it does the simulated hypervisor.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use uuid::Uuid;

use super::words::{Access, BlockSource, NewVolume, Probed, StoreState, VolumeState};
use super::{Opened, Place, Source, Store, unsupported};
use crate::files::{self, Durability};
use crate::hypervisor::sim::Faults;
use crate::step::{ImageFormat, Reason, Refusal, StepKind};

/// What a store has room for unless `device_config["physical_size"]` says otherwise.
const ROOM: u64 = 1 << 50;

struct Sim {
    place: Place,
    dir: PathBuf,
    room: u64,
    faults: Arc<Faults>,
}

/// A volume's file.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    vdi: Uuid,
    virtual_size: u64,
    physical_utilisation: u64,
    read_only: bool,
    parent: String,
    kind: String,
    /// The domain that was suspended to it, in the simulated hypervisor's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    suspended: Option<serde_json::Value>,
}

impl Kept {
    fn state(&self, location: &str) -> VolumeState {
        VolumeState {
            vdi: Some(self.vdi),
            location: location.to_owned(),
            virtual_size: self.virtual_size,
            physical_utilisation: self.physical_utilisation,
            read_only: self.read_only,
            parent: self.parent.clone(),
            name: String::new(),
            kind: self.kind.clone(),
        }
    }
}

/// A simulated store, whatever its type.
pub(super) fn open(place: Place) -> Result<Arc<dyn Store>, Refusal> {
    let spec = &place.spec;
    // Hosts that would reach the same place with the real driver reach the same one here.
    let below = match (spec.said("server"), spec.said("serverpath"), spec.said("location")) {
        (Some(_), Some(_), _) => "shared",
        (_, _, Some(location)) if !location.starts_with('/') => location,
        _ => "local",
    };
    if below.split('/').any(|part| part == "..") {
        return Err(Refusal::new(Reason::BadConfig, "location: must not have .. in it"));
    }
    let room = match spec.said("physical_size") {
        Some(text) => text.parse().map_err(|_| Refusal::new(Reason::BadConfig, "physical_size: is no number"))?,
        None => ROOM,
    };
    let dir = place.site.storage_dir.join(below).join(format!("sim-{}", spec.sr));
    let faults = Arc::clone(&place.site.faults);
    Ok(Arc::new(Sim { place, dir, room, faults }))
}

impl Sim {
    /// What every step begins with: its ordered failure, its delay.
    async fn begin(&self, step: StepKind) -> Result<(), Refusal> {
        self.faults.refresh();
        self.faults.failure(step)?;
        let delay = self.faults.delay(step);
        if !delay.is_zero() {
            sleep(delay).await;
        }
        Ok(())
    }

    fn path(&self, location: &str) -> Result<PathBuf, Refusal> {
        let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        if location.is_empty() || location.starts_with('.') || !location.chars().all(plain) {
            return Err(Refusal::new(Reason::NoSuchVolume, location));
        }
        Ok(self.dir.join(format!("{location}.json")))
    }

    fn kept(&self, location: &str) -> Result<Kept, Refusal> {
        read(&self.path(location)?)
    }

    fn keep(&self, location: &str, kept: &Kept) -> Result<VolumeState, Refusal> {
        let text = serde_json::to_vec(kept).map_err(Refusal::failed)?;
        files::replace(&self.path(location)?, &text, Durability::Process).map_err(Refusal::failed)?;
        Ok(kept.state(location))
    }

    fn all(&self) -> Result<BTreeMap<String, Kept>, Refusal> {
        let entries = fs::read_dir(&self.dir).map_err(|_| missing(&self.dir))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let locations = names.filter_map(|name| name.strip_suffix(".json").map(str::to_owned));
        // One that went meanwhile is none.
        Ok(locations.filter_map(|location| self.kept(&location).ok().map(|kept| (location, kept))).collect())
    }

    fn has_room(&self, more: u64) -> Result<(), Refusal> {
        let used: u64 = self.all()?.values().map(|kept| kept.physical_utilisation).sum();
        let available = self.room.saturating_sub(used);
        if more > available { Err(Refusal::space(more, available)) } else { Ok(()) }
    }

    fn fresh(&self, vdi: Uuid) -> Result<String, Refusal> {
        let location = vdi.to_string();
        match self.kept(&location) {
            Ok(_) => Err(Refusal::new(Reason::VolumeExists, location)),
            Err(_) => Ok(location),
        }
    }

    fn in_use(&self, location: &str) -> Result<(), Refusal> {
        let path = self.path(location)?;
        match self.place.site.users.all().into_iter().find(|user| user.path == path) {
            Some(user) => Err(Refusal::new(Reason::InUse, format!("the VM {} has it open", user.vm))),
            None => Ok(()),
        }
    }
}

fn read(path: &Path) -> Result<Kept, Refusal> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| Refusal::new(Reason::Damaged, error.to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let location = path.file_stem().unwrap_or_default().to_string_lossy();
            Err(Refusal::new(Reason::NoSuchVolume, location))
        }
        Err(error) => Err(Refusal::failed(error)),
    }
}

fn missing(dir: &Path) -> Refusal {
    Refusal::new(Reason::NoSuchStore, format!("{} is not there", dir.display()))
}

#[async_trait]
impl Store for Sim {
    async fn attach(&self) -> Result<(), Refusal> {
        self.begin(StepKind::AttachStore).await?;
        fs::create_dir_all(&self.dir).map_err(Refusal::failed)
    }

    async fn detach(&self) -> Result<(), Refusal> {
        self.begin(StepKind::DetachStore).await?;
        match self.place.site.users.all().into_iter().find(|user| user.path.starts_with(&self.dir)) {
            Some(user) => Err(Refusal::new(Reason::InUse, format!("the VM {} has a volume open", user.vm))),
            None => Ok(()),
        }
    }

    async fn create(&self, _physical_size: u64) -> Result<(), Refusal> {
        self.begin(StepKind::CreateStore).await?;
        fs::create_dir_all(&self.dir).map_err(Refusal::failed)
    }

    async fn destroy(&self) -> Result<(), Refusal> {
        self.begin(StepKind::DestroyStore).await?;
        self.detach().await?;
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Refusal::failed(error)),
            _ => Ok(()),
        }
    }

    async fn probe(&self) -> Result<Vec<Probed>, Refusal> {
        self.begin(StepKind::ProbeStore).await?;
        // The first of those that are simulated here: a simulated place has no more to tell them apart.
        let stores = self.dir.parent().and_then(|all| fs::read_dir(all).ok()).into_iter().flatten();
        let sr = stores.filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("sim-")?.parse().ok()).min();
        let device_config = self.place.spec.device_config.clone();
        Ok(vec![Probed { device_config, complete: true, sr, ..Probed::default() }])
    }

    async fn scan(&self) -> Result<StoreState, Refusal> {
        self.begin(StepKind::ScanStore).await?;
        self.sizes().await
    }

    async fn sizes(&self) -> Result<StoreState, Refusal> {
        let all = self.all()?;
        Ok(StoreState {
            physical_size: self.room,
            physical_utilisation: all.values().map(|kept| kept.physical_utilisation).sum(),
            virtual_allocation: all.values().map(|kept| kept.virtual_size).sum(),
            volumes: all.iter().map(|(location, kept)| kept.state(location)).collect(),
            ..StoreState::of(self.place.spec.sr)
        })
    }

    async fn volume(&self, location: &str) -> Result<VolumeState, Refusal> {
        Ok(self.kept(location)?.state(location))
    }

    async fn location(&self, vdi: Uuid) -> Option<String> {
        Some(vdi.to_string())
    }

    async fn create_volume(&self, new: &NewVolume) -> Result<VolumeState, Refusal> {
        self.begin(StepKind::CreateVolume).await?;
        let location = self.fresh(new.vdi)?;
        self.has_room(new.virtual_size)?;
        let kept = Kept {
            vdi: new.vdi,
            virtual_size: new.virtual_size,
            physical_utilisation: new.virtual_size,
            read_only: false,
            parent: String::new(),
            kind: new.kind.clone(),
            suspended: None,
        };
        self.keep(&location, &kept)
    }

    async fn branch(&self, location: &str, into: Uuid, snapshot: bool) -> Result<VolumeState, Refusal> {
        self.begin(if snapshot { StepKind::SnapshotVolume } else { StepKind::CloneVolume }).await?;
        let kept = self.kept(location)?;
        let fresh = self.fresh(into)?;
        let parent = location.to_owned();
        self.keep(&fresh, &Kept { vdi: into, physical_utilisation: 0, read_only: snapshot, parent, ..kept })
    }

    async fn fill(&self, source: &Source, into: Uuid, location: &str) -> Result<VolumeState, Refusal> {
        self.begin(StepKind::CopyVolume).await?;
        let from = &source.state;
        let location = if location.is_empty() { into.to_string() } else { location.to_owned() };
        let there = self.kept(&location).ok();
        if there.as_ref().is_some_and(|there| there.virtual_size < from.virtual_size) {
            return unsupported("the volume is too small for the copy");
        }
        self.in_use(&location)?;
        let had = there.as_ref().map_or(0, |there| there.physical_utilisation);
        self.has_room(from.virtual_size.saturating_sub(had))?;
        let kept = Kept {
            vdi: into,
            virtual_size: there.map_or(from.virtual_size, |there| there.virtual_size),
            physical_utilisation: from.virtual_size.max(had),
            read_only: false,
            parent: String::new(),
            kind: from.kind.clone(),
            suspended: read(&source.opened.source.path).ok().and_then(|from| from.suspended),
        };
        self.keep(&location, &kept)
    }

    async fn resize(&self, location: &str, virtual_size: u64) -> Result<VolumeState, Refusal> {
        self.begin(StepKind::ResizeVolume).await?;
        let kept = self.kept(location)?;
        if virtual_size < kept.virtual_size {
            return unsupported("a volume cannot be made smaller");
        }
        if kept.read_only {
            return unsupported("a snapshot keeps its size");
        }
        let more = virtual_size - kept.virtual_size;
        self.has_room(more)?;
        let physical_utilisation = kept.physical_utilisation + more;
        self.keep(location, &Kept { virtual_size, physical_utilisation, ..kept })
    }

    async fn destroy_volume(&self, location: &str) -> Result<(), Refusal> {
        self.begin(StepKind::DestroyVolume).await?;
        self.in_use(location)?;
        match fs::remove_file(self.path(location)?) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Refusal::failed(error)),
            _ => Ok(()),
        }
    }

    async fn revert(&self, location: &str, snapshot: &str) -> Result<VolumeState, Refusal> {
        self.begin(StepKind::RevertVolume).await?;
        self.in_use(location)?;
        let (kept, from) = (self.kept(location)?, self.kept(snapshot)?);
        if !from.read_only {
            return unsupported("it is no snapshot to go back to");
        }
        self.keep(location, &Kept { virtual_size: from.virtual_size, parent: snapshot.to_owned(), ..kept })
    }

    async fn open(&self, location: &str, access: Access) -> Result<Opened, Refusal> {
        let kept = self.kept(location)?;
        if kept.read_only && !access.read_only {
            return unsupported("nobody may write to a snapshot");
        }
        let path = self.path(location)?;
        let other = |path: &Path| {
            let mut users = self.place.site.users.all().into_iter();
            users.find(|user| user.path == path && access.vm != Some(user.vm) && !(user.read_only && access.read_only))
        };
        if let Some(user) = other(&path).filter(|_| !access.sharable) {
            return Err(Refusal::new(Reason::InUse, format!("the VM {} has it open", user.vm)));
        }
        let source =
            BlockSource { path, format: ImageFormat::Raw, read_only: access.read_only, sharable: access.sharable };
        Ok(Opened { source, _held: None })
    }
}
