//! Whom hosts believe: one another, a witness, and those whom they call for the first time.

use chaos_tests::client::Client;
use chaos_tests::lab::{Lab, What, program};
use serde_json::{Value, json};

use crate::support::{SOON, Witness, new_vm, other_master, refusal, text, until, until_member};

#[tokio::test(flavor = "multi_thread")]
async fn the_pools_authority_and_every_certificate_are_replaced_while_it_serves() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "written meanwhile").await;
    let before = std::fs::read_to_string(lab.dir().join("ca/ca.pem")).unwrap();
    let secret = client.call("pool.initial_auth", json!([])).await.unwrap();
    client.call("pool.rotate_secret", json!([])).await.unwrap();
    let again = refusal(client.call("pool.rotate_secret", json!([])).await);
    assert_eq!(again.0, "OPERATION_NOT_ALLOWED");
    let pool = text(&client.call("pool.get_all", json!([])).await.unwrap()[0]);
    let mut writes = 0;
    until(SOON * 2, "the rotation to end", async || {
        client.persist(SOON, "VM.set_name_description", json!([vm, format!("{writes}")])).await.unwrap();
        writes += 1;
        let pending = client.persist(SOON, "pool.get_is_psr_pending", json!([pool])).await.unwrap();
        (pending == false).then_some(())
    })
    .await;
    let mut authorities: Vec<_> = lab
        .made()
        .hosts
        .iter()
        .map(|host| lab.dir().join(&host.name).join("controller/current/tls/ca.pem"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    authorities.dedup();
    assert_eq!(authorities.len(), 1);
    assert_eq!(authorities[0].matches("BEGIN CERTIFICATE").count(), 1, "the old authority is believed no more");
    assert_ne!(authorities[0], before);
    assert_ne!(client.persist(SOON, "pool.initial_auth", json!([])).await.unwrap(), secret);
    // Nothing of it is in memory alone.
    for host in &lab.made().hosts {
        lab.kill(&host.name, What::Host).await.unwrap();
    }
    lab.up_again(&[]).await.unwrap();
    let label = client.persist(SOON, "VM.get_name_description", json!([vm])).await.unwrap();
    assert_eq!(label, format!("{}", writes - 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_witness_takes_part_in_a_rotation_of_certificates_and_votes_after_it() {
    let flags = ["--wait", "60"];
    let lab = Lab::with(&program().unwrap(), &std::env::temp_dir(), 2, "sim", &flags).await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "written after it").await;
    let witness = Witness::enrol(&lab).await;
    let file = |name: &str| witness.dir.path().join("data/current/tls").join(name);
    let before = until(SOON, "the witness to have a seat", async || std::fs::read_to_string(file("ca.pem")).ok()).await;
    client.call("pool.rotate_secret", json!([])).await.unwrap();
    let pool = text(&client.persist(SOON, "pool.get_all", json!([])).await.unwrap()[0]);
    until(SOON * 3, "the rotation to end", async || {
        let pending = client.persist(SOON, "pool.get_is_psr_pending", json!([pool])).await.unwrap();
        (pending == false).then_some(())
    })
    .await;
    let host = lab.dir().join(&lab.made().hosts[0].name).join("controller/current/tls/ca.pem");
    let after = std::fs::read_to_string(file("ca.pem")).unwrap();
    assert_eq!(after, std::fs::read_to_string(host).unwrap());
    assert_ne!(after, before);

    // Its vote still counts: with it the other host is a majority.
    let master = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
    lab.kill(&master, What::Host).await.unwrap();
    let next = other_master(&lab, &master).await;
    let mut next = client.at(&lab.made().host(&next).unwrap().endpoint().unwrap());
    next.persist(SOON, "VM.set_name_label", json!([vm, "written with the witness"])).await.unwrap();
}

/// The certificate that a host shows its clients.
async fn shown(client: &mut Client, uuid: &str) -> String {
    let host = client.call("host.get_by_uuid", json!([uuid])).await.unwrap();
    text(&client.call("host.get_server_certificate", json!([host])).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_shows_the_certificate_that_it_was_given_until_it_is_given_another() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let master = lab.made().master().unwrap().clone();
    let other = lab.made().others()[0].clone();
    let file = |host: &str, name: &str| std::fs::read_to_string(lab.dir().join(host).join("tls").join(name)).unwrap();
    let its = shown(&mut client, &master.uuid).await;
    let before = shown(&mut client, &other.uuid).await;
    let host = lab.host_reference(&mut client, &other.name).await.unwrap();
    // Who listens there meanwhile goes on.
    let mut there = client.at(&other.endpoint().unwrap());
    there.call("host.get_uuid", json!([host])).await.unwrap();

    let (certificate, key) = (file(&master.name, "api.pem"), file(&master.name, "api.key"));
    let wrong = json!([host, certificate, file(&other.name, "api.key")]);
    let refused = refusal(client.call("host.install_server_certificate", wrong).await);
    assert_eq!(refused.0, "SERVER_CERTIFICATE_KEY_MISMATCH");
    assert_eq!(shown(&mut client, &other.uuid).await, before);

    client.call("host.install_server_certificate", json!([host, certificate, key])).await.unwrap();
    assert_eq!(shown(&mut client, &other.uuid).await, its);
    there.call("host.get_uuid", json!([host])).await.unwrap();
    let rows = client.call("Certificate.get_all_records", json!([])).await.unwrap();
    let of_the_host = |row: &&Value| row["type"] == "host" && row["host"] == host.as_str();
    let rows: Vec<_> = rows.as_object().unwrap().values().filter(of_the_host).cloned().collect();
    assert_eq!(rows.len(), 1);
    assert_eq!(text(&rows[0]["fingerprint"]).len(), 95, "32 bytes in hexadecimal with colons");

    lab.kill(&other.name, What::Controller).await.unwrap();
    lab.start(&other.name, What::Controller).await.unwrap();
    assert_eq!(shown(&mut client, &other.uuid).await, its);

    client.call("host.reset_server_certificate", json!([host])).await.unwrap();
    let own = shown(&mut client, &other.uuid).await;
    assert!(own != its && own != before);
    let mut sitting = client.at(&other.local());
    sitting.call("host.emergency_reset_server_certificate", json!([])).await.unwrap();
    assert_ne!(shown(&mut client, &other.uuid).await, own);
    let refused = refusal(sitting.call("host.emergency_disable_tls_verification", json!([])).await);
    assert_eq!(refused.0, "OPERATION_NOT_ALLOWED");
    sitting.call("host.emergency_reenable_tls_verification", json!([])).await.unwrap();
}

async fn names(client: &mut Client, message: &str) -> Vec<String> {
    let names = client.persist(SOON, message, json!([])).await.unwrap();
    names.as_array().unwrap().iter().map(text).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_given_authorities_joins_only_a_pool_that_one_of_them_vouches_for_and_brings_them_along() {
    let flags = ["--wait", "60", "--apart", "1"];
    let lab = Lab::with(&program().unwrap(), &std::env::temp_dir(), 3, "sim", &flags).await.unwrap();
    let newcomer = lab.made().host("host4").unwrap().clone();
    let mut there = Client::connect(vec![newcomer.endpoint().unwrap()], lab.made().credentials()).await.unwrap();
    let mut pool = lab.client().await.unwrap();
    let master = lab.made().master().unwrap();
    let own = shown(&mut there, &newcomer.uuid).await;
    let masters = shown(&mut pool, &master.uuid).await;
    assert_ne!(own, masters);

    for (name, pem, code) in [
        ("../ca", own.as_str(), "CERTIFICATE_NAME_INVALID"),
        (".ca", own.as_str(), "CERTIFICATE_NAME_INVALID"),
        ("ca.pem", "no certificate", "CERTIFICATE_CORRUPT"),
    ] {
        assert_eq!(refusal(there.call("pool.install_ca_certificate", json!([name, pem])).await).0, code);
    }
    let missing = there.call("pool.uninstall_ca_certificate", json!(["ca.pem"])).await;
    assert_eq!(refusal(missing), ("CERTIFICATE_DOES_NOT_EXIST".to_owned(), vec!["ca.pem".to_owned()]));
    assert_eq!(refusal(there.call("pool.crl_install", json!(["crl", own])).await).0, "CRL_CORRUPT");
    assert_eq!(refusal(there.call("pool.crl_uninstall", json!(["crl"])).await).0, "CRL_DOES_NOT_EXIST");

    // An authority that did not sign what the master shows.
    there.call("pool.install_ca_certificate", json!(["other.pem", own])).await.unwrap();
    let twice = there.call("pool.install_ca_certificate", json!(["other.pem", own])).await;
    assert_eq!(refusal(twice).0, "CERTIFICATE_ALREADY_EXISTS");
    let target: Value = json!([master.address, lab.made().user, lab.made().password]);
    assert_eq!(refusal(there.call("pool.join", target.clone()).await).0, "SSL_VERIFY_ERROR");

    there.call("pool.install_ca_certificate", json!(["masters.pem", masters])).await.unwrap();
    assert_eq!(names(&mut there, "pool.certificate_list").await, ["masters.pem", "other.pem"]);
    there.call("pool.join", target).await.unwrap();
    until_member(&mut pool, &newcomer.uuid).await;
    assert_eq!(names(&mut pool, "pool.certificate_list").await, ["masters.pem", "other.pem"]);
    let all = pool.call("Certificate.get_all_records", json!([])).await.unwrap();
    let authorities = all.as_object().unwrap().values().filter(|row| row["type"] == "ca");
    for row in authorities {
        assert_eq!(row["host"], "OpaqueRef:NULL");
        assert_eq!(text(&row["fingerprint"]).len(), 95, "32 bytes in hexadecimal with colons");
    }

    // They are rows: the next master has them, and lets go of them for all.
    let name = master.name.clone();
    lab.kill(&name, What::Host).await.unwrap();
    let next = other_master(&lab, &name).await;
    let mut next = pool.at(&lab.made().host(&next).unwrap().endpoint().unwrap());
    assert_eq!(names(&mut next, "pool.certificate_list").await, ["masters.pem", "other.pem"]);
    next.persist(SOON, "pool.uninstall_ca_certificate", json!(["other.pem"])).await.unwrap();
    assert_eq!(names(&mut next, "pool.certificate_list").await, ["masters.pem"]);
}
