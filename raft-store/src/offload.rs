//! Work that blocks, away from the runtime's workers.
//!
//! A runtime of one thread says that nothing may run beside it, which is what makes a simulation repeatable: there the
//! work is done on the spot.

use std::io;

use tokio::runtime::{Handle, RuntimeFlavor};

/// Whether this runtime has no thread but this one.
pub(crate) fn is_alone() -> bool {
    Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::CurrentThread)
}

/// Does work that blocks.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    if is_alone() { Ok(work()) } else { tokio::task::spawn_blocking(work).await.map_err(io::Error::other) }
}
