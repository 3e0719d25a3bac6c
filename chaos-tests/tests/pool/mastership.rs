//! The leader is the master, everybody learns of it, and there is soon a next one.

use std::time::{Duration, Instant};

use chaos_tests::bench::load::median;
use chaos_tests::client::Client;
use chaos_tests::lab::{Lab, What};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::support::{SOON, new_vm, other_master, refusal, text, until};

/// A member waits so long for a master before it says that there is none; the rest is for a busy machine.
const EMERGENCY_LIMIT: Duration = Duration::from_secs(5 + 5);

fn login(lab: &Lab) -> Value {
    json!([lab.made().user, lab.made().password])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_sends_logins_to_the_master_and_forwards_the_calls_of_a_session() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "reached from everywhere").await;
    let master = lab.made().master().unwrap().clone();
    for member in lab.made().others() {
        let mut here = lab.client_at(member).unwrap();
        let answer = refusal(here.plain("session.login_with_password", &login(&lab)).await);
        assert_eq!(answer, ("HOST_IS_SLAVE".to_owned(), vec![master.address.clone()]));
        let bad = refusal(here.plain("session.login_with_password", &json!(["root", "wrong"])).await);
        assert_eq!(bad.0, "HOST_IS_SLAVE", "who may log in is not for a member to say");

        let parameters = json!([client.session(), vm, member.name]);
        assert_eq!(here.plain("VM.set_name_description", &parameters).await.unwrap(), "");
        let read = here.plain("VM.get_name_description", &json!([client.session(), vm])).await.unwrap();
        assert_eq!(read, member.name.as_str());
        let event = here.plain("event.from", &json!([client.session(), [format!("VM/{vm}")], "", 0.0])).await.unwrap();
        assert_eq!(event["events"].as_array().unwrap().len(), 1);

        let unknown = "OpaqueRef:11111111-2222-3333-4444-555555555555";
        let answer = refusal(here.plain("VM.get_all", &json!([unknown])).await);
        assert_eq!(answer, ("SESSION_INVALID".to_owned(), vec![unknown.to_owned()]));
        let methods = here.plain("system.listMethods", &json!([])).await.unwrap();
        assert!(methods.as_array().unwrap().iter().any(|name| name == "VM.get_all_records"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pool_master_follows_the_leader_and_clients_hear_of_it() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let mut master = lab.made().master.clone().unwrap();
    let start = client.call("event.from", json!([["pool"], "", 0.0])).await.unwrap();
    let mut token = text(&start["token"]);

    // Killed, stopped for a while, and asked to hand over.
    for round in ["kill", "pause", "designate"] {
        match round {
            "kill" => drop(lab.kill(&master, What::Host).await.unwrap()),
            "pause" => drop(lab.pause(&master, What::Host).await.unwrap()),
            _ => {
                let chosen = lab.made().hosts.iter().find(|host| host.name != master).unwrap();
                let chosen = lab.host_reference(&mut client, &chosen.name).await.unwrap();
                client.persist(SOON, "pool.designate_new_master", json!([chosen])).await.unwrap();
            }
        }
        let next = other_master(&lab, &master).await;
        let mut client_of_next = client.at(&lab.made().host(&next).unwrap().endpoint().unwrap());
        assert_eq!(lab.master_by_pool(&mut client_of_next).await.unwrap(), next, "after {round}");

        let reference = lab.host_reference(&mut client_of_next, &next).await.unwrap();
        until(SOON, "the event of the new master", async || {
            let parameters = json!([["pool"], token, 5.0]);
            let batch = client_of_next.call("event.from", parameters).await.unwrap();
            token = text(&batch["token"]);
            let events = batch["events"].as_array().unwrap();
            events.last().filter(|event| event["snapshot"]["master"] == reference.as_str()).map(drop)
        })
        .await;
        match round {
            "kill" => drop(lab.start(&master, What::Host).await.unwrap()),
            "pause" => drop(lab.resume(&master, What::Host).await.unwrap()),
            _ => {}
        }
        client = client_of_next;
        // All three are there again before the next one goes.
        let old = lab.made().host(&master).unwrap();
        let mut at_old = lab.client_at(old).unwrap();
        until(SOON, "the old master to know the new one", async || {
            let answer = at_old.plain("session.login_with_password", &login(&lab)).await.err()?;
            (answer.refusal()?.params == [lab.made().host(&next).unwrap().address.clone()]).then_some(())
        })
        .await;
        master = next;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_slept_through_its_replacement_never_answers_from_old_state() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "old").await;
    for round in 0..3 {
        let asleep = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
        let sleeper = lab.made().host(&asleep).unwrap();
        let mut at_sleeper = client.at(&sleeper.endpoint().unwrap());
        at_sleeper.call("VM.get_name_label", json!([vm])).await.unwrap();
        lab.pause(&asleep, What::Controller).await.unwrap();
        let next = other_master(&lab, &asleep).await;
        let mut at_next = client.at(&lab.made().host(&next).unwrap().endpoint().unwrap());
        let new = format!("new {round}");
        at_next.persist(SOON, "VM.set_name_label", json!([vm, new])).await.unwrap();
        // The question is there when it wakes, on a connection of before.
        let question = async { at_sleeper.plain("VM.get_name_label", &json!([client.session(), vm])).await };
        let awake = async {
            sleep(Duration::from_millis(100)).await;
            lab.resume(&asleep, What::Controller).await.unwrap();
        };
        match tokio::join!(question, awake).0 {
            Ok(label) => assert_eq!(label, new.as_str(), "an answer from before its sleep"),
            Err(error) => assert!(error.is("HOST_IS_SLAVE"), "{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_majority_callers_are_told_of_the_emergency_and_with_one_they_are_served_again() {
    let lab = Lab::sim().await.unwrap();
    let client = lab.client().await.unwrap();
    let master = lab.made().master.clone().unwrap();
    let others: Vec<_> = lab.made().others().into_iter().cloned().collect();
    let survivor = &others[0];
    lab.kill(&others[1].name, What::Host).await.unwrap();
    lab.kill(&master, What::Host).await.unwrap();

    let mut at_survivor = client.at(&survivor.endpoint().unwrap());
    // Until it misses the master's heartbeats it cannot know better.
    until(EMERGENCY_LIMIT, "the survivor to miss its master", async || {
        let asked = at_survivor.plain("session.login_with_password", &login(&lab)).await;
        (refusal(asked).0 != "HOST_IS_SLAVE").then_some(())
    })
    .await;
    for (method, parameters) in
        [("session.login_with_password", login(&lab)), ("VM.get_all", json!([client.session()]))]
    {
        let asked = Instant::now();
        let answer = refusal(at_survivor.plain(method, &parameters).await);
        assert_eq!(answer.0, "HOST_IN_EMERGENCY_MODE", "{method}");
        assert!(asked.elapsed() < EMERGENCY_LIMIT, "{method} took {:?}", asked.elapsed());
    }
    let mut local = Client::new(vec![survivor.local()], lab.made().credentials());
    assert_eq!(refusal(local.plain("session.login_with_password", &login(&lab)).await).0, "HOST_IN_EMERGENCY_MODE");

    lab.start(&master, What::Host).await.unwrap();
    at_survivor.persist(SOON, "VM.get_all", json!([])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_master_serves_within_a_second_of_the_old_ones_death() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap().with_call_limit(Duration::from_secs(2));
    let vm = new_vm(&mut client, "written throughout").await;
    let mut times = Vec::new();
    for round in 0..5 {
        let master = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
        client.persist(SOON, "VM.set_name_description", json!([vm, format!("before {round}")])).await.unwrap();
        let killing = Instant::now();
        let killed = lab.kill(&master, What::Host);
        let write = json!([vm, format!("after {round}")]);
        // `kill` returns when the lab has looked around again; the write does not wait for that.
        let written = async {
            until(SOON, "the kill", async || (!master_lives(&lab, &master)).then_some(())).await;
            client.persist(SOON, "VM.set_name_description", write).await.unwrap();
            killing.elapsed().as_secs_f64() * 1e3
        };
        let (killed, written) = tokio::join!(killed, written);
        killed.unwrap();
        times.push(written);
        lab.start(&master, What::Host).await.unwrap();
        let mut returned = lab.client_at(lab.made().host(&master).unwrap()).unwrap();
        until(SOON, "the killed host to know the master", async || {
            let answer = returned.plain("session.login_with_password", &login(&lab)).await.err()?;
            answer.is("HOST_IS_SLAVE").then_some(())
        })
        .await;
    }
    // Measured from the start of the command that kills; a machine that builds something else at the time is slower.
    let middle = median(times.iter().copied());
    assert!(middle < 1_000.0, "the median of {times:?} ms is {middle} ms");
}

fn master_lives(lab: &Lab, name: &str) -> bool {
    !crate::support::processes_with(&["controller", lab.dir().join(name).to_str().unwrap()]).is_empty()
}
