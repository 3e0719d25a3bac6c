//! `xenith agent`: the host's domains, on the word of the pool's master.

use anyhow::Context;
use member_agent::Agent;

use super::{on_runtime, signals};
use crate::cli::Daemon;
use crate::config::{self, AgentConfig};
use crate::telemetry;

/// Runs the agent until it is told to end. Its domains go on.
pub fn agent(flags: &Daemon) -> anyhow::Result<()> {
    let config: AgentConfig = config::load(&flags.config)?;
    if flags.check {
        eprintln!("{} is in order", flags.config.display());
        return Ok(());
    }
    on_runtime(async {
        let host = config.agent.host_uuid.to_string();
        let telemetry = telemetry::start("xenith-agent", &host, &config.log, flags.log_format, &config.traces)?;
        let ending = signals::until_told_to_end()?;
        Agent::start(config.agent, ending).await.context("the agent cannot start")?.ended().await;
        tracing::info!("the agent has ended");
        telemetry.finish();
        Ok(())
    })
}
