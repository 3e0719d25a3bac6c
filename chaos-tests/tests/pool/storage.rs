//! Disks of real guests: images are made, plugged, snapshotted and checked, and the rows say what is there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use chaos_tests::client::Client;
use chaos_tests::lab::{Lab, What};
use serde_json::{Value, json};

use crate::support::{SOON, plugged, refusal, template, text, until};

/// A real guest under emulation takes its time.
const GUEST_LIMIT: Duration = Duration::from_secs(90);
const MIB: u64 = 1 << 20;

struct Storage {
    lab: Lab,
    client: Client,
}

impl Storage {
    async fn up(hosts: u8, driver: &str) -> Self {
        let lab = Lab::up(hosts, driver).await.unwrap();
        let client = lab.client().await.unwrap().with_call_limit(GUEST_LIMIT);
        let mut it = Self { lab, client };
        plugged(&mut it.client).await;
        it
    }

    async fn ask(&mut self, method: &str, arguments: Value) -> Value {
        self.client.call(method, arguments).await.unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// The pool's default SR, and its uuid.
    async fn default_sr(&mut self) -> (String, String) {
        let pools = self.ask("pool.get_all_records", json!([])).await;
        let sr = text(&pools.as_object().unwrap().values().next().unwrap()["default_SR"]);
        let uuid = text(&self.ask("SR.get_uuid", json!([sr])).await);
        (sr, uuid)
    }

    /// A VM of the lab's template with one provisioned disk, as the documents install one.
    async fn install(&mut self, name: &str) -> String {
        let (_, sr) = self.default_sr().await;
        let template = template(&mut self.client, "Xenith guest").await;
        let vm = text(&self.ask("VM.clone", json!([template, name])).await);
        let disk = format!("<disk device=\"0\" size=\"{}\" sr=\"{sr}\" bootable=\"true\" type=\"system\"/>", 64 * MIB);
        let disks = format!("<provision>{disk}</provision>");
        self.ask("VM.add_to_other_config", json!([vm, "disks", disks])).await;
        self.ask("VM.provision", json!([vm])).await;
        vm
    }

    async fn new_disk(&mut self, name: &str) -> String {
        let (sr, _) = self.default_sr().await;
        let record = json!({
            "name_label": name, "name_description": "", "SR": sr, "virtual_size": 32 * MIB, "type": "user",
            "sharable": false, "read_only": false, "other_config": {},
        });
        text(&self.ask("VDI.create", json!([record])).await)
    }

    async fn drive(&mut self, vm: &str, vdi: &str) -> String {
        let record = json!({
            "VM": vm, "VDI": vdi, "userdevice": "autodetect", "bootable": false, "mode": "RW", "type": "Disk",
            "empty": false, "other_config": {}, "qos_algorithm_type": "", "qos_algorithm_params": {},
        });
        text(&self.ask("VBD.create", json!([record])).await)
    }

    /// The disks of a VM, by their places.
    async fn disks(&mut self, vm: &str) -> Vec<String> {
        let drives = self.ask("VM.get_VBDs", json!([vm])).await;
        let mut found = Vec::new();
        for drive in drives.as_array().unwrap() {
            let record = self.ask("VBD.get_record", json!([drive])).await;
            found.push((text(&record["userdevice"]), text(&record["VDI"])));
        }
        found.sort();
        found.into_iter().map(|(_, vdi)| vdi).collect()
    }

    /// The rows of the shared store say what its scan finds, and nothing is missing.
    async fn rows_are_true(&mut self) {
        let (sr, _) = self.default_sr().await;
        let before = self.ask("SR.get_record", json!([sr])).await;
        self.ask("SR.scan", json!([sr])).await;
        let after = self.ask("SR.get_record", json!([sr])).await;
        for what in ["VDIs", "virtual_allocation"] {
            assert_eq!(before[what], after[what], "{what} before and after a scan");
        }
        assert!(after["physical_size"].as_u64() > Some(0), "{after}");
        for vdi in after["VDIs"].as_array().unwrap() {
            assert_eq!(self.ask("VDI.get_missing", json!([vdi])).await, false);
        }
    }

    /// Every image of the lab is whole. None of them may be open.
    fn images_are_whole(&self) -> usize {
        let images = images(self.lab.dir());
        for image in &images {
            let checked = std::process::Command::new("qemu-img").args(["check", "-q"]).arg(image).output().unwrap();
            let told = String::from_utf8_lossy(&checked.stderr);
            assert!(checked.status.success(), "{}: {told}", image.display());
        }
        images.len()
    }
}

/// The qcow2 images below a directory, links not followed.
fn images(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(images(&entry.path()));
        } else if kind.is_file() && is_qcow2(&entry.path()) {
            found.push(entry.path());
        }
    }
    found
}

