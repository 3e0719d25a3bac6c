//! What `scan` does besides looking: it mends what somebody died at, removes what nothing points to, and joins images
//! that need not be two.
//!
//! At rest a row of images becomes one by writing what is in the upper ones into the lowest, which nobody else sees,
//! and then giving that the name of the uppermost: one step, before which all is as it was. In use the guest's own
//! image takes in what is below. Both can be given up at any moment.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::contents::{Contents, OPENED};
use super::crash;
use super::directory::{Directory, room, same_file, sync};
use crate::files;
use crate::step::{ImageFormat, Reason, Refusal};
use crate::storage::claim::{self, Claim, Purpose};
use crate::storage::lock;
use crate::storage::program::{LONG, SHORT, apart, trouble};

/// How soon a join hears that somebody needs the images.
const LOOK: Duration = Duration::from_millis(50);
/// A scan waits so long for joins; longer ones go on by themselves.
const SCAN: Duration = Duration::from_secs(5);

impl Directory {
    /// Mends and removes what crashes left.
    pub(super) async fn mend(&self) -> Result<(), Refusal> {
        let dir = self.dir()?;
        let gate = self.gate().await?;
        let at = dir.clone();
        let (claims, contents) = apart(move || {
            let claims = claim::all(&at).map_err(|error| trouble(&at, &error))?;
            Ok((claims, Contents::read(&at)?))
        })
        .await?;
        for dead in claims.iter().filter(|claim| !claim.held) {
            // Only what was changed in its place can be anything but whole.
            let images = match dead.purpose {
                Purpose::Change => dead.images.iter().take(1).cloned().collect(),
                Purpose::Join => dead.images.clone(),
                Purpose::Open | Purpose::Fill => Vec::new(),
            };
            let mut mended = true;
            for image in images {
                if contents.images.get(&image).is_some_and(|image| image.format == ImageFormat::Qcow2) {
                    mended &= self.check(&image).await;
                }
            }
            if mended {
                dead.forget();
            }
        }
        let held = |left: &String| claims.iter().any(|claim| claim.held && claim.images.contains(left));
        for left in contents.leftovers.iter().filter(|left| !held(left)) {
            let path = dir.join(left);
            apart(move || {
                // One that is not there is what is wanted.
                let _ = fs::remove_file(path);
                Ok(())
            })
            .await?;
        }
        for opened in &contents.opened {
            let open = claims.iter().any(|claim| claim.held && claim.images.contains(opened));
            let (path, note) = (dir.join(opened), dir.join(format!("{OPENED}{opened}")));
            let at_rest = apart(move || Ok(!open && !lock::written(&path).unwrap_or_default())).await?;
            let image = contents.images.get(opened).filter(|image| image.damage.is_none());
            let qcow2 = image.is_some_and(|image| image.format == ImageFormat::Qcow2);
            if at_rest && (!qcow2 || self.check(opened).await) {
                apart(move || {
                    // One that stays is looked at again by the next scan.
                    let _ = fs::remove_file(note);
                    Ok(())
                })
                .await?;
            }
        }
        let unused = contents.unused();
        self.clear(contents, unused).await?;
        drop(gate);
        Ok(())
    }

    /// Clusters that belong to nothing are all that a killed qemu-img leaves; an image in use is left for later.
    async fn check(&self, image: &str) -> bool {
        let Ok(dir) = self.dir() else { return false };
        let arguments = ["check", "-q", "-f", "qcow2", "-r", "leaks", image];
        match self.place.site.programs.run(&dir, "qemu-img", &arguments, SHORT).await {
            Ok(_) => true,
            Err(refusal) => {
                tracing::warn!(image, %refusal, "an image that somebody died at is not mended yet");
                refusal.reason != Reason::InUse
            }
        }
    }

    /// Begins to join what need not be apart, and waits a moment for it.
    pub(super) async fn join(&self) -> Result<(), Refusal> {
        // One after the other; who finds somebody at it leaves it to him.
        let Ok(permit) = Arc::clone(&self.joining).try_acquire_owned() else { return Ok(()) };
        let runs = self.contents().await?.runs();
        if runs.is_empty() {
            return Ok(());
        }
        let Some(own) = self.own.upgrade() else { return Ok(()) };
        let shutdown = self.place.site.shutdown.clone();
        let work = self.place.site.tasks.spawn(async move {
            let _permit = permit;
            for run in runs {
                let joined = tokio::select! {
                    joined = own.join_run(&run) => joined,
                    () = shutdown.cancelled() => return,
                };
                match joined {
                    Ok(true) => tracing::info!(?run, "images have become one"),
                    Ok(false) => {}
                    // It is all as it was; the next scan tries again.
                    Err(refusal) => tracing::info!(?run, %refusal, "images stay apart for now"),
                }
            }
        });
        let _ = timeout(SCAN, work).await;
        Ok(())
    }

