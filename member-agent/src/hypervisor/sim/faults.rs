//! Faults on order: `sim.toml` in the state directory, read again whenever it changes.
//!
//! ```toml
//! delay_ms = 20                # every step takes this long
//! shutdown_ms = 500            # a guest needs this long to obey
//! deaf = false                 # guests do not obey at all
//! die = ["<vm uuid>"]          # once: these domains die by themselves
//!
//! [delays_ms]                  # other than delay_ms, by step
//! start = 200
//!
//! [[fail_next]]                # once each: the next step of this kind is refused
//! step = "start"
//! reason = "boot-failed"
//! detail = "no such kernel"
//! ```
//!
//! What is to happen once happens once for each version of the file, also over a restart of the agent. A file that
//! cannot be understood changes nothing but the log.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use serde::Deserialize;
use uuid::Uuid;

use crate::files::{self, Durability};
use crate::hypervisor::domain::{Reason, Refusal, StepKind};

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Orders {
    delay_ms: u64,
    shutdown_ms: u64,
    deaf: bool,
    delays_ms: HashMap<StepKind, u64>,
    fail_next: Vec<Failure>,
    die: Vec<Uuid>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Failure {
    step: StepKind,
    reason: Reason,
    #[serde(default)]
    detail: String,
}

/// The orders in force.
#[derive(Debug)]
pub(crate) struct Faults {
    path: PathBuf,
    taken: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    version: String,
    orders: Orders,
}

impl Faults {
    /// Takes up the orders of a state directory, for the hypervisor or for the stores: each takes those of its steps.
    pub fn open(state_dir: &Path, whose: &str) -> Self {
        let taken = state_dir.join(format!("{whose}.taken"));
        Self { path: state_dir.join("sim.toml"), taken, inner: Mutex::default() }
    }

    /// Reads the file if it has changed; gives the domains that are to die.
    pub fn refresh(&self) -> Vec<Uuid> {
        let version = version(&self.path);
        let mut inner = self.inner.lock();
        if inner.version == version {
            return Vec::new();
        }
        inner.version.clone_from(&version);
        match read(&self.path) {
            Ok(orders) => inner.orders = orders,
            Err(error) => {
                tracing::warn!(%error, file = %self.path.display(), "orders are not understood");
                return Vec::new();
            }
        }
        if fs::read_to_string(&self.taken).is_ok_and(|taken| taken == version) {
            inner.orders.fail_next.clear();
            inner.orders.die.clear();
        } else if let Err(error) = files::replace(&self.taken, version.as_bytes(), Durability::Process) {
            tracing::warn!(%error, "orders may be carried out again after a restart");
        }
        std::mem::take(&mut inner.orders.die)
    }

    /// How long a step takes.
    pub fn delay(&self, step: StepKind) -> Duration {
        let inner = self.inner.lock();
        let orders = &inner.orders;
        Duration::from_millis(orders.delays_ms.get(&step).copied().unwrap_or(orders.delay_ms))
    }

    /// How long a guest takes to obey; none: it does not.
    pub fn obeys_after(&self) -> Option<Duration> {
        let inner = self.inner.lock();
        (!inner.orders.deaf).then(|| Duration::from_millis(inner.orders.shutdown_ms))
    }

    /// The refusal that was ordered for the next step of this kind.
    pub fn failure(&self, step: StepKind) -> Result<(), Refusal> {
        let failures = &mut self.inner.lock().orders.fail_next;
        match failures.iter().position(|failure| failure.step == step) {
            Some(at) => {
                let failure = failures.remove(at);
                Err(Refusal::new(failure.reason, failure.detail))
            }
            None => Ok(()),
        }
    }
}

/// Time and length; empty when there is no file.
fn version(path: &Path) -> String {
    fs::metadata(path).map_or_else(
        |_| String::new(),
        |metadata| {
            let time = metadata.modified().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
            format!("{}-{}", time.unwrap_or_default().as_nanos(), metadata.len())
        },
    )
}

fn read(path: &Path) -> Result<Orders, String> {
    match fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text).map_err(|error| error.to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Orders::default()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ordered_once_happens_once_also_over_a_restart() {
        let dir = tempfile::tempdir().expect("directory");
        let vm = Uuid::from_u128(7);
        let text =
            format!("delay_ms = 5\ndie = [\"{vm}\"]\n[[fail_next]]\nstep = \"start\"\nreason = \"boot-failed\"\n");
        fs::write(dir.path().join("sim.toml"), text).expect("write");
        let faults = Faults::open(dir.path(), "sim");
        assert_eq!(faults.refresh(), vec![vm]);
        assert_eq!(faults.refresh(), Vec::<Uuid>::new());
        assert_eq!(faults.failure(StepKind::Start).expect_err("ordered").reason, Reason::BootFailed);
        assert_eq!(faults.failure(StepKind::Start), Ok(()));
        let again = Faults::open(dir.path(), "sim");
        assert_eq!(again.refresh(), Vec::<Uuid>::new());
        assert_eq!(again.failure(StepKind::Start), Ok(()));
        assert_eq!(again.delay(StepKind::Start), Duration::from_millis(5));
    }

    #[test]
    fn orders_that_are_not_understood_change_nothing() {
        let dir = tempfile::tempdir().expect("directory");
        fs::write(dir.path().join("sim.toml"), "delay_ms = 5").expect("write");
        let faults = Faults::open(dir.path(), "sim");
        faults.refresh();
        fs::write(dir.path().join("sim.toml"), "delay = 50000").expect("write");
        faults.refresh();
        assert_eq!(faults.delay(StepKind::Pause), Duration::from_millis(5));
        fs::remove_file(dir.path().join("sim.toml")).expect("remove");
        faults.refresh();
        assert_eq!(faults.delay(StepKind::Pause), Duration::ZERO);
    }
}
