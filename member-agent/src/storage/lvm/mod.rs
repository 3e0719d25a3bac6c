//! Logical volumes in a volume group on devices of the host: thin ones in one pool, so that a snapshot takes constant
//! time and nobody has to change over to anything. `commands` is what is said to LVM.
//!
//! Going back to a snapshot makes a new volume and changes names twice; what a crash leaves of it is told by the names.

mod commands;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use uuid::Uuid;

use super::program::{LONG, SHORT, apart};
use super::words::{Access, BlockSource, NewVolume, Probed, StoreState, VolumeState};
use super::{Opened, Place, Source, Store, User, unsupported};
use crate::step::{ImageFormat, Reason, Refusal};
use commands::{Group, Logical, NEW, OLD, POOL, Report};

struct Lvm {
    place: Place,
    group: Group,
}

/// A store in a volume group.
pub(super) fn open(place: Place) -> Result<Arc<dyn Store>, Refusal> {
    let devices: Vec<_> = place.spec.needed("device")?.split(',').map(str::to_owned).collect();
    if devices.iter().any(|device| !device.starts_with('/')) {
        return Err(Refusal::new(Reason::BadConfig, "device: must be absolute paths"));
    }
    let group = Group { name: format!("xenith-{}", place.spec.sr), devices };
    Ok(Arc::new(Lvm { place, group }))
}

impl Lvm {
    async fn say(&self, command: &[String]) -> Result<String, Refusal> {
        let [program, arguments @ ..] = command else { return Ok(String::new()) };
        self.place.site.programs.run(Path::new("/"), program, arguments, SHORT).await
    }

    async fn report(&self) -> Result<Report, Refusal> {
        let text = self.say(&self.group.report()).await.map_err(|refusal| {
            let gone = refusal.detail.contains("not found");
            if gone { Refusal::new(Reason::NoSuchStore, refusal.detail) } else { refusal }
        })?;
        Report::parse(&text)
    }

    async fn there(&self, location: &str) -> Result<Logical, Refusal> {
        let none = || Refusal::new(Reason::NoSuchVolume, location);
        checked(location)?;
        self.report().await?.volumes.into_iter().find(|volume| volume.name == location).ok_or_else(none)
    }

    fn user(&self, location: &str) -> Option<User> {
        let path = self.group.path(location);
        self.place.site.users.all().into_iter().find(|user| user.path == path)
    }

    async fn at_rest(&self, location: &str) -> Result<(), Refusal> {
        if let Some(user) = self.user(location) {
            return Err(Refusal::new(Reason::InUse, format!("the VM {} has it open", user.vm)));
        }
        if self.there(location).await?.open {
            return Err(Refusal::new(Reason::InUse, format!("{location} is open")));
        }
        Ok(())
    }
}

#[async_trait]
impl Store for Lvm {
    async fn attach(&self) -> Result<(), Refusal> {
        self.report().await?;
        self.say(&self.group.activate(true)).await.map(drop)
    }

