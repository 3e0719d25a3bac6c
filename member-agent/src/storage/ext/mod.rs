//! Images in a file system of their own: a device that the agent formats and mounts, or a directory that is there.
//!
//! The file system has the SR's uuid, so that a probe knows the store without mounting it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use uuid::Uuid;

use super::file::{Directory, Ground, Plain};
use super::program::{SHORT, apart};
use super::words::Probed;
use super::{Place, Store, mount};
use crate::step::{Reason, Refusal};

/// Where ext has its superblock, its magic in it, and its uuid.
const SUPERBLOCK: u64 = 1024;
const MAGIC: (usize, [u8; 2]) = (0x38, [0x53, 0xef]);
const UUID: usize = 0x68;

/// A device with a file system.
struct Device {
    place: Place,
    device: PathBuf,
}

/// What is on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Formatted {
    Ext(Uuid),
    Otherwise,
}

fn formatted(device: &Path) -> Result<Formatted, Refusal> {
    let bad = |why: &str| Refusal::new(Reason::BadConfig, format!("device: {}: {why}", device.display()));
    let file = File::open(device).map_err(|error| bad(&error.to_string()))?;
    let mut block = [0; 256];
    match file.read_exact_at(&mut block, SUPERBLOCK) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(bad("it is too small")),
        Err(error) => return Err(bad(&error.to_string())),
    }
    let (at, magic) = MAGIC;
    if block[at..at + 2] != magic {
        return Ok(Formatted::Otherwise);
    }
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&block[UUID..UUID + 16]);
    Ok(Formatted::Ext(Uuid::from_bytes(uuid)))
}

impl Device {
    async fn look(&self) -> Result<Formatted, Refusal> {
        let device = self.device.clone();
        apart(move || formatted(&device)).await
    }

    async fn format(&self) -> Result<(), Refusal> {
        let device = self.device.clone();
        if apart(move || Ok(mount::device_mounted(&device))).await? {
            return Err(Refusal::new(Reason::InUse, format!("device: {} is mounted", self.device.display())));
        }
        let (sr, device) = (self.place.spec.sr.to_string(), self.device.display().to_string());
        let arguments = ["-q", "-F", "-m", "0", "-L", "xenith", "-U", &sr, &device];
        self.place.site.programs.run(Path::new("/"), "mkfs.ext4", &arguments, 10 * SHORT).await?;
        Ok(())
    }
}

#[async_trait]
impl Ground for Device {
    async fn up(&self, make: bool) -> Result<PathBuf, Refusal> {
        match self.look().await? {
            // The same step a second time: what is there already is not formatted again.
            Formatted::Ext(sr) if sr == self.place.spec.sr => {}
            _ if make => self.format().await?,
            Formatted::Ext(other) => {
                let why = format!("device: {} holds the file system {other}", self.device.display());
                return Err(Refusal::new(Reason::BadConfig, why));
            }
            Formatted::Otherwise => {
                let why = format!("device: {} holds no file system of ours", self.device.display());
                return Err(Refusal::new(Reason::NoSuchStore, why));
            }
        }
        let options = if self.device.is_file() { "noatime,loop" } else { "noatime" };
        let arguments = ["-t", "ext4", "-o", options].map(str::to_owned).to_vec();
        let arguments = [arguments, vec![self.device.display().to_string()]].concat();
        mount::mount(&self.place, &arguments).await
    }

    async fn down(&self) -> Result<(), Refusal> {
        mount::unmount(&self.place).await
    }

    async fn probe(&self) -> Result<Vec<Probed>, Refusal> {
        let sr = match self.look().await? {
            Formatted::Ext(sr) => Some(sr),
            Formatted::Otherwise => None,
        };
        let device_config = self.place.spec.device_config.clone();
        Ok(vec![Probed { device_config, complete: true, sr, ..Probed::default() }])
    }
}

/// A store on a device or in a directory.
pub(super) fn open(place: Place) -> Result<Arc<dyn Store>, Refusal> {
    let ground: Box<dyn Ground> = match place.spec.said("device") {
        Some(device) if !device.starts_with('/') => {
            return Err(Refusal::new(Reason::BadConfig, "device: must be an absolute path"));
        }
        Some(device) => Box::new(Device { place: place.clone(), device: PathBuf::from(device) }),
        None => Box::new(Plain::own(place.clone())?),
    };
    Ok(Directory::open(place, ground))
}
