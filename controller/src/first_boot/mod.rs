//! What a client expects to find: a pool that has just been founded, and hosts that have just come up.
//!
//! Each is one transaction that expects not to have happened yet, so that a master that dies half-way
//! leaves nothing half done and its successor does it once.

mod host;
mod licence;
mod pool;
mod storage;
mod templates;

use std::net::IpAddr;
use std::sync::Arc;

use datamodel::fields::{member, pool as pool_fields};
use datamodel::{Host, Member, Pool, Ref};
use proto::agent::HelloReply;
use raft_store::CommitError;
use uuid::Uuid;

use crate::controller::Shared;
use crate::failure::{Failure, Served};

/// The small Linux that the lab's template boots. Empty texts: no such template.
#[derive(Debug, Clone, Default)]
pub struct Guest {
    /// Path of the kernel on every host.
    pub kernel: String,
    /// Path of its initial RAM disk.
    pub ramdisk: String,
    /// Its command line.
    pub args: String,
}

/// A host that the pool is founded with.
#[derive(Debug, Clone)]
pub struct InitialMember {
    /// Its number in the Raft group.
    pub node_id: u64,
    /// Its uuid.
    pub host_uuid: Uuid,
    /// Where clients reach it.
    pub api_address: IpAddr,
    /// `ip:port` of its peer listener.
    pub peer_address: String,
    /// `ip:port` of its agent.
    pub agent_address: String,
    /// Whether it keeps the pool's state.
    pub replica: bool,
}

/// Founds the pool where there is none. Only the host that was given root's first password can.
pub(crate) async fn found(shared: &Arc<Shared>) -> Served<()> {
    let state = shared.store.read().await?;
    if state.all::<Pool>().next().is_some() {
        return Ok(());
    }
    if shared.config.initial_password_hash.is_empty() {
        let founder = shared.config.initial_members.iter().map(|member| member.node_id).min().unwrap_or(1);
        tracing::info!(founder, "the pool is not founded: handing the lead to the host that can");
        return Ok(shared.store.transfer_leader(founder).await?);
    }
    let mut change = shared.transaction();
    change.expect_class_empty(<Pool as datamodel::ClassKind>::ID);
    pool::found(shared, &mut change);
    match shared.store.commit(change).await {
        Ok(index) => {
            tracing::info!(%index, "the pool is founded");
            Ok(())
        }
        Err(CommitError::Conflict(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Makes `pool.master` say who leads, in the first transaction of a term.
pub(crate) async fn take_office(shared: &Arc<Shared>) -> Served<()> {
    let state = shared.store.read().await?;
    let this = i64::try_from(shared.store.node_id()).unwrap_or(0);
    let row = state.all::<Member>().find(|row| row.get(member::NODE_ID) == this);
    let host_ref: Ref<Host> = row.map_or(Ref::NULL, |row| row.get(member::HOST));
    let Some(pool_row) = state.all::<Pool>().next() else { return Err(Failure::NotLeader) };
    if host_ref.is_null() || pool_row.get(pool_fields::MASTER) == host_ref {
        return Ok(());
    }
    let mut change = shared.transaction();
    change.set(pool_row.typed::<Pool>(), pool_fields::MASTER, host_ref);
    shared.store.commit(change).await?;
    Ok(())
}

/// A host's agent has answered: its rows are made, or brought up to date. The host.
pub(crate) async fn attach(shared: &Arc<Shared>, reference: Ref<Member>, reply: &HelloReply) -> Served<Ref<Host>> {
    let host_ref = host::attach(shared, reference, reply).await?;
    take_office(shared).await?;
    Ok(host_ref)
}
