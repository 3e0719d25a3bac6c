//! What every driver promises of disks, memory and suspended domains, put to each of them as the agent's steps and stores
//! do; and what only a real guest can show of it.
#![allow(clippy::expect_used, clippy::unwrap_used)]

#[macro_use]
mod common;

use std::fs::{self, File};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Host, MIB, PATIENCE, eventually, guest, kill, operation};
use member_agent::hypervisor::domain::{
    Disk, DomainSpec, DomainState, ImageFormat, Medium, Power, Reason, Refusal, Vif,
};
use member_agent::hypervisor::{self, Hypervisor, Site, Unplug};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

for_each_driver!(
    a_disk_comes_to_a_domain_once_and_goes_once,
    a_disk_goes_by_force_from_a_guest_that_does_not_let_go,
    a_medium_is_changed_in_its_drive,
    a_suspended_domain_is_gone_and_comes_back_as_the_machine_it_was,
    a_suspend_that_was_done_is_told_so_when_it_is_repeated,
    an_image_that_holds_no_suspended_domain_is_said_so_and_starts_nothing,
    memory_is_asked_for_within_what_a_domain_was_built_for,
    vcpus_come_within_what_a_domain_was_built_for,
    disks_are_known_to_the_next_agent,
);

#[tokio::test]
async fn a_simulated_disk_in_use_goes_over_to_another_image() {
    a_disk_in_use_goes_over_to_another_image("sim").await;
}

#[tokio::test]
async fn a_disk_in_use_of_qemu_goes_over_to_another_image() {
    a_disk_in_use_goes_over_to_another_image("qemu").await;
}

/// A host with a driver alone: what steps and stores see of it.
struct Bare {
    host: Host,
    driver: Option<(Arc<dyn Hypervisor>, CancellationToken, TaskTracker)>,
}

impl Bare {
    async fn start(driver: &str) -> Self {
        let mut bare = Self { host: Host::without_agent(driver, |_| {}), driver: None };
        fs::create_dir_all(&bare.host.config.state_dir).unwrap();
        bare.open().await;
        bare
    }

    async fn open(&mut self) {
        let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
        let site = Site {
            config: self.host.config.clone(),
            boot_id: "boot-1".into(),
            capacity: 384 * MIB,
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
        };
        self.driver = Some((hypervisor::open(site).await.expect("opens"), shutdown, tasks));
    }

    /// As an agent that ends: its tasks do, its domains do not.
    async fn close(&mut self) {
        let (driver, shutdown, tasks) = self.driver.take().expect("open");
        drop(driver);
        shutdown.cancel();
        tasks.close();
        tasks.wait().await;
    }

    fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.host.dir.path().join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// An image to suspend a domain to. A simulated one is a record.
    fn memory(&self, driver: &str) -> PathBuf {
        let path = self.file("memory.raw", if driver == "sim" { 0 } else { 160 * MIB });
        if driver == "sim" {
            fs::write(&path, "{}").unwrap();
        }
        path
    }

    /// A qcow2 image, above another if one is named.
    fn thin(&self, name: &str, size: u64, below: Option<&Path>) -> PathBuf {
        let path = self.host.dir.path().join(name);
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]);
        if let Some(below) = below {
            command.arg("-b").arg(below).args(["-F", "qcow2"]);
        }
        let status = command.arg(&path).arg(size.to_string()).status().expect("qemu-img runs");
        assert!(status.success());
        path
    }

    fn state(&self, vm: Uuid) -> Option<DomainState> {
        self.roster().get(vm)
    }

    fn nothing_is_left(&self, vm: Uuid) {
        assert!(self.state(vm).is_none() && self.plugged().is_empty());
        assert!(!self.host.domain_dir(vm).exists() && self.host.processes().is_empty(), "something stays behind");
        assert_eq!(self.roster().memory().free, 384 * MIB);
    }
}

impl Deref for Bare {
    type Target = dyn Hypervisor;
    fn deref(&self) -> &Self::Target {
        &*self.driver.as_ref().expect("open").0
    }
}