fn is_qcow2(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    std::fs::File::open(path).is_ok_and(|mut file| file.read_exact(&mut magic).is_ok()) && magic == *b"QFI\xfb"
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_installed_with_a_disk_and_gets_another_one_while_it_runs() {
    let mut it = Storage::up(1, "qemu").await;
    let vm = it.install("installed").await;
    let disks = it.disks(&vm).await;
    assert_eq!(disks.len(), 1);
    assert_eq!(it.ask("VDI.get_virtual_size", json!([disks[0]])).await, 64 * MIB);
    it.ask("VM.start", json!([vm, false, false])).await;
    let (code, params) = refusal(it.client.call("VDI.destroy", json!([disks[0]])).await);
    assert_eq!((code.as_str(), &params[..]), ("VDI_IN_USE", &[disks[0].clone(), "destroy".to_owned()][..]));

    let more = it.new_disk("more").await;
    let drive = it.drive(&vm, &more).await;
    it.ask("VBD.plug", json!([drive])).await;
    let record = it.ask("VBD.get_record", json!([drive])).await;
    assert_eq!((&record["currently_attached"], &record["device"]), (&json!(true), &json!("xvdb")));

    // It grows beneath its guest, by the message that is for disks in use.
    let (code, _) = refusal(it.client.call("VDI.resize", json!([more, 48 * MIB])).await);
    assert_eq!(code, "VDI_IN_USE");
    it.ask("VDI.resize_online", json!([more, 48 * MIB])).await;
    assert_eq!(it.ask("VDI.get_virtual_size", json!([more])).await, 48 * MIB);

    // What is in a directory is said without an SR of it.
    let (sr, uuid) = it.default_sr().await;
    let host = it.ask("host.get_all", json!([])).await[0].clone();
    let connection = it.ask("SR.get_PBDs", json!([sr])).await[0].clone();
    let config = it.ask("PBD.get_device_config", json!([connection])).await;
    let found = it.ask("SR.probe", json!([host, config, "file", {}])).await;
    assert!(text(&found).contains(&uuid), "{found}");
    let nowhere = it.client.call("SR.probe", json!([host, {"location": "/nowhere/at/all"}, "file", {}])).await;
    let (code, params) = refusal(nowhere);
    assert!(code == "SR_BACKEND_FAILURE_47" && params[1].contains("/nowhere/at/all"), "{code} {params:?}");

    // A second VM cannot have it meanwhile.
    let other = it.install("other").await;
    it.drive(&other, &more).await;
    let (code, _) = refusal(it.client.call("VM.start", json!([other, false, false])).await);
    assert_eq!(code, "VDI_IN_USE");

    it.ask("VM.hard_shutdown", json!([vm])).await;
    assert_eq!(it.ask("VBD.get_currently_attached", json!([drive])).await, false);
    it.rows_are_true().await;
    assert!(it.images_are_whole() >= 3);
    for disk in it.disks(&vm).await {
        it.ask("VDI.destroy", json!([disk])).await;
    }
    it.rows_are_true().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_vm_is_snapshotted_again_and_again_and_its_images_stay_whole() {
    let mut it = Storage::up(1, "qemu").await;
    let vm = it.install("often").await;
    let disk = it.disks(&vm).await[0].clone();
    it.ask("VM.start", json!([vm, false, false])).await;
    let mut snapshots = Vec::new();
    for number in 0..3 {
        let snapshot = text(&it.ask("VM.snapshot", json!([vm, format!("snapshot {number}")])).await);
        let record = it.ask("VM.get_record", json!([snapshot])).await;
        assert_eq!((&record["is_a_snapshot"], &record["snapshot_of"]), (&json!(true), &json!(vm)));
        snapshots.push(snapshot);
    }
    let of = it.ask("VDI.get_snapshots", json!([disk])).await;
    assert_eq!(of.as_array().unwrap().len(), 3);
    // A VM made of a snapshot starts with the disk as it was.
    let clone = text(&it.ask("VM.clone", json!([snapshots[1], "from a snapshot"])).await);
    it.ask("VM.provision", json!([clone])).await;
    it.ask("VM.start", json!([clone, false, false])).await;
    for running in [&vm, &clone] {
        it.ask("VM.hard_shutdown", json!([running])).await;
    }
    it.rows_are_true().await;
    assert!(it.images_are_whole() >= 5);
    for snapshot in snapshots {
        for disk in it.disks(&snapshot).await {
            it.ask("VDI.destroy", json!([disk])).await;
        }
        it.ask("VM.destroy", json!([snapshot])).await;
    }
    it.rows_are_true().await;
    it.images_are_whole();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_boots_finds_its_stores_plugged_and_its_vms_disks_free() {
    let mut it = Storage::up(3, "sim").await;
    let disk = it.new_disk("survivor").await;
    let template = template(&mut it.client, "Xenith guest").await;
    let vm = text(&it.ask("VM.clone", json!([template, "guest"])).await);
    it.ask("VM.provision", json!([vm])).await;
    let drive = it.drive(&vm, &disk).await;
    let host = it.lab.made().others()[0].name.clone();
    let reference = it.lab.host_reference(&mut it.client, &host).await.unwrap();
    it.ask("VM.start_on", json!([vm, reference, false, false])).await;
    it.lab.kill(&host, What::Host).await.unwrap();
    it.lab.start(&host, What::Host).await.unwrap();
    until(SOON, "the VM to be halted", async || {
        let record = it.client.persist(SOON, "VM.get_record", json!([vm])).await.unwrap();
        (record["power_state"] == "Halted").then_some(())
    })
    .await;
    plugged(&mut it.client).await;
    assert_eq!(it.ask("VBD.get_currently_attached", json!([drive])).await, false);
    it.ask("VM.start_on", json!([vm, reference, false, false])).await;
    it.ask("VM.hard_shutdown", json!([vm])).await;
    it.rows_are_true().await;
}
