//! The two daemons: read the configuration, start logging, build the parts, run until told to end.

mod agent;
mod controller;
mod room;
mod seat;
mod signals;
mod witness;

use std::time::Duration;

use anyhow::Context;

pub use agent::agent;
pub use controller::controller;
pub use witness::witness;

/// How long tasks may take to end after the last of them was told to.
const RUNTIME_LIMIT: Duration = Duration::from_secs(2);

fn on_runtime<T>(daemon: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    let outcome = runtime.block_on(daemon);
    runtime.shutdown_timeout(RUNTIME_LIMIT);
    outcome
}
