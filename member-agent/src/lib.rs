//! The agent of a host: it alone touches domains, on the word of the pool's master.
//!
//! ```text
//!   master ──gRPC, mutual TLS──► service ─► steps ─► hypervisor/{qemu, sim}
//!                                             ├────► storage/{file, ext, nfs, lvm, iso, udev, sim}
//!                                             └────► ledger (epochs and outcomes, on disk)
//! ```
//!
//! What it promises to the master:
//! - A step of an older epoch than the highest it has seen is refused, for ever (`ledger`).
//! - A step is done at most once: its repetition is answered with the first outcome, also while the first still
//!   runs and after this process died in between (`steps`).
//! - Whoever watches sees every domain as it is and then each change, within half a second also when a domain
//!   dies by itself (`hypervisor::roster`).
//! - Domains outlive the agent: it ends, by request or by force, without touching them, and finds them again.

mod agent;
mod config;
mod console;
mod facts;
mod files;
pub mod hypervisor;
mod identity;
mod ledger;
mod service;
pub mod step;
mod steps;
mod storage;
mod wire;

pub use agent::{Agent, StartError};
pub use config::{AcceleratorChoice, Config, NicSource, StoreChoice, TlsFiles};
