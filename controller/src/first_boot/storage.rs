//! Storage of a new pool: drivers, a shared SR, and a local one for each host.

use std::collections::BTreeMap;

use datamodel::fields::{pbd, sm, sr};
use datamodel::{Host, Pbd, Ref, Sm, Sr};
use raft_store::{NewRow, State, Transaction};

use crate::controller::Shared;
use crate::storage::plug_at_boot;

/// What a driver of disks can do: images at any time, whole logical volumes all but the last.
const OF_IMAGES: &[&str] = &[
    "SR_PROBE",
    "SR_SCAN",
    "SR_UPDATE",
    "VDI_CREATE",
    "VDI_DELETE",
    "VDI_ATTACH",
    "VDI_DETACH",
    "VDI_CLONE",
    "VDI_SNAPSHOT",
    "VDI_RESIZE",
    "VDI_UPDATE",
    "VDI_INTRODUCE",
    "VDI_RESIZE_ONLINE",
];
const OF_VOLUMES: &[&str] = match OF_IMAGES.split_last() {
    Some((_, rest)) => rest,
    None => &[],
};

/// What a driver of what is simply there can do.
const OF_MEDIA: &[&str] =
    &["SR_PROBE", "SR_SCAN", "SR_UPDATE", "VDI_ATTACH", "VDI_DETACH", "VDI_UPDATE", "VDI_INTRODUCE"];

/// A key of a device_config, and what it says.
type Setting = (&'static str, &'static str);

struct Driver {
    ty: &'static str,
    name: &'static str,
    description: &'static str,
    features: &'static [&'static str],
    configuration: &'static [Setting],
}

const LOCATION: Setting = ("location", "directory that holds the images; one of the host's own where it is relative");

const DRIVERS: &[Driver] = &[
    Driver {
        ty: "file",
        name: "File",
        description: "Disk images in a directory",
        features: OF_IMAGES,
        configuration: &[LOCATION],
    },
    Driver {
        ty: "ext",
        name: "Local EXT",
        description: "Disk images in a file system of the host's own",
        features: OF_IMAGES,
        configuration: &[("device", "block device that holds the file system")],
    },
    Driver {
        ty: "nfs",
        name: "NFS",
        description: "Disk images in a directory of a file server",
        features: OF_IMAGES,
        configuration: &[
            ("server", "name or address of the file server"),
            ("serverpath", "directory on it"),
            ("options", "further options of the mount"),
        ],
    },
    Driver {
        ty: "lvm",
        name: "Local LVM",
        description: "Disks as logical volumes",
        features: OF_VOLUMES,
        configuration: &[("device", "block devices of the volume group")],
    },
    Driver {
        ty: "iso",
        name: "ISO",
        description: "CD images in a directory",
        features: OF_MEDIA,
        configuration: &[LOCATION],
    },
    Driver {
        ty: "udev",
        name: "udev",
        description: "CD drives and removable disks of the host",
        features: OF_MEDIA,
        configuration: &[("location", "directory of the devices")],
    },
    Driver {
        ty: "sim",
        name: "Sim",
        description: "No disks at all, for trials",
        features: OF_IMAGES,
        configuration: &[],
    },
    Driver {
        ty: "dummy",
        name: "Dummy",
        description: "No disks at all, by the name that samples use",
        features: OF_IMAGES,
        configuration: &[],
    },
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
    for driver in DRIVERS {
        let owned = |pairs: &[Setting]| -> BTreeMap<String, String> {
            pairs.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect()
        };
        change.insert(
            NewRow::new(Ref::<Sm>::new(shared.uuid()), shared.uuid())
                .with(sm::NAME_LABEL, driver.name.to_owned())
                .with(sm::NAME_DESCRIPTION, driver.description.to_owned())
                .with(sm::TYPE, driver.ty.to_owned())
                .with(sm::VENDOR, "Xenith".to_owned())
                .with(sm::VERSION, "1.0".to_owned())
                .with(sm::REQUIRED_API_VERSION, "1.0".to_owned())
                .with(sm::CAPABILITIES, driver.features.iter().map(|feature| (*feature).to_owned()).collect())
                .with(sm::FEATURES, driver.features.iter().map(|feature| ((*feature).to_owned(), 1)).collect())
                .with(sm::CONFIGURATION, owned(driver.configuration)),
        );
    }
    let reference = Ref::new(shared.uuid());
    change.insert(sr_row(shared, reference, "file", "Shared storage", "shared-storage", true));
    reference
}

/// A host's local SR and its connections to it and to every shared SR, which are as those of the other hosts.
pub(super) fn host_rows(shared: &Shared, state: &State, change: &mut Transaction, host: Ref<Host>) {
    let local = Ref::new(shared.uuid());
    change.insert(sr_row(shared, local, "file", "Local storage", "local-storage", false));
    let settings = |location: &str| BTreeMap::from([("location".to_owned(), location.to_owned())]);
    let of_others = |target: Ref<Sr>| {
        let known = state.all::<Pbd>().find(|row| row.get(pbd::SR) == target);
        known.map_or_else(|| settings("shared"), |row| row.get(pbd::DEVICE_CONFIG))
    };
    let pool_wide = state.all::<Sr>().filter(|row| row.get(sr::SHARED)).map(|row| row.typed::<Sr>());
    let pool_wide = pool_wide.map(|target| (target, of_others(target)));
    for (target, device_config) in std::iter::once((local, settings("local"))).chain(pool_wide) {
        change.insert(
            NewRow::new(Ref::<Pbd>::new(shared.uuid()), shared.uuid())
                .with(pbd::HOST, host)
                .with(pbd::SR, target)
                // Plugged as soon as the host is heard.
                .with(pbd::OTHER_CONFIG, plug_at_boot())
                .with(pbd::DEVICE_CONFIG, device_config),
        );
    }
}
