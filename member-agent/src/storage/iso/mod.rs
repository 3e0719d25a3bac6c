//! CD images: the `*.iso` files of a directory, each a volume of its name that nobody may write to.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use nix::sys::statvfs::statvfs;

use super::file::{Ground, Plain};
use super::program::{apart, trouble};
use super::words::{Access, BlockSource, Probed, StoreState, VolumeState};
use super::{Opened, Place, Store, unsupported};
use crate::step::{ImageFormat, Reason, Refusal};

struct Discs {
    place: Place,
    ground: Plain,
    dir: parking_lot::Mutex<Option<PathBuf>>,
}

/// A store of CD images.
pub(super) fn open(place: Place) -> Result<Arc<dyn Store>, Refusal> {
    let ground = Plain::named(place.clone())?;
    Ok(Arc::new(Discs { place, ground, dir: parking_lot::Mutex::default() }))
}

/// One image; none: it is none.
fn disc(path: &Path) -> Option<VolumeState> {
    let name = path.file_name()?.to_str()?;
    let (_, ending) = name.rsplit_once('.')?;
    let metadata = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    ending.eq_ignore_ascii_case("iso").then(|| VolumeState {
        vdi: None,
        location: name.to_owned(),
        virtual_size: metadata.len(),
        physical_utilisation: metadata.len(),
        read_only: true,
        // As people know it, with its ending: scripts ask for "debian.iso".
        name: name.to_owned(),
        kind: "user".to_owned(),
        ..VolumeState::default()
    })
}

impl Discs {
    fn dir(&self) -> Result<PathBuf, Refusal> {
        self.dir.lock().clone().ok_or_else(|| Refusal::new(Reason::NoSuchStore, "the store is not attached"))
    }

    fn path(&self, location: &str) -> Result<PathBuf, Refusal> {
        if location.contains(['/', '\0']) || location.starts_with('.') {
            return Err(Refusal::new(Reason::NoSuchVolume, location));
        }
        Ok(self.dir()?.join(location))
    }

    fn in_use(&self) -> Result<(), Refusal> {
        let Some(dir) = self.dir.lock().clone() else { return Ok(()) };
        match self.place.site.users.all().into_iter().find(|user| user.path.starts_with(&dir)) {
            Some(user) => Err(Refusal::new(Reason::InUse, format!("the VM {} has a disc in its drive", user.vm))),
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Store for Discs {
    async fn attach(&self) -> Result<(), Refusal> {
        let dir = self.ground.up(false).await?;
        *self.dir.lock() = Some(dir);
        Ok(())
    }

    async fn detach(&self) -> Result<(), Refusal> {
        self.in_use()?;
        *self.dir.lock() = None;
        Ok(())
    }

    async fn create(&self, _physical_size: u64) -> Result<(), Refusal> {
        self.ground.up(true).await.map(drop)
    }

    /// The images are somebody else's, and stay.
    async fn destroy(&self) -> Result<(), Refusal> {
        self.detach().await
    }

    async fn probe(&self) -> Result<Vec<Probed>, Refusal> {
        self.ground.probe().await
    }

    async fn scan(&self) -> Result<StoreState, Refusal> {
        let (dir, sr) = (self.dir()?, self.place.spec.sr);
        apart(move || {
            let failed = |error: &std::io::Error| trouble(&dir, error);
            let entries = fs::read_dir(&dir).map_err(|error| failed(&error))?;
            let mut volumes: Vec<_> = entries.filter_map(|entry| disc(&entry.ok()?.path())).collect();
            volumes.sort_by(|one, other| one.location.cmp(&other.location));
            let all = statvfs(&dir).map_err(|error| failed(&error.into()))?;
            Ok(StoreState {
                physical_size: all.blocks() * all.fragment_size(),
                physical_utilisation: volumes.iter().map(|volume| volume.physical_utilisation).sum(),
                virtual_allocation: volumes.iter().map(|volume| volume.virtual_size).sum(),
                volumes,
                ..StoreState::of(sr)
            })
        })
        .await
    }

    async fn volume(&self, location: &str) -> Result<VolumeState, Refusal> {
        let (path, name) = (self.path(location)?, location.to_owned());
        apart(move || disc(&path).ok_or_else(|| Refusal::new(Reason::NoSuchVolume, name))).await
    }

    async fn open(&self, location: &str, access: Access) -> Result<Opened, Refusal> {
        let volume = self.volume(location).await?;
        if !access.read_only {
            return unsupported("nobody may write to a CD image");
        }
        let path = self.path(&volume.location)?;
        let source = BlockSource { path, format: ImageFormat::Raw, read_only: true, sharable: false };
        Ok(Opened { source, _held: None })
    }
}
