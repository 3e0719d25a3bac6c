//! Storage, as the pool means it: what SRs, PBDs, VDIs and VBDs are, and what may be done to them.
//!
//! Rows say what is wanted and known; images are what is. What is done to an image is an operation whose steps an agent
//! does, and the rows follow in the transaction that ends it. What may be done when is in [`rules`], as tables; who does
//! it in [`reach`]. One writer is held by the versions of rows: a drive is marked in the transaction that expects its
//! disk's row as it was looked at, so that two that would share a disk cannot both begin.

mod device;
pub(crate) mod disks;
mod keep;
pub(crate) mod pbd;
pub(crate) mod reach;
pub(crate) mod rules;
mod scan;
pub(crate) mod sr;
pub(crate) mod vbd;
pub(crate) mod vdi;
pub(crate) mod volumes;

use std::collections::BTreeMap;

use datamodel::{Pbd, Ref};
use raft_store::{Row, State};

pub(crate) use self::device::{choose as choose_device, free as free_devices};
pub(crate) use self::keep::{keep, unplugged_by_boot};
use crate::operations::Kind;

/// What is done to storage, for the journal.
pub(crate) const KINDS: &[&[&dyn Kind]] = &[sr::KINDS, pbd::KINDS, vdi::KINDS, vbd::KINDS];

/// The key by which a connection waits to be plugged, until it is.
pub(crate) const PLUG_AT_BOOT: &str = "plug_at_boot";

/// The other_config of a connection that waits to be plugged.
pub(crate) fn plug_at_boot() -> BTreeMap<String, String> {
    BTreeMap::from([(PLUG_AT_BOOT.to_owned(), "true".to_owned())])
}

/// Whether any host is connected to an SR.
pub(crate) fn connected(state: &State, sr_row: &Row) -> bool {
    let pbds = sr_row.get(datamodel::fields::sr::PBDS).into_iter();
    pbds.filter_map(|reference: Ref<Pbd>| state.row(reference))
        .any(|row| row.get(datamodel::fields::pbd::CURRENTLY_ATTACHED))
}