fn spec(vm: Uuid) -> DomainSpec {
    DomainSpec {
        vm,
        name: "a guest, under test".into(),
        memory_static_max: 96 * MIB,
        memory_target: 96 * MIB,
        vcpus_max: 2,
        vcpus_at_startup: 1,
        kernel: guest().join("vmlinuz").display().to_string(),
        ramdisk: guest().join("initrd.gz").display().to_string(),
        kernel_args: "console=ttyS0 quiet panic=-1".into(),
        ..DomainSpec::default()
    }
}

fn disk(vbd: &str, device: &str, path: &Path) -> Disk {
    let format = if path.extension().is_some_and(|it| it == "qcow2") { ImageFormat::Qcow2 } else { ImageFormat::Raw };
    let path = path.display().to_string();
    Disk { vbd: vbd.into(), device: device.into(), path, format, ..Disk::default() }
}

fn drive(vbd: &str, path: &Path) -> Disk {
    Disk { cdrom: true, read_only: true, ..disk(vbd, "xvdd", path) }
}

const GENTLY: Unplug = Unplug { force: false, limit: PATIENCE };
const AT_ONCE: Unplug = Unplug { force: false, limit: Duration::from_millis(300) };
const BY_FORCE: Unplug = Unplug { force: true, limit: PATIENCE };

fn reason<T: std::fmt::Debug>(outcome: Result<T, Refusal>) -> Reason {
    outcome.expect_err("refused").reason
}

async fn booted(bare: &Bare, driver: &str, vm: Uuid) {
    if driver == "qemu" {
        bare.host.boots(vm, 1).await;
    }
}

async fn a_disk_comes_to_a_domain_once_and_goes_once(driver: &str) {
    let bare = Bare::start(driver).await;
    let vm = Uuid::new_v4();
    bare.start(spec(vm), false, "start").await.expect("starts");
    let image = bare.file("disk.raw", MIB);
    fs::write(&image, [b"marked".to_vec(), vec![0; 1 << 20]].concat()).unwrap();
    let plugged = bare.plug_disk(vm, disk("one", "xvdb", &image), "plug").await.expect("plugs");
    assert_eq!((plugged.disks.as_slice(), plugged.last_operation.as_str()), (&["one".to_owned()][..], "plug"));
    bare.plug_disk(vm, disk("one", "xvdb", &image), "again").await.expect("is there already");
    assert_eq!(bare.plugged().iter().map(|it| it.disk.path.as_str()).collect::<Vec<_>>(), [image.to_str().unwrap()]);
    if driver == "qemu" {
        bare.host.guest_says(vm, "head -c 6 /dev/vda", "marked").await;
        assert_eq!(reason(bare.plug_disk(vm, disk("two", "xvdc", &image), "").await), Reason::InUse);
        let missing = bare.host.dir.path().join("missing.raw");
        assert_eq!(reason(bare.plug_disk(vm, disk("two", "xvdc", &missing), "").await), Reason::NoSuchVolume);
        let damaged = bare.file("damaged.qcow2", MIB);
        assert_eq!(reason(bare.plug_disk(vm, disk("two", "xvdc", &damaged), "").await), Reason::Damaged);
    }
    if driver == "qemu" {
        // One that is late is late, and no more than that.
        bare.pause(vm, "").await.expect("pauses");
        assert_eq!(reason(bare.unplug_disk(vm, "one", AT_ONCE, "").await), Reason::TimedOut);
        let mut changes = bare.roster().feed().changes;
        bare.unpause(vm, "").await.expect("runs on");
        becomes(&mut changes, &bare, vm, |state| state.disks.is_empty()).await;
        bare.plug_disk(vm, disk("one", "xvdb", &image), "plug").await.expect("plugs");
        bare.host.guest_says(vm, "head -c 6 /dev/vda", "marked").await;
    }
    let gone = bare.unplug_disk(vm, "one", GENTLY, "unplug").await.expect("lets go");
    assert_eq!((gone.disks.len(), gone.last_operation.as_str()), (0, "unplug"));
    assert!(bare.plugged().is_empty());
    bare.unplug_disk(vm, "one", GENTLY, "").await.expect("is gone already");
    if driver == "qemu" {
        bare.host.guest_says(vm, "ls /sys/block | grep -c vda", "0").await;
    }
    assert_eq!(reason(bare.plug_disk(vm, drive("cd", &image), "").await), Reason::Unsupported);
    bare.destroy(vm, "").await.expect("destroyed");
    bare.nothing_is_left(vm);
}

