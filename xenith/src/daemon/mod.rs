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

/// A thread that does nothing but consensus: however many clients there are, the kernel gives it its turn, and a
/// heartbeat, a vote or a commit never waits behind a queue of readers. One, because a commit is a dozen short steps, and
/// handing each to another thread takes longer than the step.
const CONSENSUS_THREADS: usize = 1;

fn consensus_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONSENSUS_THREADS)
        .thread_name("consensus")
        .enable_all()
        .build()
        .context("cannot start the runtime of consensus")
}

fn on_runtime<T>(daemon: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    let outcome = runtime.block_on(daemon);
    runtime.shutdown_timeout(RUNTIME_LIMIT);
    outcome
}
