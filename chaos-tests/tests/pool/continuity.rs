//! What was under way when the master died ends as if it had not.

use std::time::Duration;

use chaos_tests::client::Client;
use chaos_tests::lab::{Lab, What};
use serde_json::json;

use crate::support::{SOON, new_vm, other_master, refusal, text, until};

/// Long enough that a master can be killed meanwhile, and for the next one to take over.
const SLOW_START_MS: u64 = 1_500;

/// Domains of this lab take their time to start.
fn slow_starts(lab: &Lab) {
    for host in &lab.made().hosts {
        let orders = format!("[delays_ms]\nstart = {SLOW_START_MS}\n");
        std::fs::write(lab.dir().join(&host.name).join("agent/sim.toml"), orders).unwrap();
    }
}

/// Waits until a VM is being started, and then kills the master's controller; the name of the next master.
async fn lose_the_master_while_starting(lab: &Lab, client: &mut Client, vm: &str) -> String {
    until(SOON, "the start to begin", async || {
        let operations = client.call("VM.get_current_operations", json!([vm])).await.unwrap();
        (!operations.as_object().unwrap().is_empty()).then_some(())
    })
    .await;
    let master = lab.made().master.clone().unwrap();
    lab.kill(&master, What::Controller).await.unwrap();
    other_master(lab, &master).await
}

async fn settled(client: &mut Client, vm: &str) {
    let vm = client.persist(SOON, "VM.get_record", json!([vm])).await.unwrap();
    assert_eq!((text(&vm["power_state"]).as_str(), &vm["current_operations"]), ("Running", &json!({})));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_with_a_key_is_done_once_on_whichever_master_it_is_asked() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let original = new_vm(&mut client, "original").await;
    client.set_key("clone it once");
    let made = client.call("VM.clone", json!([original, "copy"])).await.unwrap();
    let master = lab.made().master.clone().unwrap();
    lab.kill(&master, What::Host).await.unwrap();
    let again = client.persist(SOON, "VM.clone", json!([original, "copy"])).await.unwrap();
    assert_eq!(again, made);
    let answer = refusal(client.call("VM.clone", json!([original, "another"])).await);
    assert_eq!(answer.0, "VALUE_NOT_SUPPORTED", "one key, two calls");
    let found = client.persist(SOON, "VM.get_by_name_label", json!(["copy"])).await.unwrap();
    assert_eq!(found, json!([made]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_lost_its_master_answers_its_caller_at_another_host() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "started").await;
    client.call("VM.provision", json!([vm])).await.unwrap();
    slow_starts(&lab);
    let member = lab.made().others()[0].endpoint().unwrap();
    let mut starter = client.at(&member).with_call_limit(Duration::from_secs(30));
    let mut onlooker = client.at(&member);
    let (parameters, of_vm) = (json!([client.session(), vm, false, false]), vm.clone());
    let started = tokio::spawn(async move { starter.plain("VM.start", &parameters).await });
    lose_the_master_while_starting(&lab, &mut onlooker, &of_vm).await;
    assert_eq!(started.await.unwrap().expect("the start went on without its first master"), "");
    settled(&mut onlooker, &vm).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_whose_master_died_is_ended_by_the_next_one() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "started behind a task").await;
    client.call("VM.provision", json!([vm])).await.unwrap();
    slow_starts(&lab);
    let task = client.call("Async.VM.start", json!([vm, false, false])).await.unwrap();
    let next = lose_the_master_while_starting(&lab, &mut client, &vm).await;
    let mut client = client.at(&lab.made().host(&next).unwrap().endpoint().unwrap());
    let status = until(SOON, "the task to end", async || {
        let status = client.persist(SOON, "task.get_status", json!([task])).await.unwrap();
        (status != "pending").then_some(status)
    })
    .await;
    assert_eq!(status, "success");
    settled(&mut client, &vm).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_stops_without_a_word_holds_nobody_who_asks_another_host() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "written meanwhile").await;
    let master = lab.made().master.clone().unwrap();
    let member = lab.made().others()[0].endpoint().unwrap();
    let mut writer = client.at(&member).with_call_limit(SOON);
    let mut watcher = client.at(&member).with_call_limit(SOON);
    let from = json!([client.session(), [format!("VM/{vm}")], "", 0.0]);
    let token = text(&watcher.plain("event.from", &from).await.unwrap()["token"]);
    let waiting = json!([client.session(), [format!("VM/{vm}")], token, 60.0]);
    let watching = tokio::spawn(async move { watcher.plain("event.from", &waiting).await });
    // Both are with the master, as far as the member knows, when it stops.
    lab.pause(&master, What::Controller).await.unwrap();
    writer.plain("VM.set_name_label", &json!([client.session(), vm, "renamed"])).await.unwrap();
    let batch = watching.await.unwrap().unwrap();
    assert_eq!(batch["events"][0]["snapshot"]["name_label"], "renamed");
    lab.resume(&master, What::Controller).await.unwrap();
}
