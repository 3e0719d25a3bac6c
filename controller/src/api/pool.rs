//! Messages of the class pool.

use datamodel::fields::member;
use datamodel::{Host, Member, Ref, errors};

use crate::call::Call;
use crate::failure::{Failure, Served};

/// Hands the lead to a host. The call is answered by the old master, which has lost it by then.
pub(super) async fn designate_new_master(cx: &Call, host: Ref<Host>) -> Served<()> {
    cx.row(host)?;
    let member = cx.state.all::<Member>().find(|row| row.get(member::HOST) == host);
    let node = member.and_then(|row| u64::try_from(row.get(member::NODE_ID)).ok());
    let node = node.ok_or_else(errors::host_not_live)?;
    let handed = cx.shared.store.transfer_leader(node).await;
    handed.map_err(|_| Failure::Api(errors::internal_error("the host did not take the lead")))
}

/// Nothing to do: what is acknowledged is on a majority's disks.
pub(super) async fn sync_database(_: &Call) -> Served<()> {
    Ok(())
}
