//! SIGTERM and SIGINT ask a daemon to end; the second one ends it at once.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status after a second signal: the conventional one of a process that SIGTERM ended.
const IMPATIENT: i32 = 143;

/// A token that is cancelled by the first signal.
pub fn until_told_to_end() -> anyhow::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    // A terminal that is closed does not end a daemon.
    let mut hangup = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
    let ending = CancellationToken::new();
    let told = ending.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => continue,
            }
            if told.is_cancelled() {
                tracing::warn!("told twice to end: ending at once");
                std::process::exit(IMPATIENT);
            }
            tracing::info!("told to end");
            told.cancel();
        }
    });
    Ok(ending)
}