async fn a_disk_goes_by_force_from_a_guest_that_does_not_let_go(driver: &str) {
    let bare = Bare::start(driver).await;
    let (vm, other) = (Uuid::new_v4(), Uuid::new_v4());
    let image = bare.file("disk.raw", MIB);
    let with_disk = |vm| DomainSpec { disks: vec![disk("one", "xvda", &image)], ..spec(vm) };
    let state = bare.start(with_disk(vm), true, "").await.expect("starts");
    assert_eq!(state.disks, ["one"]);
    assert_eq!(reason(bare.unplug_disk(vm, "one", AT_ONCE, "").await), Reason::TimedOut);
    assert_eq!(bare.state(vm).unwrap().disks, ["one"]);
    assert!(bare.unplug_disk(vm, "one", BY_FORCE, "").await.expect("goes").disks.is_empty());
    assert!(bare.plugged().is_empty());
    bare.start(with_disk(other), true, "").await.expect("the image is nobody's now");
    bare.unpause(vm, "").await.expect("the domain lives on");
}

async fn a_medium_is_changed_in_its_drive(driver: &str) {
    let bare = Bare::start(driver).await;
    let vm = Uuid::new_v4();
    let disc = bare.file("disc.iso", MIB);
    let medium = || Medium { path: disc.display().to_string(), format: ImageFormat::Raw };
    let empty = DomainSpec { disks: vec![drive("cd", Path::new(""))], ..spec(vm) };
    bare.start(empty, true, "").await.expect("starts");
    let held = || bare.plugged().remove(0).disk.path;
    assert_eq!(held(), "");
    for _again in 0..2 {
        let state = bare.change_medium(vm, "cd", Some(medium()), "insert").await.expect("inserted");
        assert_eq!((state.disks, held()), (vec!["cd".to_owned()], disc.display().to_string()));
    }
    if driver == "qemu" {
        let missing = Medium { path: "/no/such.iso".into(), ..medium() };
        assert_eq!(reason(bare.change_medium(vm, "cd", Some(missing), "").await), Reason::NoSuchVolume);
        assert_eq!(held(), disc.display().to_string());
    }
    for _again in 0..2 {
        bare.change_medium(vm, "cd", None, "eject").await.expect("ejected");
        assert_eq!(held(), "");
    }
    bare.change_medium(vm, "cd", Some(medium()), "").await.expect("inserted again");
    assert_eq!(reason(bare.change_medium(vm, "none", None, "").await), Reason::NoSuchDisk);
    assert_eq!(reason(bare.unplug_disk(vm, "cd", GENTLY, "").await), Reason::Unsupported);
}

