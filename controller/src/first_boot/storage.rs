//! Storage of a new pool: drivers, a shared SR, and a local one for each host.

use std::collections::BTreeMap;

use datamodel::fields::{pbd, sm, sr};
use datamodel::{Host, Pbd, Ref, Sm, Sr};
use raft_store::{NewRow, State, Transaction};

use crate::controller::Shared;

/// (type, name, description, features, shared).
const DRIVERS: &[(&str, &str, &str, &[&str])] = &[
    (
        "file",
        "File",
        "Disk images in a directory",
        &[
            "SR_PROBE",
            "SR_UPDATE",
            "VDI_CREATE",
            "VDI_DELETE",
            "VDI_ATTACH",
            "VDI_DETACH",
            "VDI_CLONE",
            "VDI_SNAPSHOT",
            "VDI_RESIZE",
            "VDI_UPDATE",
        ],
    ),
    (
        "ext",
        "Local EXT",
        "Disk images in a local file system",
        &[
            "SR_PROBE",
            "SR_UPDATE",
            "VDI_CREATE",
            "VDI_DELETE",
            "VDI_ATTACH",
            "VDI_DETACH",
            "VDI_CLONE",
            "VDI_SNAPSHOT",
            "VDI_RESIZE",
            "VDI_UPDATE",
        ],
    ),
    ("iso", "ISO", "CD images in a directory", &["VDI_ATTACH", "VDI_DETACH"]),
];

fn sr_row(shared: &Shared, reference: Ref<Sr>, ty: &str, name: &str, key: &str, pool_wide: bool) -> NewRow<Sr> {
    NewRow::new(reference, shared.uuid())
        .with(sr::NAME_LABEL, name.to_owned())
        .with(sr::TYPE, ty.to_owned())
        .with(sr::CONTENT_TYPE, "user".to_owned())
        .with(sr::SHARED, pool_wide)
        .with(sr::OTHER_CONFIG, BTreeMap::from([("i18n-key".to_owned(), key.to_owned())]))
}

/// Drivers and the shared SR; the SR.
pub(super) fn pool_rows(shared: &Shared, change: &mut Transaction) -> Ref<Sr> {
    for (ty, name, description, features) in DRIVERS {
        change.insert(
            NewRow::new(Ref::<Sm>::new(shared.uuid()), shared.uuid())
                .with(sm::NAME_LABEL, (*name).to_owned())
                .with(sm::NAME_DESCRIPTION, (*description).to_owned())
                .with(sm::TYPE, (*ty).to_owned())
                .with(sm::VENDOR, "Xenith".to_owned())
                .with(sm::VERSION, "1.0".to_owned())
                .with(sm::REQUIRED_API_VERSION, "1.0".to_owned())
                .with(sm::CAPABILITIES, features.iter().map(|feature| (*feature).to_owned()).collect())
                .with(sm::FEATURES, features.iter().map(|feature| ((*feature).to_owned(), 1)).collect())
                .with(
                    sm::CONFIGURATION,
                    BTreeMap::from([("location".to_owned(), "directory that holds the images".to_owned())]),
                ),
        );
    }
    let reference = Ref::new(shared.uuid());
    change.insert(sr_row(shared, reference, "file", "Shared storage", "shared-storage", true));
    reference
}

/// A host's local SR and its connections to it and to every shared SR.
pub(super) fn host_rows(shared: &Shared, state: &State, change: &mut Transaction, host: Ref<Host>) {
    let local = Ref::new(shared.uuid());
    change.insert(sr_row(shared, local, "ext", "Local storage", "local-storage", false));
    let pool_wide = state.all::<Sr>().filter(|row| row.get(sr::SHARED)).map(|row| (row.typed::<Sr>(), "shared"));
    for (target, location) in std::iter::once((local, "local")).chain(pool_wide) {
        change.insert(
            NewRow::new(Ref::<Pbd>::new(shared.uuid()), shared.uuid())
                .with(pbd::HOST, host)
                .with(pbd::SR, target)
                .with(pbd::CURRENTLY_ATTACHED, true)
                .with(pbd::DEVICE_CONFIG, BTreeMap::from([("location".to_owned(), location.to_owned())])),
        );
    }
}
