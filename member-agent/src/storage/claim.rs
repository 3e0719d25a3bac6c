//! Who is at work on which images of a directory, for the time in which nothing else would tell it: a file `claim-*`
//! that its owner keeps locked. Hosts that share a directory see each other's claims; a claim that nobody holds any
//! more belongs to an agent that died at it, and what it was at wants mending.
//!
//! Claims are laid and looked at only under the lock of the directory.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Purpose {
    /// Somebody is about to open the images, and has no lock of his own on them yet; or reads them for long.
    Open,
    /// The first image is being changed in its place.
    Change,
    /// The images are becoming one.
    Join,
    /// A file that is being filled.
    Fill,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Content {
    purpose: Purpose,
    images: Vec<String>,
}

/// A claim of this agent's; it ends when it is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    path: PathBuf,
    _file: File,
}

impl Claim {
    /// Lays a claim; the first image is the one that is wanted, the others are below it.
    pub fn lay(dir: &Path, purpose: Purpose, images: &[String]) -> io::Result<Self> {
        let path = dir.join(format!("claim-{}", Uuid::new_v4()));
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        let laid = Self { path, _file: file.try_clone()? };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(io::Error::other("a new file is locked by another")),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        file.write_all(&serde_json::to_vec(&Content { purpose, images: images.to_vec() })?)?;
        Ok(laid)
    }

    /// Somebody needs the images more.
    pub fn is_to_stop(&self) -> bool {
        self.path.with_extension("stop").exists()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_file(self.path.with_extension("stop"));
    }
}

/// A claim that was found.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub path: PathBuf,
    pub purpose: Purpose,
    pub images: Vec<String>,
    /// Its owner lives.
    pub held: bool,
}

impl Found {
    /// Asks its owner to give it up.
    pub fn stop(&self) -> io::Result<()> {
        File::create(self.path.with_extension("stop")).map(drop)
    }

    /// Removes the claim of one who died.
    pub fn forget(&self) {
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_file(self.path.with_extension("stop"));
    }

    /// It is about an image of these.
    pub fn touches<'a>(&self, mut images: impl Iterator<Item = &'a String>) -> bool {
        images.any(|image| self.images.contains(image))
    }

    /// Its first image is this one.
    pub fn is_of(&self, image: &str) -> bool {
        self.images.first().is_some_and(|first| first == image)
    }
}

/// All claims on images of a directory.
pub(super) fn all(dir: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if !name.starts_with("claim-") || name.ends_with(".stop") {
            continue;
        }
        let path = entry.path();
        // One that ends just now is none.
        let Ok(file) = File::open(&path) else { continue };
        let held = match file.try_lock_shared() {
            Ok(()) => false,
            Err(TryLockError::WouldBlock) => true,
            Err(TryLockError::Error(error)) => return Err(error),
        };
        let content = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Content>(&text).ok());
        match content {
            Some(Content { purpose, images }) => found.push(Found { path, purpose, images, held }),
            // Its owner died before it said what it wanted, and so before it did anything.
            None if !held => drop(fs::remove_file(&path)),
            None => {}
        }
    }
    Ok(found)
}
