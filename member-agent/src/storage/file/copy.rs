//! All bytes of a volume into another one. They go to a file that is no image yet; only when it is whole and on disk
//! does it get a name, so that a copy is there or is not.

use std::fs;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::contents::{IMAGE, PART, checked};
use super::crash;
use super::directory::{Directory, Entered, Wants, room, sync};
use crate::step::{ImageFormat, Reason, Refusal};
use crate::storage::claim::{Claim, Purpose};
use crate::storage::program::{LONG, SHORT, apart, trouble};
use crate::storage::words::VolumeState;
use crate::storage::{Source, Store};

/// How often the log hears of a copy.
const NEWS: Duration = Duration::from_secs(5);

impl Directory {
    /// Fills a volume. It gets the format of its source if it has to be made, and keeps its size if that is larger.
    pub(super) async fn fill_from(&self, source: &Source, into: Uuid, location: &str) -> Result<VolumeState, Refusal> {
        let dir = self.dir()?;
        let found = self.contents().await?;
        let names = [location.to_owned(), format!("{into}.qcow2"), format!("{into}.raw")];
        let known = names.iter().find(|name| found.names.contains_key(*name)).cloned();
        let (target, format, size) = match &known {
            Some(known) => {
                let top = found.top(known)?;
                let now = found.volume(known)?;
                if now.virtual_size < source.state.virtual_size {
                    return Err(Refusal::new(Reason::Unsupported, "the volume is too small for the copy"));
                }
                if now.read_only {
                    return Err(Refusal::new(Reason::Unsupported, "nobody may write to a snapshot"));
                }
                let format = found.images.get(top).map_or(ImageFormat::Qcow2, |image| image.format);
                (known.clone(), format, now.virtual_size)
            }
            None => {
                let raw = source.opened.source.format == ImageFormat::Raw && source.state.location.ends_with(".raw");
                let format = if raw { ImageFormat::Raw } else { ImageFormat::Qcow2 };
                (format!("{into}.{}", format.word()), format, source.state.virtual_size)
            }
        };
        checked(&target)?;
        let part = format!("{PART}{}", Uuid::new_v4());
        let claim = {
            let _gate = self.gate().await?;
            Claim::lay(&dir, Purpose::Fill, std::slice::from_ref(&part)).map_err(|error| trouble(&dir, &error))?
        };
        let filled = self.convert(source, &part, format, size).await;
        crash::point("filled");
        if let Err(refusal) = filled {
            let path = dir.join(&part);
            apart(move || {
                // One that is not there is what is wanted.
                let _ = fs::remove_file(path);
                Ok(())
            })
            .await?;
            // What it wrote is free again, so that it can be told how much there is.
            return Err(self.with_room(refusal, source.state.physical_utilisation));
        }
        // The volume may have been removed or made meanwhile; whoever has it open must not lose it.
        let (gate, old) = if known.is_some() {
            let Entered { gate, chain, .. } = self.enter(&target, Wants::Change).await?;
            self.refuse_open(&chain).await?;
            (gate, chain.first().cloned())
        } else {
            let gate = self.gate().await?;
            if self.contents().await?.names.contains_key(&target) {
                return Err(Refusal::new(Reason::VolumeExists, target));
            }
            (gate, None)
        };
        let image = Self::fresh(format);
        let (from, to) = (dir.join(&part), dir.join(&image));
        apart(move || {
            let renamed = fs::rename(&from, &to).and_then(|()| sync(&to));
            renamed.map_err(|error| trouble(&from, &error))
        })
        .await?;
        drop(claim);
        crash::point("image made");
        self.name(&target, &image).await?;
        crash::point("named");
        if let Some(old) = old.filter(|old| old.starts_with(IMAGE)) {
            self.clear(self.contents().await?, vec![old]).await?;
        }
        drop(gate);
        self.volume(&target).await
    }

    async fn refuse_open(&self, chain: &[String]) -> Result<(), Refusal> {
        let top: Vec<_> = chain.iter().take(1).cloned().collect();
        match self.users(&top)?.into_iter().next() {
            Some(user) => Err(super::directory::in_use_by(&user)),
            None => Ok(()),
        }
    }

    async fn convert(&self, source: &Source, part: &str, format: ImageFormat, size: u64) -> Result<(), Refusal> {
        let dir = self.dir()?;
        let from = source.opened.source.path.display().to_string();
        let (_, available) = room(&dir).map_err(|error| trouble(&dir, &error))?;
        tracing::info!(from, size, available, "a copy begins");
        let began = Instant::now();
        let mut told = Instant::now();
        let news = |line: &str| {
            if told.elapsed() > NEWS {
                told = Instant::now();
                tracing::info!(from, done = line.trim(), "a copy goes on");
            }
        };
        // Written out of order and in several requests at once; the one sync at the end makes up for the cache mode.
        let formats = ["-f", source.opened.source.format.word(), "-O", format.word()];
        let mut arguments = vec!["convert", "-p", "-W", "-m", "8", "-t", "unsafe"];
        arguments.extend(formats);
        arguments.extend([from.as_str(), part]);
        let programs = &self.place.site.programs;
        programs.run_in(&dir, "qemu-img", &arguments, LONG, news).await?.succeeded("qemu-img")?;
        if size > source.state.virtual_size {
            let size = size.to_string();
            programs.run(&dir, "qemu-img", &["resize", "-q", "-f", format.word(), part, &size], SHORT).await?;
        }
        let path = dir.join(part);
        apart(move || sync(&path).map_err(|error| trouble(&path, &error))).await?;
        tracing::info!(from, milliseconds = began.elapsed().as_millis(), "a copy is done");
        Ok(())
    }
}