    async fn detach(&self) -> Result<(), Refusal> {
        let dir = PathBuf::from("/dev").join(&self.group.name);
        if let Some(user) = self.place.site.users.all().into_iter().find(|user| user.path.starts_with(&dir)) {
            return Err(Refusal::new(Reason::InUse, format!("the VM {} has a volume open", user.vm)));
        }
        match self.say(&self.group.activate(false)).await {
            Err(refusal) if refusal.detail.contains("not found") => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    async fn create(&self, _physical_size: u64) -> Result<(), Refusal> {
        if self.report().await.is_ok() {
            return Ok(());
        }
        for command in self.group.create() {
            self.say(&command).await?;
        }
        Ok(())
    }

    async fn destroy(&self) -> Result<(), Refusal> {
        if self.report().await.is_err_and(|refusal| refusal.reason == Reason::NoSuchStore) {
            return Ok(());
        }
        self.detach().await?;
        for command in self.group.destroy() {
            self.say(&command).await?;
        }
        Ok(())
    }

    async fn probe(&self) -> Result<Vec<Probed>, Refusal> {
        let text = self.say(&self.group.probe()).await.unwrap_or_default();
        let sr = text.split_whitespace().find_map(|name| name.strip_prefix("xenith-")?.parse().ok());
        let device_config = self.place.spec.device_config.clone();
        Ok(vec![Probed { device_config, complete: true, sr, ..Probed::default() }])
    }

    async fn scan(&self) -> Result<StoreState, Refusal> {
        let report = self.report().await?;
        let has = |name: &str| report.volumes.iter().any(|volume| volume.name == name);
        for volume in &report.volumes {
            // A way back to a snapshot that was not gone to its end: OLD is there until NEW has the name.
            if let Some(name) = volume.name.strip_prefix(OLD) {
                let new = format!("{NEW}{name}");
                if !has(name) && has(&new) {
                    self.say(&self.group.rename(&new, name)).await?;
                } else if !has(name) {
                    self.say(&self.group.rename(&volume.name, name)).await?;
                    continue;
                }
                self.say(&self.group.remove(&volume.name)).await?;
            } else if let Some(name) = volume.name.strip_prefix(NEW)
                && has(name)
            {
                self.say(&self.group.remove(&volume.name)).await?;
            }
        }
        self.sizes().await
    }

    async fn sizes(&self) -> Result<StoreState, Refusal> {
        let report = self.report().await?;
        let volumes: Vec<_> = report.volumes.iter().filter_map(Logical::state).collect();
        Ok(StoreState {
            physical_size: report.pool_size,
            physical_utilisation: report.pool_used,
            virtual_allocation: volumes.iter().map(|volume| volume.virtual_size).sum(),
            volumes,
            ..StoreState::of(self.place.spec.sr)
        })
    }

    async fn volume(&self, location: &str) -> Result<VolumeState, Refusal> {
        let none = || Refusal::new(Reason::NoSuchVolume, location);
        self.there(location).await?.state().ok_or_else(none)
    }

    async fn location(&self, vdi: Uuid) -> Option<String> {
        Some(vdi.to_string())
    }

    async fn create_volume(&self, new: &NewVolume) -> Result<VolumeState, Refusal> {
        let name = new.vdi.to_string();
        let report = self.report().await?;
        if report.volumes.iter().any(|volume| volume.name == name) {
            return Err(Refusal::new(Reason::VolumeExists, name));
        }
        let available = report.pool_size.saturating_sub(report.pool_used);
        if new.kind == "suspend" && available < new.virtual_size {
            return Err(Refusal::space(new.virtual_size, available));
        }
        self.say(&self.group.make(&name, new.virtual_size)).await?;
        self.volume(&name).await
    }

    async fn branch(&self, location: &str, into: Uuid, snapshot: bool) -> Result<VolumeState, Refusal> {
        self.there(location).await?;
        let name = into.to_string();
        if self.there(&name).await.is_ok() {
            return Err(Refusal::new(Reason::VolumeExists, name));
        }
        self.say(&self.group.branch(location, &name, snapshot)).await?;
        self.volume(&name).await
    }

    async fn fill(&self, source: &Source, into: Uuid, _location: &str) -> Result<VolumeState, Refusal> {
        let name = into.to_string();
        let empty = match self.there(&name).await {
            Ok(there) if there.size < source.state.virtual_size => {
                return unsupported("the volume is too small for the copy");
            }
            Ok(_) => {
                self.at_rest(&name).await?;
                false
            }
            Err(refusal) if refusal.reason == Reason::NoSuchVolume => {
                self.say(&self.group.make(&name, source.state.virtual_size)).await?;
                true
            }
            Err(refusal) => return Err(refusal),
        };
        let (from, to) =
            (source.opened.source.path.display().to_string(), self.group.path(&name).display().to_string());
        let format = source.opened.source.format.word();
        let mut arguments = vec!["convert", "-n", "-W", "-m", "8", "-f", format, "-O", "raw"];
        if empty {
            // Zeroes that were written would take room from the pool.
            arguments.push("--target-is-zero");
        }
        arguments.extend([from.as_str(), &to]);
        self.place.site.programs.run(Path::new("/"), "qemu-img", &arguments, LONG).await?;
        apart(move || {
            let synced = fs::File::open(&to).and_then(|file| file.sync_all());
            synced.map_err(Refusal::failed)
        })
        .await?;
        self.volume(&name).await
    }

    async fn resize(&self, location: &str, virtual_size: u64) -> Result<VolumeState, Refusal> {
        let now = self.there(location).await?;
        if now.read_only {
            return unsupported("nobody may write to a snapshot");
        }
        if virtual_size < now.size {
            return unsupported("a volume cannot be made smaller");
        }
        if virtual_size > now.size {
            self.say(&self.group.resize(location, virtual_size)).await?;
        }
        if let Some(user) = self.user(location) {
            self.place.site.users.resize(&user, virtual_size).await?;
        }
        self.volume(location).await
    }

    async fn destroy_volume(&self, location: &str) -> Result<(), Refusal> {
        checked(location)?;
        match self.at_rest(location).await {
            Err(refusal) if refusal.reason == Reason::NoSuchVolume => return Ok(()),
            rest => rest?,
        }
        self.say(&self.group.remove(location)).await.map(drop)
    }

    async fn revert(&self, location: &str, snapshot: &str) -> Result<VolumeState, Refusal> {
        self.at_rest(location).await?;
        if !self.there(snapshot).await?.read_only {
            return unsupported("it is no snapshot to go back to");
        }
        let (new, old) = (format!("{NEW}{location}"), format!("{OLD}{location}"));
        self.say(&self.group.branch(snapshot, &new, false)).await?;
        self.say(&self.group.rename(location, &old)).await?;
        self.say(&self.group.rename(&new, location)).await?;
        self.say(&self.group.remove(&old)).await?;
        self.volume(location).await
    }

    async fn open(&self, location: &str, access: Access) -> Result<Opened, Refusal> {
        let there = self.there(location).await?;
        if there.read_only && !access.read_only {
            return unsupported("nobody may write to a snapshot");
        }
        if let Some(user) = self.user(location).filter(|user| access.vm != Some(user.vm) && !access.sharable) {
            return Err(Refusal::new(Reason::InUse, format!("the VM {} has it open", user.vm)));
        }
        // A snapshot is not active by itself.
        self.say(&self.group.activate_one(location)).await?;
        let source = BlockSource {
            path: self.group.path(location),
            format: ImageFormat::Raw,
            read_only: access.read_only,
            sharable: access.sharable,
        };
        Ok(Opened { source, _held: None })
    }
}

/// Only names that this driver gives are asked for.
fn checked(location: &str) -> Result<(), Refusal> {
    location.parse::<Uuid>().map(drop).map_err(|_| Refusal::new(Reason::NoSuchVolume, location))
}

/// The pool itself is no volume.
fn is_volume(name: &str) -> bool {
    name != POOL
}
