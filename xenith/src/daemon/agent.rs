//! `xenith agent`.

use crate::cli::Daemon;
use crate::config::{self, AgentConfig};
use crate::telemetry;

use super::{on_runtime, signals};

/// Runs the agent until it is told to end.
pub fn agent(flags: &Daemon) -> anyhow::Result<()> {
    let config: AgentConfig = config::load(&flags.config)?;
    if flags.check {
        return Ok(());
    }
    on_runtime(async {
        let telemetry = telemetry::start("xenith-agent", &config.host_uuid.to_string(), &config.log, flags.log_format, &config.traces)?;
        let ending = signals::until_told_to_end()?;
        let _listener = tokio::net::TcpListener::bind(config.listen).await?;
        ending.cancelled().await;
        telemetry.finish();
        Ok(())
    })
}
