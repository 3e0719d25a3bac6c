//! Who is to be master next, when somebody asks for it.

use std::time::Duration;

use datamodel::{Host, Pool, Ref, errors};

use super::{expect_no_ha, is_live, member_of, node_id, voters};
use crate::call::Call;
use crate::failure::{Failure, Served, refuse};

/// How long a host may take to become one that can lead.
const CATCH_UP: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(25);

/// `pool.designate_new_master`: the lead is handed to a host, which votes from then on if it did not. The call is
/// answered by the old master, which has lost the lead by then.
pub(crate) async fn designate(cx: &Call, this: Ref<Host>) -> Served<()> {
    let row = cx.row(this)?;
    expect_no_ha(&cx.state)?;
    if cx.state.all::<Pool>().any(|row| row.get(datamodel::fields::pool::MASTER) == this) {
        return Ok(());
    }
    if !is_live(&cx.state, &row) {
        return refuse(errors::host_offline(this));
    }
    let store = &cx.shared.store;
    let candidate = member_of(&cx.state, this).filter(|row| row.get(datamodel::fields::member::REPLICA));
    let Some(node) = candidate.map(|row| node_id(row)) else {
        return refuse(errors::operation_not_allowed("The host keeps no copy of the pool's database"));
    };
    if tokio::time::timeout(CATCH_UP, close_behind(cx, node)).await.is_err() {
        return refuse(errors::host_offline(this));
    }
    // Until it leads, nobody finds that there is a voter too many.
    let _turn = cx.shared.admissions.lock().await;
    if !store.voters().contains(&node) {
        let mut voters = store.voters();
        voters.insert(node);
        let promoted = tokio::time::timeout(CATCH_UP, store.set_voters(voters)).await;
        if !matches!(promoted, Ok(Ok(()))) {
            return refuse(errors::host_offline(this));
        }
    }
    let handed = store.transfer_leader(node).await;
    handed.map_err(|_| Failure::Api(errors::internal_error("the host did not take the lead")))
}

/// Waits until a member has most of the log.
async fn close_behind(cx: &Call, node: u64) {
    let store = &cx.shared.store;
    while !store.progress().get(&node).is_some_and(|seen| voters::is_close(seen, store.state().applied)) {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
