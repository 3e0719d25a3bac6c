//! The peers: entries, votes and snapshots over gRPC with mutual TLS.
//!
//! Entries travel on one stream per peer, so that a request need not wait for the last one's answer.

mod acknowledged;
mod client;
mod server;
mod snapshot;

pub(crate) use acknowledged::Acknowledged;
pub(crate) use client::PeerFactory;
pub use client::{Dial, PeerChannel, PeerTls};
pub(crate) use server::{Heard, PeerService};
