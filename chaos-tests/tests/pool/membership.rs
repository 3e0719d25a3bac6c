//! Hosts come, go and die, and the pool knows which are its own.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use chaos_tests::client::{CallError, Client};
use chaos_tests::lab::{Host, Lab, What, program};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::support::{
    HANDOVER, SOON, Witness, hand_overs, is_live, lives, new_vm, other_master, refusal, text, until, until_member,
};

/// How soon the pool must show that a host is dead.
const DEATH_SHOWN: Duration = Duration::from_secs(5);
/// Voters that are silent for longer are replaced, in labs that are asked to.
const REPLACE_AFTER: Duration = Duration::from_millis(1_500);

async fn lab(flags: &[&str]) -> Lab {
    let flags: Vec<&str> = ["--wait", "60"].into_iter().chain(flags.iter().copied()).collect();
    Lab::with(&program().unwrap(), &std::env::temp_dir(), 3, "sim", &flags).await.unwrap()
}

/// A VM that runs on that host.
async fn running_on(lab: &Lab, client: &mut Client, host: &str, name: &str) -> String {
    let vm = new_vm(client, name).await;
    client.call("VM.provision", json!([vm])).await.unwrap();
    let host = lab.host_reference(client, host).await.unwrap();
    client.call("VM.start_on", json!([vm, host, false, false])).await.unwrap();
    vm
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_host_is_shown_within_five_seconds_and_its_guests_run_elsewhere_once_it_is_declared_dead() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let victim = lab.made().others()[0].name.clone();
    let host = lab.host_reference(&mut client, &victim).await.unwrap();
    let vm = running_on(&lab, &mut client, &victim, "on a host that dies").await;
    for message in ["host.declare_dead", "host.destroy"] {
        assert_eq!(refusal(client.call(message, json!([host])).await), ("HOST_IS_LIVE".to_owned(), vec![host.clone()]));
    }
    assert_eq!(refusal(client.call("VM.power_state_reset", json!([vm])).await).0, "HOST_IS_LIVE");

    let killed = Instant::now();
    lab.kill(&victim, What::Host).await.unwrap();
    until(SOON, "the host to be shown dead", async || (!is_live(&mut client, &host).await).then_some(())).await;
    assert!(killed.elapsed() < DEATH_SHOWN, "{:?}", killed.elapsed());
    let record = client.call("VM.get_record", json!([vm])).await.unwrap();
    assert_eq!((&record["power_state"], &record["resident_on"]), (&json!("Running"), &json!(host)), "nobody can know");
    assert_eq!(refusal(client.call("host.destroy", json!([host])).await).0, "HOST_HAS_RESIDENT_VMS");
    assert_eq!(refusal(client.call("host.enable", json!([host])).await).0, "HOST_STILL_BOOTING");

    client.call("host.declare_dead", json!([host])).await.unwrap();
    let record = client.call("VM.get_record", json!([vm])).await.unwrap();
    assert_eq!((&record["power_state"], &record["resident_on"]), (&json!("Halted"), &json!("OpaqueRef:NULL")));
    assert_eq!(client.call("host.get_enabled", json!([host])).await.unwrap(), false);
    client.call("VM.start", json!([vm, false, false])).await.unwrap();
    let elsewhere = client.call("VM.get_resident_on", json!([vm])).await.unwrap();
    assert_ne!(elsewhere, json!(host));

    // It boots anew: it is live, takes guests again, and has nothing of the one that moved.
    lab.start(&victim, What::Host).await.unwrap();
    until(SOON, "the host to be back", async || is_live(&mut client, &host).await.then_some(())).await;
    assert_eq!(client.call("host.get_enabled", json!([host])).await.unwrap(), true);
    assert_eq!(client.call("VM.get_resident_on", json!([vm])).await.unwrap(), elsewhere);
    client.call("host.disable", json!([host])).await.unwrap();
    assert_eq!(client.call("host.get_enabled", json!([host])).await.unwrap(), false);
    client.call("host.enable", json!([host])).await.unwrap();

    // The next master tells it of the last one.
    let master = lab.made().master.clone().unwrap();
    let host = lab.host_reference(&mut client, &master).await.unwrap();
    let killed = Instant::now();
    lab.kill(&master, What::Host).await.unwrap();
    until(SOON, "the old master to be shown dead", async || (!is_live(&mut client, &host).await).then_some(())).await;
    assert!(killed.elapsed() < DEATH_SHOWN, "{:?}", killed.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_host_is_forgotten_with_all_that_is_its_own() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let victim = lab.made().others()[0].name.clone();
    let host = lab.host_reference(&mut client, &victim).await.unwrap();
    lab.kill(&victim, What::Host).await.unwrap();
    until(SOON, "the host to be shown dead", async || (!is_live(&mut client, &host).await).then_some(())).await;
    client.call("host.destroy", json!([host])).await.unwrap();
    for class in ["host", "PIF", "PBD", "host_cpu", "Certificate"] {
        let all = client.call(&format!("{class}.get_all_records"), json!([])).await.unwrap();
        assert!(!all.to_string().contains(&host), "{class} still names the host");
    }
    let controls = client.call("VM.get_all_records_where", json!([r#"field "is_control_domain" = "true""#])).await;
    assert_eq!(controls.unwrap().as_object().unwrap().len(), 2);
    // Two are left, and the death of the one that does not vote is no loss.
    let name = client.call("host.get_all", json!([])).await.unwrap();
    assert_eq!(name.as_array().unwrap().len(), 2);

    // It comes back, long after anybody would have told it: it asks, and begins anew.
    lab.start(&victim, What::Host).await.unwrap();
    let host = lab.made().host(&victim).unwrap().clone();
    let alone = until(SOON * 2, "the forgotten host to be a pool of its own", async || {
        view(&lab, &host).await.ok().filter(|view| view.hosts.len() == 1)
    })
    .await;
    assert_ne!(Some(alone.pool), host.pool);
    assert_eq!(client.call("host.get_all", json!([])).await.unwrap().as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_is_asked_to_go_is_replaced_without_a_failed_call_and_with_a_short_pause() {
    let mut pauses = hand_overs(&Lab::sim().await.unwrap(), 5).await;
    pauses.sort_unstable();
    eprintln!("pauses: {pauses:?}");
    assert!(pauses[pauses.len() / 2] < HANDOVER, "{pauses:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_votes_in_the_place_of_a_voter_that_is_gone_for_long() {
    let flags = ["--replace-after-ms", "1500"];
    let flags: Vec<&str> = ["--wait", "60"].into_iter().chain(flags).collect();
    let lab = Lab::with(&program().unwrap(), &std::env::temp_dir(), 4, "sim", &flags).await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "written with two deaths").await;
    // Three of four vote; the one that does not is the last to have come.
    let master = lab.made().master.clone().unwrap();
    let voters: Vec<_> = lab.made().hosts[..3].iter().map(|host| host.name.clone()).collect();
    let mut victims = voters.iter().filter(|name| **name != master);
    // The founders all vote until the pool has chosen.
    sleep(REPLACE_AFTER).await;
    lab.kill(victims.next().unwrap(), What::Host).await.unwrap();
    sleep(REPLACE_AFTER + Duration::from_secs(1)).await;
    lab.kill(victims.next().unwrap_or(&voters[0]), What::Host).await.unwrap();
    // Of the first three voters one is left, of the three that vote now two are.
    client.persist(SOON, "VM.set_name_label", json!([vm, "written"])).await.unwrap();
}

/// What a client sees of a host's pool, by way of the host's own socket.
struct View {
    pool: String,
    hosts: Vec<String>,
    vms: Vec<String>,
}

async fn view(lab: &Lab, host: &Host) -> Result<View, CallError> {
    let mut client = Client::connect(vec![host.local()], lab.made().credentials()).await?;
    let uuids = |all: &Value| -> Vec<String> {
        let records = all.as_object().unwrap().values();
        records.filter(|record| record["is_a_template"] != true).map(|record| text(&record["uuid"])).collect()
    };
    let pools = client.call("pool.get_all_records", json!([])).await?;
    let hosts = client.call("host.get_all_records", json!([])).await?;
    let vms = client.call("VM.get_all_records", json!([])).await?;
    let guests: serde_json::Map<String, Value> = vms
        .as_object()
        .unwrap()
        .iter()
        .filter(|(_, vm)| vm["is_control_domain"] != true)
        .map(|(reference, vm)| (reference.clone(), vm.clone()))
        .collect();
    let pool = uuids(&pools).remove(0);
    Ok(View { pool, hosts: uuids(&hosts), vms: uuids(&Value::Object(guests)) })
}

fn target(lab: &Lab) -> Value {
    let master = lab.made().master().unwrap();
    json!([master.address, lab.made().user, lab.made().password])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_joins_with_its_guests_serves_in_the_new_pool_and_leaves_it_as_a_pool_of_its_own() {
    let lab = lab(&["--apart", "1"]).await;
    let newcomer = lab.made().host("host4").unwrap().clone();
    let mut there = Client::connect(vec![newcomer.endpoint().unwrap()], lab.made().credentials()).await.unwrap();
    let mut pool = lab.client().await.unwrap();
    assert_eq!(pool.call("host.get_all", json!([])).await.unwrap().as_array().unwrap().len(), 3);
    let (own, ours) = (newcomer.pool.clone().unwrap(), lab.made().hosts[0].pool.clone().unwrap());
    assert_ne!(own, ours);

    // What it may not bring, and what it must show.
    let vm = new_vm(&mut there, "brought along").await;
    there.call("VM.provision", json!([vm])).await.unwrap();
    let uuid = text(&there.call("VM.get_uuid", json!([vm])).await.unwrap());
    there.call("VM.start", json!([vm, false, false])).await.unwrap();
    assert_eq!(refusal(there.call("pool.join", target(&lab)).await).0, "JOINING_HOST_CANNOT_HAVE_RUNNING_VMS");
    there.call("VM.hard_shutdown", json!([vm])).await.unwrap();
    let wrong = json!([lab.made().master().unwrap().address, "root", "wrong"]);
    assert_eq!(refusal(there.call("pool.join", wrong).await).0, "SESSION_AUTHENTICATION_FAILED");
    let nobody = json!(["127.255.255.250", "root", "x"]);
    assert_eq!(refusal(there.call("pool.join", nobody).await).0, "JOINING_HOST_CONNECTION_FAILED");
    let itself = json!([newcomer.address, lab.made().user, lab.made().password]);
    assert_eq!(refusal(there.call("pool.join", itself).await).0, "OPERATION_NOT_ALLOWED");

    // By way of a member: it says who is master.
    let member = lab.made().others()[0].address.clone();
    let by_way = json!([member, lab.made().user, lab.made().password]);
    there.call("pool.join", by_way).await.unwrap();
    let host = until_member(&mut pool, &newcomer.uuid).await;
    let here = text(&pool.call("VM.get_by_uuid", json!([uuid])).await.unwrap());
    assert_eq!(here, vm, "references survive");
    let seen = until(SOON, "the host to serve the pool", async || view(&lab, &newcomer).await.ok()).await;
    assert_eq!((seen.pool.as_str(), seen.hosts.len()), (ours.as_str(), 4));
    assert!(seen.vms.contains(&uuid));
    let old = refusal(there.call("VM.get_all", json!([])).await);
    assert!(matches!(old.0.as_str(), "SESSION_INVALID" | "HOST_IS_SLAVE"), "{old:?}");
    assert_eq!(pool.call("host.get_enabled", json!([host])).await.unwrap(), true);
    pool.call("VM.start_on", json!([vm, host, false, false])).await.unwrap();
    let networks = pool.call("network.get_all_records", json!([])).await.unwrap();
    let mut bridges: Vec<_> = networks.as_object().unwrap().values().map(|network| text(&network["bridge"])).collect();
    bridges.sort_unstable();
    let all = bridges.len();
    bridges.dedup();
    assert_eq!(bridges.len(), all, "its networks are the pool's");
    let pbds = pool.call("host.get_PBDs", json!([host])).await.unwrap();
    assert_eq!(pbds.as_array().unwrap().len(), 2, "its own storage, and the pool's");

    assert_eq!(refusal(pool.call("pool.eject", json!([host])).await).0, "OPERATION_NOT_ALLOWED");
    pool.call("VM.hard_shutdown", json!([vm])).await.unwrap();
    pool.call("pool.eject", json!([host])).await.unwrap();
    assert_eq!(pool.call("host.get_all", json!([])).await.unwrap().as_array().unwrap().len(), 3);
    let alone = until(SOON, "the host to be a pool of its own", async || {
        view(&lab, &newcomer).await.ok().filter(|view| view.pool != ours && view.hosts.len() == 1)
    })
    .await;
    assert_ne!(alone.pool, own, "it begins anew");
    assert!(alone.vms.is_empty() && alone.hosts == [newcomer.uuid.clone()]);

    // And once more, with another number.
    let mut there = Client::connect(vec![newcomer.endpoint().unwrap()], lab.made().credentials()).await.unwrap();
    until_member(&mut there, &newcomer.uuid).await;
    there.call("pool.join", target(&lab)).await.unwrap();
    let host = until_member(&mut pool, &newcomer.uuid).await;
    pool.call("pool.designate_new_master", json!([host])).await.unwrap();
    until(SOON, "the newcomer to be master", async || {
        (lab.status().await.unwrap().master.as_deref() == Some("host4")).then_some(())
    })
    .await;
}

/// Kills the controller of a joining host as soon as this holds.
async fn kill_when(pid: i32, holds: impl Fn() -> bool + Send + 'static) {
    let killing = tokio::task::spawn_blocking(move || {
        let deadline = Instant::now() + SOON;
        while !holds() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    });
    killing.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_killed_while_it_joins_is_of_one_pool_or_of_the_other_and_can_join_in_the_end() {
    let lab = lab(&["--apart", "1"]).await;
    let newcomer = lab.made().host("host4").unwrap().clone();
    let ours = lab.made().hosts[0].pool.clone().unwrap();
    let data: PathBuf = lab.dir().join("host4/controller");
    let mut pool = lab.client().await.unwrap();
    let mut there = Client::connect(vec![newcomer.endpoint().unwrap()], lab.made().credentials()).await.unwrap();
    // It was of the pool before: whatever is left of that must not speak for it.
    there.call("pool.join", target(&lab)).await.unwrap();
    let host = until_member(&mut pool, &newcomer.uuid).await;
    pool.call("pool.eject", json!([host])).await.unwrap();
    until(SOON, "the host to be a pool of its own", async || {
        view(&lab, &newcomer).await.ok().filter(|view| view.pool != ours && view.hosts.len() == 1)
    })
    .await;
    let mut there = Client::connect(vec![newcomer.endpoint().unwrap()], lab.made().credentials()).await.unwrap();
    until_member(&mut there, &newcomer.uuid).await;
    let vm = new_vm(&mut there, "of one pool").await;
    there.call("VM.provision", json!([vm])).await.unwrap();
    let uuid = text(&there.call("VM.get_uuid", json!([vm])).await.unwrap());

    // As soon as it asks to be let in; when its seat is begun; when it is furnished; when it has just been taken.
    let before = std::fs::read_link(data.join("current")).unwrap();
    for (round, point) in ["asks", "another seat", "seat.json", "taken"].into_iter().enumerate() {
        let pid = lab.status().await.unwrap().host("host4").unwrap().controller_pid.unwrap();
        let mut joiner = there.at(&newcomer.endpoint().unwrap());
        let join = target(&lab);
        let asked = tokio::spawn(async move { joiner.call("pool.join", join).await });
        let (place, before) = (data.clone(), before.clone());
        let others = move |holds: &dyn Fn(PathBuf) -> bool| {
            let seats = std::fs::read_dir(&place).unwrap().flatten().map(|entry| entry.path());
            let others = seats
                .filter(|seat| seat.file_name() != before.file_name() && seat.to_string_lossy().contains("/seat-"));
            others.into_iter().any(holds)
                || (point == "taken" && std::fs::read_link(place.join("current")).unwrap() != before)
        };
        let seen = move || match point {
            "asks" => true,
            "another seat" => others(&|_| true),
            "seat.json" => others(&|seat| seat.join("seat.json").exists()),
            _ => others(&|_| false),
        };
        kill_when(pid, seen).await;
        let _ = asked.await.unwrap();
        until(SOON, "its end", async || (!lives(pid)).then_some(())).await;
        lab.start("host4", What::Host).await.unwrap();
        let seen = until(SOON, "the host to be of a pool", async || view(&lab, &newcomer).await.ok()).await;
        let known = pool.call("host.get_by_uuid", json!([newcomer.uuid])).await.is_ok();
        eprintln!("round {round}, killed at {point}: of {}", if seen.pool == ours { "the other" } else { "its own" });
        if seen.pool == ours {
            until_member(&mut pool, &newcomer.uuid).await;
            assert!(pool.call("VM.get_by_uuid", json!([uuid])).await.is_ok(), "its guest came along");
            return;
        }
        assert!(!known, "the pool shows a host that is not of it");
        assert!(seen.vms.contains(&uuid), "its guest is still there");
        assert_eq!(refusal(pool.call("VM.get_by_uuid", json!([uuid])).await).0, "UUID_INVALID");
        there = Client::connect(vec![newcomer.endpoint().unwrap()], lab.made().credentials()).await.unwrap();
    }
    there.call("pool.join", target(&lab)).await.unwrap();
    until_member(&mut pool, &newcomer.uuid).await;
    assert!(pool.call("VM.get_by_uuid", json!([uuid])).await.is_ok());
}

/// A session of one host alone.
async fn local_session(lab: &Lab, host: &Host) -> Client {
    let mut client = lab.client_at(host).unwrap();
    let login = json!([lab.made().user, lab.made().password]);
    let session = client.plain("session.slave_local_login_with_password", &login).await.unwrap();
    client.set_session(&text(&session));
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn a_survivor_whose_majority_is_lost_begins_the_pool_anew_and_the_others_come_back_empty() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "kept").await;
    let pool = text(&client.call("pool.get_all", json!([])).await.unwrap()[0]);
    let survivor = lab.made().others()[0].clone();
    let lost: Vec<_> = lab.made().hosts.iter().filter(|host| host.name != survivor.name).cloned().collect();
    let mut local = local_session(&lab, &survivor).await;
    assert_eq!(local.call("host.is_in_emergency_mode", json!([])).await.unwrap(), false);
    let refused = refusal(local.call("pool.emergency_transition_to_master", json!([])).await);
    assert_eq!(refused.0, "OPERATION_NOT_ALLOWED", "there is a majority");
    assert_eq!(refusal(local.call("VM.get_all", json!([])).await).0, "SESSION_INVALID", "it is of one host alone");
    for host in &lost {
        lab.kill(&host.name, What::Host).await.unwrap();
    }
    until(SOON, "the emergency", async || {
        (local.call("host.is_in_emergency_mode", json!([])).await.unwrap() == true).then_some(())
    })
    .await;
    local.call("pool.emergency_transition_to_master", json!([])).await.unwrap();

    // The same pool, the same session, the same objects, and it is written to.
    let mut client = client.at(&survivor.endpoint().unwrap());
    let found = client.persist(SOON, "pool.get_all", json!([])).await.unwrap();
    assert_eq!(found, json!([pool]));
    client.persist(SOON, "VM.set_name_label", json!([vm, "written alone"])).await.unwrap();
    assert_eq!(lab.master_by_pool(&mut client).await.unwrap(), survivor.name);

    // One of the dead comes back with its old database, and is told where the pool is.
    let first = &lost[0];
    lab.start(&first.name, What::Host).await.unwrap();
    let there = lab.host_reference(&mut client, &first.name).await.unwrap();
    assert!(!is_live(&mut client, &there).await, "it is not of the pool before it has come back empty");
    let mut local = local_session(&lab, first).await;
    until(SOON, "the emergency", async || {
        (local.call("host.is_in_emergency_mode", json!([])).await.unwrap() == true).then_some(())
    })
    .await;
    let back = client.call("pool.recover_slaves", json!([])).await.unwrap();
    assert_eq!(back, json!([there]));
    until_member(&mut client, &first.uuid).await;
    let seen = until(SOON, "the host to serve the pool", async || view(&lab, first).await.ok()).await;
    assert_eq!(seen.hosts.len(), 3);
    client.call("pool.designate_new_master", json!([there])).await.unwrap();
    let mut client = client.at(&first.endpoint().unwrap());
    client.persist(SOON, "VM.set_name_label", json!([vm, "written by the other"])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hosts_and_a_witness_survive_the_death_of_any_one_and_the_witness_is_never_master() {
    let flags = ["--wait", "60"];
    let lab = Lab::with(&program().unwrap(), &std::env::temp_dir(), 2, "sim", &flags).await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "written throughout").await;
    let mut witness = Witness::enrol(&lab).await;
    for round in 0..3 {
        let master = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
        // Three vote once the master can do without itself; until then its death is the pool's.
        sleep(Duration::from_secs(1)).await;
        lab.kill(&master, What::Host).await.unwrap();
        let next = other_master(&lab, &master).await;
        let mut next = client.at(&lab.made().host(&next).unwrap().endpoint().unwrap());
        next.persist(SOON, "VM.set_name_label", json!([vm, format!("round {round}")])).await.unwrap();
        lab.start(&master, What::Host).await.unwrap();
        let mut back = lab.client_at(lab.made().host(&master).unwrap()).unwrap();
        until(SOON, "the killed host to know the master", async || {
            let login = json!([lab.made().user, lab.made().password]);
            let answer = back.plain("session.login_with_password", &login).await.err()?;
            answer.is("HOST_IS_SLAVE").then_some(())
        })
        .await;
    }
    witness.process.kill().await.unwrap();
    client.persist(SOON, "VM.set_name_label", json!([vm, "without the witness"])).await.unwrap();
}
