//! A host that was forgotten while it was away, and how it finds out.
//!
//! A host that leaves reads so in its log. One that was dead at the time, and for longer than the pool keeps telling it,
//! is no member of the Raft group any more: nobody sends it anything. So a host that hears of no master asks those whom it
//! knows over the peers' connections. The master alone answers, from what a majority has acknowledged, and what it says
//! needs no memory: who is in no member row is no member, and since node ids are never reused, never will be again.

use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::member;
use datamodel::{Member, Pool};
use raft_store::{Leadership, State};
use uuid::Uuid;

use super::seat::{Standing, Surroundings};
use super::{LEAVING, node_id};
use crate::controller::Shared;

/// A host without a master for so long has not just lost one.
const PATIENCE: Duration = Duration::from_secs(3);
/// It asks again so often.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// What this node knows of another's membership, as master.
pub(crate) async fn standing(shared: &Shared, node: u64, host: Uuid) -> Standing {
    let Ok(state) = shared.store.read().await else { return Standing::Unknown };
    if state.all::<Pool>().next().is_none() {
        return Standing::Unknown;
    }
    let uuid = host.to_string();
    let stays = |row: &Arc<raft_store::Row>| {
        row.get(member::STANDING) != LEAVING && (node_id(row) == node || row.get(member::HOST_UUID) == uuid)
    };
    if state.all::<Member>().any(stays) { Standing::Member } else { Standing::Stranger }
}

/// Waits until somebody who knows says that this host is not of its pool any more.
pub(crate) async fn found_out(shared: &Shared, surroundings: &Surroundings) {
    let mut leadership = shared.store.leadership();
    loop {
        let masterless = async {
            if leadership.wait_for(|now| *now == Leadership::Electing).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        masterless.await;
        let found = leadership.wait_for(|now| *now != Leadership::Electing);
        if tokio::time::timeout(PATIENCE, found).await.is_ok() {
            continue;
        }
        if is_stranger(&shared.store.state(), shared.store.node_id(), surroundings).await {
            return;
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

async fn is_stranger(state: &State, this: u64, surroundings: &Surroundings) -> bool {
    let others = state.all::<Member>().filter(|row| row.get(member::REPLICA) && node_id(row) != this);
    let host = surroundings.this.host_uuid;
    let asked =
        others.map(|row| async move { surroundings.peers.standing(&row.get(member::PEER_ADDRESS), this, host).await });
    let told = futures::future::join_all(asked).await;
    // One who leads knows better than one who led: should two answer, the host stays.
    told.contains(&Standing::Stranger) && !told.contains(&Standing::Member)
}
