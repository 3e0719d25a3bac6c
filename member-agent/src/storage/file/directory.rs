//! One directory: its lock, its claims, and all that is done to volumes without making others of them.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::contents::{Contents, IMAGE, LINK, OPENED, checked};
use super::crash;
use crate::files::{self, Durability};
use crate::step::{ImageFormat, Reason, Refusal};
use crate::storage::claim::{self, Claim, Found, Purpose};
use crate::storage::lock;
use crate::storage::program::{SHORT, apart, trouble};
use crate::storage::words::{Access, NewVolume, Probed, StoreState, VolumeState};
use crate::storage::{Opened, Place, Source, Store, User};

/// How long a step waits for another one at the same images, or for the directory.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(5);
const MARK: &str = ".xenith-store.json";
const LOCK: &str = ".xenith-lock";
/// Sizes are whole blocks of this many bytes.
const BLOCK: u64 = 4096;

/// Where the directory of a store comes from.
#[async_trait]
pub(in crate::storage) trait Ground: Send + Sync {
    /// Makes it reachable; `make`: also where there is none yet.
    async fn up(&self, make: bool) -> Result<PathBuf, Refusal>;
    /// Ends that.
    async fn down(&self) -> Result<(), Refusal>;
    /// What there is.
    async fn probe(&self) -> Result<Vec<Probed>, Refusal>;
}

/// Whose directory it is.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    format: u32,
    sr: Uuid,
}

/// The store in a directory, if there is one.
pub(in crate::storage) fn probe_directory(dir: &Path) -> Option<Uuid> {
    serde_json::from_slice::<Mark>(&fs::read(dir.join(MARK)).ok()?).ok().map(|mark| mark.sr)
}

/// The stores below a directory, each in one of its own; a place without any, where there is none.
pub(in crate::storage) fn probe_below(dir: &Path, config: &BTreeMap<String, String>) -> Result<Vec<Probed>, Refusal> {
    let entries = fs::read_dir(dir).map_err(|error| trouble(dir, &error))?;
    let stores = entries.filter_map(|entry| probe_directory(&entry.ok()?.path()));
    let found = |sr| Probed { device_config: config.clone(), complete: true, sr, ..Probed::default() };
    let probed: Vec<_> = stores.map(|sr| found(Some(sr))).collect();
    Ok(if probed.is_empty() { vec![found(None)] } else { probed })
}

/// A store in a directory.
pub(in crate::storage) struct Directory {
    pub(super) place: Place,
    ground: Box<dyn Ground>,
    /// For what goes on when the step that began it has ended.
    pub(super) own: Weak<Directory>,
    dir: parking_lot::Mutex<Option<PathBuf>>,
    gate: Semaphore,
    pub(super) joining: Arc<Semaphore>,
}

/// The directory's lock: images come, go and change their places only under it.
pub(super) struct Gate<'a> {
    _file: File,
    _permit: SemaphorePermit<'a>,
}

/// Which claims of others a step cannot pass by. Joins are asked to stop, whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wants {
    /// To open an image.
    Open,
    /// To put another image above it.
    Branch,
    /// To change or remove it.
    Change,
}

impl Directory {
    /// A store on some ground.
    pub fn open(place: Place, ground: Box<dyn Ground>) -> Arc<dyn Store> {
        Arc::new_cyclic(|own| Self {
            place,
            ground,
            own: own.clone(),
            dir: parking_lot::Mutex::default(),
            gate: Semaphore::new(1),
            joining: Arc::new(Semaphore::new(1)),
        })
    }

    /// Where the images are.
    pub(super) fn dir(&self) -> Result<PathBuf, Refusal> {
        self.dir.lock().clone().ok_or_else(|| Refusal::new(Reason::NoSuchStore, "the store is not attached"))
    }

