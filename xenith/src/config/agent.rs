//! `agent.toml`: how a host's domains are run.

use serde::{Deserialize, Serialize};

use super::{Check, Fault, Log, Traces, fault, tls_files};

/// The whole file.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// The agent itself.
    pub agent: member_agent::Config,
    /// Logs.
    #[serde(default)]
    pub log: Log,
    /// Spans.
    #[serde(default)]
    pub traces: Traces,
}

impl Check for AgentConfig {
    fn check(&self) -> Result<(), Fault> {
        let agent = &self.agent;
        if !matches!(agent.driver.as_str(), "auto" | "qemu" | "sim") {
            return fault(
                "agent.driver",
                format_args!("there is no driver {:?}; there are qemu, sim and auto", agent.driver),
            );
        }
        if agent.memory_total_mib.is_some_and(|total| total <= agent.control_domain_memory_mib) {
            return fault(
                "agent.memory_total_mib",
                "no guest would fit: it must exceed agent.control_domain_memory_mib",
            );
        }
        let tls = &agent.tls;
        tls_files("agent.tls", &tls.ca, &tls.certificate, &tls.key)
    }
}
