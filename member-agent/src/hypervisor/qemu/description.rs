//! What the agent keeps on disk about a domain, so that its successor finds it again.
//!
//! The directory `domains/<vm uuid>` holds the description and everything that is QEMU's: the sockets `qmp`,
//! `console`, `agent` and `vnc`, `console.log`, `qemu.log` and `qemu.pid`. It is there before QEMU is and goes after it. A
//! description that says *building* belongs to a start that never came to an answer: such a domain is taken down.
//! What is done to a living one in more than one step is said here before the first: who finds it so looks how far it
//! came.

use std::path::Path;
use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::blocks::{Attached, Node};
use crate::facts::unix_seconds;
use crate::files::{self, Durability};
use crate::hypervisor::domain::{Disk, DomainSpec, DomainState, Power};

/// The only format there has been.
const FORMAT: u32 = 1;
/// Seconds that firmware may take on a busy machine.
const FIRMWARE: u64 = 5;

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
    /// What it was built of, and has become since.
    pub spec: DomainSpec,
    pub state: DomainState,
    #[serde(default)]
    pub disks: Vec<Attached>,
    /// Its memory is being written to an image; whether its vCPUs ran before.
    #[serde(default)]
    pub saving: Option<bool>,
    /// Unix seconds of the first instruction since it was built or reset.
    #[serde(default)]
    pub first_run: Option<u64>,
    #[serde(default)]
    nodes: u64,
}

impl Description {
    /// A description of a domain that is being built.
    pub fn new(spec: DomainSpec, state: DomainState) -> Self {
        let disks = spec.disks.clone();
        let mut description = Self {
            format: FORMAT,
            phase: Phase::Building,
            spec,
            state,
            disks: Vec::new(),
            saving: None,
            first_run: None,
            nodes: 0,
        };
        description.runs();
        for disk in disks {
            let nodes = if disk.path.is_empty() { Vec::new() } else { vec![description.node(&disk.path)] };
            description.disks.push(Attached { disk, nodes, ..Attached::default() });
        }
        description.state.disks = description.vbds();
        description
    }

    /// Notes when its vCPUs began.
    pub fn runs(&mut self) {
        if self.state.power == Power::Running {
            self.first_run.get_or_insert(unix_seconds());
        }
    }

    /// Whether its firmware may still be on its way into memory. A machine that is reset just then never comes up: the
    /// reset leaves half of the firmware there, and that is what runs.
    pub fn firmware_may_be_at_work(&self) -> bool {
        self.first_run.is_some_and(|first| unix_seconds() < first + FIRMWARE)
    }

    /// A name for a node that no other has had.
    pub fn node(&mut self, path: &str) -> Node {
        self.nodes += 1;
        Node::new(format!("image{}", self.nodes), path)
    }

    /// The disks that are plugged, by VBD.
    pub fn vbds(&self) -> Vec<String> {
        let there = self.disks.iter().filter(|attached| !attached.coming && !attached.empty);
        there.map(|attached| attached.disk.vbd.clone()).collect()
    }

    /// The disks whose images are open.
    pub fn images(&self) -> Vec<Disk> {
        self.disks.iter().filter(|attached| !attached.empty).map(|attached| attached.disk.clone()).collect()
    }

    /// The disk of a VBD.
    pub fn disk(&mut self, vbd: &str) -> Option<&mut Attached> {
        self.disks.iter_mut().find(|attached| attached.disk.vbd == vbd)
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
