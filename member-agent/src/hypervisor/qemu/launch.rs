//! A domain's command line: what a spec means in QEMU's words.
//!
//! The process works in its domain's directory, so sockets and logs have short names. Its vCPUs always wait (`-S`)
//! until the agent listens, so that nothing a guest does goes unseen. A guest that ends keeps its process
//! (`shutdown=pause`) until the agent has learnt why, also when there is no agent just then.
//!
//! For now NICs are QEMU's own user networking without a way out: the guest sees its NIC and MAC, and nobody
//! else. Disks are virtio. `VM.platform` has no effect yet.

use std::path::Path;
use std::process::Stdio;
use std::{fs, io};

use serde_json::json;
use tokio::process::{Child, Command};

use crate::hypervisor::domain::{Action, DomainSpec, MIB, Reason, Refusal};

/// How QEMU runs the vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    pub fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

/// Starts QEMU in `dir`, in a process group of its own and with nothing of ours open, so that it outlives us.
pub(super) fn spawn(binary: &Path, dir: &Path, arguments: &[String]) -> io::Result<Child> {
    let log = fs::File::create(dir.join("qemu.log"))?;
    Command::new(binary)
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .kill_on_drop(false)
        .spawn()
}

/// Refuses what this driver cannot build.
pub(super) fn check(spec: &DomainSpec) -> Result<(), Refusal> {
    if !matches!(spec.firmware.as_str(), "" | "bios") {
        return Err(Refusal::new(Reason::Unsupported, format!("firmware {:?}", spec.firmware)));
    }
    if spec.memory() == 0 {
        return Err(Refusal::new(Reason::BootFailed, "a domain needs memory"));
    }
    Ok(())
}

/// The whole command line.
pub(super) fn arguments(spec: &DomainSpec, accelerator: Accelerator) -> Vec<String> {
    let mut line = Line::default();
    line.add("-name", format!("guest={}", escaped(&spec.name)));
    line.add("-uuid", spec.vm.to_string());
    line.add("-machine", "pc,usb=off");
    line.words(&accelerator.arguments());
    line.add("-m", format!("{}M", spec.memory() / MIB));
    let at_startup = spec.vcpus_at_startup.max(1);
    line.add("-smp", format!("cpus={at_startup},maxcpus={}", spec.vcpus_max.max(at_startup)));
    line.words(&["-nodefaults", "-no-user-config", "-S", "-pidfile", "qemu.pid"]);
    line.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");

    let reboot = if spec.on_reboot == Action::Restart { "reset" } else { "shutdown" };
    line.add("-action", format!("shutdown=pause,reboot={reboot},panic=pause"));
    line.add("-device", "pvpanic");
    line.add("-qmp", "unix:qmp,server=on,wait=off");
    line.add("-chardev", "socket,id=console,path=console,server=on,wait=off,logfile=console.log,logappend=on");
    line.add("-serial", "chardev:console");
    line.add("-device", "VGA,vgamem_mb=8");
    line.add("-vnc", "unix:vnc");

    boot(&mut line, spec);
    disks(&mut line, spec);
    nics(&mut line, spec);
    line.0
}

fn boot(line: &mut Line, spec: &DomainSpec) {
    if !spec.kernel.is_empty() {
        line.add("-kernel", spec.kernel.clone());
        if !spec.ramdisk.is_empty() {
            line.add("-initrd", spec.ramdisk.clone());
        }
        if !spec.kernel_args.is_empty() {
            line.add("-append", spec.kernel_args.clone());
        }
    }
    let order: String = spec.boot_order.chars().filter(|letter| "cdn".contains(*letter)).collect();
    if !order.is_empty() {
        line.add("-boot", format!("order={order}"));
    }
}

fn disks(line: &mut Line, spec: &DomainSpec) {
    for (number, disk) in spec.disks.iter().enumerate() {
        let node = format!("disk{number}");
        let bus = if disk.cdrom { "ide-cd" } else { "virtio-blk-pci" };
        if disk.path.is_empty() {
            line.add("-device", format!("{bus},id={node}"));
            continue;
        }
        let read_only = disk.read_only || disk.cdrom;
        let protocol = if disk.path.starts_with("/dev/") { "host_device" } else { "file" };
        let backend = json!({
            "driver": disk.format.word(),
            "node-name": node,
            "read-only": read_only,
            "file": { "driver": protocol, "filename": disk.path, "read-only": read_only },
        });
        line.add("-blockdev", backend.to_string());
        let serial = escaped(&disk.device);
        let shared = if disk.sharable { ",share-rw=on" } else { "" };
        line.add("-device", format!("{bus},id={node}-{serial},drive={node},serial={serial}{shared}"));
    }
}

fn nics(line: &mut Line, spec: &DomainSpec) {
    for (number, vif) in spec.vifs.iter().enumerate() {
        line.add("-netdev", format!("user,id=net{number},restrict=on"));
        let mac = if vif.mac.is_empty() { String::new() } else { format!(",mac={}", escaped(&vif.mac)) };
        line.add("-device", format!("virtio-net-pci,netdev=net{number},romfile={mac}"));
    }
}

/// QEMU's option lists separate by comma; a doubled one is meant.
fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.0.push(option.to_owned());
        self.0.push(value.into());
    }

    fn words(&mut self, words: &[&str]) {
        self.0.extend(words.iter().map(|word| (*word).to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::domain::Disk;

    fn value<'a>(arguments: &'a [String], option: &str) -> Option<&'a str> {
        let at = arguments.iter().position(|argument| argument == option)?;
        arguments.get(at + 1).map(String::as_str)
    }

    #[test]
    fn a_name_cannot_smuggle_in_options() {
        let spec = DomainSpec { name: "a,process=init".into(), ..DomainSpec::default() };
        assert_eq!(value(&arguments(&spec, Accelerator::Tcg), "-name"), Some("guest=a,,process=init"));
    }

    #[test]
    fn a_disk_path_is_taken_as_it_is() {
        let disk = Disk { device: "xvda".into(), path: "/a,b\"c.raw".into(), ..Disk::default() };
        let spec = DomainSpec { disks: vec![disk], ..DomainSpec::default() };
        let arguments = arguments(&spec, Accelerator::Tcg);
        let backend: serde_json::Value =
            serde_json::from_str(value(&arguments, "-blockdev").expect("disk")).expect("JSON");
        assert_eq!(backend["file"]["filename"], "/a,b\"c.raw");
        assert_eq!((&backend["driver"], &backend["read-only"]), (&json!("raw"), &json!(false)));
    }

    #[test]
    fn a_guest_that_reboots_ends_its_domain_unless_it_may_restart() {
        let spec = DomainSpec { on_reboot: Action::Restart, ..DomainSpec::default() };
        let restart = arguments(&spec, Accelerator::Tcg);
        let destroy = arguments(&DomainSpec::default(), Accelerator::Tcg);
        assert_eq!(value(&restart, "-action"), Some("shutdown=pause,reboot=reset,panic=pause"));
        assert_eq!(value(&destroy, "-action"), Some("shutdown=pause,reboot=shutdown,panic=pause"));
    }

    #[test]
    fn there_is_always_a_vcpu_and_never_fewer_slots_than_vcpus() {
        let spec = DomainSpec { vcpus_at_startup: 2, vcpus_max: 1, ..DomainSpec::default() };
        assert_eq!(value(&arguments(&spec, Accelerator::Kvm), "-smp"), Some("cpus=2,maxcpus=2"));
        assert_eq!(value(&arguments(&DomainSpec::default(), Accelerator::Kvm), "-smp"), Some("cpus=1,maxcpus=1"));
    }
}