    /// Joins the images of a run, from the bottom up; false: somebody was in the way.
    async fn join_run(&self, run: &[String]) -> Result<bool, Refusal> {
        let dir = self.dir()?;
        let [lowest, .., uppermost] = run else { return Ok(false) };
        let gate = self.gate().await?;
        let contents = self.contents().await?;
        if !contents.runs().iter().any(|now| now == run) {
            return Ok(false);
        }
        let claims = apart({
            let dir = dir.clone();
            move || claim::all(&dir).map_err(|error| trouble(&dir, &error))
        })
        .await?;
        if claims.iter().any(|claim| claim.touches(run.iter())) {
            return Ok(false);
        }
        let from_top: Vec<_> = run.iter().rev().cloned().collect();
        let users = self.users(run)?;
        let claim = Claim::lay(&dir, Purpose::Join, &from_top).map_err(|error| trouble(&dir, &error))?;
        drop(gate);
        let stopped = async {
            while !claim.is_to_stop() {
                sleep(LOOK).await;
            }
        };
        let joined = async {
            match users.as_slice() {
                [] => self.join_at_rest(run).await,
                [user] if same_file(&user.path, &dir.join(uppermost)) && !user.read_only => {
                    // What is below comes up: there has to be room for it a second time.
                    let below = contents.images.iter().filter(|(name, _)| run.contains(name) && *name != uppermost);
                    let needed: u64 = below.map(|(_, image)| image.allocated).sum();
                    let (_, available) = room(&dir).map_err(|error| trouble(&dir, &error))?;
                    if needed.saturating_mul(2) > available {
                        return Err(Refusal::space(needed, available));
                    }
                    let base = contents.images.get(lowest).and_then(|image| image.below.as_ref());
                    let base = base.map(|base| dir.join(base));
                    self.place.site.users.join(user, base.as_deref()).await?;
                    let _gate = self.gate().await?;
                    let contents = self.contents().await?;
                    let unused = contents.unused();
                    // The claim is on these very images; nobody else is at them.
                    self.remove(unused.into_iter().filter(|name| run.contains(name) && name != uppermost)).await?;
                    Ok(true)
                }
                _ => Ok(false),
            }
        };
        tokio::select! {
            joined = joined => joined,
            () = stopped => Ok(false),
        }
    }

    async fn join_at_rest(&self, run: &[String]) -> Result<bool, Refusal> {
        let dir = self.dir()?;
        let [lowest, between @ .., uppermost] = run else { return Ok(false) };
        crash::point("before the commit");
        // A base of a snapshot may say that nobody may write to it.
        let path = dir.join(lowest);
        apart(move || {
            let mode = fs::Permissions::from_mode(0o644);
            fs::set_permissions(&path, mode).map_err(|error| trouble(&path, &error))
        })
        .await?;
        // Not emptied (-d): until the name changes, the uppermost image is what it was.
        let arguments = ["commit", "-q", "-d", "-f", "qcow2", "-b", lowest, uppermost];
        let programs = &self.place.site.programs;
        programs.run(&dir, "qemu-img", &arguments, LONG).await.map_err(|refusal| self.with_room(refusal, 1))?;
        crash::point("after the commit");
        let _gate = self.gate().await?;
        let (from, to) = (dir.join(lowest), dir.join(uppermost));
        let done = apart(move || {
            let failed = |error: &std::io::Error| trouble(&from, error);
            let Some(_still) = lock::still(&to).map_err(|error| failed(&error))? else { return Ok(false) };
            let mode = fs::metadata(&to).map_err(|error| failed(&error))?.permissions();
            fs::set_permissions(&from, mode).map_err(|error| failed(&error))?;
            sync(&from).map_err(|error| failed(&error))?;
            crash::point("before the name");
            fs::rename(&from, &to).map_err(|error| failed(&error))?;
            files::sync_directory(&to).map_err(|error| failed(&error))?;
            crash::point("after the name");
            Ok(true)
        })
        .await?;
        if done {
            self.remove(between.iter().cloned()).await?;
        }
        Ok(done)
    }

    async fn remove(&self, images: impl Iterator<Item = String>) -> Result<(), Refusal> {
        let dir = self.dir()?;
        for image in images {
            let path = dir.join(image);
            apart(move || fs::remove_file(&path).map_err(|error| trouble(&path, &error))).await?;
        }
        Ok(())
    }
}
