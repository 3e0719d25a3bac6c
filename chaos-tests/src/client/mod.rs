//! A small XenAPI client: JSON-RPC 2.0 with keep-alive over TLS, plain HTTP or a Unix socket.
//!
//! It does what the pool asks of clients and no more: it follows `HOST_IS_SLAVE`, tries the other hosts when one does not
//! answer, and waits for nothing without a limit. Sessions are passed by hand where a test is about them.

mod connection;
mod failure;
mod pool;
mod trust;

pub use connection::{Answer, Connection, Endpoint};
pub use failure::{CallError, Failure};
pub use pool::{Client, Credentials};
pub use trust::trust_anyone;
