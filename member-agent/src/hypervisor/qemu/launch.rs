//! A domain's command line: what a spec means in QEMU's words.
//!
//! The process works in its domain's directory, so sockets and logs have short names. Its vCPUs always wait (`-S`)
//! until the agent listens, so that nothing a guest does goes unseen. A guest that ends keeps its process
//! (`shutdown=pause`) until the agent has learnt why, also when there is no agent just then.
//!
//! Each device has its place on the bus, so that a domain that is resumed finds it there. `VM.platform` has no effect yet.

use std::path::Path;
use std::process::Stdio;
use std::{fs, io};

use tokio::process::{Child, Command};

use super::description::Description;
use super::{blocks, nics};
use crate::hypervisor::domain::{Action, DomainSpec, MIB, Reason, Refusal};
use crate::hypervisor::saved::Saved;

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
    if spec.disks.iter().filter(|disk| disk.cdrom).count() > 4 {
        return Err(Refusal::new(Reason::Unsupported, "more than four CD drives"));
    }
    if spec.memory() == 0 {
        return Err(Refusal::new(Reason::BootFailed, "a domain needs memory"));
    }
    Ok(())
}

/// The whole command line. With `saved`, the machine waits for what it was to be told over QMP.
pub(super) fn arguments(description: &Description, accelerator: Accelerator, saved: Option<&Saved>) -> Vec<String> {
    let (spec, domid) = (&description.spec, description.state.domid);
    let mut line = Line::default();
    line.add("-name", format!("guest={}", escaped(&spec.name)));
    line.add("-uuid", spec.vm.to_string());
    let machine = saved.map(|saved| saved.machine.as_str()).filter(|machine| !machine.is_empty());
    line.add("-machine", format!("{},usb=off", escaped(machine.unwrap_or("pc"))));
    line.words(&accelerator.arguments());
    line.add("-m", format!("{}M", spec.memory() / MIB));
    let at_startup = spec.vcpus_at_startup.max(1);
    line.add("-smp", format!("cpus={at_startup},maxcpus={}", spec.vcpus_max.max(at_startup)));
    line.words(&["-nodefaults", "-no-user-config", "-S", "-pidfile", "qemu.pid"]);
    if saved.is_some() {
        line.words(&["-incoming", "defer"]);
    }
    line.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");

    let reboot = if spec.on_reboot == Action::Restart { "reset" } else { "shutdown" };
    line.add("-action", format!("shutdown=pause,reboot={reboot},panic=pause"));
    line.add("-device", "pvpanic");
    line.add("-qmp", "unix:qmp,server=on,wait=off");
    line.add("-chardev", "socket,id=console,path=console,server=on,wait=off,logfile=console.log,logappend=on");
    line.add("-serial", "chardev:console");
    line.add("-device", "VGA,vgamem_mb=8,addr=2");
    line.add("-vnc", "unix:vnc");
    line.add("-device", "virtio-serial-pci,id=ports,addr=3");
    line.add("-chardev", "socket,id=agent,path=agent,server=on,wait=off");
    line.add("-device", "virtserialport,id=agent,bus=ports.0,chardev=agent,name=org.qemu.guest_agent.0");
    line.add("-device", "virtio-balloon-pci,id=balloon,addr=4");

    boot(&mut line, spec);
    let turns = turns(spec);
    for attached in &description.disks {
        let turn = turns.iter().position(|device| *device == blocks::device_id(&attached.disk));
        let node = attached.nodes.first();
        if let Some(node) = node {
            line.add("-blockdev", blocks::image(&attached.disk, node, false).to_string());
        }
        line.add("-device", blocks::device(&attached.disk, node, spec.vcpus_max, turn).to_string());
    }
    for (backend, device) in nics::options(spec, domid) {
        line.add("-netdev", backend);
        line.add("-device", device.to_string());
    }
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
        line.add("-boot", format!("order={order},strict=off"));
    }
}

/// Which disks the firmware tries, in turn: those that are bootable before the others of their kind.
fn turns(spec: &DomainSpec) -> Vec<String> {
    // A kernel of our own comes before any disk.
    if !spec.kernel.is_empty() {
        return Vec::new();
    }
    let order = if spec.boot_order.is_empty() { "cd" } else { spec.boot_order.as_str() };
    let mut turns = Vec::new();
    for letter in order.chars() {
        let mut disks: Vec<_> = spec.disks.iter().filter(|disk| disk.cdrom == (letter == 'd')).collect();
        disks.sort_by_key(|disk| !disk.bootable);
        if matches!(letter, 'c' | 'd') {
            turns.extend(disks.into_iter().map(blocks::device_id));
        }
    }
    turns
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

    fn arguments(spec: &DomainSpec, accelerator: Accelerator) -> Vec<String> {
        let state = crate::hypervisor::domain::DomainState::halted(spec.vm, "", "");
        super::arguments(&Description::new(spec.clone(), state), accelerator, None)
    }

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
    fn firmware_tries_bootable_disks_first_and_kinds_in_their_order() {
        let disk = |vbd: &str, cdrom, bootable| Disk { vbd: vbd.into(), cdrom, bootable, ..Disk::default() };
        let disks = vec![disk("data", false, false), disk("cd", true, false), disk("system", false, true)];
        let spec = DomainSpec { disks, boot_order: "dc".into(), ..DomainSpec::default() };
        assert_eq!(turns(&spec), ["vbd-cd", "vbd-system", "vbd-data"]);
        assert_eq!(turns(&DomainSpec { kernel: "/k".into(), ..spec }), Vec::<String>::new());
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
