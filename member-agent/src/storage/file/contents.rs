//! What is in a directory: names, images, and which is above which. Read anew for each step, because others share it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use uuid::Uuid;

use crate::step::{ImageFormat, Reason, Refusal};
use crate::storage::program::trouble;
use crate::storage::qcow2;
use crate::storage::words::VolumeState;

/// Images begin so, and so do files on their way to being one.
pub(super) const IMAGE: &str = "image-";
pub(super) const PART: &str = "part-";
/// A link on its way to a name.
pub(super) const LINK: &str = "link-";
/// Beside an image that somebody opened to write: when he is gone, it may have clusters that belong to nothing.
pub(super) const OPENED: &str = "opened-";
/// No chain is longer; a longer one has a ring in it.
const DEEPEST: usize = 1024;

/// One image.
#[derive(Debug, Clone)]
pub(super) struct Image {
    pub format: ImageFormat,
    pub virtual_size: u64,
    pub allocated: u64,
    /// Its mode says that nobody may write to it.
    pub read_only: bool,
    /// The image below.
    pub below: Option<String>,
    /// Why it is none.
    pub damage: Option<String>,
}

/// Everything.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Locations and the images they stand for; a file of somebody else's stands for itself.
    pub names: BTreeMap<String, String>,
    pub images: BTreeMap<String, Image>,
    /// Files that never came to be something.
    pub leftovers: Vec<String>,
    /// Images that were opened to write since they were last looked at.
    pub opened: Vec<String>,
}

/// The format that a file's name tells; none: no image.
fn format(name: &str) -> Option<ImageFormat> {
    match name.rsplit_once('.')? {
        (_, "qcow2") => Some(ImageFormat::Qcow2),
        (_, "raw" | "img") => Some(ImageFormat::Raw),
        _ => None,
    }
}

/// A location may not lead out of its directory, nor name what is the driver's own.
pub(super) fn checked(location: &str) -> Result<&str, Refusal> {
    let own = [IMAGE, PART, LINK, OPENED, "claim-", "."].iter().any(|own| location.starts_with(own));
    if location.is_empty() || location.contains('/') || location.contains('\0') || own {
        return Err(Refusal::new(Reason::NoSuchVolume, location));
    }
    Ok(location)
}

