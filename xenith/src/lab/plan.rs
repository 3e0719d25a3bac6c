//! What a lab is made of: decided once, when it is made, and kept in `lab.json`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::layout::{Layout, private_file};
use crate::cli::{Driver, Up};

const VERSION: u32 = 1;
/// Peers and agents listen on the ports after the API's.
const PEER_PORT: u16 = 1;
const AGENT_PORT: u16 = 2;
/// As many as may vote; more only where it is asked for.
const REPLICAS: u8 = 7;

/// The whole lab.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    version: u32,
    /// What runs the guests.
    pub driver: Driver,
    /// Port of the API, the same on every host.
    pub port: u16,
    /// The account that clients use.
    pub user: String,
    /// Its password when the pool was made.
    pub password: String,
    /// A voter that is silent for so long is replaced; none: as the program has it.
    #[serde(default)]
    pub replace_after_ms: Option<u64>,
    /// The newest format that the hosts read; none: as the program has it.
    #[serde(default)]
    pub format_limit: Option<u32>,
    /// The hosts, in order.
    pub hosts: Vec<Host>,
}

/// One host of the lab.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// `host1`, `host2`, …
    pub name: String,
    /// Its uuid in the pool.
    pub uuid: Uuid,
    /// Its number in the Raft group.
    pub node_id: u64,
    /// Its own loopback address.
    pub address: Ipv4Addr,
    /// Whether it runs a controller, with a copy of the pool's state.
    #[serde(default = "yes")]
    pub replica: bool,
    /// Whether it begins as a pool of its own.
    #[serde(default)]
    pub apart: bool,
}

fn yes() -> bool {
    true
}

impl Plan {
    /// What the flags ask for, with the defaults for what they leave open.
    fn new(flags: &Up) -> anyhow::Result<Self> {
        let base = flags.base.unwrap_or(Ipv4Addr::new(127, 0, 71, 1));
        let count = flags.hosts.unwrap_or(3);
        let replicas = flags.replicas.unwrap_or(REPLICAS);
        let apart = flags.apart.unwrap_or(0);
        let hosts = (0..count + apart).map(|position| {
            let address =
                Ipv4Addr::from(u32::from(base).checked_add(position.into()).context("--base leaves no room")?);
            if !address.is_loopback() {
                bail!(
                    "{address} is no loopback address: --base must be 127.x.y.z with room for {count} hosts after it"
                );
            }
            Ok(Host {
                name: format!("host{}", position + 1),
                uuid: Uuid::new_v4(),
                node_id: if position < count { u64::from(position) + 1 } else { 1 },
                address,
                replica: position < replicas || position >= count,
                apart: position >= count,
            })
        });
        Ok(Self {
            version: VERSION,
            driver: flags.driver.unwrap_or(Driver::Qemu),
            port: flags.port.unwrap_or(8443),
            user: "root".into(),
            password: flags.password.clone().unwrap_or_else(|| "xenith".into()),
            replace_after_ms: flags.replace_after_ms,
            format_limit: flags.format_limit,
            hosts: hosts.collect::<anyhow::Result<_>>()?,
        })
    }