async fn a_suspended_domain_is_gone_and_comes_back_as_the_machine_it_was(driver: &str) {
    let bare = Bare::start(driver).await;
    let vm = Uuid::new_v4();
    let (image, one, two) = (bare.memory(driver), bare.file("one.raw", MIB), bare.file("two.raw", MIB));
    let machine = DomainSpec { disks: vec![disk("one", "xvda", &one)], ..spec(vm) };
    let first = bare.start(machine, false, "").await.expect("starts");
    booted(&bare, driver, vm).await;
    // It is not the machine of its start any more.
    bare.plug_disk(vm, disk("two", "xvdc", &two), "").await.expect("plugs");
    bare.unplug_disk(vm, "one", GENTLY, "").await.expect("lets go");
    bare.set_vcpus(vm, 2, "").await.expect("another vCPU");
    let seconds = if driver == "qemu" {
        let line = bare.host.type_at(vm, "COUNT=kept; echo [$(echo counts)]").await;
        eventually("the shell counts", || bare.host.console(vm).contains("[counts]")).await;
        drop(line);
        bare.host.guest_says(vm, "nproc", "2").await;
        last_beat(&bare.host.console(vm))
    } else {
        0
    };
    let gone = bare.suspend(vm, &image, false, "suspend").await.expect("suspends");
    assert_eq!((gone.power, gone.domid, gone.reason.as_str()), (Power::Halted, -1, "suspended"));
    bare.nothing_is_left(vm);

    let machine = DomainSpec { disks: vec![disk("two", "xvdc", &two)], ..spec(vm) };
    let again = bare.resume(machine.clone(), &image, true, "resume").await.expect("resumes");
    assert_eq!((again.power, again.last_operation.as_str(), again.disks.len()), (Power::Paused, "resume", 1));
    assert_ne!(again.domid, first.domid);
    assert_eq!(reason(bare.resume(machine.clone(), &image, false, "").await), Reason::DomainExists);
    assert_eq!(bare.unpause(vm, "").await.expect("goes on").power, Power::Running);
    if driver == "qemu" {
        // The log is a new one, and the guest has not booted in it.
        bare.host.heartbeats(vm, 2).await;
        let log = bare.host.console(vm);
        let beat = log.split("XENITH-GUEST ").nth(1).and_then(|it| it.split_whitespace().next()).unwrap();
        assert!(beat.parse::<u64>().unwrap() >= seconds && !log.contains("BusyBox v"), "{log}");
        let mut line = std::os::unix::net::UnixStream::connect(bare.host.domain_dir(vm).join("console")).unwrap();
        std::io::Write::write_all(&mut line, b"echo [$COUNT $(nproc)]\n").unwrap();
        eventually("the shell goes on", || bare.host.console(vm).contains("[kept 2]")).await;
    }
    bare.destroy(vm, "").await.expect("destroyed");
    bare.nothing_is_left(vm);
    // The image is as it was: it can be resumed from again.
    bare.resume(machine, &image, true, "").await.expect("resumes again");
}

fn last_beat(console: &str) -> u64 {
    let last = console.rsplit("XENITH-GUEST ").next().and_then(|it| it.split_whitespace().next());
    last.and_then(|it| it.parse().ok()).expect("a beat")
}

async fn a_suspend_that_was_done_is_told_so_when_it_is_repeated(driver: &str) {
    let bare = Bare::start(driver).await;
    let (vm, by) = (Uuid::new_v4(), operation());
    let image = bare.memory(driver);
    let before = bare.start(spec(vm), true, "").await.expect("starts");
    let kept = bare.suspend(vm, &image, true, &by).await.expect("a checkpoint");
    assert_eq!((kept.power, kept.domid, kept.last_operation.as_str()), (Power::Paused, before.domid, by.as_str()));
    assert_eq!(bare.unpause(vm, "").await.expect("lives").power, Power::Running);
    assert_eq!(bare.suspend(vm, &image, true, &by).await.expect("a checkpoint").power, Power::Running);
    bare.suspend(vm, &image, false, &by).await.expect("suspends");
    let again = bare.suspend(vm, &image, false, &by).await.expect("done before");
    assert_eq!((again.power, again.reason.as_str()), (Power::Halted, "suspended"));
    assert_eq!(reason(bare.suspend(vm, &image, false, "another").await), Reason::NoSuchDomain);
}

async fn an_image_that_holds_no_suspended_domain_is_said_so_and_starts_nothing(driver: &str) {
    let bare = Bare::start(driver).await;
    let (vm, other) = (Uuid::new_v4(), Uuid::new_v4());
    let image = bare.memory(driver);
    assert_eq!(reason(bare.resume(spec(vm), &image, false, "").await), Reason::Damaged);
    let missing = bare.host.dir.path().join("missing");
    assert_eq!(reason(bare.resume(spec(vm), &missing, false, "").await), Reason::NoSuchVolume);
    bare.start(spec(vm), true, "").await.expect("starts");
    assert_eq!(reason(bare.suspend(vm, &missing, false, "").await), Reason::NoSuchVolume);
    if driver == "qemu" {
        let small = bare.file("small.raw", MIB);
        assert_eq!(reason(bare.suspend(vm, &small, false, "").await), Reason::NoSpace);
    }
    assert_eq!(bare.state(vm).unwrap().power, Power::Paused);
    bare.suspend(vm, &image, false, "").await.expect("suspends");
    assert_eq!(reason(bare.resume(spec(other), &image, false, "").await), Reason::Damaged);
    if driver == "qemu" {
        // The record is whole, what follows is not.
        let whole = fs::read(&image).unwrap();
        fs::write(&image, [&whole[..64 * 1024], &vec![7; 64 * 1024][..]].concat()).unwrap();
        assert_eq!(reason(bare.resume(spec(vm), &image, false, "").await), Reason::Damaged);
        // And one that ends too soon.
        fs::write(&image, &whole[..96 * 1024]).unwrap();
        let before = fs::read(&image).unwrap();
        assert_eq!(reason(bare.resume(spec(vm), &image, false, "").await), Reason::Damaged);
        assert_eq!(fs::read(&image).unwrap(), before);
    }
    bare.nothing_is_left(vm);
}

