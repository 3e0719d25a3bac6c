//! Hypervisor drivers: what builds domains, and knows how they are.
//!
//! A driver is a folder and a line in [`DRIVERS`]. It keeps its domains in a [`Roster`], which gives every driver
//! the same rules for names, memory and watching, and it passes the suite in `tests/contract.rs`. What only some
//! drivers can do is told by [`Hypervisor::features`]; a step a driver has not is refused as `Unsupported`.
//!
//! Every method says in its name what becomes of the domain, returns the domain as it is afterwards, and ends
//! within a limit of its own. Methods for one domain may be called at the same time: a destroy is never kept
//! waiting by another step, and ends it.

pub mod domain;
mod domid;
pub mod qemu;
pub mod roster;
mod saved;
pub mod sim;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::BoxFuture;
use thiserror::Error;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::config::Config;
use domain::{Disk, DomainSpec, DomainState, Medium, Reboot, Refusal};
pub use domid::DomainIds;
use roster::Roster;

/// What every driver can do. `by` is the operation that wants it, and becomes the domain's `last_operation`.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// What this driver is and can do.
    fn features(&self) -> Features;

    /// The domains, their memory, and the feed of their changes.
    fn roster(&self) -> &Arc<Roster>;

    /// Builds a domain and lets it run, or leaves it paused before its first instruction.
    async fn start(&self, spec: DomainSpec, paused: bool, by: &str) -> Result<DomainState, Refusal>;

    /// Takes the domain's power away. One that is not there is a success; one that is being built is given up.
    async fn destroy(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal>;

    /// Stops the vCPUs.
    async fn pause(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal>;

    /// Lets the vCPUs run on.
    async fn unpause(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal>;

    /// Asks the guest to switch itself off, and returns when it is off; a guest that does not in time runs on.
    async fn shutdown(&self, vm: Uuid, limit: Duration, by: &str) -> Result<DomainState, Refusal>;

    /// Begins the guest anew.
    async fn reboot(&self, vm: Uuid, reboot: Reboot, by: &str) -> Result<DomainState, Refusal>;

    /// Writes what the guest has in memory, and how far it is, to the image `into`, and ends the domain or lets it go on
    /// as it was. If that fails, it goes on as it was. Whoever repeats it after it was done is told so.
    async fn suspend(&self, vm: Uuid, into: &Path, keep_running: bool, by: &str) -> Result<DomainState, Refusal>;

    /// Builds a domain that goes on where the image `from` left it. If that fails there is none; the image stays as it
    /// is either way.
    async fn resume(&self, spec: DomainSpec, from: &Path, paused: bool, by: &str) -> Result<DomainState, Refusal>;

    /// Asks the guest to make do with so many bytes, or gives it more. Returns when it was asked: how it follows is
    /// told as it does.
    async fn set_memory_target(&self, vm: Uuid, bytes: u64, by: &str) -> Result<DomainState, Refusal>;

    /// Gives or takes vCPUs, within what the domain was built for.
    async fn set_vcpus(&self, vm: Uuid, number: u32, by: &str) -> Result<DomainState, Refusal>;

    /// Has the guest's kernel do what its SysRq key does with this letter.
    async fn send_sysrq(&self, vm: Uuid, letter: char, by: &str) -> Result<DomainState, Refusal>;

    /// Brings a disk into a domain. One that is there already is a success.
    async fn plug_disk(&self, vm: Uuid, disk: Disk, by: &str) -> Result<DomainState, Refusal>;

    /// Takes a disk out of a domain. One that is not there is a success.
    async fn unplug_disk(&self, vm: Uuid, vbd: &str, how: Unplug, by: &str) -> Result<DomainState, Refusal>;

    /// Changes what is in a CD drive; nothing empties it. If that fails, what was in it stays.
    async fn change_medium(
        &self,
        vm: Uuid,
        vbd: &str,
        medium: Option<Medium>,
        by: &str,
    ) -> Result<DomainState, Refusal>;

    /// Every disk of every domain, with the image that it has open now.
    fn plugged(&self) -> Vec<Plugged>;

    /// The disk goes over to `overlay`, an empty qcow2 image above the one it has: what the guest writes from now on
    /// goes there, and the image below is no longer written. A disk that has it already is a success. Images keep their
    /// names as long as a domain has them: QEMU opens one again by its name when what it may do with it changes.
    async fn relink_disk(&self, vm: Uuid, vbd: &str, overlay: &Path) -> Result<(), Refusal>;

    /// The disk's image becomes so large, and the guest sees it.
    async fn resize_disk(&self, vm: Uuid, vbd: &str, bytes: u64) -> Result<(), Refusal>;

    /// The disk's image takes in what is in the images between it and `base` (none: in all below it) and then stands
    /// directly above `base`, by the name `base` has in its own directory. Ends when that is done, which may take long.
    async fn join_disk(&self, vm: Uuid, vbd: &str, base: Option<&Path>) -> Result<(), Refusal>;
}

/// How a disk is taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unplug {
    /// The guest is told, not asked: its disk is empty from now on.
    pub force: bool,
    /// How long it has to let go.
    pub limit: Duration,
}

/// A disk in a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugged {
    /// The domain's VM.
    pub vm: Uuid,
    /// The disk, with the path it has open now.
    pub disk: Disk,
}

