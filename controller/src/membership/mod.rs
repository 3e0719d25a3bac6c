//! Which hosts are of the pool, which of them vote, and how they come and go.
//!
//! The `member` rows say what is wanted; the Raft group follows them (`voters`), as do the rows of hosts
//! (`admission`, `departure`). A host that changes its pool takes another *seat*: a directory of its own with database,
//! node id and certificates, which becomes the host's only one by an atomic rename and is read at the next start. So a
//! crash on the way leaves it in one pool or in the other, never in both.

pub(crate) mod admission;
pub(crate) mod departure;
pub(crate) mod emergency;
pub(crate) mod join;
pub(crate) mod mastership;
pub(crate) mod precondition;
pub(crate) mod rotation;
pub(crate) mod seat;
pub(crate) mod shown;
pub(crate) mod stranger;
pub(crate) mod trust;
pub(crate) mod voters;

use datamodel::fields::{host, host_metrics, member, pool};
use datamodel::{Host, Member, Pool, Ref, errors};
use raft_store::{Row, State};

use crate::call::persist;
use crate::failure::{Served, refuse};

pub use join::{Newcomer, enrol_witness};
pub use rotation::told_to_have;
pub use seat::{Abroad, Alone, AskError, ExchangeError, Home, Peers, Seat, Standing, Surroundings};
pub use trust::Trust;
pub use voters::Policy as VoterPolicy;

/// How a member stands; the word in its row.
pub(crate) const JOINING: &str = "joining";
/// It has been ejected, and is told so until it is sure to know.
pub(crate) const LEAVING: &str = "leaving";

/// Whether a host's agent is heard.
pub(crate) fn is_live(state: &State, row: &Row) -> bool {
    state.row(row.get(host::METRICS)).is_some_and(|metrics| metrics.get(host_metrics::LIVE))
}

/// The member that runs on a host.
pub(crate) fn member_of(state: &State, this: Ref<Host>) -> Option<&std::sync::Arc<Row>> {
    state.all::<Member>().find(|row| row.get(member::HOST) == this)
}

pub(crate) fn node_id(row: &Row) -> u64 {
    u64::try_from(row.get(member::NODE_ID)).unwrap_or(0)
}

/// Refuses while high availability watches over the pool.
pub(crate) fn expect_no_ha(state: &State) -> Served<()> {
    if state.all::<Pool>().any(|row| row.get(pool::HA_ENABLED)) {
        return refuse(errors::ha_is_enabled());
    }
    Ok(())
}