async fn memory_is_asked_for_within_what_a_domain_was_built_for(driver: &str) {
    let bare = Bare::start(driver).await;
    let vm = Uuid::new_v4();
    let nic = Vif { device: "0".into(), mac: "02:00:00:00:00:01".into(), ..Vif::default() };
    let machine = DomainSpec { memory_static_max: 128 * MIB, memory_target: 112 * MIB, vifs: vec![nic], ..spec(vm) };
    let mut changes = bare.roster().feed().changes;
    bare.start(machine, true, "").await.expect("starts");
    if driver == "qemu" {
        // No guest yet that could give anything back.
        assert_eq!(bare.roster().memory().free, (384 - 128) * MIB);
        assert_eq!(reason(bare.set_memory_target(vm, 100 * MIB, "").await), Reason::NoGuestSupport);
        assert_eq!(bare.roster().memory().free, (384 - 128) * MIB);
    }
    bare.unpause(vm, "").await.expect("runs");
    let holds = |bytes| move |state: &DomainState| state.memory_actual == bytes;
    becomes(&mut changes, &bare, vm, holds(112 * MIB)).await;
    assert_eq!(bare.roster().memory().free, (384 - 112) * MIB);
    assert_eq!(reason(bare.set_memory_target(vm, 129 * MIB, "").await), Reason::Unsupported);
    let told = bare.set_memory_target(vm, 100 * MIB, "less").await.expect("is asked");
    assert_eq!(told.last_operation, "less");
    becomes(&mut changes, &bare, vm, holds(100 * MIB)).await;
    bare.set_memory_target(vm, 120 * MIB, "").await.expect("is given more");
    assert_eq!(bare.roster().memory().free, (384 - 120) * MIB);
    becomes(&mut changes, &bare, vm, holds(120 * MIB)).await;

    let metrics = |state: &DomainState| {
        state.guest.as_ref().is_some_and(|it| it.agent_live && it.can_balloon && it.networks.contains_key("0/ip"))
    };
    becomes(&mut changes, &bare, vm, metrics).await;
    let guest = bare.state(vm).and_then(|state| state.guest).expect("metrics");
    if driver == "qemu" {
        assert_eq!(
            (guest.networks["0/ip"].as_str(), guest.os_version["distro"].as_str()),
            ("10.0.2.15", "xenith-guest")
        );
        assert!(guest.os_version["uname"].contains("cloud-amd64") && guest.pv_drivers_version.len() == 4);
        assert_eq!(bare.send_sysrq(vm, 'h', "").await.expect("pressed").power, Power::Running);
        eventually("the kernel hears SysRq", || bare.host.console(vm).contains("sysrq: HELP")).await;
    }
    assert_eq!(reason(bare.send_sysrq(vm, '/', "").await), Reason::Unsupported);
}

async fn becomes(
    changes: &mut tokio::sync::broadcast::Receiver<DomainState>,
    bare: &Bare,
    vm: Uuid,
    wanted: impl Fn(&DomainState) -> bool,
) {
    let deadline = Instant::now() + PATIENCE;
    while !bare.state(vm).is_some_and(|state| wanted(&state)) {
        let left = deadline.saturating_duration_since(Instant::now());
        let change = tokio::time::timeout(left, changes.recv()).await;
        assert!(change.is_ok(), "stays {:?}: {}", bare.state(vm), bare.host.console(vm));
    }
}