    /// Takes the directory's lock: first among this agent's tasks, in their order, then among hosts.
    pub(super) async fn gate(&self) -> Result<Gate<'_>, Refusal> {
        let late = || Refusal::new(Reason::InUse, "others have been at work on the store for too long");
        let permit = timeout(PATIENCE, self.gate.acquire()).await.map_err(|_| late())?.map_err(Refusal::failed)?;
        let path = self.dir()?.join(LOCK);
        let file = apart(move || {
            let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
            let file = file.map_err(|error| trouble(&path, &error))?;
            let deadline = Instant::now() + PATIENCE;
            loop {
                match file.try_lock() {
                    Ok(()) => return Ok(file),
                    Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOOK),
                    Err(TryLockError::WouldBlock) => return Err(late()),
                    Err(TryLockError::Error(error)) => return Err(trouble(&path, &error)),
                }
            }
        });
        Ok(Gate { _file: file.await?, _permit: permit })
    }

    /// What is there.
    pub(super) async fn contents(&self) -> Result<Contents, Refusal> {
        let dir = self.dir()?;
        apart(move || Contents::read(&dir)).await
    }

    /// Takes the lock and reads, once nobody is in the way of what is wanted with the volume.
    pub(super) async fn enter(&self, location: &str, wants: Wants) -> Result<Entered<'_>, Refusal> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let gate = self.gate().await?;
            let contents = self.contents().await?;
            let top = contents.top(location)?.to_owned();
            let chain = contents.chain(&top)?;
            let dir = self.dir()?;
            let own = chain.clone();
            let blocking = apart(move || {
                let claims = claim::all(&dir).map_err(|error| trouble(&dir, &error))?;
                let blocking: Vec<_> = claims.into_iter().filter(|claim| blocks(claim, &own, wants)).collect();
                for join in blocking.iter().filter(|claim| claim.purpose == Purpose::Join) {
                    join.stop().map_err(|error| trouble(&dir, &error))?;
                }
                Ok(blocking)
            })
            .await?;
            if blocking.is_empty() {
                return Ok(Entered { gate, contents, chain });
            }
            drop(gate);
            if Instant::now() > deadline {
                let at = blocking.first().map_or(Purpose::Change, |claim| claim.purpose);
                return Err(Refusal::new(Reason::InUse, format!("{location}: another step is at it ({at:?})")));
            }
            sleep(10 * LOOK).await;
        }
    }

    /// Domains of this host that have one of the images open.
    pub(super) fn users(&self, images: &[String]) -> Result<Vec<User>, Refusal> {
        let dir = self.dir()?;
        let ours = |user: &User| images.iter().any(|image| same_file(&user.path, &dir.join(image)));
        Ok(self.place.site.users.all().into_iter().filter(ours).collect())
    }

    /// A domain that writes to the volume, whichever of its images.
    pub(super) fn writer(&self, chain: &[String]) -> Result<Option<User>, Refusal> {
        Ok(self.users(chain)?.into_iter().find(|user| !user.read_only))
    }

    /// A name that no image has had.
    pub(super) fn fresh(format: ImageFormat) -> String {
        format!("{IMAGE}{}.{}", Uuid::new_v4(), format.word())
    }

    /// Makes an empty image and has it on disk; `below` is an image of the same directory.
    pub(super) async fn make_image(
        &self,
        name: &str,
        below: Option<(&str, ImageFormat)>,
        virtual_size: u64,
    ) -> Result<(), Refusal> {
        let dir = self.dir()?;
        let size = virtual_size.to_string();
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if let Some((below, format)) = below {
            // Unseen (-u): a guest may have it open.
            arguments.extend(["-u", "-F", format.word(), "-b", below]);
        }
        arguments.extend([name, &size]);
        let made = self.place.site.programs.run(&dir, "qemu-img", &arguments, SHORT).await;
        if let Err(refusal) = made {
            let path = dir.join(name);
            apart(move || {
                // One that is not there is what is wanted.
                let _ = fs::remove_file(path);
                Ok(())
            })
            .await?;
            return Err(self.with_room(refusal, BLOCK));
        }
        let path = dir.join(name);
        apart(move || sync(&path).map_err(|error| trouble(&path, &error))).await
    }

    /// Lets a name stand for an image from now on, in one step, durably.
    pub(super) async fn name(&self, location: &str, image: &str) -> Result<(), Refusal> {
        let dir = self.dir()?;
        let (location, image) = (location.to_owned(), image.to_owned());
        let refused = apart(move || {
            let link = dir.join(format!("{LINK}{}", Uuid::new_v4()));
            let done = symlink(&image, &link).and_then(|()| {
                crash::point("link");
                fs::rename(&link, dir.join(&location))
            });
            let done = done.and_then(|()| files::sync_directory(&dir.join(&location)));
            done.map_err(|error| trouble(&dir.join(&location), &error))
        });
        refused.await.map_err(|refusal| self.with_room(refusal, BLOCK))
    }

    /// Removes images that nothing needs any more, beginning with these. Under the lock.
    pub(super) async fn clear(&self, mut contents: Contents, mut suspects: Vec<String>) -> Result<(), Refusal> {
        let dir = self.dir()?;
        let open: Vec<_> = self.place.site.users.all().into_iter().map(|user| user.path).collect();
        apart(move || {
            let claims = claim::all(&dir).map_err(|error| trouble(&dir, &error))?;
            while let Some(name) = suspects.pop() {
                let path = dir.join(&name);
                let claimed = claims.iter().any(|claim| claim.held && claim.images.contains(&name));
                let needed = claimed || contents.is_named(&name) || !contents.above(&name).is_empty();
                if needed || !name.starts_with(IMAGE) || open.iter().any(|open| same_file(open, &path)) {
                    continue;
                }
                match lock::written(&path) {
                    Ok(false) => {}
                    // A guest somewhere else goes on with it.
                    Ok(true) => continue,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(trouble(&path, &error)),
                }
                fs::remove_file(&path).map_err(|error| trouble(&path, &error))?;
                crash::point("image removed");
                tracing::debug!(image = name, "an image that nothing needs is removed");
                suspects.extend(contents.images.remove(&name).and_then(|image| image.below));
            }
            Ok(())
        })
        .await
    }

    /// No space: how much there is.
    pub(super) fn with_room(&self, refusal: Refusal, needed: u64) -> Refusal {
        if refusal.reason != Reason::NoSpace {
            return refusal;
        }
        let available = self.dir().ok().and_then(|dir| room(&dir).ok()).map_or(0, |(_, available)| available);
        Refusal { needed: needed.max(available + 1), available, ..refusal }
    }

    async fn mark(&self, dir: &Path) -> Result<(), Refusal> {
        let (dir, sr) = (dir.to_owned(), self.place.spec.sr);
        apart(move || match probe_directory(&dir) {
            Some(other) if other != sr => {
                Err(Refusal::new(Reason::BadConfig, format!("location: {} is the store {other}", dir.display())))
            }
            Some(_) => Ok(()),
            None => {
                let mark = serde_json::to_vec(&Mark { format: 1, sr }).map_err(Refusal::failed)?;
                files::replace(&dir.join(MARK), &mark, Durability::Power).map_err(|error| trouble(&dir, &error))
            }
        })
        .await
    }

    async fn refuse_users(&self) -> Result<(), Refusal> {
        let Some(dir) = self.dir.lock().clone() else { return Ok(()) };
        match self.place.site.users.all().into_iter().find(|user| user.path.starts_with(&dir)) {
            Some(user) => Err(in_use_by(&user)),
            None => Ok(()),
        }
    }
}

