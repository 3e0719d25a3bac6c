//! What a pool is measured beside: etcd, or the pool of another build.

use std::time::Duration;

use super::etcd::Etcd;
use super::load::{Round, round};
use super::pool::Pool;

/// How long clients work before anything counts.
const WARM: Duration = Duration::from_millis(500);

/// One that takes the load. Dropped, it is gone.
pub enum Peer {
    /// Three nodes of etcd.
    Etcd(Etcd),
    /// Three hosts.
    Pool(Box<Pool>),
}

impl Peer {
    /// A round of writes by so many clients.
    pub async fn write(&mut self, clients: usize, number: u64, measured: Duration) -> anyhow::Result<Round> {
        Ok(match self {
            Self::Etcd(etcd) => round(etcd.writers(clients).await?, number, WARM, measured).await?.0,
            Self::Pool(pool) => round(pool.writers(clients).await?, number, WARM, measured).await?.0,
        })
    }

    /// A round of reads of what those clients wrote.
    pub async fn read(&mut self, clients: usize, number: u64, measured: Duration) -> anyhow::Result<Round> {
        Ok(match self {
            Self::Etcd(etcd) => round(etcd.readers(clients).await?, number, WARM, measured).await?.0,
            Self::Pool(pool) => round(pool.readers(clients).await?, number, WARM, measured).await?.0,
        })
    }
}
