//! What may be done to disks, drives and stores, and when.

use datamodel::enums::{StorageOperations, VbdOperations, VdiOperations};
use datamodel::fields::{sr, vbd, vdi};
use raft_store::{Row, State};

pub(crate) fn vdi_allowed(_: &State, row: &Row) -> Vec<VdiOperations> {
    row.get(vdi::ALLOWED_OPERATIONS)
}

pub(crate) fn vbd_allowed(_: &State, row: &Row) -> Vec<VbdOperations> {
    row.get(vbd::ALLOWED_OPERATIONS)
}

pub(crate) fn sr_allowed(_: &State, row: &Row) -> Vec<StorageOperations> {
    row.get(sr::ALLOWED_OPERATIONS)
}
