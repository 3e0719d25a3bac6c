//! Guests on networks: an interface of a VM is on the bridge of its network for as long as the VM runs.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use chaos_tests::lab::Lab;
use chaos_tests::namespace::NETWORK;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use crate::support::{interface, refusal, template, text, until};

/// A real guest under emulation takes its time.
const GUEST_LIMIT: Duration = Duration::from_secs(120);
const HERE: &str = "10.213.7.1/24";
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 213, 7, 2);
const ANSWER: Duration = Duration::from_millis(500);
/// IPv4's header before what ICMP says (RFC 791, RFC 792).
const HEADER: usize = 20;
const ECHO: u8 = 8;
const ECHO_REPLY: u8 = 0;

#[test]
fn a_guest_on_a_bridge_answers_who_is_on_that_bridge_and_is_gone_from_it_when_it_ends() {
    const NAME: &str = "network::a_guest_on_a_bridge_answers_who_is_on_that_bridge_and_is_gone_from_it_when_it_ends";
    if NETWORK.is_entered_for(NAME) {
        tokio::runtime::Runtime::new().unwrap().block_on(ask_a_guest_on_a_bridge());
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

async fn ask_a_guest_on_a_bridge() {
    run("mount", &["-t", "sysfs", "sysfs", "/sys"]);
    run("ip", &["link", "set", "lo", "up"]);
    let lab = Lab::up(1, "qemu").await.unwrap();
    let mut client = lab.client().await.unwrap().with_call_limit(GUEST_LIMIT);
    let template = template(&mut client, "Xenith guest").await;
    let vm = text(&client.call("VM.clone", json!([template, "on a bridge"])).await.unwrap());
    let (vif, network) = interface(&mut client, &vm).await;
    let bridge = text(&client.call("network.get_bridge", json!([network])).await.unwrap());
    run("ip", &["link", "add", &bridge, "type", "bridge"]);
    run("ip", &["address", "add", HERE, "dev", &bridge]);
    run("ip", &["link", "set", &bridge, "up"]);

    let words = text(&client.call("VM.get_PV_args", json!([vm])).await.unwrap());
    client.call("VM.set_PV_args", json!([vm, format!("{words} xenith.ip={GUEST}/24")])).await.unwrap();
    client.call("VM.provision", json!([vm])).await.unwrap();
    client.call("VM.start", json!([vm, false, false])).await.unwrap();
    until(GUEST_LIMIT, "the guest to answer", async || echo(GUEST).then_some(())).await;
    until(GUEST_LIMIT, "the guest to say its address", async || {
        let metrics = client.call("VM.get_guest_metrics", json!([vm])).await.unwrap();
        let networks = client.call("VM_guest_metrics.get_networks", json!([metrics])).await.ok()?;
        (networks["0/ip"] == GUEST.to_string()).then_some(())
    })
    .await;
    let on_it = || std::fs::read_dir(PathBuf::from("/sys/class/net").join(&bridge).join("brif")).unwrap().count();
    assert_eq!(on_it(), 1);
    let (code, _) = refusal(client.call("VIF.destroy", json!([vif])).await);
    assert_eq!(code, "OPERATION_NOT_ALLOWED", "it is in use");

    client.call("VM.hard_shutdown", json!([vm])).await.unwrap();
    until(ANSWER, "the bridge to be empty", async || (on_it() == 0).then_some(())).await;
    assert!(!echo(GUEST));
    client.call("VIF.destroy", json!([vif])).await.unwrap();
}

/// Whether somebody at that address answers.
fn echo(address: Ipv4Addr) -> bool {
    let mut message = [ECHO, 0, 0, 0, 0x7e, 0x1e, 0, 1];
    // RFC 1071: the complement of the sum, here of three words that do not overflow.
    let sum = u16::from_be_bytes([message[0], message[1]]) + u16::from_be_bytes([message[4], message[5]]) + 1;
    message[2..4].copy_from_slice(&(!sum).to_be_bytes());
    let mut socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).unwrap();
    socket.set_read_timeout(Some(ANSWER)).unwrap();
    if socket.send_to(&message, &SocketAddrV4::new(address, 0).into()).is_err() {
        return false;
    }
    let (mut answer, deadline) = ([0; 128], Instant::now() + ANSWER);
    while Instant::now() < deadline {
        let Ok(length) = socket.read(&mut answer) else { return false };
        let said = answer.get(HEADER..length).unwrap_or_default();
        if said.first() == Some(&ECHO_REPLY) && said.get(4..8) == Some(&message[4..8]) {
            return true;
        }
    }
    false
}
