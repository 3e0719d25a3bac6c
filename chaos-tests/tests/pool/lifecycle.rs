//! VMs for real: what a client can do to a guest that runs in QEMU, and what the guest says.

use std::time::Duration;

use chaos_tests::client::Client;
use chaos_tests::lab::Lab;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{SOON, interface, plugged, refusal, template, text, until};

/// A real guest under emulation takes its time.
const GUEST_LIMIT: Duration = Duration::from_secs(120);
const MIB: i64 = 1 << 20;

async fn client(lab: &Lab) -> Client {
    lab.client().await.unwrap().with_call_limit(GUEST_LIMIT)
}

async fn made(client: &mut Client, name: &str) -> String {
    let template = template(client, "Xenith guest").await;
    let vm = text(&client.call("VM.clone", json!([template, name])).await.unwrap());
    client.call("VM.provision", json!([vm])).await.unwrap();
    vm
}

async fn field(client: &mut Client, vm: &str, name: &str) -> Value {
    client.call(&format!("VM.get_{name}"), json!([vm])).await.unwrap()
}

async fn speaks(client: &mut Client, vm: &str) -> Value {
    until(GUEST_LIMIT, "the guest to speak", async || {
        let metrics = field(client, vm, "guest_metrics").await;
        let record = client.call("VM_guest_metrics.get_record", json!([metrics])).await.ok()?;
        (record["live"] == true).then_some(record)
    })
    .await
}