/// A volume that a step is at, with the directory's lock.
pub(super) struct Entered<'a> {
    pub gate: Gate<'a>,
    pub contents: Contents,
    /// From the top down.
    pub chain: Vec<String>,
}

fn blocks(claim: &Found, chain: &[String], wants: Wants) -> bool {
    if !claim.held {
        return false;
    }
    let first = chain.first().is_some_and(|first| claim.is_of(first));
    match claim.purpose {
        Purpose::Join => claim.touches(chain.iter()),
        Purpose::Change => first,
        Purpose::Open => first && wants != Wants::Open,
        Purpose::Fill => false,
    }
}

pub(super) fn in_use_by(user: &User) -> Refusal {
    Refusal::new(Reason::InUse, format!("the VM {} has it open", user.vm))
}

pub(super) fn same_file(one: &Path, other: &Path) -> bool {
    one == other || fs::canonicalize(one).is_ok_and(|one| fs::canonicalize(other).is_ok_and(|other| one == other))
}

/// Has a file and its name on disk.
pub(super) fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()?;
    files::sync_directory(path)
}

/// Bytes of the file system that a path is in: all, and those that are free for us.
pub(super) fn room(path: &Path) -> io::Result<(u64, u64)> {
    let all = statvfs(path)?;
    Ok((all.blocks() * all.fragment_size(), all.blocks_available() * all.fragment_size()))
}

#[async_trait]
impl Store for Directory {
    async fn attach(&self) -> Result<(), Refusal> {
        let dir = self.ground.up(false).await?;
        self.mark(&dir).await?;
        *self.dir.lock() = Some(dir);
        Ok(())
    }

