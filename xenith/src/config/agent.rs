//! `agent.toml`: how a host's domains are run.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Check, Fault, Log, Tls, Traces, fault};
use crate::cli::Driver;

/// The whole file.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// Uuid of this host, as the pool knows it.
    pub host_uuid: Uuid,
    /// Where the pool's master reaches this agent (mutual TLS).
    pub listen: SocketAddr,
    /// Where domains, their sockets and the ledger of operations are kept.
    pub state_dir: PathBuf,
    /// What runs the guests: `qemu` or `sim`.
    pub driver: Driver,
    /// Who this host is to the pool's master.
    pub tls: Tls,
    /// Memory for domains and the control domain together. Without it, what the machine has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Logs.
    #[serde(default)]
    pub log: Log,
    /// Spans.
    #[serde(default)]
    pub traces: Traces,
}

impl Check for AgentConfig {
    fn check(&self) -> Result<(), Fault> {
        if self.memory_mib.is_some_and(|mib| mib < 64) {
            return fault("memory_mib", "no guest fits into less than 64 MiB");
        }
        self.tls.check()
    }
}
