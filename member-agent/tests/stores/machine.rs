//! Real NFS and real LVM: QEMU boots Debian's kernel with both, and in it this program runs itself.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use crate::common::{MIB, guest, machine_for_storage};

/// For all promises of a driver on a processor that is emulated, beside other tests.
const THE_MACHINES_TIME: Duration = Duration::from_secs(600);

#[tokio::test]
async fn every_promise_holds_on_a_real_nfs_server() {
    every_promise_holds_in_the_machine("nfs").await;
}

#[tokio::test]
async fn every_promise_holds_on_real_lvm() {
    every_promise_holds_in_the_machine("lvm").await;
}

/// This kernel may have no NFS and no LVM; one that has runs this very program, with the tests that are left out here.
async fn every_promise_holds_in_the_machine(driver: &str) {
    let dir = tempfile::tempdir().unwrap();
    let disk = |name: &str, size: u64| {
        let path = dir.path().join(name);
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        format!("if=virtio,format=raw,cache=unsafe,file={}", path.display())
    };
    let program = format!("if=virtio,format=raw,readonly=on,file={}", std::env::current_exe().unwrap().display());
    let words = format!("console=ttyS0 quiet panic=-1 -- --ignored --test-threads=1 {driver}::");
    let mut machine = tokio::process::Command::new("qemu-system-x86_64");
    // With a source of randomness, for which the first program would wait long otherwise.
    machine.args([
        "-accel",
        "tcg",
        "-cpu",
        "qemu64,+rdrand",
        "-m",
        "640",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
    ]);
    machine.arg("-kernel").arg(guest().join("vmlinuz")).arg("-initrd").arg(machine_for_storage());
    machine.args(["-append", &words]);
    for drive in [disk("export", 256 * MIB), disk("group", 512 * MIB), program] {
        machine.args(["-drive", &drive]);
    }
    machine.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(THE_MACHINES_TIME, machine.output()).await.expect("it ends").unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(said.contains("XENITH-ENDED 0"), "{said}");
    assert!(said.contains(&format!("test {driver}::a_volume_is_made_grown_and_removed ... ok")), "{said}");
}