    async fn detach(&self) -> Result<(), Refusal> {
        self.refuse_users().await?;
        self.ground.down().await?;
        *self.dir.lock() = None;
        Ok(())
    }

    async fn create(&self, _physical_size: u64) -> Result<(), Refusal> {
        let dir = self.ground.up(true).await?;
        let marked = self.mark(&dir).await;
        // Made, not attached.
        self.ground.down().await?;
        marked
    }

    async fn destroy(&self) -> Result<(), Refusal> {
        let dir = match self.ground.up(false).await {
            Ok(dir) => dir,
            Err(refusal) if refusal.reason == Reason::NoSuchStore => return Ok(()),
            Err(refusal) => return Err(refusal),
        };
        self.mark(&dir).await?;
        *self.dir.lock() = Some(dir.clone());
        self.refuse_users().await?;
        let gate = self.gate().await?;
        let contents = self.contents().await?;
        apart(move || {
            for image in contents.images.keys() {
                let path = dir.join(image);
                if lock::written(&path).is_ok_and(|written| written) {
                    return Err(Refusal::new(Reason::InUse, format!("{} is open elsewhere", path.display())));
                }
            }
            let own = |name: &str| {
                let before = ["claim-", OPENED];
                name == MARK || name == LOCK || before.iter().any(|before| name.starts_with(before))
            };
            for entry in fs::read_dir(&dir).map_err(|error| trouble(&dir, &error))? {
                let entry = entry.map_err(|error| trouble(&dir, &error))?;
                let name = entry.file_name();
                let Some(name) = name.to_str() else { continue };
                let ours = contents.names.contains_key(name) || contents.images.contains_key(name);
                if ours || own(name) || contents.leftovers.iter().any(|left| left == name) {
                    fs::remove_file(entry.path()).map_err(|error| trouble(&entry.path(), &error))?;
                }
            }
            // What is somebody else's stays, and so does the directory then.
            let _ = fs::remove_dir(&dir);
            Ok(())
        })
        .await?;
        drop(gate);
        self.detach().await
    }

    async fn probe(&self) -> Result<Vec<Probed>, Refusal> {
        self.ground.probe().await
    }

    async fn scan(&self) -> Result<StoreState, Refusal> {
        self.mend().await?;
        self.join().await?;
        self.sizes().await
    }

    async fn sizes(&self) -> Result<StoreState, Refusal> {
        let (dir, sr) = (self.dir()?, self.place.spec.sr);
        let contents = self.contents().await?;
        apart(move || {
            let (all, available) = room(&dir).map_err(|error| trouble(&dir, &error))?;
            let volumes: Vec<_> = contents
                .names
                .keys()
                .filter_map(|location| {
                    let volume = contents.volume(location);
                    volume.inspect_err(|refusal| tracing::warn!(location, %refusal, "a volume cannot be told")).ok()
                })
                .collect();
            Ok(StoreState {
                physical_size: all,
                physical_utilisation: all.saturating_sub(available),
                virtual_allocation: volumes.iter().map(|volume| volume.virtual_size).sum(),
                volumes,
                ..StoreState::of(sr)
            })
        })
        .await
    }

    async fn volume(&self, location: &str) -> Result<VolumeState, Refusal> {
        self.contents().await?.volume(location)
    }

    async fn location(&self, vdi: Uuid) -> Option<String> {
        let contents = self.contents().await.ok()?;
        let raw = format!("{vdi}.raw");
        Some(if contents.names.contains_key(&raw) { raw } else { format!("{vdi}.qcow2") })
    }

    async fn create_volume(&self, new: &NewVolume) -> Result<VolumeState, Refusal> {
        let format = if new.raw { ImageFormat::Raw } else { ImageFormat::Qcow2 };
        let location = format!("{}.{}", new.vdi, format.word());
        let size = whole(new.virtual_size)?;
        let gate = self.gate().await?;
        if self.contents().await?.names.contains_key(&location) {
            return Err(Refusal::new(Reason::VolumeExists, location));
        }
        let dir = self.dir()?;
        // A domain's memory is written whole, so there has to be room for it.
        if new.kind == "suspend" {
            let (_, available) = room(&dir).map_err(|error| trouble(&dir, &error))?;
            if available < size {
                return Err(Refusal::space(size, available));
            }
        }
        let image = Self::fresh(format);
        if new.raw {
            let path = dir.join(&image);
            apart(move || {
                let file = File::create_new(&path).and_then(|file| file.set_len(size).and_then(|()| sync(&path)));
                file.map_err(|error| trouble(&path, &error))
            })
            .await
            .map_err(|refusal| self.with_room(refusal, size))?;
        } else {
            self.make_image(&image, None, size).await?;
        }
        crash::point("image made");
        self.name(&location, &image).await?;
        crash::point("named");
        drop(gate);
        self.volume(&location).await
    }

