//! Measurements of a pool on this machine, beside etcd on the same machine, the same disk and in the same run.
//!
//! Both peers get the same load from the same generator: so many clients, each with a connection of its own and one
//! request on its way at a time. Rounds alternate between the peers, so that whatever else the machine does meets both.
//! The peers keep their default timings; each acknowledges a write only after a majority has it on disk.

pub mod bulk;
pub mod disks;
pub mod etcd;
pub mod events;
pub mod failover;
pub mod load;
pub mod machine;
pub mod machines;
pub mod peer;
pub mod pool;
pub mod report;
pub mod restore;
pub mod scale;
pub mod wire;

/// The proto3 subset of etcd's API that is needed here.
#[allow(missing_docs, clippy::all, reason = "generated")]
pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}

/// A load step: one operation of one client at a time, each awaited to its acknowledgement.
pub trait Operation: Send + 'static {
    /// The `number`th operation of this client. Numbers are unique within a run, so that no write repeats a value.
    fn run(&mut self, number: u64) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// What is written: a text of 64 bytes that is never the same twice.
pub fn description(number: u64) -> String {
    format!("{number:020} what an operator may write of a machine {:08x}", number as u32)
}