/// What a driver is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Features {
    /// The driver's name.
    pub name: &'static str,
    /// Version of what runs the domains.
    pub version: String,
    /// "kvm", "tcg" or "none".
    pub accelerator: &'static str,
    /// Abilities beyond the common ones, such as "console:rfb".
    pub abilities: &'static [&'static str],
}

/// What a driver is given when it is opened.
#[derive(Debug, Clone)]
pub struct Site {
    /// The agent's configuration.
    pub config: Config,
    /// Tells this boot of the host from others.
    pub boot_id: String,
    /// Bytes for all domains together.
    pub capacity: u64,
    /// Owns the driver's tasks.
    pub tasks: TaskTracker,
    /// The end of the agent: tasks end, domains do not.
    pub shutdown: CancellationToken,
}

/// A driver could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// No such line in the table.
    #[error("no hypervisor driver is named {0:?}")]
    Unknown(String),
    /// Nothing to run domains with.
    #[error("this machine has no hypervisor: install QEMU, or configure driver = \"sim\"")]
    Nothing,
    /// The hypervisor's program does not work.
    #[error("{program} does not run: {why}")]
    Program {
        /// What was called.
        program: String,
        /// What it said.
        why: String,
    },
    /// State directory.
    #[error("state directory")]
    Io(#[from] io::Error),
}

/// A driver that is being opened.
type Opening = BoxFuture<'static, Result<Arc<dyn Hypervisor>, OpenError>>;

/// One driver.
pub struct Driver {
    /// As configuration names it.
    pub name: &'static str,
    /// Whether this machine has the means for it, so that "auto" may take it.
    present: fn(&Config) -> bool,
    open: fn(Site) -> Opening,
}

/// All drivers, in the order in which "auto" tries them.
pub const DRIVERS: &[Driver] = &[
    Driver {
        name: "qemu",
        present: qemu::present,
        open: |site| Box::pin(async { Ok(Arc::new(qemu::Qemu::open(site).await?) as Arc<dyn Hypervisor>) }),
    },
    Driver {
        name: "sim",
        present: |_| false,
        open: |site| Box::pin(async { Ok(sim::Sim::open(site)? as Arc<dyn Hypervisor>) }),
    },
];

/// Opens the driver that the configuration names.
pub async fn open(site: Site) -> Result<Arc<dyn Hypervisor>, OpenError> {
    let wanted = site.config.driver.as_str();
    let driver = match wanted {
        "auto" => DRIVERS.iter().find(|driver| (driver.present)(&site.config)).ok_or(OpenError::Nothing)?,
        name => DRIVERS.iter().find(|driver| driver.name == name).ok_or_else(|| OpenError::Unknown(name.to_owned()))?,
    };
    (driver.open)(site).await
}
