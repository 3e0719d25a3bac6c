//! What an agent is told when it starts. A setting that is not known is an error, not a silence.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The agent's configuration, as its file says it.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The host this agent speaks for.
    pub host_uuid: Uuid,
    /// Its name; none: the kernel's.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Where the master reaches the agent: address and port. Port 0 takes any free one.
    pub listen: SocketAddr,
    /// Who the agent is and whom it believes.
    pub tls: TlsFiles,
    /// Directory with the certificates of the pool that the host has joined since (`ca.pem`, `host.pem`, `host.key`);
    /// where it has them, those under `tls` are not used any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<PathBuf>,
    /// Directory for ledger and domains; one agent at a time.
    pub state_dir: PathBuf,
    /// "qemu", "sim", or "auto": the first driver that this machine has the means for, never "sim".
    #[serde(default = "auto")]
    pub driver: String,
    /// The only pool that may command this host; none: whoever shows a certificate of the pool's authority.
    #[serde(default)]
    pub pool: Option<Uuid>,
    /// MiB for domains and control domain together; none: the machine's memory.
    #[serde(default)]
    pub memory_total_mib: Option<u64>,
    /// MiB kept for the host itself.
    #[serde(default = "control_domain_memory_mib")]
    pub control_domain_memory_mib: u64,
    /// Which NICs the host says it has.
    #[serde(default)]
    pub nics: NicSource,
    /// The QEMU to run; none: `qemu-system-x86_64` from the path.
    #[serde(default)]
    pub qemu_binary: Option<PathBuf>,
    /// How QEMU runs guests.
    #[serde(default)]
    pub accelerator: AcceleratorChoice,
    /// The file whose content tells one boot of this host from the next. The lab, where hosts share a kernel, gives
    /// each its own and changes it when it cuts the host's power.
    #[serde(default = "boot_id_path")]
    pub boot_id_path: PathBuf,
    /// Where stores are whose `device_config["location"]` is no absolute path, such as the pool's first ones, "local"
    /// and "shared"; none: below `state_dir`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage_dir: Option<PathBuf>,
    /// Which drivers stores have.
    #[serde(default)]
    pub stores: StoreChoice,
    /// Directory of programs that are run instead of those of the same names on the path (qemu-img, mount, lvs, …).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub programs: Option<PathBuf>,
}

impl Config {
    /// Where stores whose location is no absolute path are.
    pub fn stores_below(&self) -> PathBuf {
        self.storage_dir.clone().unwrap_or_else(|| self.state_dir.join("storage"))
    }

    /// Whether stores are simulated, beside a hypervisor of this name.
    pub fn stores_simulated(&self, hypervisor: &str) -> bool {
        match self.stores {
            StoreChoice::Auto => hypervisor == "sim",
            StoreChoice::Real => false,
            StoreChoice::Sim => true,
        }
    }
}

/// Which drivers stores have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreChoice {
    /// Simulated ones beside the simulated hypervisor, else those of their types.
    #[default]
    Auto,
    /// Those of their types.
    Real,
    /// Simulated ones, whatever their types.
    Sim,
}

/// PEM files for mutual TLS.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The pool's authority: only peers with a certificate of its making are heard.
    pub ca: PathBuf,
    /// The agent's own certificate, with its chain.
    pub certificate: PathBuf,
    /// The key of that certificate.
    pub key: PathBuf,
}

/// Where the host's NICs come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NicSource {
    /// The machine's own.
    #[default]
    Real,
    /// Two made-up ones, for hosts that share a machine.
    Sim,
}

/// How QEMU runs guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AcceleratorChoice {
    /// KVM where a probe guest proves that it works, else emulation.
    #[default]
    Auto,
    /// KVM, unproven.
    Kvm,
    /// Emulation.
    Tcg,
}

fn auto() -> String {
    "auto".to_owned()
}

fn control_domain_memory_mib() -> u64 {
    1024
}

fn boot_id_path() -> PathBuf {
    PathBuf::from("/proc/sys/kernel/random/boot_id")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = r#"
        host_uuid = "6f2f1d3e-0000-4000-8000-000000000001"
        listen = "127.0.71.1:8445"
        state_dir = "/var/lib/xenith/agent"
        [tls]
        ca = "ca.pem"
        certificate = "host.pem"
        key = "host.key"
    "#;

    #[test]
    fn the_smallest_file_is_enough() {
        let config: Config = toml::from_str(SMALLEST).expect("parses");
        assert_eq!((config.driver.as_str(), config.nics), ("auto", NicSource::Real));
        assert_eq!(config.accelerator, AcceleratorChoice::Auto);
    }

    #[test]
    fn a_misspelt_setting_is_an_error() {
        let error = toml::from_str::<Config>(&format!("memory_totl_mib = 4\n{SMALLEST}")).expect_err("unknown");
        assert!(error.to_string().contains("memory_totl_mib"));
    }
}
