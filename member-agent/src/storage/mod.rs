//! Stores and the images in them: what makes disks, and gives them to be opened.
//!
//! A driver is a folder and a line in [`DRIVERS`], and passes the suite in `tests/stores.rs`. It knows nothing of
//! domains: whom an image is open for on this host it is told through [`Users`], and that is also how an image is
//! changed that is in use.
//!
//! A step changes images durably and in an order in which every crash leaves something that `scan` finishes or undoes
//! by looking at the store alone. Methods may be called at the same time; each ends within a limit of its own, and one
//! that is dropped before its end leaves what a crash would leave.

mod claim;
mod ext;
mod file;
mod iso;
mod lock;
mod lvm;
mod mount;
mod nfs;
mod program;
mod qcow2;
mod sim;
mod stores;
mod udev;
pub mod words;

use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::hypervisor::sim::Faults;
use crate::step::{Reason, Refusal};
pub(crate) use program::Programs;
pub(crate) use stores::Stores;
use words::{Access, BlockSource, NewVolume, Probed, StoreSpec, StoreState, VolumeState};

/// What every driver can do with a store. What it cannot it refuses as `Unsupported`.
#[async_trait]
pub(crate) trait Store: Send + Sync {
    /// Makes the store usable at this host; one that is usable already is a success.
    async fn attach(&self) -> Result<(), Refusal>;

    /// Ends that; refused while a domain uses a volume of it.
    async fn detach(&self) -> Result<(), Refusal>;

    /// Makes an empty store where there is none.
    async fn create(&self, physical_size: u64) -> Result<(), Refusal>;

    /// Removes the store and every volume in it; refused while one of them is in use.
    async fn destroy(&self) -> Result<(), Refusal>;

    /// What there is to be attached, as far as the configuration narrows it down.
    async fn probe(&self) -> Result<Vec<Probed>, Refusal>;

    /// Its volumes and sizes. Mends first what a crash left, and begins to join what need not be apart.
    async fn scan(&self) -> Result<StoreState, Refusal>;

    /// Its sizes alone.
    async fn sizes(&self) -> Result<StoreState, Refusal> {
        self.scan().await
    }

    /// One volume.
    async fn volume(&self, location: &str) -> Result<VolumeState, Refusal>;

    /// What this driver calls the volume of a VDI when nobody has told; none: it does not choose names.
    async fn location(&self, _vdi: Uuid) -> Option<String> {
        None
    }

    /// Makes an empty volume.
    async fn create_volume(&self, _new: &NewVolume) -> Result<VolumeState, Refusal> {
        unsupported(FIXED)
    }

    /// The volume as of now under another name: a snapshot nobody may write to, or else a clone.
    async fn branch(&self, _location: &str, _into: Uuid, _snapshot: bool) -> Result<VolumeState, Refusal> {
        unsupported(FIXED)
    }

    /// Fills a volume, which is made if it is not there, with all bytes of an image.
    async fn fill(&self, _source: &Source, _into: Uuid, _location: &str) -> Result<VolumeState, Refusal> {
        unsupported(FIXED)
    }

    /// Makes a volume larger.
    async fn resize(&self, _location: &str, _virtual_size: u64) -> Result<VolumeState, Refusal> {
        unsupported(FIXED)
    }

    /// Removes a volume; one that is not there is a success.
    async fn destroy_volume(&self, _location: &str) -> Result<(), Refusal> {
        unsupported(FIXED)
    }

    /// A volume becomes what a snapshot of it is.
    async fn revert(&self, _location: &str, _snapshot: &str) -> Result<VolumeState, Refusal> {
        unsupported(FIXED)
    }

    /// Gives an image to be opened. What else comes is held until it has been opened, or given up.
    async fn open(&self, location: &str, access: Access) -> Result<Opened, Refusal>;
}

/// An image that is about to be opened.
pub(crate) struct Opened {
    /// What to open.
    pub source: BlockSource,
    /// Keeps the image as it is until whoever opens it has a lock of his own.
    pub _held: Option<Box<dyn Any + Send + Sync>>,
}

/// What is copied from.
pub(crate) struct Source {
    /// The image.
    pub opened: Opened,
    /// Its volume.
    pub state: VolumeState,
}

/// A domain of this host that has an image open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    /// The VM.
    pub vm: Uuid,
    /// The VBD.
    pub vbd: String,
    /// The image that it has open now, on top of those below it.
    pub path: PathBuf,
    /// It does not write.
    pub read_only: bool,
}

/// The domains of this host, as far as stores have to do with them.
#[async_trait]
pub(crate) trait Users: Send + Sync {
    /// All of them.
    fn all(&self) -> Vec<User>;

    /// From now on this one writes to `overlay`, which is above what it has.
    async fn relink(&self, user: &User, overlay: &Path) -> Result<(), Refusal>;

    /// Its image becomes so large.
    async fn resize(&self, user: &User, bytes: u64) -> Result<(), Refusal>;

    /// Its image takes in all between it and `base`. Whoever drops it waits no longer; the domain gives it up when anything
    /// else is to be done to its images.
    async fn join(&self, user: &User, base: Option<&Path>) -> Result<(), Refusal>;
}

/// What a driver is given for a store.
#[derive(Clone)]
pub(crate) struct Place {
    /// The store.
    pub spec: StoreSpec,
    /// What is the same for all stores of this host.
    pub site: Arc<Site>,
}

/// What is the same for all stores of a host.
pub(crate) struct Site {
    /// The agent's own directory.
    pub state_dir: PathBuf,
    /// Where locations that are no absolute paths begin.
    pub storage_dir: PathBuf,
    /// Tells this boot of the host from others: with it mounts go.
    pub boot_id: String,
    /// Every store is simulated.
    pub simulated: bool,
    /// How simulated stores are to fail.
    pub faults: Arc<Faults>,
    /// Programs.
    pub programs: Programs,
    /// Domains.
    pub users: Arc<dyn Users>,
    /// Owns what stores do by themselves.
    pub tasks: TaskTracker,
    /// The end of the agent.
    pub shutdown: CancellationToken,
}

/// One driver.
pub(crate) struct Driver {
    /// As SR.type names it.
    pub name: &'static str,
    /// Makes the store of a configuration, without touching anything.
    open: fn(Place) -> Result<Arc<dyn Store>, Refusal>,
}

/// All drivers.
pub(crate) const DRIVERS: &[Driver] = &[
    Driver { name: "file", open: file::open },
    Driver { name: "ext", open: ext::open },
    Driver { name: "nfs", open: nfs::open },
    Driver { name: "lvm", open: lvm::open },
    Driver { name: "iso", open: iso::open },
    Driver { name: "udev", open: udev::open },
    Driver { name: "sim", open: sim::open },
];

/// The driver of a store: its type's, or the simulated one where nothing is to be touched.
fn driver(spec: &StoreSpec, simulated: bool) -> Result<&'static Driver, Refusal> {
    let named = |name: &str| DRIVERS.iter().find(|driver| driver.name == name);
    let unknown = || Refusal::new(Reason::Unsupported, format!("no storage driver is named {:?}", spec.driver));
    let own = named(&spec.driver).ok_or_else(unknown)?;
    if simulated { named("sim").ok_or_else(unknown) } else { Ok(own) }
}

/// This driver's volumes are what they are.
/// Of a store that finds its volumes and makes none.
const FIXED: &str = "the volumes of such a store are what they are";

fn unsupported<T>(what: &str) -> Result<T, Refusal> {
    Err(Refusal::new(Reason::Unsupported, what))
}
