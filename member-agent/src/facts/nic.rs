//! NICs: the machine's own from `/sys/class/net`, or two made-up ones for hosts that share a machine.
//!
//! Real are those that stand for a device; where none does, as in a container, every Ethernet interface that is no
//! bridge and no guest's end counts. The management NIC is the one with the address the agent listens on, else the
//! one with the default route.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use nix::ifaddrs::getifaddrs;
use proto::agent::Nic;

use crate::config::{Config, NicSource};

const SYSFS: &str = "/sys/class/net";

/// The host's NICs.
pub(super) fn read(config: &Config) -> Vec<Nic> {
    let address = config.listen.ip();
    match config.nics {
        NicSource::Sim => made_up(config.host_uuid.as_bytes(), address),
        NicSource::Real => real(address),
    }
}

/// The first carries the host's own address. MACs are locally administered and stay with the host.
fn made_up(host: &[u8; 16], address: IpAddr) -> Vec<Nic> {
    (0..2_u8)
        .map(|number| {
            let management = number == 0;
            let [.., a, b, c, d] = *host;
            Nic {
                device: format!("eth{number}"),
                mac: format!("02:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{number:02x}"),
                mtu: 1500,
                carrier: true,
                speed_mbit: 10_000,
                duplex: true,
                ip: if management { address.to_string() } else { String::new() },
                netmask: if management { "255.255.255.0".to_owned() } else { String::new() },
                gateway: String::new(),
                bridge: format!("xenbr{number}"),
                management,
                vendor_name: "Xenith".to_owned(),
                device_name: "Made-up NIC".to_owned(),
                pci_bus_path: format!("0000:00:{:02x}.0", number + 3),
            }
        })
        .collect()
}

fn real(listen: IpAddr) -> Vec<Nic> {
    let mut names: Vec<String> = fs::read_dir(SYSFS)
        .map(|entries| {
            entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect()
        })
        .unwrap_or_default();
    names.sort();
    names.retain(|name| is_ethernet(name));
    if names.iter().any(|name| has(name, "device")) {
        names.retain(|name| has(name, "device"));
    }
    let addresses = addresses();
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let mut nics: Vec<Nic> = names.iter().map(|name| describe(name, &addresses, &routes)).collect();
    let by_address = nics.iter().position(|nic| nic.ip == listen.to_string());
    let by_route = nics.iter().position(|nic| !nic.gateway.is_empty());
    if let Some(nic) = by_address.or(by_route).and_then(|at| nics.get_mut(at)) {
        nic.management = true;
    }
    nics
}

fn is_ethernet(name: &str) -> bool {
    let guests_end = ["veth", "vif", "tap", "vnet", "docker"].iter().any(|prefix| name.starts_with(prefix));
    text(name, "type") == "1" && !guests_end && !["bridge", "bonding", "tun_flags"].iter().any(|it| has(name, it))
}

/// A bridge's address is that of the NIC it carries, as clients know it.
fn describe(name: &str, addresses: &HashMap<String, (Ipv4Addr, Ipv4Addr)>, routes: &str) -> Nic {
    let target = |file: &str| {
        let link = fs::read_link(Path::new(SYSFS).join(name).join(file)).ok();
        link.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned())).unwrap_or_default()
    };
    let bridge = target("brport/bridge");
    let carrier = if bridge.is_empty() { name } else { bridge.as_str() };
    let (ip, netmask) = match addresses.get(carrier) {
        Some((ip, netmask)) => (ip.to_string(), netmask.to_string()),
        None => Default::default(),
    };
    Nic {
        device: name.to_owned(),
        mac: text(name, "address"),
        mtu: text(name, "mtu").parse().unwrap_or(1500),
        carrier: text(name, "carrier") == "1",
        speed_mbit: text(name, "speed").parse().unwrap_or(-1),
        duplex: text(name, "duplex") == "full",
        ip,
        netmask,
        gateway: gateway(routes, carrier).map(|it| it.to_string()).unwrap_or_default(),
        management: false,
        vendor_name: text(name, "device/vendor"),
        device_name: text(name, "device/device"),
        pci_bus_path: target("device"),
        bridge,
    }
}

fn has(name: &str, file: &str) -> bool {
    Path::new(SYSFS).join(name).join(file).exists()
}

fn text(name: &str, file: &str) -> String {
    fs::read_to_string(Path::new(SYSFS).join(name).join(file)).unwrap_or_default().trim().to_owned()
}

/// The first IPv4 address and netmask of each interface.
fn addresses() -> HashMap<String, (Ipv4Addr, Ipv4Addr)> {
    let mut found = HashMap::new();
    for interface in getifaddrs().into_iter().flatten() {
        let ip = interface.address.and_then(|address| Some(address.as_sockaddr_in()?.ip()));
        let netmask = interface.netmask.and_then(|netmask| Some(netmask.as_sockaddr_in()?.ip()));
        if let (Some(ip), Some(netmask)) = (ip, netmask) {
            found.entry(interface.interface_name).or_insert((ip, netmask));
        }
    }
    found
}

/// The way out: destination and mask zero, in the kernel's table of little-endian hexadecimal numbers.
fn gateway(routes: &str, name: &str) -> Option<Ipv4Addr> {
    routes.lines().find_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let [interface, "00000000", gateway, _, _, _, _, "00000000", ..] = columns.as_slice() else {
            return None;
        };
        let number = u32::from_str_radix(gateway, 16).ok().filter(|number| *number != 0)?;
        (*interface == name).then(|| Ipv4Addr::from(number.swap_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_nics_have_addresses_of_their_own_that_stay() {
        let address = IpAddr::from([127, 0, 71, 2]);
        let one = made_up(uuid::Uuid::from_u128(1).as_bytes(), address);
        let two = made_up(uuid::Uuid::from_u128(2).as_bytes(), address);
        assert_eq!(one, made_up(uuid::Uuid::from_u128(1).as_bytes(), address));
        let macs: std::collections::HashSet<_> = one.iter().chain(&two).map(|nic| nic.mac.clone()).collect();
        assert_eq!(macs.len(), 4);
        assert!(one[0].management && one[0].ip == "127.0.71.2" && one[0].mac.starts_with("02:"));
    }

    #[test]
    fn the_gateway_is_that_of_the_default_route() {
        let routes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
                      eth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                      eth0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
        assert_eq!(gateway(routes, "eth0"), Some(Ipv4Addr::new(192, 168, 0, 1)));
        assert_eq!(gateway(routes, "eth1"), None);
    }
}
