//! Giving an image to be opened, and refusing it to whoever would disturb another.

use std::fs::{self, File};
use std::path::Path;

use super::contents::{IMAGE, OPENED};
use super::crash;
use super::directory::{Directory, Entered, Wants, in_use_by};
use crate::files;
use crate::step::{ImageFormat, Reason, Refusal};
use crate::storage::claim::{Claim, Purpose};
use crate::storage::lock;
use crate::storage::program::{apart, trouble};
use crate::storage::words::{Access, BlockSource};
use crate::storage::{Opened, User};

impl Directory {
    /// Claims the image for him who opens it, until he has a lock of his own on it.
    pub(super) async fn open_volume(&self, location: &str, access: Access) -> Result<Opened, Refusal> {
        let Entered { gate, contents, chain } = self.enter(location, Wants::Open).await?;
        let volume = contents.volume(location)?;
        if volume.read_only && !access.read_only {
            return Err(Refusal::new(Reason::Unsupported, format!("{location}: nobody may write to a snapshot")));
        }
        let top = chain.first().cloned().unwrap_or_default();
        let format = contents.images.get(&top).map_or(ImageFormat::Qcow2, |image| image.format);
        let sharable = access.sharable && format == ImageFormat::Raw;
        let own = |user: &User| access.vm == Some(user.vm);
        if !sharable && !self.users(&chain)?.iter().any(own) {
            if access.read_only {
                self.unwritten(&chain[..chain.len().min(1)]).await?;
            } else {
                self.at_rest(&chain).await?;
            }
        }
        let dir = self.dir()?;
        let top = if top.starts_with(IMAGE) { top } else { self.adopt(&top, format).await? };
        let claimed: Vec<_> = std::iter::once(top.clone()).chain(chain.into_iter().skip(1)).collect();
        let claim = Claim::lay(&dir, Purpose::Open, &claimed).map_err(|error| trouble(&dir, &error))?;
        if !access.read_only {
            self.will_be_written(&top).await?;
        }
        drop(gate);
        let source = BlockSource { path: dir.join(top), format, read_only: access.read_only, sharable };
        Ok(Opened { source, _held: Some(Box::new(claim)) })
    }

    /// Somebody is going to write to the image: should he be killed at it, a scan looks at it when he is gone.
    pub(super) async fn will_be_written(&self, image: &str) -> Result<(), Refusal> {
        let path = self.dir()?.join(format!("{OPENED}{image}"));
        let noted = apart(move || File::create(&path).map(drop).map_err(|error| trouble(&path, &error)));
        noted.await.map_err(|refusal| self.with_room(refusal, 1))
    }

    /// Refuses what must not be done to a volume that somebody has open.
    pub(super) async fn at_rest(&self, chain: &[String]) -> Result<(), Refusal> {
        match self.users(&chain[..chain.len().min(1)])?.first() {
            Some(user) => Err(in_use_by(user)),
            None => self.unwritten(chain).await,
        }
    }

    /// Refuses images that somebody writes to.
    async fn unwritten(&self, images: &[String]) -> Result<(), Refusal> {
        if let Some(user) = self.writer(images)? {
            return Err(in_use_by(&user));
        }
        let dir = self.dir()?;
        let paths: Vec<_> = images.iter().map(|image| dir.join(image)).collect();
        apart(move || paths.iter().try_for_each(|path| refuse_written(path))).await
    }

    /// Makes a file that somebody put there an image of ours under the same name, so that its path does not change
    /// while it is open.
    pub(super) async fn adopt(&self, location: &str, format: ImageFormat) -> Result<String, Refusal> {
        let dir = self.dir()?;
        let image = Self::fresh(format);
        let (from, to) = (dir.join(location), dir.join(&image));
        apart(move || {
            let linked = fs::hard_link(&from, &to).and_then(|()| files::sync_directory(&to));
            linked.map_err(|error| trouble(&from, &error))
        })
        .await?;
        crash::point("adopted");
        self.name(location, &image).await?;
        Ok(image)
    }
}

fn refuse_written(path: &Path) -> Result<(), Refusal> {
    match lock::written(path) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Refusal::new(Reason::InUse, format!("{} is open elsewhere", path.display()))),
        Err(error) => Err(trouble(path, &error)),
    }
}