    /// The lab that is there; None when none was made in this directory.
    pub fn load(layout: &Layout) -> anyhow::Result<Option<Self>> {
        let path = layout.plan();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let plan: Self = serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))?;
        if plan.version != VERSION {
            bail!("{} has version {}, this program knows {VERSION}", path.display(), plan.version);
        }
        Ok(Some(plan))
    }

    /// The lab that is there, or else a new one as the flags ask for. Flags that ask for another lab than is there are
    /// refused: a pool does not change its addresses by being started.
    pub fn load_or_make(layout: &Layout, flags: &Up) -> anyhow::Result<Self> {
        let Some(plan) = Self::load(layout)? else {
            let plan = Self::new(flags)?;
            private_file(&layout.plan(), &serde_json::to_string_pretty(&plan)?)?;
            return Ok(plan);
        };
        let mut differences = Vec::new();
        let mut compare = |flag: &str, asked: Option<String>, there: String| {
            if asked.as_ref().is_some_and(|asked| *asked != there) {
                differences.push(format!("{flag} is {there}"));
            }
        };
        let apart = plan.hosts.iter().filter(|host| host.apart).count();
        compare("--hosts", flags.hosts.map(|count| count.to_string()), (plan.hosts.len() - apart).to_string());
        compare("--apart", flags.apart.map(|count| count.to_string()), apart.to_string());
        let replicas = plan.hosts.iter().filter(|host| host.replica && !host.apart).count();
        compare("--replicas", flags.replicas.map(|count| count.to_string()), replicas.to_string());
        compare("--driver", flags.driver.map(|driver| driver.name().into()), plan.driver.name().into());
        compare(
            "--base",
            flags.base.map(|base| base.to_string()),
            plan.hosts.first().map(|host| host.address.to_string()).unwrap_or_default(),
        );
        compare("--port", flags.port.map(|port| port.to_string()), plan.port.to_string());
        if flags.password.as_ref().is_some_and(|asked| *asked != plan.password) {
            differences.push("--password is another".into());
        }
        if !differences.is_empty() {
            bail!(
                "the lab in {} was made otherwise: {}. Leave these flags out, or choose another --dir",
                layout.root().display(),
                differences.join(", ")
            );
        }
        Ok(plan)
    }

    /// The host of that name.
    pub fn host(&self, name: &str) -> anyhow::Result<&Host> {
        self.hosts.iter().find(|host| host.name == name).with_context(|| {
            let names: Vec<_> = self.hosts.iter().map(|host| host.name.as_str()).collect();
            format!("there is no host {name:?} in this lab; there are {}", names.join(", "))
        })
    }

    /// Where clients reach a host.
    pub fn api(&self, host: &Host) -> SocketAddr {
        self.at(host, 0)
    }

    /// Where other controllers reach it.
    pub fn peer(&self, host: &Host) -> SocketAddr {
        self.at(host, PEER_PORT)
    }

    /// Where the master reaches its agent.
    pub fn agent(&self, host: &Host) -> SocketAddr {
        self.at(host, AGENT_PORT)
    }

    fn at(&self, host: &Host, offset: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(host.address), self.port + offset)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command, Lab};

    fn flags(dir: &std::path::Path, rest: &[&str]) -> Up {
        let all = ["xenith", "lab", "up", "--dir", dir.to_str().unwrap()];
        match Cli::parse_from(all.iter().chain(rest)).command {
            Command::Lab(Lab::Up(up)) => up,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_second_up_finds_the_lab_as_it_was_and_refuses_to_make_another_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::make(dir.path()).unwrap();
        let made = Plan::load_or_make(&layout, &flags(dir.path(), &["--driver", "sim", "--hosts", "2"])).unwrap();
        let found = Plan::load_or_make(&layout, &flags(dir.path(), &[])).unwrap();
        assert_eq!(made, found);
        let same =
            flags(dir.path(), &["--driver", "sim", "--hosts", "2", "--base", "127.0.71.1", "--password", "xenith"]);
        assert_eq!(Plan::load_or_make(&layout, &same).unwrap(), made);
        for other in
            [["--hosts", "3"], ["--driver", "qemu"], ["--base", "127.0.72.1"], ["--port", "9443"], ["--password", "x"]]
        {
            let refusal = Plan::load_or_make(&layout, &flags(dir.path(), &other)).unwrap_err().to_string();
            assert!(refusal.contains(other[0]), "{refusal}");
        }
    }

    #[test]
    fn hosts_never_leave_the_loopback_network() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::make(dir.path()).unwrap();
        for base in ["10.0.0.1", "127.255.255.254"] {
            Plan::load_or_make(&layout, &flags(dir.path(), &["--base", base])).unwrap_err();
        }
        assert!(Plan::load(&layout).unwrap().is_none());
    }
}
