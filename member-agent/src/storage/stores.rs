//! The stores that this host uses. Which they are is kept on disk, so that an agent that begins anew has them; for
//! the next boot of the host it counts no more, for then nothing is mounted, and the master attaches what is wanted.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::{fs, io};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;
use uuid::Uuid;

use super::words::{Probed, StoreSpec, StoreState};
use super::{Place, Site, Store, driver};
use crate::files::{self, Durability};
use crate::step::{Reason, Refusal};

const FORMAT: u32 = 1;

/// What is on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    format: u32,
    boot_id: String,
    stores: Vec<StoreSpec>,
}

type Attached = Arc<OnceCell<Arc<dyn Store>>>;

struct Entry {
    spec: StoreSpec,
    /// Filled by the first who needs it.
    store: Attached,
}

/// All stores of this host.
pub(crate) struct Stores {
    site: Arc<Site>,
    path: PathBuf,
    entries: Arc<Mutex<BTreeMap<Uuid, Entry>>>,
    /// Held while the file is written: steps for different stores end at the same time.
    writing: Arc<Mutex<()>>,
}

impl Stores {
    /// Takes up what a former agent of this boot had attached. Nothing is touched before it is needed.
    pub fn open(site: Site) -> io::Result<Self> {
        let path = site.state_dir.join("stores.json");
        let kept = match fs::read(&path) {
            Ok(text) => Some(serde_json::from_slice::<Kept>(&text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if let Some(newer) = kept.as_ref().filter(|kept| kept.format > FORMAT) {
            return Err(io::Error::other(format!("stores.json has the newer format {}", newer.format)));
        }
        let kept = kept.filter(|kept| kept.boot_id == site.boot_id).map(|kept| kept.stores).unwrap_or_default();
        let entries = kept.into_iter().map(|spec| (spec.sr, Entry { spec, store: Attached::default() })).collect();
        Ok(Self { site: Arc::new(site), path, entries: Arc::new(Mutex::new(entries)), writing: Arc::default() })
    }

    /// How many are attached.
    pub fn count(&self) -> usize {
        self.entries.lock().len()
    }

    /// Names of the drivers that work here.
    pub fn drivers() -> impl Iterator<Item = &'static str> {
        super::DRIVERS.iter().map(|driver| driver.name)
    }

    /// Uses the store from now on.
    pub async fn attach(&self, spec: &StoreSpec) -> Result<StoreState, Refusal> {
        let store = self.store(spec).await?;
        self.keep().await?;
        Ok(store.sizes().await?.briefly())
    }

    /// The store of a step: a step carries all that is needed, so that one that is not attached becomes so.
    pub async fn store(&self, spec: &StoreSpec) -> Result<Arc<dyn Store>, Refusal> {
        let cell = {
            let mut entries = self.entries.lock();
            let entry =
                entries.entry(spec.sr).or_insert_with(|| Entry { spec: spec.clone(), store: Attached::default() });
            if entry.spec != *spec {
                // Plugged anew with another configuration: what was is let go of.
                *entry = Entry { spec: spec.clone(), store: Attached::default() };
            }
            Arc::clone(&entry.store)
        };
        let attaching = cell.get_or_try_init(|| async {
            let store = self.unattached(spec)?;
            store.attach().await?;
            tracing::info!(sr = %spec.sr, driver = spec.driver, "a store is attached");
            Ok(store)
        });
        match attaching.await {
            Ok(store) => Ok(Arc::clone(store)),
            Err(refusal) => {
                let mut entries = self.entries.lock();
                if entries.get(&spec.sr).is_some_and(|entry| Arc::ptr_eq(&entry.store, &cell) && !cell.initialized()) {
                    entries.remove(&spec.sr);
                }
                Err(refusal)
            }
        }
    }

    /// The store of a configuration, whether it is attached or not.
    fn unattached(&self, spec: &StoreSpec) -> Result<Arc<dyn Store>, Refusal> {
        let driver = driver(spec, self.site.simulated)?;
        (driver.open)(Place { spec: spec.clone(), site: Arc::clone(&self.site) })
    }

    /// Uses the store no longer.
    pub async fn detach(&self, spec: &StoreSpec) -> Result<StoreState, Refusal> {
        let known = self.entries.lock().get(&spec.sr).map(|entry| (entry.spec.clone(), Arc::clone(&entry.store)));
        // One that a former agent attached may be mounted, though this one has not needed it.
        let store = match &known {
            Some((kept, cell)) => match cell.get() {
                Some(store) => Arc::clone(store),
                None => self.unattached(kept)?,
            },
            None => self.unattached(spec)?,
        };
        store.detach().await?;
        self.entries.lock().remove(&spec.sr);
        self.keep().await?;
        tracing::info!(sr = %spec.sr, "a store is detached");
        Ok(StoreState::of(spec.sr))
    }

    /// Makes an empty store; it is not attached thereby.
    pub async fn create(&self, spec: &StoreSpec, physical_size: u64) -> Result<StoreState, Refusal> {
        if self.entries.lock().contains_key(&spec.sr) {
            return Err(Refusal::new(Reason::InUse, "the store is attached"));
        }
        self.unattached(spec)?.create(physical_size).await?;
        Ok(StoreState::of(spec.sr))
    }

    /// Removes a store with all volumes.
    pub async fn destroy(&self, spec: &StoreSpec) -> Result<StoreState, Refusal> {
        self.unattached(spec)?.destroy().await?;
        self.entries.lock().remove(&spec.sr);
        self.keep().await?;
        Ok(StoreState::of(spec.sr))
    }

    /// What could be attached.
    pub async fn probe(&self, spec: &StoreSpec) -> Result<StoreState, Refusal> {
        let probed: Vec<Probed> = self.unattached(spec)?.probe().await?;
        Ok(StoreState { probed, ..StoreState::of(spec.sr) })
    }

    async fn keep(&self) -> Result<(), Refusal> {
        let (path, boot_id) = (self.path.clone(), self.site.boot_id.clone());
        let (entries, writing) = (Arc::clone(&self.entries), Arc::clone(&self.writing));
        super::program::apart(move || {
            let _alone = writing.lock();
            // As they are now, and not when this was asked for: who writes last has them all.
            let stores = entries.lock().values().map(|entry| entry.spec.clone()).collect();
            let kept = Kept { format: FORMAT, boot_id, stores };
            let text = serde_json::to_vec_pretty(&kept).map_err(Refusal::failed)?;
            files::replace(&path, &text, Durability::Power).map_err(Refusal::failed)
        })
        .await
    }
}
