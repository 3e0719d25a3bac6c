//! `xenith controller`.

use crate::cli::Daemon;
use crate::config::{self, ControllerConfig};
use crate::telemetry;

use super::{on_runtime, signals};

/// Runs the controller until it is told to end.
pub fn controller(flags: &Daemon) -> anyhow::Result<()> {
    let config: ControllerConfig = config::load(&flags.config)?;
    if flags.check {
        return Ok(());
    }
    on_runtime(async {
        let telemetry = telemetry::start(
            "xenith-controller",
            &config.host_uuid.to_string(),
            &config.log,
            flags.log_format,
            &config.traces,
        )?;
        let ending = signals::until_told_to_end()?;
        let _listener = tokio::net::TcpListener::bind(config.api.listen[0]).await?;
        let _ = std::fs::remove_file(config.api.socket.as_ref().unwrap());
        let _socket = tokio::net::UnixListener::bind(config.api.socket.as_ref().unwrap())?;
        ending.cancelled().await;
        telemetry.finish();
        Ok(())
    })
}