async fn vcpus_come_within_what_a_domain_was_built_for(driver: &str) {
    let bare = Bare::start(driver).await;
    let vm = Uuid::new_v4();
    bare.start(spec(vm), true, "").await.expect("starts");
    for _again in 0..2 {
        assert_eq!(bare.set_vcpus(vm, 2, "more").await.expect("comes").last_operation, "more");
    }
    for number in [0, 3] {
        assert_eq!(reason(bare.set_vcpus(vm, number, "").await), Reason::Unsupported);
    }
}

async fn a_disk_in_use_goes_over_to_another_image(driver: &str) {
    let bare = Bare::start(driver).await;
    let vm = Uuid::new_v4();
    let volume = bare.thin("volume.qcow2", 4 * MIB, None);
    let machine = DomainSpec { disks: vec![disk("one", "xvda", &volume)], ..spec(vm) };
    let machine = DomainSpec { kernel_args: format!("{} xenith.mark=first", machine.kernel_args), ..machine };
    bare.start(machine, false, "").await.expect("starts");
    if driver == "qemu" {
        bare.host.guest_says(vm, "head -c 5 /dev/vda", "first").await;
    }
    // As a store takes a snapshot: the image stays what it is and where it is, and the guest goes on in one above it.
    let [above, top] = ["above.qcow2", "top.qcow2"].map(|name| bare.host.dir.path().join(name));
    for (below, image, mark) in [(&volume, &above, "above"), (&above, &top, "fresh")] {
        bare.thin(image.file_name().unwrap().to_str().unwrap(), 4 * MIB, Some(below));
        for _again in 0..2 {
            bare.relink_disk(vm, "one", image).await.expect("goes over");
        }
        if driver == "qemu" {
            let write = format!("printf {mark} | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null && echo ok");
            bare.host.guest_says(vm, &write, "ok").await;
        }
    }
    bare.resize_disk(vm, "one", 8 * MIB).await.expect("grows");
    bare.join_disk(vm, "one", Some(&volume)).await.expect("joins");
    if driver == "qemu" {
        assert_eq!(reason(bare.resize_disk(vm, "one", 4 * MIB).await), Reason::Unsupported);
        bare.host.guest_says(vm, "cat /sys/block/vda/size", "16384").await;
        fs::remove_file(&above).unwrap();
        bare.host.guest_says(vm, "head -c 5 /dev/vda", "fresh").await;
        bare.unplug_disk(vm, "one", GENTLY, "").await.expect("lets go");
        let told = Command::new("qemu-img").args(["info", "--output=json"]).arg(&top).output().unwrap();
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        assert!(told.contains("\"backing-filename\": \"volume.qcow2\""), "{told}");
        for image in [&volume, &top] {
            assert!(Command::new("qemu-img").args(["check", "-q"]).arg(image).status().unwrap().success());
        }
        bare.plug_disk(vm, disk("one", "xvda", &top), "").await.expect("comes back");
        bare.join_disk(vm, "one", None).await.expect("joins all");
        fs::remove_file(&volume).unwrap();
        bare.host.guest_says(vm, "head -c 5 /dev/vda", "fresh").await;
    }
    assert_eq!(reason(bare.relink_disk(vm, "none", &volume).await), Reason::NoSuchDisk);
    assert_eq!(bare.plugged().remove(0).disk.path, top.display().to_string());
}

#[tokio::test]
async fn a_join_gives_way_to_whatever_is_to_be_done_to_its_images() {
    let bare = Bare::start("qemu").await;
    let vm = Uuid::new_v4();
    // So much that it takes a while, and is not one piece.
    let size = 512 * MIB;
    let below = bare.thin("below.qcow2", size, None);
    let write = |image: &Path| {
        let at = |megabyte: u64| format!("write -q -P {} {megabyte}M 256k", megabyte % 250 + 1);
        let mut command = Command::new("qemu-io");
        for megabyte in 0..size / MIB {
            command.args(["-c", &at(megabyte)]);
        }
        assert!(command.args(["-f", "qcow2"]).arg(image).status().expect("qemu-io runs").success());
    };
    write(&below);
    let volume = bare.thin("volume.qcow2", size, Some(&below));
    let machine = DomainSpec { disks: vec![disk("one", "xvda", &volume)], ..spec(vm) };
    bare.start(machine.clone(), true, "").await.expect("starts");
    let join = || bare.join_disk(vm, "one", None);

    // The domain is asked for one after the other: the join has begun when the next comes.
    let image = bare.memory("qemu");
    let top = bare.thin("top.qcow2", size, Some(&volume));
    let (joined, done) = tokio::join!(join(), bare.relink_disk(vm, "one", &top));
    done.expect("goes over");
    assert!(joined.is_err(), "the join is over before anything is to be done");
    let (joined, done) = tokio::join!(join(), bare.resize_disk(vm, "one", size + MIB));
    done.expect("grows");
    assert!(joined.is_err());
    let (joined, done) = tokio::join!(join(), bare.suspend(vm, &image, false, ""));
    done.expect("suspends");
    assert!(joined.is_err());
    bare.nothing_is_left(vm);
    let machine = DomainSpec { disks: vec![disk("one", "xvda", &top)], ..machine };
    bare.resume(machine, &image, true, "").await.expect("resumes");
    join().await.expect("joins in the end");
    bare.destroy(vm, "").await.expect("ends");
    for image in [&below, &volume, &top] {
        assert!(Command::new("qemu-img").args(["check", "-q"]).arg(image).status().unwrap().success());
    }
}

