//! Images in a directory.
//!
//! ```text
//! <vdi uuid>.qcow2 -> image-<id>.qcow2    a volume: its name stays, whatever image it is
//! image-<id>.qcow2                        an image; its name and what is below it do not change
//! .xenith-store.json                      whose directory it is
//! ```
//!
//! A snapshot makes two empty images above the volume's, and lets the volume's name point to one and the snapshot's to
//! the other. What is below is no longer written. Each name is changed in one step by renaming a link; so a crash
//! leaves at most images that nothing points to, which `scan` removes, or a base with one image left above it, which
//! `scan` joins. An image that somebody opened to write (`opened-*`) is looked at when he is gone; what could be half done in its place (a larger size, two images becoming one) is claimed beforehand,
//! and a claim whose owner is gone is mended.
//!
//! Files that somebody else put there (`*.qcow2`, `*.raw`, `*.img`) are volumes as well, under their own names.

mod branch;
mod contents;
mod copy;
mod crash;
#[cfg(test)]
mod crash_tests;
mod directory;
mod join;
mod opening;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;

use super::program::{apart, trouble};
use super::words::Probed;
use super::{Place, Store};
use crate::step::{Reason, Refusal};
pub(super) use directory::{Directory, Ground, probe_below, probe_directory};

/// A directory that is simply there.
pub(super) struct Plain {
    place: Place,
    dir: PathBuf,
    /// Below the agent's own directory for storage, where the agent makes what is missing.
    own: bool,
}

impl Plain {
    /// The directory that `device_config["location"]` names. Where the agent chooses it, each store has its own: pools
    /// that become one bring several of the same location.
    pub fn own(place: Place) -> Result<Self, Refusal> {
        let mut plain = Self::named(place)?;
        if plain.own {
            plain.dir.push(plain.place.spec.sr.to_string());
        }
        Ok(plain)
    }

    /// The same directory for all stores that name it.
    pub fn named(place: Place) -> Result<Self, Refusal> {
        let location = PathBuf::from(place.spec.needed("location")?);
        let own = location.is_relative();
        if location.components().any(|part| matches!(part, std::path::Component::ParentDir)) {
            return Err(Refusal::new(Reason::BadConfig, "location: must not have .. in it"));
        }
        let dir = place.site.storage_dir.join(location);
        Ok(Self { place, dir, own })
    }
}

#[async_trait]
impl Ground for Plain {
    async fn up(&self, make: bool) -> Result<PathBuf, Refusal> {
        let (dir, make) = (self.dir.clone(), make || self.own);
        apart(move || {
            if make {
                std::fs::create_dir_all(&dir).map_err(|error| trouble(&dir, &error))?;
            }
            std::fs::canonicalize(&dir).ok().filter(|dir| dir.is_dir()).ok_or_else(|| no_directory(&dir))
        })
        .await
    }

    async fn down(&self) -> Result<(), Refusal> {
        Ok(())
    }

    async fn probe(&self) -> Result<Vec<Probed>, Refusal> {
        let (dir, own, config) = (self.dir.clone(), self.own, self.place.spec.device_config.clone());
        apart(move || {
            // Each store has its own there, and which is not known yet.
            let dir = if own { dir.parent().unwrap_or(&dir) } else { &dir };
            if !dir.is_dir() {
                return Err(no_directory(dir));
            }
            if own {
                return probe_below(dir, &config);
            }
            Ok(vec![Probed { device_config: config, complete: true, sr: probe_directory(dir), ..Probed::default() }])
        })
        .await
    }
}

fn no_directory(dir: &Path) -> Refusal {
    Refusal::new(Reason::NoSuchStore, format!("location: there is no directory {}", dir.display()))
}

/// A store in a directory.
pub(super) fn open(place: Place) -> Result<Arc<dyn Store>, Refusal> {
    let ground = Plain::own(place.clone())?;
    Ok(Directory::open(place, Box::new(ground)))
}
