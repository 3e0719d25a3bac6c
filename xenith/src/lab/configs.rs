//! Writes what the daemons of a lab read: the pool's CA, each host's certificate and the configuration files.
//!
//! Keys and certificates are made once; the configuration files are written anew at every `up`, so that they always say
//! what this program understands and where the directory is now.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use controller::certificates::{self, Issued};
use member_agent::{AcceleratorChoice, NicSource, StoreChoice, TlsFiles};
use serde::Serialize;
use uuid::Uuid;

use super::layout::{HostLayout, Layout, private_dir, private_file};
use super::plan::{Host, Plan};
use crate::cli::Driver;
use crate::config::{
    AgentConfig, Api, ControllerConfig, Founding, Guest, Log, Member, Membership, Peers, Raft, Store, Tls, Traces,
};

/// Memory of a lab host: room for a few dozen of the small guests that labs run.
const QEMU_HOST_MIB: u64 = 4 * 1024;
/// A simulated host has as much as a large real one.
const SIM_HOST_MIB: u64 = 1024 * 1024;
const CONTROL_DOMAIN_MIB: u64 = 512;

/// The guest's console is the serial port, and a kernel that panics starts over at once.
const GUEST_ARGS: &str = "console=ttyS0 quiet panic=-1";

/// Writes all of it.
pub fn write(layout: &Layout, plan: &Plan) -> anyhow::Result<()> {
    private_file(&layout.root_password(), &format!("{}\n", plan.password))?;
    let together = authority(&layout.ca())?;
    let guest = guest(plan.driver)?;
    let members: Vec<_> = plan.hosts.iter().filter(|host| !host.apart).map(|host| member(plan, host)).collect();
    for (position, host) in plan.hosts.iter().enumerate() {
        let place = layout.host(&host.name);
        let storage = place.storage();
        let dirs = [&place.tls(), &place.controller_data(), &place.agent_state(), &storage.join("local")];
        for dir in dirs.into_iter().map(PathBuf::as_path).chain([place.root()]) {
            private_dir(dir)?;
        }
        share(&layout.shared_storage(), &storage.join("shared"))?;
        // A host apart has an authority of its own, as it is a pool of its own.
        let (ca, own) = if host.apart {
            let ca = place.tls().join("ca");
            let own = authority(&ca)?;
            (ca, Some(own))
        } else {
            (layout.ca(), None)
        };
        let tls = identity(own.as_ref().unwrap_or(&together), &ca, &place, host)?;
        let founding = Founding {
            initialize: position == 0 || host.apart,
            root_password_file: Some(layout.root_password()),
            ca_key: Some(ca.join("ca.key")),
            members: if host.apart { vec![member(plan, host)] } else { members.clone() },
        };
        let controller = ControllerConfig {
            host_uuid: host.uuid,
            node_id: host.node_id,
            data_dir: place.controller_data(),
            api: Api {
                listen: vec![plan.api(host)],
                plain_http: Vec::new(),
                socket: Some(place.socket()),
                certificate: place.tls().join("api.pem"),
                key: place.tls().join("api.key"),
                redirect_sessions: false,
                election_wait_ms: 5_000,
            },
            peers: Peers { listen: plan.peer(host) },
            tls: tls.clone(),
            founding: Some(founding),
            raft: Raft::default(),
            store: Store { format_limit: plan.format_limit },
            membership: plan.replace_after_ms.map_or_else(Membership::default, |replace_after_ms| Membership {
                replace_after_ms,
                ..Membership::default()
            }),
            guest: guest.clone(),
            clock_offset: None,
            log: Log::default(),
            traces: Traces::default(),
        };
        write_toml(&place.controller_config(), &controller)?;
        if !place.boot_id().is_file() {
            new_boot(&place)?;
        }
        let agent = AgentConfig {
            agent: member_agent::Config {
                host_uuid: host.uuid,
                hostname: Some(host.name.clone()),
                listen: plan.agent(host),
                identity: Some(place.controller_data().join("current/tls")),
                tls: TlsFiles { ca: tls.ca, certificate: tls.certificate, key: tls.key },
                state_dir: place.agent_state(),
                driver: plan.driver.name().into(),
                pool: None,
                memory_total_mib: Some(match plan.driver {
                    Driver::Qemu => QEMU_HOST_MIB,
                    Driver::Sim => SIM_HOST_MIB,
                }),
                control_domain_memory_mib: CONTROL_DOMAIN_MIB,
                nics: NicSource::Sim,
                qemu_binary: None,
                accelerator: AcceleratorChoice::Auto,
                boot_id_path: place.boot_id(),
                storage_dir: Some(storage),
                stores: StoreChoice::Auto,
                programs: None,
            },
            log: Log::default(),
            traces: Traces::default(),
        };
        write_toml(&place.agent_config(), &agent)?;
    }
    Ok(())
}

