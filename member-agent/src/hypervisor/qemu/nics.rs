//! A domain's NICs: on the bridge they name, where there is one and the agent may use it; else on a network of QEMU's
//! own without a way out, where DHCP answers and nobody else is.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::timeout;

use crate::hypervisor::domain::{DomainSpec, Reason, Refusal, Vif};

/// The first place on the bus that is a NIC's, and how many there are.
const FIRST_PLACE: usize = 5;
const PLACES: usize = 7;
/// How long the kernel may take to put an interface on a bridge.
const LINK: Duration = Duration::from_secs(5);

/// A NIC's number in its guest.
pub(super) fn number(vif: &Vif, position: usize) -> usize {
    vif.device.parse().unwrap_or(position)
}

/// Whether the NIC belongs on a bridge that is there.
fn bridged(vif: &Vif) -> bool {
    let plain = !vif.bridge.is_empty() && !vif.bridge.contains(['/', '.']);
    plain && nix::unistd::geteuid().is_root() && Path::new("/sys/class/net").join(&vif.bridge).join("bridge").exists()
}

/// The host's end of a NIC. It goes with the QEMU that made it.
fn interface(domid: i64, number: usize) -> String {
    format!("vif{domid}.{number}")
}

/// What QEMU is told of each: the host's end, then the guest's.
pub(super) fn options(spec: &DomainSpec, domid: i64) -> Vec<(String, Value)> {
    let network_boots = spec.kernel.is_empty() && spec.boot_order.contains('n');
    let nics = spec.vifs.iter().enumerate().map(|(position, vif)| {
        let number = number(vif, position);
        let id = format!("net{position}");
        let backend = if bridged(vif) {
            let name = interface(domid, number);
            format!("tap,id={id},ifname={name},script=no,downscript=no")
        } else {
            format!("user,id={id},restrict=on")
        };
        let mut device = json!({ "driver": "virtio-net-pci", "id": format!("vif{position}"), "netdev": id });
        if let Some(options) = device.as_object_mut() {
            if !network_boots {
                options.insert("romfile".into(), "".into());
            }
            if !vif.mac.is_empty() {
                options.insert("mac".into(), vif.mac.clone().into());
            }
            if number < PLACES {
                options.insert("addr".into(), format!("{:x}", FIRST_PLACE + number).into());
            }
        }
        (backend, device)
    });
    nics.collect()
}

/// Puts the host's ends on their bridges.
pub(super) async fn connect(spec: &DomainSpec, domid: i64) -> Result<(), Refusal> {
    for (position, vif) in spec.vifs.iter().enumerate() {
        if !bridged(vif) {
            continue;
        }
        let name = interface(domid, number(vif, position));
        let mut command = Command::new("ip");
        command.args(["link", "set", &name, "master", &vif.bridge]);
        if vif.mtu > 0 {
            command.args(["mtu", &vif.mtu.to_string()]);
        }
        command.arg("up").stdin(Stdio::null()).kill_on_drop(true);
        let failed = |why: String| Refusal::new(Reason::BootFailed, format!("{name} on {}: {why}", vif.bridge));
        let output = timeout(LINK, command.output()).await.map_err(|_| failed("no answer".into()))?;
        let output = output.map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nic_without_its_bridge_is_on_a_network_of_its_own() {
        let vif =
            Vif { device: "2".into(), mac: "02:00:00:00:00:01".into(), bridge: "no-such".into(), ..Vif::default() };
        let spec = DomainSpec {
            vifs: vec![vif, Vif { bridge: "../net/lo".into(), ..Vif::default() }],
            ..DomainSpec::default()
        };
        let options = options(&spec, 3);
        assert_eq!(options[0].0, "user,id=net0,restrict=on");
        assert_eq!((&options[0].1["mac"], &options[0].1["addr"]), (&json!("02:00:00:00:00:01"), &json!("7")));
        assert_eq!(options[1].0, "user,id=net1,restrict=on");
    }
}