/// Looks at one image.
pub(super) fn image(path: &Path, format: ImageFormat) -> io::Result<Image> {
    let metadata = fs::metadata(path)?;
    let mut image = Image {
        format,
        virtual_size: metadata.len(),
        allocated: metadata.blocks() * 512,
        read_only: metadata.permissions().mode() & 0o222 == 0,
        below: None,
        damage: None,
    };
    if format == ImageFormat::Qcow2 {
        match qcow2::head(path) {
            Ok(head) => {
                image.virtual_size = head.virtual_size;
                image.below = head.below;
                if head.corrupt {
                    image.damage = Some("it is marked as corrupt".to_owned());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => image.damage = Some(error.to_string()),
            Err(error) => return Err(error),
        }
    }
    Ok(image)
}

impl Contents {
    /// Reads a directory.
    pub fn read(dir: &Path) -> Result<Self, Refusal> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Refusal::new(Reason::NoSuchStore, format!("{} is not there", dir.display())),
            _ => trouble(dir, &error),
        };
        let mut contents = Self::default();
        for entry in fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            // What has no name in text is nobody's volume.
            let Some(name) = name.to_str() else { continue };
            if name.starts_with(PART) || name.starts_with(LINK) {
                contents.leftovers.push(name.to_owned());
                continue;
            }
            if let Some(image) = name.strip_prefix(OPENED) {
                contents.opened.push(image.to_owned());
                continue;
            }
            let Some(format) = format(name) else { continue };
            let path = dir.join(name);
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_symlink() {
                let target = fs::read_link(&path).map_err(failed)?;
                if let Some(target) = target.to_str().filter(|target| target.starts_with(IMAGE)) {
                    contents.names.insert(name.to_owned(), target.to_owned());
                }
                continue;
            }
            if !kind.is_file() {
                continue;
            }
            match image(&path, format) {
                Ok(image) => {
                    if !name.starts_with(IMAGE) {
                        contents.names.insert(name.to_owned(), name.to_owned());
                    }
                    contents.images.insert(name.to_owned(), image);
                }
                // Another host removed it just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(contents)
    }

    /// The image of a location.
    pub fn top(&self, location: &str) -> Result<&str, Refusal> {
        let gone = || Refusal::new(Reason::NoSuchVolume, location);
        let name = self.names.get(checked(location)?).ok_or_else(gone)?;
        if self.images.contains_key(name) { Ok(name) } else { Err(gone()) }
    }

    /// The image itself, and those below it from the top down. One that is missing or none is damage.
    pub fn chain(&self, top: &str) -> Result<Vec<String>, Refusal> {
        let damaged = |why: String| Refusal::new(Reason::Damaged, why);
        let mut chain: Vec<String> = Vec::new();
        let mut next = Some(top.to_owned());
        while let Some(name) = next.take() {
            let image = self.images.get(&name).ok_or_else(|| damaged(format!("{name} is not there")))?;
            if let Some(damage) = &image.damage {
                return Err(damaged(format!("{name}: {damage}")));
            }
            if chain.len() >= DEEPEST {
                return Err(damaged(format!("{name}: there is no end to the images below it")));
            }
            next.clone_from(&image.below);
            chain.push(name);
        }
        Ok(chain)
    }

    /// The images right above one.
    pub fn above(&self, name: &str) -> Vec<&str> {
        let above = self.images.iter().filter(|(_, image)| image.below.as_deref() == Some(name));
        above.map(|(name, _)| name.as_str()).collect()
    }

    /// Some location stands for it.
    pub fn is_named(&self, name: &str) -> bool {
        self.names.values().any(|image| image == name)
    }

    /// Images that are no volume and have nothing above them.
    pub fn unused(&self) -> Vec<String> {
        let named: BTreeSet<_> = self.names.values().collect();
        let below: BTreeSet<_> = self.images.values().filter_map(|image| image.below.as_ref()).collect();
        let unused = self.images.keys().filter(|name| !named.contains(name) && !below.contains(name));
        unused.cloned().collect()
    }

    /// Rows of images that could be one: each is the only one above the one before it, and all but the last are
    /// nobody's volume. From the bottom up.
    pub fn runs(&self) -> Vec<Vec<String>> {
        let joins = |name: &str| {
            let image = self.images.get(name)?;
            let plain = image.format == ImageFormat::Qcow2 && image.damage.is_none() && !self.is_named(name);
            match (plain, self.above(name).as_slice()) {
                (true, [only]) => {
                    let upper = self.images.get(*only)?;
                    let grows = upper.virtual_size >= image.virtual_size && upper.damage.is_none();
                    (grows && only.starts_with(IMAGE)).then(|| (*only).to_owned())
                }
                _ => None,
            }
        };
        let mut runs = Vec::new();
        for (name, image) in &self.images {
            let begins = image.below.as_deref().is_none_or(|below| joins(below).is_none());
            let Some(mut next) = joins(name).filter(|_| begins) else { continue };
            let mut run = vec![name.clone(), next.clone()];
            while let Some(upper) = joins(&next).filter(|upper| !run.contains(upper)) {
                run.push(upper.clone());
                next = upper;
            }
            runs.push(run);
        }
        runs
    }

    /// A volume, as the master is told.
    pub fn volume(&self, location: &str) -> Result<VolumeState, Refusal> {
        let top = self.top(location)?;
        let image = self.images.get(top).ok_or_else(|| Refusal::new(Reason::NoSuchVolume, location))?;
        if let Some(damage) = &image.damage {
            return Err(Refusal::new(Reason::Damaged, format!("{location}: {damage}")));
        }
        let stem = location.rsplit_once('.').map_or(location, |(stem, _)| stem);
        let vdi: Option<Uuid> = stem.parse().ok();
        Ok(VolumeState {
            vdi,
            location: location.to_owned(),
            virtual_size: image.virtual_size,
            physical_utilisation: image.allocated,
            read_only: image.read_only,
            parent: image.below.clone().unwrap_or_default(),
            name: if vdi.is_some() { String::new() } else { stem.to_owned() },
            // What it is for only the pool knows.
            kind: "user".to_owned(),
        })
    }
}
