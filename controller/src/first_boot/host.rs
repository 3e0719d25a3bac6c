//! The rows of a host, made when its agent first answers and brought up to date whenever it does.

use std::collections::BTreeMap;
use std::sync::Arc;

use datamodel::enums::{
    CertificateType, ConsoleProtocol, DomainType, HostAllowedOperations, IpConfigurationMode, VmPowerState,
};
use datamodel::fields::{
    certificate, console, host, host_cpu, host_metrics, member, network, pif, pif_metrics, pool, vm, vm_metrics,
};
use datamodel::{
    Certificate, Console, Host, HostCpu, HostMetrics, Member, Network, Pif, PifMetrics, Pool, Ref, Timestamp, Vm,
    VmMetrics, errors,
};
use proto::agent::{HelloReply, HostFacts, Nic};
use raft_store::{CommitError, NewRow, Row, State, Transaction};

use super::{licence, storage};
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::membership::{self, departure};
use crate::{operations, storage as stores};

const PRODUCT_VERSION: &str = "8.3.0";
/// Newer ones switch some clients to a mode that expects an update server.
const PLATFORM_VERSION: &str = "3.2.1";

pub(super) async fn attach(shared: &Arc<Shared>, reference: Ref<Member>, reply: &HelloReply) -> Served<Ref<Host>> {
    for _ in 0..20 {
        let state = shared.store.read().await?;
        let row = state.row(reference).ok_or(Failure::NotLeader)?;
        let facts = reply.facts.clone().unwrap_or_default();
        if row.get(member::HOST_UUID) != reply.host {
            return refuse(errors::internal_error(format!(
                "the agent at {} speaks for another host",
                row.get(member::AGENT_ADDRESS)
            )));
        }
        let mut change = shared.transaction();
        change.expect_row(row);
        let host_ref: Ref<Host> = row.get(member::HOST);
        let joined = if row.get(member::STANDING) == membership::JOINING {
            membership::admission::bring_in(shared, &state, &mut change, row)?
        } else {
            None
        };
        let host_ref = match state.row(host_ref) {
            _ if joined.is_some() => joined.unwrap_or(host_ref),
            Some(host_row) => {
                refresh(&state, &mut change, row, host_row, &facts);
                host_ref
            }
            None => make(shared, &state, &mut change, row, &facts),
        };
        if change.is_empty() {
            return Ok(host_ref);
        }
        operations::refresh(&state, &mut change);
        match shared.store.commit(change).await {
            Ok(_) => return Ok(host_ref),
            Err(CommitError::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Failure::NotLeader)
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn map(pairs: &[(&str, String)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect()
}

fn clocks(facts: &HostFacts) -> [(&'static str, String); 2] {
    [("boot_time", format!("{}.", facts.boot_time)), ("agent_start_time", format!("{}.", facts.agent_start_time))]
}

/// What may have changed while the host was away. A new boot enables it, whoever disabled it.
fn refresh(state: &State, change: &mut Transaction, row: &Row, host_row: &Row, facts: &HostFacts) {
    let reference = host_row.typed::<Host>();
    if row.get(member::BOOT_ID) != facts.boot_id {
        change.set(row.typed::<Member>(), member::BOOT_ID, facts.boot_id.clone());
        stores::unplugged_by_boot(state, change, reference);
        if !host_row.get(host::ENABLED) {
            change.set(reference, host::ENABLED, true);
        }
    }
    let known = host_row.get(host::OTHER_CONFIG);
    for (key, value) in clocks(facts) {
        if known.get(key) != Some(&value) {
            change.put(reference, host::OTHER_CONFIG, key.to_owned(), value);
        }
    }
    let version = software_version(facts);
    if host_row.get(host::SOFTWARE_VERSION) != version {
        change.set(reference, host::SOFTWARE_VERSION, version);
    }
}

fn software_version(facts: &HostFacts) -> BTreeMap<String, String> {
    map(&[
        ("product_version", PRODUCT_VERSION.into()),
        ("product_version_text", "8.3".into()),
        ("product_version_text_short", "8.3".into()),
        ("platform_name", "XCP".into()),
        ("platform_version", PLATFORM_VERSION.into()),
        ("product_brand", "XCP-ng".into()),
        ("build_number", format!("xenith-{}", env!("CARGO_PKG_VERSION"))),
        ("git_id", "0".into()),
        ("hostname", "localhost".into()),
        ("date", "20260101T00:00:00Z".into()),
        ("dbv", "0.0.1".into()),
        ("db_schema", "5.900".into()),
        ("xapi", "2.21".into()),
        ("xapi_build", env!("CARGO_PKG_VERSION").into()),
        ("xenith", env!("CARGO_PKG_VERSION").into()),
        ("xen", facts.hypervisor_version.clone()),
        ("linux", facts.kernel.clone()),
        ("xencenter_min", "2.20".into()),
        ("xencenter_max", "2.20".into()),
        ("network_backend", "bridge".into()),
    ])
}

fn cpu_info(facts: &HostFacts) -> BTreeMap<String, String> {
    let first = facts.cpus.first().cloned().unwrap_or_default();
    map(&[
        ("cpu_count", facts.cpus.len().to_string()),
        ("socket_count", facts.cpu_sockets.max(1).to_string()),
        ("threads_per_core", "1".into()),
        ("nr_nodes", "1".into()),
        ("vendor", first.vendor),
        ("speed", first.speed_mhz.to_string()),
        ("modelname", first.model_name),
        ("family", first.family.to_string()),
        ("model", first.model.to_string()),
        ("stepping", first.stepping),
        ("flags", first.flags),
        ("features_pv", String::new()),
        ("features_hvm", String::new()),
        ("features_pv_host", String::new()),
        ("features_hvm_host", String::new()),
    ])
}

fn make(shared: &Shared, state: &State, change: &mut Transaction, row: &Row, facts: &HostFacts) -> Ref<Host> {
    let host_ref: Ref<Host> = Ref::new(shared.uuid());
    let metrics: Ref<HostMetrics> = Ref::new(shared.uuid());
    let address = row.get(member::API_ADDRESS);
    let uuid = row.get(member::HOST_UUID).parse().unwrap_or_else(|_| shared.uuid());
    let local_host = |name: &str| {
        ["address", "port"]
            .map(|key| (key.to_owned(), if key == "port" { "27000".to_owned() } else { name.to_owned() }))
    };
    change.insert(
        NewRow::new(metrics, shared.uuid())
            .with(host_metrics::MEMORY_TOTAL, signed(facts.memory_total))
            .with(host_metrics::MEMORY_FREE, signed(facts.memory_free))
            .with(host_metrics::LIVE, false)
            .with(host_metrics::LAST_UPDATED, shared.now()),
    );
    let control: Ref<Vm> = Ref::new(shared.uuid());
    let agent_clocks: BTreeMap<String, String> = map(&clocks(facts));
    change.insert(
        NewRow::new(host_ref, uuid)
            .with(host::NAME_LABEL, facts.hostname.clone())
            .with(host::NAME_DESCRIPTION, "Default install".to_owned())
            .with(host::HOSTNAME, facts.hostname.clone())
            .with(host::ADDRESS, address.clone())
            .with(host::ENABLED, true)
            .with(host::API_VERSION_MAJOR, 2)
            .with(host::API_VERSION_MINOR, 21)
            .with(host::API_VERSION_VENDOR, "XenSource".to_owned())
            .with(host::SCHED_POLICY, "credit".to_owned())
            .with(host::SUPPORTED_BOOTLOADERS, vec!["pygrub".to_owned(), "eliloader".to_owned()])
            .with(host::METRICS, metrics)
            .with(host::CONTROL_DOMAIN, control)
            .with(host::MEMORY_OVERHEAD, signed(facts.control_domain_memory).min(0))
            .with(host::SOFTWARE_VERSION, software_version(facts))
            .with(host::CPU_INFO, cpu_info(facts))
            .with(host::CAPABILITIES, ["xen-3.0-x86_64", "hvm-3.0-x86_32", "hvm-3.0-x86_64"].map(str::to_owned).into())
            .with(host::CHIPSET_INFO, map(&[("iommu", "false".into())]))
            .with(host::LICENSE_PARAMS, licence::params())
            .with(host::LICENSE_SERVER, local_host("localhost").into())
            .with(host::EDITION, "free".to_owned())
            .with(
                host::BIOS_STRINGS,
                map(&[("bios-vendor", "Xenith".into()), ("system-manufacturer", "Xenith".into())]),
            )
            .with(host::VIRTUAL_HARDWARE_PLATFORM_VERSIONS, vec![0, 1, 2])
            .with(host::SSL_LEGACY, false)
            .with(host::TLS_VERIFICATION_ENABLED, true)
            .with(host::ISCSI_IQN, format!("iqn.2026-01.org.xenith:{uuid}"))
            .with(
                host::ALLOWED_OPERATIONS,
                vec![HostAllowedOperations::Provision, HostAllowedOperations::VmStart, HostAllowedOperations::Enable],
            )
            .with(host::OTHER_CONFIG, agent_clocks),
    );
    change.set(row.typed::<Member>(), member::HOST, host_ref);
    change.set(row.typed::<Member>(), member::BOOT_ID, facts.boot_id.clone());
    cpus(shared, change, host_ref, facts);
    control_domain(shared, change, host_ref, control, &address, facts);
    nics(shared, state, change, host_ref, &address, facts);
    storage::host_rows(shared, state, change, host_ref);
    change.insert(
        NewRow::new(Ref::<Certificate>::new(shared.uuid()), shared.uuid())
            .with(certificate::HOST, host_ref)
            .with(certificate::TYPE, CertificateType::HostInternal)
            .with(certificate::NAME, "pool member".to_owned())
            .with(certificate::NOT_BEFORE, shared.now())
            .with(certificate::NOT_AFTER, Timestamp(shared.now().0 + 10 * 365 * 86400)),
    );
    pool_cpus(state, change, facts);
    host_ref
}

/// The pool's processors, with those of one more host.
fn pool_cpus(state: &State, change: &mut Transaction, facts: &HostFacts) {
    let Some(row) = state.all::<Pool>().next() else { return };
    let known = state.all::<Host>().map(|row| row.get(host::CPU_INFO));
    let all = departure::processors(known.chain([cpu_info(facts)]));
    change.expect_row(row).set(row.typed::<Pool>(), pool::CPU_INFO, all);
}

fn cpus(shared: &Shared, change: &mut Transaction, host_ref: Ref<Host>, facts: &HostFacts) {
    for cpu in &facts.cpus {
        change.insert(
            NewRow::new(Ref::<HostCpu>::new(shared.uuid()), shared.uuid())
                .with(host_cpu::HOST, host_ref)
                .with(host_cpu::NUMBER, i64::from(cpu.number))
                .with(host_cpu::VENDOR, cpu.vendor.clone())
                .with(host_cpu::SPEED, signed(cpu.speed_mhz))
                .with(host_cpu::MODELNAME, cpu.model_name.clone())
                .with(host_cpu::FAMILY, i64::from(cpu.family))
                .with(host_cpu::MODEL, i64::from(cpu.model))
                .with(host_cpu::STEPPING, cpu.stepping.clone())
                .with(host_cpu::FLAGS, cpu.flags.clone()),
        );
    }
}

fn control_domain(
    shared: &Shared,
    change: &mut Transaction,
    host_ref: Ref<Host>,
    reference: Ref<Vm>,
    address: &str,
    facts: &HostFacts,
) {
    let memory = signed(facts.control_domain_memory);
    let vcpus = signed(facts.cpus.len() as u64).max(1);
    let metrics: Ref<VmMetrics> = Ref::new(shared.uuid());
    change.insert(
        NewRow::new(metrics, shared.uuid())
            .with(vm_metrics::MEMORY_ACTUAL, memory)
            .with(vm_metrics::VCPUS_NUMBER, vcpus)
            .with(vm_metrics::CURRENT_DOMAIN_TYPE, DomainType::Pv)
            .with(vm_metrics::LAST_UPDATED, shared.now()),
    );
    change.insert(
        NewRow::new(reference, shared.uuid())
            .with(vm::NAME_LABEL, format!("Control domain on host: {}", facts.hostname))
            .with(
                vm::NAME_DESCRIPTION,
                "The domain which manages physical devices and manages other domains".to_owned(),
            )
            .with(vm::IS_CONTROL_DOMAIN, true)
            .with(vm::POWER_STATE, VmPowerState::Running)
            .with(vm::DOMID, 0)
            .with(vm::RESIDENT_ON, host_ref)
            .with(vm::AFFINITY, host_ref)
            .with(vm::METRICS, metrics)
            .with(vm::MEMORY_STATIC_MAX, memory)
            .with(vm::MEMORY_STATIC_MIN, memory)
            .with(vm::MEMORY_DYNAMIC_MAX, memory)
            .with(vm::MEMORY_DYNAMIC_MIN, memory)
            .with(vm::MEMORY_TARGET, memory)
            .with(vm::VCPUS_MAX, vcpus)
            .with(vm::VCPUS_AT_STARTUP, vcpus)
            .with(vm::HVM_SHADOW_MULTIPLIER, 1.0)
            .with(vm::DOMAIN_TYPE, DomainType::Pv)
            .with(vm::DOMARCH, "x64".to_owned()),
    );
    for protocol in [ConsoleProtocol::Rfb, ConsoleProtocol::Vt100] {
        let console_ref: Ref<Console> = Ref::new(shared.uuid());
        change.insert(
            NewRow::new(console_ref, shared.uuid())
                .with(console::PROTOCOL, protocol)
                .with(console::LOCATION, format!("https://{address}/console?ref={console_ref}"))
                .with(console::VM, reference),
        );
    }
}

fn nics(
    shared: &Shared,
    state: &State,
    change: &mut Transaction,
    host_ref: Ref<Host>,
    address: &str,
    facts: &HostFacts,
) {
    for (number, nic) in facts.nics.iter().enumerate() {
        let bridge = if nic.bridge.is_empty() { format!("xenbr{number}") } else { nic.bridge.clone() };
        let known =
            state.all::<Network>().find(|row| row.get(network::BRIDGE) == bridge).map(|row| row.typed::<Network>());
        let network_ref = known.unwrap_or_else(|| {
            let reference = Ref::new(shared.uuid());
            change.insert(
                NewRow::new(reference, shared.uuid())
                    .with(network::NAME_LABEL, format!("Pool-wide network associated with {}", nic.device))
                    .with(network::BRIDGE, bridge)
                    .with(network::MTU, i64::from(nic.mtu))
                    .with(network::MANAGED, true),
            );
            reference
        });
        pif_rows(shared, change, host_ref, network_ref, address, nic);
    }
}

fn pif_rows(
    shared: &Shared,
    change: &mut Transaction,
    host_ref: Ref<Host>,
    network_ref: Ref<Network>,
    address: &str,
    nic: &Nic,
) {
    let metrics: Ref<PifMetrics> = Ref::new(shared.uuid());
    change.insert(
        NewRow::new(metrics, shared.uuid())
            .with(pif_metrics::CARRIER, nic.carrier)
            .with(pif_metrics::SPEED, nic.speed_mbit)
            .with(pif_metrics::DUPLEX, nic.duplex)
            .with(pif_metrics::VENDOR_NAME, nic.vendor_name.clone())
            .with(pif_metrics::DEVICE_NAME, nic.device_name.clone())
            .with(pif_metrics::PCI_BUS_PATH, nic.pci_bus_path.clone())
            .with(pif_metrics::LAST_UPDATED, shared.now()),
    );
    let mode = if nic.management { IpConfigurationMode::Static } else { IpConfigurationMode::None };
    let ip = if nic.management && nic.ip.is_empty() { address.to_owned() } else { nic.ip.clone() };
    change.insert(
        NewRow::new(Ref::<Pif>::new(shared.uuid()), shared.uuid())
            .with(pif::DEVICE, nic.device.clone())
            .with(pif::NETWORK, network_ref)
            .with(pif::HOST, host_ref)
            .with(pif::MAC, nic.mac.to_ascii_lowercase())
            .with(pif::MTU, i64::from(nic.mtu))
            .with(pif::VLAN, -1)
            .with(pif::METRICS, metrics)
            .with(pif::PHYSICAL, true)
            .with(pif::MANAGED, true)
            .with(pif::MANAGEMENT, nic.management)
            .with(pif::CURRENTLY_ATTACHED, true)
            .with(pif::IP_CONFIGURATION_MODE, mode)
            .with(pif::IP, ip)
            .with(pif::NETMASK, nic.netmask.clone())
            .with(pif::GATEWAY, nic.gateway.clone())
            .with(pif::PROPERTIES, BTreeMap::from([("gro".to_owned(), "on".to_owned())])),
    );
}
