//! Snapshots, clones, and the way back to a snapshot: links in constant time, for a volume at rest and for one in use.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use uuid::Uuid;

use super::contents::IMAGE;
use super::crash;
use super::directory::{Directory, Entered, Wants, in_use_by, same_file};
use crate::step::{ImageFormat, Reason, Refusal};
use crate::storage::lock;
use crate::storage::program::{apart, trouble};
use crate::storage::words::{Access, VolumeState};
use crate::storage::{Source, Store, User};

impl Directory {
    /// The volume as of now under another name.
    ///
    /// The volume's name goes over to an empty image above the one it had, then the guest, and only then does the new
    /// name appear. Whoever dies in between leaves a volume that is what it was: while nobody else stands on the image
    /// below, it does no harm that a guest still writes to it.
    pub(super) async fn make_branch(&self, location: &str, into: Uuid, snapshot: bool) -> Result<VolumeState, Refusal> {
        let Entered { gate, contents, chain } = self.enter(location, Wants::Branch).await?;
        let new = format!("{into}.qcow2");
        if [&new, &format!("{into}.raw")].into_iter().any(|name| contents.names.contains_key(name)) {
            return Err(Refusal::new(Reason::VolumeExists, new));
        }
        let now = contents.volume(location)?;
        let mut base = chain.first().cloned().unwrap_or_default();
        let Some(image) = contents.images.get(&base).cloned() else {
            return Err(Refusal::new(Reason::NoSuchVolume, location));
        };
        if image.format == ImageFormat::Raw {
            // Bytes as they are have nothing that could point to what is below.
            drop(gate);
            let access = Access { read_only: true, sharable: false, vm: None };
            let source = Source { opened: self.open(location, access).await?, state: now };
            let copy = self.fill_from(&source, into, "").await?;
            return if snapshot { self.forbid_writing(&copy.location).await } else { Ok(copy) };
        }
        let fresh = Self::fresh(ImageFormat::Qcow2);
        if now.read_only {
            // It never changes, so it may stay where it is; and being empty, it need not even be below.
            let below = image.below.unwrap_or(base);
            self.make_above(&fresh, &below, now.virtual_size, snapshot, &contents).await?;
            crash::point("image made");
        } else {
            let writer = self.writer(&chain)?;
            let still = match &writer {
                Some(user) => {
                    self.settle(&chain, user).await?;
                    None
                }
                None => self.keep_still(&chain).await?,
            };
            if !base.starts_with(IMAGE) {
                base = self.adopt(&base, image.format).await?;
            }
            let above = Self::fresh(ImageFormat::Qcow2);
            let made = tokio::try_join!(
                self.make_above(&above, &base, now.virtual_size, false, &contents),
                self.make_above(&fresh, &base, now.virtual_size, snapshot, &contents),
            );
            made?;
            if writer.is_some() {
                self.will_be_written(&above).await?;
            }
            crash::point("images made");
            self.name(location, &above).await?;
            crash::point("the volume goes over");
            if let Some(user) = writer {
                let overlay = self.dir()?.join(&above);
                self.place.site.users.relink(&user, &overlay).await?;
                crash::point("the guest goes over");
            }
            drop(still);
        }
        self.name(&new, &fresh).await?;
        crash::point("the new name");
        drop(gate);
        self.volume(&new).await
    }

    /// A volume becomes what a snapshot is.
    pub(super) async fn make_revert(&self, location: &str, snapshot: &str) -> Result<VolumeState, Refusal> {
        let Entered { gate: _gate, contents, chain } = self.enter(location, Wants::Change).await?;
        let top = chain.first().cloned().unwrap_or_default();
        if let Some(user) = self.users(std::slice::from_ref(&top))?.into_iter().next().or(self.writer(&chain)?) {
            return Err(in_use_by(&user));
        }
        let _still = self.keep_still(&chain).await?;
        let target = contents.volume(snapshot)?;
        let from = contents.top(snapshot)?.to_owned();
        contents.chain(&from)?;
        let image = contents.images.get(&from).cloned();
        let format = image.as_ref().map_or(ImageFormat::Qcow2, |image| image.format);
        if !target.read_only || format != ImageFormat::Qcow2 || !from.starts_with(IMAGE) {
            return Err(Refusal::new(Reason::Unsupported, format!("{snapshot} is no snapshot to go back to")));
        }
        let below = image.and_then(|image| image.below).unwrap_or(from);
        let fresh = Self::fresh(ImageFormat::Qcow2);
        self.make_above(&fresh, &below, target.virtual_size, false, &contents).await?;
        crash::point("image made");
        self.name(location, &fresh).await?;
        crash::point("the volume goes back");
        let contents = self.contents().await?;
        let state = contents.volume(location)?;
        self.clear(contents, vec![top]).await?;
        Ok(state)
    }

    /// Lets a guest go over to the image that is the volume's, where a step that died had no time to.
    pub(super) async fn settle(&self, chain: &[String], user: &User) -> Result<(), Refusal> {
        let dir = self.dir()?;
        let at = chain.iter().position(|image| same_file(&user.path, &dir.join(image)));
        for image in chain.iter().take(at.unwrap_or_default()).rev() {
            self.place.site.users.relink(user, &dir.join(image)).await?;
        }
        Ok(())
    }

    async fn make_above(
        &self,
        name: &str,
        below: &str,
        size: u64,
        snapshot: bool,
        contents: &super::contents::Contents,
    ) -> Result<(), Refusal> {
        let format = contents.images.get(below).map_or(ImageFormat::Qcow2, |image| image.format);
        self.make_image(name, Some((below, format)), size).await?;
        if !snapshot {
            return Ok(());
        }
        let path = self.dir()?.join(name);
        apart(move || read_only(&path)).await
    }

    async fn forbid_writing(&self, location: &str) -> Result<VolumeState, Refusal> {
        let image = self.contents().await?.top(location)?.to_owned();
        let path = self.dir()?.join(image);
        apart(move || read_only(&path)).await?;
        self.volume(location).await
    }

    /// Nobody writes to any of the images, and nobody begins to write to the first while this is held.
    async fn keep_still(&self, chain: &[String]) -> Result<Option<lock::Still>, Refusal> {
        let dir = self.dir()?;
        let paths: Vec<_> = chain.iter().map(|image| dir.join(image)).collect();
        apart(move || {
            let open = |path: &Path| Refusal::new(Reason::InUse, format!("{} is open elsewhere", path.display()));
            let mut held = None;
            for path in &paths {
                let still = lock::still(path).map_err(|error| trouble(path, &error))?.ok_or_else(|| open(path))?;
                held.get_or_insert(still);
            }
            Ok(held)
        })
        .await
    }
}

/// The mode of an image's file says that it is a snapshot, to us as to everybody.
fn read_only(path: &Path) -> Result<(), Refusal> {
    let done = fs::set_permissions(path, fs::Permissions::from_mode(0o444)).and_then(|()| super::directory::sync(path));
    done.map_err(|error| trouble(path, &error))
}