    async fn branch(&self, location: &str, into: Uuid, snapshot: bool) -> Result<VolumeState, Refusal> {
        self.make_branch(location, into, snapshot).await
    }

    async fn fill(&self, source: &Source, into: Uuid, location: &str) -> Result<VolumeState, Refusal> {
        self.fill_from(source, into, location).await
    }

    async fn resize(&self, location: &str, virtual_size: u64) -> Result<VolumeState, Refusal> {
        let size = whole(virtual_size)?;
        let Entered { gate, contents, chain } = self.enter(location, Wants::Change).await?;
        let now = contents.volume(location)?;
        if now.read_only {
            return Err(Refusal::new(Reason::Unsupported, "a snapshot keeps its size"));
        }
        match size.cmp(&now.virtual_size) {
            std::cmp::Ordering::Less => {
                return Err(Refusal::new(Reason::Unsupported, "a volume cannot be made smaller"));
            }
            std::cmp::Ordering::Equal => return Ok(now),
            std::cmp::Ordering::Greater => {}
        }
        let dir = self.dir()?;
        let top = chain.first().cloned().unwrap_or_default();
        let claim = Claim::lay(&dir, Purpose::Change, &chain).map_err(|error| trouble(&dir, &error))?;
        if let Some(user) = self.writer(&chain)? {
            self.settle(&chain, &user).await?;
            drop(gate);
            self.place.site.users.resize(&user, size).await?;
        } else {
            drop(gate);
            let format = contents.images.get(&top).map_or("qcow2", |image| image.format.word());
            let size = size.to_string();
            let arguments = ["resize", "-q", "-f", format, &top, &size];
            let resized = self.place.site.programs.run(&dir, "qemu-img", &arguments, SHORT).await;
            crash::point("resized");
            resized.map_err(|refusal| self.with_room(refusal, BLOCK))?;
            let path = dir.join(&top);
            apart(move || sync(&path).map_err(|error| trouble(&path, &error))).await?;
        }
        drop(claim);
        self.volume(location).await
    }

    async fn destroy_volume(&self, location: &str) -> Result<(), Refusal> {
        checked(location)?;
        let gate = self.gate().await?;
        let contents = self.contents().await?;
        let Some(top) = contents.names.get(location).cloned() else { return Ok(()) };
        drop(gate);
        // One that is no image any more can still be removed.
        let (_gate, contents) = match self.enter(location, Wants::Change).await {
            Ok(Entered { gate, contents, chain }) => {
                self.at_rest(&chain).await?;
                (gate, contents)
            }
            Err(refusal) if matches!(refusal.reason, Reason::Damaged | Reason::NoSuchVolume) => {
                (self.gate().await?, contents)
            }
            Err(refusal) => return Err(refusal),
        };
        if !contents.above(location).is_empty() {
            return Err(Refusal::new(Reason::InUse, format!("{location}: other images are above it")));
        }
        let dir = self.dir()?;
        let path = dir.join(location);
        apart(move || {
            let removed = match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => files::sync_directory(&path),
            };
            removed.map_err(|error| trouble(&path, &error))
        })
        .await?;
        crash::point("name removed");
        let contents =
            Contents { names: contents.names.into_iter().filter(|(name, _)| name != location).collect(), ..contents };
        self.clear(contents, vec![top]).await
    }

    async fn revert(&self, location: &str, snapshot: &str) -> Result<VolumeState, Refusal> {
        self.make_revert(location, snapshot).await
    }

    async fn open(&self, location: &str, access: Access) -> Result<Opened, Refusal> {
        self.open_volume(location, access).await
    }
}

/// A size in whole blocks.
fn whole(bytes: u64) -> Result<u64, Refusal> {
    let rounded = bytes.checked_next_multiple_of(BLOCK).filter(|size| (1..1 << 56).contains(size));
    rounded.ok_or_else(|| Refusal::new(Reason::BadConfig, format!("virtual_size: {bytes} bytes cannot be had")))
}