/// Suspended and resumed, checkpointed and put back, on either driver.
async fn memory_is_kept(lab: &Lab, real: bool) {
    let mut client = client(lab).await;
    plugged(&mut client).await;
    let vm = made(&mut client, "a memory").await;
    client.call("VM.start", json!([vm, false, false])).await.unwrap();
    if real {
        speaks(&mut client, &vm).await;
    }
    client.call("VM.suspend", json!([vm])).await.unwrap();
    assert_eq!(field(&mut client, &vm, "power_state").await, "Suspended");
    let image = text(&field(&mut client, &vm, "suspend_VDI").await);
    assert_eq!(client.call("VDI.get_type", json!([image])).await.unwrap(), "suspend");
    client.call("VM.resume", json!([vm, false, false])).await.unwrap();
    assert_eq!(field(&mut client, &vm, "power_state").await, "Running");
    let (code, _) = refusal(client.call("VDI.get_type", json!([image])).await);
    assert_eq!(code, "HANDLE_INVALID", "the image is gone");
    let point = text(&client.call("VM.checkpoint", json!([vm, "a point"])).await.unwrap());
    assert_eq!(field(&mut client, &vm, "power_state").await, "Running");
    assert_eq!(field(&mut client, &point, "power_state").await, "Suspended");
    client.call("VM.revert", json!([point])).await.unwrap();
    assert_eq!(field(&mut client, &vm, "power_state").await, "Suspended");
    client.call("VM.resume", json!([vm, false, false])).await.unwrap();
    if real {
        speaks(&mut client, &vm).await;
        client.call("VM.clean_shutdown", json!([vm])).await.unwrap();
    } else {
        client.call("VM.hard_shutdown", json!([vm])).await.unwrap();
    }
    assert_eq!(field(&mut client, &vm, "power_state").await, "Halted");
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_kept_and_put_back_on_simulated_hosts() {
    memory_is_kept(&Lab::sim().await.unwrap(), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_guest_is_suspended_and_resumed_checkpointed_and_put_back_and_obeys() {
    memory_is_kept(&Lab::up(1, "qemu").await.unwrap(), true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_guest_says_what_it_is_gives_memory_back_and_shows_its_screen() {
    let lab = Lab::up(1, "qemu").await.unwrap();
    let mut client = client(&lab).await;
    let vm = made(&mut client, "a guest").await;
    let (vif, _) = interface(&mut client, &vm).await;
    client.call("VM.set_memory_limits", json!([vm, 64 * MIB, 192 * MIB, 96 * MIB, 192 * MIB])).await.unwrap();
    client.call("VM.start", json!([vm, false, false])).await.unwrap();
    let said = speaks(&mut client, &vm).await;
    assert!(!said["os_version"].as_object().unwrap().is_empty(), "{said}");
    assert_eq!(said["PV_drivers_detected"], true);
    // No bridge of that name is there: DHCP answers it on a network of its own.
    until(GUEST_LIMIT, "the guest's address", async || {
        let metrics = field(&mut client, &vm, "guest_metrics").await;
        let networks = client.call("VM_guest_metrics.get_networks", json!([metrics])).await.ok()?;
        (networks["0/ip"] == "10.0.2.15").then_some(())
    })
    .await;
    assert_eq!(client.call("VIF.get_currently_attached", json!([vif])).await.unwrap(), true);
    client.call("VM.set_memory_dynamic_range", json!([vm, 128 * MIB, 128 * MIB])).await.unwrap();
    assert_eq!(field(&mut client, &vm, "memory_target").await, json!(128 * MIB));
    client.call("VM.wait_memory_target_live", json!([vm])).await.unwrap();
    let screen = screen(&lab, &mut client, &vm).await;
    assert!(screen.starts_with(b"RFB 003."), "{:?}", String::from_utf8_lossy(&screen));
    client.call("VM.clean_shutdown", json!([vm])).await.unwrap();
    assert_eq!(field(&mut client, &vm, "guest_metrics").await, "OpaqueRef:NULL");
    assert_eq!(field(&mut client, &vm, "consoles").await, json!([]));
}

/// The first bytes of a VM's console, as XenCenter asks for them.
async fn screen(lab: &Lab, client: &mut Client, vm: &str) -> Vec<u8> {
    let all = field(client, vm, "consoles").await;
    let mut location = String::new();
    for console in all.as_array().unwrap() {
        let record = client.call("console.get_record", json!([console])).await.unwrap();
        if record["protocol"] == "rfb" {
            location = text(&record["location"]);
        }
    }
    let path = location.splitn(4, '/').nth(3).unwrap_or_else(|| panic!("{location}")).to_owned();
    let master = lab.made().master().unwrap();
    let mut stream = tokio::net::UnixStream::connect(&master.socket).await.unwrap();
    let ask = format!("CONNECT /{path} HTTP/1.0\r\nCookie: session_id={}\r\n\r\n", client.session());
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut told = Vec::new();
    let reading = async {
        loop {
            let end = told.windows(4).position(|four| four == b"\r\n\r\n");
            if let Some(end) = end.filter(|end| told.len() >= end + 16) {
                return told[end + 4..].to_vec();
            }
            assert_ne!(stream.read_buf(&mut told).await.unwrap(), 0, "{:?}", String::from_utf8_lossy(&told));
        }
    };
    tokio::time::timeout(SOON, reading).await.expect("no screen")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_appliance_starts_and_ends_in_its_order() {
    let lab = Lab::sim().await.unwrap();
    let mut client = client(&lab).await;
    let record = json!({"name_label": "web", "name_description": ""});
    let appliance = text(&client.call("VM_appliance.create", json!([record])).await.unwrap());
    let mut members = Vec::new();
    for order in [2, 1, 3] {
        let vm = made(&mut client, &format!("number {order}")).await;
        client.call("VM.set_appliance", json!([vm, appliance])).await.unwrap();
        client.call("VM.set_order", json!([vm, order])).await.unwrap();
        members.push((order, vm));
    }
    members.sort();
    client.call("VM_appliance.start", json!([appliance, false])).await.unwrap();
    let mut last = 0;
    for (_, vm) in &members {
        assert_eq!(field(&mut client, vm, "power_state").await, "Running");
        let domid = field(&mut client, vm, "domid").await.as_i64().unwrap();
        assert!(domid > 0);
        last = last.max(domid);
    }
    assert!(last > 0);
    client.call("VM_appliance.shutdown", json!([appliance])).await.unwrap();
    for (_, vm) in &members {
        assert_eq!(field(&mut client, vm, "power_state").await, "Halted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_taken_on_schedule_and_no_more_of_them_are_kept_than_is_wanted() {
    let lab = Lab::sim().await.unwrap();
    let mut client = client(&lab).await;
    let schedule = json!({
        "name_label": "often", "type": "snapshot", "frequency": "hourly", "schedule": {"min": "0"},
        "retained_snapshots": 2, "enabled": false,
    });
    let schedule = text(&client.call("VMSS.create", json!([schedule])).await.unwrap());
    let vm = made(&mut client, "kept").await;
    client.call("VM.set_snapshot_schedule", json!([vm, schedule])).await.unwrap();
    for _ in 0..3 {
        client.call("VMSS.snapshot_now", json!([schedule])).await.unwrap();
    }
    let snapshots = field(&mut client, &vm, "snapshots").await;
    assert_eq!(snapshots.as_array().unwrap().len(), 2, "{snapshots}");
    for snapshot in snapshots.as_array().unwrap() {
        assert_eq!(field(&mut client, &text(snapshot), "is_vmss_snapshot").await, true);
    }
}
