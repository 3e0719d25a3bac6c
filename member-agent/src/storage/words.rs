//! What stores and volumes are to the agent; `wire.rs` translates, the ledger keeps.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::step::{ImageFormat, Reason, Refusal};

/// A store as this host reaches it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSpec {
    /// The SR.
    pub sr: Uuid,
    /// The driver's name.
    pub driver: String,
    /// `PBD.device_config`.
    pub device_config: BTreeMap<String, String>,
}

impl StoreSpec {
    /// What `device_config` says of a key, if it says anything.
    pub fn said(&self, key: &str) -> Option<&str> {
        self.device_config.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The same for a key that the driver needs.
    pub fn needed(&self, key: &str) -> Result<&str, Refusal> {
        self.said(key).ok_or_else(|| Refusal::new(Reason::BadConfig, format!("{key}: is missing")))
    }
}

/// One image in one store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Where it is.
    pub store: StoreSpec,
    /// The VDI.
    pub vdi: Uuid,
    /// The driver's own name for it; empty: the one the driver would give.
    pub location: String,
}

/// A volume to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVolume {
    /// The VDI.
    pub vdi: Uuid,
    /// Bytes; the driver may round up.
    pub virtual_size: u64,
    /// `VDI.type` in lower case.
    pub kind: String,
    /// Bytes as they are, without QEMU's format around them.
    pub raw: bool,
}

/// A volume as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VolumeState {
    /// The VDI; none: an image that came without the pool.
    pub vdi: Option<Uuid>,
    /// The driver's name for it.
    pub location: String,
    /// Bytes the guest sees.
    pub virtual_size: u64,
    /// Bytes it takes in the store.
    pub physical_utilisation: u64,
    /// Nobody may write to it.
    pub read_only: bool,
    /// Location of the image below.
    pub parent: String,
    /// For an image that came without the pool: the name of its file.
    pub name: String,
    /// `VDI.type` in lower case.
    pub kind: String,
}

/// A store as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreState {
    /// The SR.
    pub sr: Uuid,
    /// Bytes there are.
    pub physical_size: u64,
    /// Bytes that are taken, by whatever it be.
    pub physical_utilisation: u64,
    /// Bytes that the volumes would take if they were full.
    pub virtual_allocation: u64,
    /// In the answer to a scan.
    pub volumes: Vec<VolumeState>,
    /// In the answer to a probe.
    pub probed: Vec<Probed>,
}

impl StoreState {
    /// A store of which no sizes are told.
    pub fn of(sr: Uuid) -> Self {
        Self {
            sr,
            physical_size: 0,
            physical_utilisation: 0,
            virtual_allocation: 0,
            volumes: Vec::new(),
            probed: Vec::new(),
        }
    }

    /// The same without the list of its volumes.
    pub fn briefly(self) -> Self {
        Self { volumes: Vec::new(), ..self }
    }
}

/// Something that can be attached.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Probed {
    /// With which configuration.
    pub device_config: BTreeMap<String, String>,
    /// Nothing is missing in it.
    pub complete: bool,
    /// The store that is there.
    pub sr: Option<Uuid>,
    /// What else is known.
    pub extra: BTreeMap<String, String>,
}

/// What a volume is to be opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Only to read.
    pub read_only: bool,
    /// Others may have it open to write at the same time, if its format allows that.
    pub sharable: bool,
    /// The VM that it is for: what it has open itself already is in nobody's way.
    pub vm: Option<Uuid>,
}

/// An image that can be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockSource {
    /// File or block device.
    pub path: PathBuf,
    /// What its bytes mean.
    pub format: ImageFormat,
    /// It must not be written.
    pub read_only: bool,
    /// Several may write to it at the same time.
    pub sharable: bool,
}
