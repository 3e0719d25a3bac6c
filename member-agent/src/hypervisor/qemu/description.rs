//! What the agent keeps on disk about a domain, so that its successor finds it again.
//!
//! The directory `domains/<vm uuid>` holds the description and everything that is QEMU's: the sockets `qmp`,
//! `console` and `vnc`, `console.log`, `qemu.log` and `qemu.pid`. It is there before QEMU is and goes after it. A
//! description that says *building* belongs to a start that never came to an answer: such a domain is taken down.

use std::path::Path;
use std::{fs, io};

use serde::{Deserialize, Serialize};

use crate::files::{self, Durability};
use crate::hypervisor::domain::{DomainSpec, DomainState};

/// The only format there has been.
const FORMAT: u32 = 1;

/// How far a start has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    /// Its start was never answered.
    Building,
    /// It is a domain.
    Live,
}

/// A domain on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Description {
    format: u32,
    pub phase: Phase,
    pub spec: DomainSpec,
    pub state: DomainState,
}

impl Description {
    /// A description of a domain that is being built.
    pub fn new(spec: DomainSpec, state: DomainState) -> Self {
        Self { format: FORMAT, phase: Phase::Building, spec, state }
    }

    /// Writes it. The loss of power ends domains anyway, so page cache is enough.
    pub fn save(&self, dir: &Path) -> io::Result<()> {
        files::replace(&dir.join("domain.json"), &serde_json::to_vec_pretty(self)?, Durability::Process)
    }

    /// Reads it; a newer format is an error.
    pub fn load(dir: &Path) -> io::Result<Self> {
        let description: Self = serde_json::from_slice(&fs::read(dir.join("domain.json"))?)?;
        if description.format > FORMAT {
            return Err(io::Error::other(format!("domain.json has the newer format {}", description.format)));
        }
        Ok(description)
    }
}