/// From now on it is another boot of this host: its agent forgets what a machine forgets when its power goes.
pub fn new_boot(place: &HostLayout) -> anyhow::Result<()> {
    private_file(&place.boot_id(), &format!("{}\n", Uuid::new_v4()))
}

/// Lets a host reach what all share.
fn share(shared: &Path, link: &Path) -> anyhow::Result<()> {
    private_dir(shared)?;
    if link.is_symlink() {
        // The lab may have been moved since.
        std::fs::remove_file(link).with_context(|| format!("cannot replace {}", link.display()))?;
    }
    std::os::unix::fs::symlink(shared, link).with_context(|| format!("cannot make {}", link.display()))
}

fn member(plan: &Plan, host: &Host) -> Member {
    Member {
        node_id: host.node_id,
        host_uuid: host.uuid,
        api_address: host.address.into(),
        peer_address: plan.peer(host),
        agent_address: plan.agent(host),
        replica: host.replica,
    }
}

/// The small Linux that `make guest` made: where XENITH_GUEST_DIR says, else in the project's cache.
fn guest(driver: Driver) -> anyhow::Result<Option<Guest>> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || {
        let above = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?;
        Some(above.join("xenith"))
    };
    let place =
        variable("XENITH_GUEST_DIR").or_else(|| Some(variable("XENITH_CACHE").or_else(cache)?.join("guest/image")));
    let image = |dir: PathBuf| Guest {
        kernel: dir.join("vmlinuz"),
        ramdisk: Some(dir.join("initrd.gz")),
        args: GUEST_ARGS.into(),
    };
    match (place.map(image), driver) {
        (Some(guest), _) if guest.kernel.is_file() => Ok(Some(guest)),
        (_, Driver::Sim) => Ok(None),
        (Some(guest), Driver::Qemu) => bail!(
            "there is no guest to boot at {}: run `make guest`, set XENITH_GUEST_DIR to where it is, or take --driver sim",
            guest.kernel.display()
        ),
        (None, Driver::Qemu) => {
            bail!("set XENITH_GUEST_DIR to the directory that `make guest` filled, or take --driver sim")
        }
    }
}

fn authority(place: &Path) -> anyhow::Result<Issued> {
    let (certificate, key) = (place.join("ca.pem"), place.join("ca.key"));
    if certificate.is_file() && key.is_file() {
        let read =
            |path: &Path| std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
        return Ok(Issued { certificate: read(&certificate)?, key: read(&key)? });
    }
    private_dir(place)?;
    let authority = certificates::create_authority("lab").context("cannot make the pool's CA")?;
    private_file(&key, &authority.key)?;
    private_file(&certificate, &authority.certificate)?;
    Ok(authority)
}

fn identity(authority: &Issued, ca: &Path, place: &HostLayout, host: &Host) -> anyhow::Result<Tls> {
    let tls =
        Tls { ca: ca.join("ca.pem"), certificate: place.tls().join("host.pem"), key: place.tls().join("host.key") };
    if !(tls.certificate.is_file() && tls.key.is_file()) {
        let issued = certificates::issue(authority, &host.uuid.to_string(), &[host.address.into()]);
        let issued = issued.context("cannot sign a host's certificate")?;
        private_file(&tls.key, &issued.key)?;
        private_file(&tls.certificate, &issued.certificate)?;
    }
    Ok(tls)
}

fn write_toml(path: &Path, config: &impl Serialize) -> anyhow::Result<()> {
    let text = toml::to_string_pretty(config).with_context(|| format!("cannot write {}", path.display()))?;
    private_file(path, &format!("# Written by `xenith lab up`, anew each time.\n{text}"))
}