async fn disks_are_known_to_the_next_agent(driver: &str) {
    let mut bare = Bare::start(driver).await;
    let vm = Uuid::new_v4();
    let (one, volume, disc) =
        (bare.file("one.raw", MIB), bare.thin("volume.qcow2", MIB, None), bare.file("disc.iso", MIB));
    let machine = DomainSpec { disks: vec![disk("one", "xvda", &one), drive("cd", Path::new(""))], ..spec(vm) };
    bare.start(machine, true, "").await.expect("starts");
    bare.plug_disk(vm, disk("two", "xvdb", &volume), "").await.expect("plugs");
    let medium = Medium { path: disc.display().to_string(), format: ImageFormat::Raw };
    bare.change_medium(vm, "cd", Some(medium), "").await.expect("inserted");
    let (state, plugged) = (bare.state(vm), bare.plugged());
    bare.close().await;
    bare.open().await;
    assert_eq!((bare.state(vm), bare.plugged()), (state, plugged));
    let base = bare.host.dir.path().join("base.qcow2");
    fs::rename(&volume, &base).unwrap();
    bare.thin("volume.qcow2", MIB, Some(&base));
    bare.relink_disk(vm, "two", &volume).await.expect("goes over");
    bare.join_disk(vm, "two", None).await.expect("joins");
    bare.change_medium(vm, "cd", None, "").await.expect("ejected");
    bare.unplug_disk(vm, "two", BY_FORCE, "").await.expect("goes");
    assert_eq!(bare.state(vm).unwrap().disks, ["one", "cd"]);
}

#[tokio::test]
async fn a_domain_whose_image_does_not_open_does_not_start_and_leaves_nothing() {
    let bare = Bare::start("qemu").await;
    let (holder, vm) = (Uuid::new_v4(), Uuid::new_v4());
    let (missing, damaged) = (bare.host.dir.path().join("missing.raw"), bare.file("damaged.qcow2", MIB));
    let with = |vm, image: &Path| DomainSpec { disks: vec![disk("one", "xvda", image)], ..spec(vm) };
    for (image, why) in [(&missing, Reason::NoSuchVolume), (&damaged, Reason::Damaged)] {
        assert_eq!(reason(bare.start(with(vm, image), false, "").await), why);
        bare.nothing_is_left(vm);
    }
    let locked = bare.file("locked.raw", MIB);
    bare.start(with(holder, &locked), true, "").await.expect("starts");
    assert_eq!(reason(bare.start(with(vm, &locked), false, "").await), Reason::InUse);
    assert!(bare.state(vm).is_none() && !bare.host.domain_dir(vm).exists());
    let shared = |vm| {
        let disk = Disk { sharable: true, ..disk("one", "xvda", &missing) };
        DomainSpec { disks: vec![disk], ..spec(vm) }
    };
    File::create(&missing).unwrap().set_len(MIB).unwrap();
    bare.destroy(holder, "").await.expect("destroyed");
    for vm in [holder, vm] {
        bare.start(shared(vm), true, "").await.expect("shared on purpose");
    }
}

