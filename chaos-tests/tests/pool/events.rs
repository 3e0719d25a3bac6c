//! Sessions, tokens and events outlive the master.

use std::collections::BTreeMap;
use std::time::Duration;

use chaos_tests::client::Client;
use chaos_tests::lab::{Lab, What};
use serde_json::{Value, json};

use crate::support::{SOON, new_vm, other_master, template, text};

#[tokio::test(flavor = "multi_thread")]
async fn sessions_and_event_tokens_outlive_the_master_and_the_whole_pool() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "watched").await;
    let class = json!([format!("VM/{vm}")]);
    let token = text(&client.call("event.from", json!([class, "", 0.0])).await.unwrap()["token"]);
    client.call("VM.set_name_description", json!([vm, "before"])).await.unwrap();

    let master = lab.made().master.clone().unwrap();
    lab.kill(&master, What::Host).await.unwrap();
    let changes = async |client: &mut Client, token: &str| {
        client.persist(SOON, "event.from", json!([class, token, 0.0])).await.unwrap()
    };
    let batch = changes(&mut client, &token).await;
    let [event] = &batch["events"].as_array().unwrap()[..] else { panic!("{batch}") };
    assert_eq!((&event["operation"], &event["snapshot"]["name_description"]), (&json!("mod"), &json!("before")));
    let token = text(&batch["token"]);
    assert!(changes(&mut client, &token).await["events"].as_array().unwrap().is_empty());

    lab.down().await.unwrap();
    lab.up_again(&[]).await.unwrap();
    assert!(changes(&mut client, &token).await["events"].as_array().unwrap().is_empty());
    client.call("VM.set_name_description", json!([vm, "after"])).await.unwrap();
    let batch = changes(&mut client, &token).await;
    let [event] = &batch["events"].as_array().unwrap()[..] else { panic!("{batch}") };
    assert_eq!(event["snapshot"]["name_description"], "after");
}

/// Follows the VMs with that name until all that are expected have been seen, and says how often each was added.
async fn follow(mut client: Client, mut token: String, name: &str, expected: usize) -> BTreeMap<String, usize> {
    let mut added = BTreeMap::new();
    let mut last = 0;
    while added.len() < expected {
        let parameters = json!([["vm"], token, 10.0]);
        let batch = client.persist(Duration::from_secs(40), "event.from", parameters).await.unwrap();
        token = text(&batch["token"]);
        for event in batch["events"].as_array().unwrap() {
            let id: u64 = text(&event["id"]).parse().unwrap();
            assert!(id >= last, "event {id} came after {last}");
            last = id;
            if event["operation"] == "add" && event["snapshot"]["name_label"] == name {
                *added.entry(text(&event["ref"])).or_default() += 1;
            }
        }
        assert!(
            Value::from(added.len()).as_u64() <= Some(expected as u64 + 1),
            "more VMs than were made: {}",
            added.len()
        );
    }
    added
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_misses_nothing_and_hears_nothing_twice_while_masters_die() {
    const EACH: usize = 40;
    const MASTERS: usize = 3;
    const NAME: &str = "made while masters die";
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let template = template(&mut client, "Other install media").await;
    let token = text(&client.call("event.from", json!([["vm"], "", 0.0])).await.unwrap()["token"]);
    // It waits at a host that is not the first master: what it hears is forwarded, and the master behind it dies.
    let watcher = client.at(&lab.made().others()[0].endpoint().unwrap()).with_call_limit(Duration::from_secs(20));
    let watching = tokio::spawn(follow(watcher, token, NAME, EACH * MASTERS));

    let mut made = Vec::new();
    for master in 0..MASTERS {
        for _ in 0..EACH {
            // Not repeated when its outcome is unknown: each VM that is made must have been acknowledged.
            made.push(text(&client.call("VM.clone", json!([template, NAME])).await.unwrap()));
        }
        if master + 1 < MASTERS {
            let name = lab.status().await.unwrap().master.unwrap();
            lab.kill(&name, What::Host).await.unwrap();
            let next = other_master(&lab, &name).await;
            client = client.at(&lab.made().host(&next).unwrap().endpoint().unwrap());
            client.persist(SOON, "VM.get_all", json!([])).await.unwrap();
            lab.start(&name, What::Host).await.unwrap();
        }
    }
    let added = watching.await.unwrap();
    made.sort();
    assert_eq!(added.keys().cloned().collect::<Vec<_>>(), made);
    assert!(added.values().all(|times| *times == 1), "{added:?}");
}
