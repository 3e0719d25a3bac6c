//! What the agent tells of its host: processors, memory, NICs, kernel, and when it came up.

mod cpu;
mod nic;

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use proto::agent::HostFacts;

use crate::config::Config;
use crate::hypervisor::Features;
use crate::hypervisor::domain::MIB;
use crate::hypervisor::roster::Memory;

/// What does not change while the agent runs.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    hostname: String,
    kernel: String,
    /// Tells this boot from others.
    pub boot_id: String,
    boot_time: u64,
    agent_start_time: u64,
    /// Bytes, domains and control domain together.
    pub memory_total: u64,
    /// Bytes kept for the host.
    pub control_domain_memory: u64,
}

impl Host {
    /// Reads them. What the machine does not tell is empty or 0, and no reason not to serve.
    pub fn read(config: &Config) -> Self {
        let boot_id = fs::read_to_string(&config.boot_id_path).unwrap_or_default().trim().to_owned();
        let uname = nix::sys::utsname::uname().ok();
        let kernel = uname.as_ref().map(|it| it.release().to_string_lossy().into_owned()).unwrap_or_default();
        let nodename = uname.as_ref().map(|it| it.nodename().to_string_lossy().into_owned()).unwrap_or_default();
        let memory_total = config.memory_total_mib.map_or_else(machine_memory, |mib| mib.saturating_mul(MIB));
        Self {
            hostname: config.hostname.clone().unwrap_or(nodename),
            kernel,
            boot_id,
            boot_time: boot_time(&config.boot_id_path),
            agent_start_time: unix_seconds(),
            memory_total,
            control_domain_memory: config.control_domain_memory_mib.saturating_mul(MIB).min(memory_total),
        }
    }

    /// Bytes for all domains together.
    pub fn capacity(&self) -> u64 {
        self.memory_total - self.control_domain_memory
    }

    /// Everything, as it is now.
    pub fn facts(&self, config: &Config, hypervisor: &Features, memory: Memory) -> HostFacts {
        let (cpus, cpu_sockets) = cpu::read();
        HostFacts {
            hostname: self.hostname.clone(),
            memory_total: self.memory_total,
            memory_free: memory.free,
            control_domain_memory: self.control_domain_memory,
            cpus,
            nics: nic::read(config),
            hypervisor: hypervisor.name.to_owned(),
            hypervisor_version: hypervisor.version.clone(),
            kernel: self.kernel.clone(),
            accelerator: hypervisor.accelerator.to_owned(),
            boot_id: self.boot_id.clone(),
            boot_time: self.boot_time,
            agent_start_time: self.agent_start_time,
            cpu_sockets,
        }
    }
}

/// The wall clock, in whole Unix seconds.
pub(crate) fn unix_seconds() -> u64 {
    seconds(SystemTime::now())
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default()
}

/// When the host came up: the kernel's word, or the age of a boot id that the lab made.
fn boot_time(boot_id_path: &Path) -> u64 {
    if !boot_id_path.starts_with("/proc") {
        return fs::metadata(boot_id_path).and_then(|it| it.modified()).map(seconds).unwrap_or_default();
    }
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "));
    line.and_then(|seconds| seconds.trim().parse().ok()).unwrap_or_default()
}

fn machine_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib: u64 =
        line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse().ok()).unwrap_or_default();
    kib * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_tells_its_memory_and_its_boot() {
        assert!(machine_memory() > 64 * MIB);
        let came_up = boot_time(Path::new("/proc/sys/kernel/random/boot_id"));
        assert!(came_up > 1_000_000_000 && came_up <= unix_seconds() + 1);
    }
}