#[tokio::test]
async fn a_suspend_that_finds_no_room_leaves_the_domain_running() {
    let bare = Bare::start("qemu").await;
    let vm = Uuid::new_v4();
    bare.start(spec(vm), false, "start").await.expect("starts");
    let refusal = bare.suspend(vm, Path::new("/dev/full"), false, "").await.expect_err("full");
    assert_eq!(refusal.reason, Reason::NoSpace, "{refusal}");
    let state = bare.state(vm).expect("is there");
    assert_eq!((state.power, state.last_operation.as_str()), (Power::Running, "start"));
    bare.pause(vm, "").await.expect("does what it is told");
}

/// A suspend that goes on for ever: nobody reads what is written.
async fn endless_suspend(bare: &Bare, vm: Uuid) -> (PathBuf, tokio::task::JoinHandle<Result<DomainState, Refusal>>) {
    let image = bare.host.dir.path().join("pipe");
    if !image.exists() {
        nix::unistd::mkfifo(&image, nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    let driver = Arc::clone(&bare.driver.as_ref().unwrap().0);
    let into = image.clone();
    let suspend = tokio::spawn(async move { driver.suspend(vm, &into, false, "endless").await });
    let description = bare.host.domain_dir(vm).join("domain.json");
    eventually("the suspend begins", || fs::read_to_string(&description).unwrap().contains("\"saving\": true")).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    (image, suspend)
}

#[tokio::test]
async fn a_domain_that_ends_in_the_middle_of_a_suspend_leaves_nothing() {
    let bare = Bare::start("qemu").await;
    let vm = Uuid::new_v4();
    bare.start(spec(vm), false, "").await.expect("starts");
    let (_, suspend) = endless_suspend(&bare, vm).await;
    assert_eq!(reason(bare.pause(vm, "").await), Reason::BadState);
    kill(bare.host.pid(vm));
    assert_eq!(reason(suspend.await.unwrap()), Reason::BadState);
    bare.nothing_is_left(vm);

    bare.start(spec(vm), false, "").await.expect("starts");
    let (_, suspend) = endless_suspend(&bare, vm).await;
    bare.destroy(vm, "").await.expect("destroyed");
    assert_eq!(reason(suspend.await.unwrap()), Reason::BadState);
    bare.nothing_is_left(vm);
}

#[tokio::test]
async fn an_agent_that_ends_in_the_middle_of_a_suspend_leaves_a_domain_that_goes_on() {
    let mut bare = Bare::start("qemu").await;
    let vm = Uuid::new_v4();
    bare.start(spec(vm), false, "").await.expect("starts");
    let (_, suspend) = endless_suspend(&bare, vm).await;
    bare.close().await;
    assert!(suspend.await.unwrap().is_err());
    bare.open().await;
    let runs = || {
        let description = fs::read_to_string(bare.host.domain_dir(vm).join("domain.json")).unwrap();
        description.contains("\"saving\": null") && bare.state(vm).is_some_and(|state| state.power == Power::Running)
    };
    eventually("the domain goes on", runs).await;
    bare.pause(vm, "").await.expect("it did run");
}

#[tokio::test]
async fn a_domain_that_dies_while_its_guest_is_asked_for_a_disk_leaves_nothing() {
    let mut bare = Bare::start("qemu").await;
    let vm = Uuid::new_v4();
    let image = bare.file("disk.raw", MIB);
    let machine = DomainSpec { disks: vec![disk("one", "xvda", &image)], ..spec(vm) };
    for restart in [false, true] {
        bare.start(machine.clone(), true, "").await.expect("the image is free");
        let driver = Arc::clone(&bare.driver.as_ref().unwrap().0);
        let unplug = tokio::spawn(async move { driver.unplug_disk(vm, "one", GENTLY, "").await });
        tokio::time::sleep(Duration::from_millis(200)).await;
        let pid = bare.host.pid(vm);
        if restart {
            bare.close().await;
            kill(pid);
            eventually("the process ends", || bare.host.processes().is_empty()).await;
            bare.open().await;
        } else {
            kill(pid);
        }
        // With its domain the disk is off; an agent that is told to end does not know.
        assert_eq!(unplug.await.unwrap().is_err(), restart);
        bare.nothing_is_left(vm);
    }
}
