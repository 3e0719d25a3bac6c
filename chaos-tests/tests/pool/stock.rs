//! Other people's clients, as they come from PyPI and npm, connect, list every class and follow the master.

use std::time::Duration;

use chaos_tests::lab::{Lab, What};
use chaos_tests::stock::Stock;
use serde_json::{Value, json};

use crate::support::{SOON, other_master, plugged, until};

/// How long a client may take for one stage of its story.
const STAGE: Duration = Duration::from_secs(60);
/// The classes that have a `get_all_records`, as of the published data model.
const CLASSES: usize = 58;

fn described(lab: &Lab) -> String {
    let made = lab.made();
    let hosts: Vec<_> =
        made.hosts.iter().map(|host| json!({"name": host.name, "address": host.address, "url": host.url})).collect();
    json!({"user": made.user, "password": made.password, "hosts": hosts, "master": made.master}).to_string()
}

/// Every class was listed, and those have members that always do.
fn all_listed(counts: &Value) {
    let counts = counts.as_object().unwrap();
    assert!(counts.len() >= CLASSES, "only {} classes: {counts:?}", counts.len());
    for (class, least) in [("pool", 1), ("host", 3), ("host_metrics", 3), ("VM", 5), ("PIF", 3), ("SR", 1), ("role", 6)]
    {
        assert!(counts[class].as_u64() >= Some(least), "{class}: {}", counts[class]);
    }
}

/// The master hands over, and lives on.
async fn hand_over(lab: &Lab) -> (String, String) {
    let old = lab.status().await.unwrap().master.unwrap();
    let mut client = lab.client().await.unwrap();
    let chosen = lab.made().hosts.iter().find(|host| host.name != old).unwrap();
    let reference = lab.host_reference(&mut client, &chosen.name).await.unwrap();
    client.call("pool.designate_new_master", json!([reference])).await.unwrap();
    let new = other_master(lab, &old).await;
    (old, new)
}

#[tokio::test(flavor = "multi_thread")]
async fn xenapi_py_connects_lists_every_class_and_follows_the_master() {
    let lab = Lab::sim().await.unwrap();
    let master = lab.made().master().unwrap().clone();
    let member = lab.made().others()[0].name.clone();
    let mut stock = Stock::python("xenapi_py.py", &[&described(&lab), &member]).await.unwrap();
    let login = stock.did("log in", STAGE).await.unwrap();
    assert_eq!((&login["sent_to"], &login["url"]), (&json!(master.address), &json!(master.url)));
    let listed = stock.did("list", STAGE).await.unwrap();
    all_listed(&listed["counts"]);
    assert_eq!(listed["version"], "2.21");
    stock.did("write", STAGE).await.unwrap();

    let (old, new) = hand_over(&lab).await;
    stock.go_on().await.unwrap();
    let at = stock.did("go on at the old master", STAGE).await.unwrap();
    assert_eq!(at["url"], lab.made().host(&old).unwrap().url.as_str());

    lab.kill(&new, What::Host).await.unwrap();
    stock.go_on().await.unwrap();
    let at = stock.did("follow", STAGE).await.unwrap();
    assert_ne!(at["url"], lab.made().host(&new).unwrap().url.as_str());

    lab.start(&new, What::Host).await.unwrap();
    stock.go_on().await.unwrap();
    stock.did("end", STAGE).await.unwrap();
    stock.end(SOON).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn xen_api_connects_lists_every_class_and_follows_the_master() {
    let lab = Lab::sim().await.unwrap();
    let master = lab.made().master().unwrap().clone();
    let member = lab.made().others()[0].name.clone();
    let mut stock = Stock::node("xen_api.mjs", &[&described(&lab), &member]).await.unwrap();
    let connected = stock.did("connect", STAGE).await.unwrap();
    assert_eq!(connected["url"], master.address.as_str());
    all_listed(&stock.did("list", STAGE).await.unwrap()["counts"]);
    stock.did("write", STAGE).await.unwrap();

    // The client talks to the first master throughout.
    let (old, new) = hand_over(&lab).await;
    assert_eq!(old, master.name);
    stock.go_on().await.unwrap();
    stock.did("go on at the old master", STAGE).await.unwrap();

    lab.kill(&new, What::Host).await.unwrap();
    stock.go_on().await.unwrap();
    stock.did("go on after a kill", STAGE).await.unwrap();
    lab.start(&new, What::Host).await.unwrap();

    until(SOON, "a master", async || lab.status().await.unwrap().master).await;
    lab.kill(&master.name, What::Host).await.unwrap();
    lab.start(&master.name, What::Host).await.unwrap();
    stock.go_on().await.unwrap();
    stock.did("return", STAGE).await.unwrap();
    stock.did("end", STAGE).await.unwrap();
    stock.end(SOON).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sample_flows_of_the_documents_pass_with_xenapi_py_and_real_guests() {
    let lab = Lab::up(1, "qemu").await.unwrap();
    plugged(&mut lab.client().await.unwrap()).await;
    let mut stock = Stock::python("sdk_flows.py", &[&described(&lab)]).await.unwrap();
    let installed = stock.did("install", 3 * STAGE).await.unwrap();
    assert!(!installed["os"].as_object().unwrap().is_empty(), "{installed}");
    for flow in ["power-cycle", "asynchronous start", "watch all events"] {
        stock.did(flow, 3 * STAGE).await.unwrap();
    }
    stock.end(SOON).await.unwrap();
}
