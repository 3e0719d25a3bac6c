//! Wire contracts of peers and agents, with the version each field arrived in.
//!
//! The sources are the files under `proto/proto/`; the code is generated at build time.
#![allow(missing_docs, clippy::all)]

/// The agent of a host, as the master calls it.
pub mod agent {
    tonic::include_proto!("xenith.agent.v1");
}

/// How a message becomes bytes and back.
pub use prost::Message;

/// Calls that a host sends on to the master.
pub mod forward {
    tonic::include_proto!("xenith.forward.v1");
}

/// What members ask one another about their membership.
pub mod members {
    tonic::include_proto!("xenith.members.v1");
}

/// Consensus among the voters and learners of a pool.
pub mod raft {
    tonic::include_proto!("xenith.raft.v1");
}
