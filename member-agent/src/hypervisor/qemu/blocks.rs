//! What a disk is made of in QEMU: a device that the guest sees, and the block nodes beneath it.
//!
//! Nodes have names of our making, so that they can be changed and told apart later: an image that was opened may be
//! renamed, and its node keeps the old path. A disk's place on the bus follows from its device's name, not from the order
//! in which disks came: a domain that is resumed finds each where it was.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::hypervisor::domain::{Disk, Reason, Refusal};

/// The first places on the bus that are disks'; those before are the machine's own and NICs'.
const FIRST_PLACE: u32 = 12;
/// As many disks have places of their own; the others take what is left.
const PLACES: u32 = 16;

/// A disk in a domain, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Attached {
    pub disk: Disk,
    /// Nodes that were made for it, the one that it reads and writes first. None: a drive without a medium.
    pub nodes: Vec<Node>,
    /// Its device may not be there yet: whoever finds it so has to look.
    pub coming: bool,
    /// The node that it is going over to.
    pub next: Option<Node>,
    /// Without the image: it was taken away while the guest would not let go.
    pub empty: bool,
}

/// A block node, and which file it has open, whatever that file is called by now.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Node {
    pub name: String,
    pub path: String,
    pub file: Option<(u64, u64)>,
}

impl Node {
    /// A node for the file at this path.
    pub fn new(name: String, path: &str) -> Self {
        Self { name, path: path.to_owned(), file: file_at(path) }
    }
}

/// Which file is at a path: device and inode.
pub(super) fn file_at(path: &str) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The name of a disk's device.
pub(super) fn device_id(disk: &Disk) -> String {
    let plain = |text: &str| text.chars().filter(|letter| letter.is_ascii_alphanumeric() || *letter == '-').collect();
    let (vbd, device): (String, String) = (plain(&disk.vbd), plain(&disk.device));
    if vbd.is_empty() { format!("disk-{device}") } else { format!("vbd-{vbd}") }
}

/// The node for a disk's image. `backing` of null leaves the image below to whoever puts it above one.
pub(super) fn image(disk: &Disk, node: &Node, above_nothing: bool) -> Value {
    let read_only = disk.read_only || disk.cdrom;
    let protocol = if disk.path.starts_with("/dev/") { "host_device" } else { "file" };
    let mut options = json!({
        "driver": disk.format.word(),
        "node-name": node.name,
        "read-only": read_only,
        "file": { "driver": protocol, "filename": disk.path, "read-only": read_only, "locking": "on" },
    });
    if above_nothing && let Some(options) = options.as_object_mut() {
        options.insert("backing".to_owned(), Value::Null);
    }
    options
}

/// The device of a disk. `boot` is its turn when the firmware looks for what to boot.
pub(super) fn device(disk: &Disk, node: Option<&Node>, vcpus_max: u32, boot: Option<usize>) -> Value {
    let mut options = serde_json::Map::new();
    options.insert("id".into(), device_id(disk).into());
    options.insert("serial".into(), disk.device.chars().take(20).collect::<String>().into());
    if disk.cdrom {
        options.insert("driver".into(), "ide-cd".into());
    } else {
        options.insert("driver".into(), "virtio-blk-pci".into());
        // As many as there can be vCPUs, not as many as there are at the start: else a resumed one would differ.
        options.insert("num-queues".into(), vcpus_max.clamp(1, 4).into());
        if let Some(place) = place(&disk.device) {
            options.insert("addr".into(), format!("{place:x}").into());
        }
    }
    if let Some(node) = node {
        options.insert("drive".into(), node.name.clone().into());
        if disk.sharable {
            options.insert("share-rw".into(), true.into());
        }
    }
    if let Some(turn) = boot {
        options.insert("bootindex".into(), turn.into());
    }
    Value::Object(options)
}

/// The place on the bus of the device with this name: "xvdc", "sdc" and "2" are the third.
fn place(device: &str) -> Option<u32> {
    let digits: String = device.chars().rev().take_while(char::is_ascii_digit).collect();
    let number = if digits.is_empty() {
        let letter = device.chars().last().filter(char::is_ascii_lowercase)?;
        u32::from(letter) - u32::from('a')
    } else {
        digits.chars().rev().collect::<String>().parse().ok()?
    };
    (number < PLACES).then_some(FIRST_PLACE + number)
}

/// Why QEMU would not open an image, if that is what it says; the words are the same since its version 2.
pub(super) fn why_not_open(said: &str) -> Option<Refusal> {
    let about_disk = said.contains("Could not open") || said.contains("-blockdev") || said.contains("lock");
    let reason = if said.contains("Failed to get") && said.contains("lock") {
        Reason::InUse
    } else if about_disk && said.contains("No such file or directory") {
        Reason::NoSuchVolume
    } else if ["not in qcow2 format", "is corrupt", "marked as corrupt", "L1 table", "too short", "Unsupported qcow2"]
        .iter()
        .any(|words| said.contains(words))
    {
        Reason::Damaged
    } else {
        return None;
    };
    Some(Refusal::new(reason, said))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::domain::ImageFormat;

    #[test]
    fn a_disk_path_is_taken_as_it_is() {
        let disk = Disk { device: "xvda".into(), path: "/a,b\"c.raw".into(), ..Disk::default() };
        let options = image(&disk, &Node::new("n1".into(), &disk.path), false);
        assert_eq!(options["file"]["filename"], "/a,b\"c.raw");
        assert_eq!((&options["driver"], &options["read-only"]), (&json!("raw"), &json!(false)));
        assert!(options.get("backing").is_none(), "what is below a raw image is nothing");
        let thin = Disk { format: ImageFormat::Qcow2, ..disk };
        assert_eq!(image(&thin, &Node::default(), true)["backing"], Value::Null);
    }

    #[test]
    fn a_disk_has_the_same_place_whatever_came_before_it() {
        assert_eq!((place("xvda"), place("hdd"), place("3")), (Some(12), Some(15), Some(15)));
        assert_eq!((place("xvdz"), place(""), place("77"), place("XVDA")), (None, None, None, None));
    }

    #[test]
    fn what_qemu_says_of_an_image_is_understood() {
        let said = |text: &str| why_not_open(text).map(|refusal| refusal.reason);
        let missing = "qemu-system-x86_64: -blockdev {}: Could not open '/x.raw': No such file or directory";
        assert_eq!(said(missing), Some(Reason::NoSuchVolume));
        let locked =
            "qemu-system-x86_64: -device virtio-blk-pci: Failed to get \"write\" lock\nIs another process using";
        assert_eq!(said(locked), Some(Reason::InUse));
        assert_eq!(said("-blockdev {}: Image is not in qcow2 format"), Some(Reason::Damaged));
        assert_eq!(said("could not open kernel file '/k': No such file or directory"), None);
    }
}
