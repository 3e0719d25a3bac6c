//! `witness.toml`: a third vote for a pool of two hosts.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Check, Fault, Log, Raft, Traces, fault};

/// The whole file.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct WitnessConfig {
    /// What the pool knows it by; of no host.
    pub uuid: Uuid,
    /// Directory of its copy of the database and of its certificates.
    pub data_dir: PathBuf,
    /// Where the hosts reach it: the address they know, and the one it listens on.
    pub listen: SocketAddr,
    /// Timings of consensus: the same as on the hosts.
    #[serde(default)]
    pub raft: Raft,
    /// Logs.
    #[serde(default)]
    pub log: Log,
    /// Spans.
    #[serde(default)]
    pub traces: Traces,
}

impl Check for WitnessConfig {
    fn check(&self) -> Result<(), Fault> {
        if self.listen.ip().is_unspecified() {
            return fault("listen", "must be the address by which the hosts reach it");
        }
        self.raft.check()
    }
}
