//! Drives of the host itself as volumes: its CD drives, or the block devices that a directory names.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;

use super::program::apart;
use super::words::{Access, BlockSource, Probed, StoreState, VolumeState};
use super::{Opened, Place, Store, unsupported};
use crate::step::{ImageFormat, Reason, Refusal};

struct Drives {
    place: Place,
}

/// A store of drives.
pub(super) fn open(place: Place) -> Result<Arc<dyn Store>, Refusal> {
    Ok(Arc::new(Drives { place }))
}

/// One drive; none: no block device.
fn drive(path: &Path) -> Option<VolumeState> {
    let device = fs::canonicalize(path).ok()?;
    fs::metadata(&device).ok().filter(|metadata| metadata.file_type().is_block_device())?;
    let name = device.file_name()?.to_str()?;
    let says = |what: &str| {
        let text = fs::read_to_string(Path::new("/sys/class/block").join(name).join(what)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let size = says("size").unwrap_or_default() * 512;
    Some(VolumeState {
        vdi: None,
        location: path.to_str()?.to_owned(),
        virtual_size: size,
        physical_utilisation: size,
        read_only: name.starts_with("sr") || says("ro") == Some(1),
        name: name.to_owned(),
        kind: "user".to_owned(),
        ..VolumeState::default()
    })
}

impl Drives {
    /// Where links to drives are, if the configuration names a directory that is there.
    fn named(&self) -> Option<PathBuf> {
        self.place.spec.said("location").map(PathBuf::from).filter(|dir| dir.is_absolute() && dir.is_dir())
    }

    async fn drives(&self) -> Result<Vec<VolumeState>, Refusal> {
        let named = self.named();
        apart(move || {
            let of = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
            let mut paths: Vec<PathBuf> = match &named {
                Some(dir) => of(dir).map(|entry| entry.path()).collect(),
                None => of(Path::new("/sys/class/block"))
                    .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with("sr")))
                    .map(|entry| Path::new("/dev").join(entry.file_name()))
                    .collect(),
            };
            paths.sort();
            Ok(paths.iter().filter_map(|path| drive(path)).collect())
        })
        .await
    }
}

#[async_trait]
impl Store for Drives {
    async fn attach(&self) -> Result<(), Refusal> {
        Ok(())
    }

    async fn detach(&self) -> Result<(), Refusal> {
        let drives = self.drives().await?;
        let ours = |path: &Path| drives.iter().any(|drive| Path::new(&drive.location) == path);
        match self.place.site.users.all().into_iter().find(|user| ours(&user.path)) {
            Some(user) => Err(Refusal::new(Reason::InUse, format!("the VM {} has a drive open", user.vm))),
            None => Ok(()),
        }
    }

    async fn create(&self, _physical_size: u64) -> Result<(), Refusal> {
        Ok(())
    }

    async fn destroy(&self) -> Result<(), Refusal> {
        self.detach().await
    }

    async fn probe(&self) -> Result<Vec<Probed>, Refusal> {
        let device_config = self.place.spec.device_config.clone();
        Ok(vec![Probed { device_config, complete: true, ..Probed::default() }])
    }

    async fn scan(&self) -> Result<StoreState, Refusal> {
        let volumes = self.drives().await?;
        let all = volumes.iter().map(|volume| volume.virtual_size).sum();
        Ok(StoreState {
            physical_size: all,
            physical_utilisation: all,
            virtual_allocation: all,
            volumes,
            ..StoreState::of(self.place.spec.sr)
        })
    }

    async fn volume(&self, location: &str) -> Result<VolumeState, Refusal> {
        let none = || Refusal::new(Reason::NoSuchVolume, location);
        self.drives().await?.into_iter().find(|drive| drive.location == location).ok_or_else(none)
    }

    async fn open(&self, location: &str, access: Access) -> Result<Opened, Refusal> {
        let volume = self.volume(location).await?;
        if volume.read_only && !access.read_only {
            return unsupported("nobody may write to this drive");
        }
        let path = PathBuf::from(volume.location);
        let source =
            BlockSource { path, format: ImageFormat::Raw, read_only: access.read_only, sharable: access.sharable };
        Ok(Opened { source, _held: None })
    }
}
