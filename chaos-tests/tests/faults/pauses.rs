//! SIGSTOP and SIGCONT: processes that are gone for a while and do not know it.

use std::time::Duration;

use chaos_tests::client::Client;
use chaos_tests::history::load::Load;
use chaos_tests::lab::{Lab, What};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::SOME;
use crate::support::{SOON, new_vm, other_master, text, until};

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_saw_fits_together_when_masters_and_members_are_stopped_and_go_on() {
    // Several times: what a sleeper finds waiting when it wakes is another thing each time.
    stop_and_go_on(4, Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes more than a minute; `make soak` runs it"]
async fn what_clients_saw_fits_together_when_a_master_is_stopped_for_half_a_minute() {
    stop_and_go_on(1, Duration::from_secs(30)).await;
}

async fn stop_and_go_on(times: usize, pause: Duration) {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "before").await;
    let mut load = Load::start(&lab).await.unwrap();
    load.some_more(SOME).await.unwrap();
    for time in 0..times {
        stop_the_master(&lab, &mut client, &vm, &format!("written in nap {time}"), pause, &mut load).await;
    }

    // A member, and then a whole host with its agent.
    let master = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
    let mut members = lab.made().hosts.iter().filter(|host| host.name != master);
    for what in [What::Controller, What::Host] {
        let member = &members.next().unwrap().name;
        lab.pause(member, what).await.unwrap();
        load.some_more(SOME).await.unwrap();
        lab.resume(member, what).await.unwrap();
        load.some_more(SOME).await.unwrap();
    }
    load.settle(&lab).await.unwrap();
}

/// Stops the master, writes `name` at the next one, and asks the sleeper for it all the while.
async fn stop_the_master(lab: &Lab, client: &mut Client, vm: &str, name: &str, pause: Duration, load: &mut Load) {
    let master = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
    let mut questions = Questions::prepare(lab, client, &master, vm, name).await;
    lab.pause(&master, What::Controller).await.unwrap();
    let next = other_master(lab, &master).await;
    let mut at_next = client.at(&lab.made().host(&next).unwrap().endpoint().unwrap());
    at_next.persist(SOON, "VM.set_name_label", json!([vm, name])).await.unwrap();
    questions.ask(pause + SOON);
    sleep(pause).await;
    load.some_more(SOME).await.unwrap();
    lab.resume(&master, What::Controller).await.unwrap();
    questions.judge(&mut at_next).await;
    load.some_more(SOME).await.unwrap();
}

/// So many that some are read before it hears of anything else when it wakes.
const SLEEPERS: usize = 64;

/// Calls that reach a master while it sleeps, on connections from before.
struct Questions {
    clients: Vec<Client>,
    vm: String,
    /// What the next master was told in the meantime.
    name: String,
    asked: JoinSet<(usize, Result<serde_json::Value, chaos_tests::client::CallError>)>,
}

impl Questions {
    async fn prepare(lab: &Lab, client: &Client, master: &str, vm: &str, name: &str) -> Self {
        let sleeper = lab.made().host(master).unwrap().endpoint().unwrap();
        let mut clients: Vec<_> = (0..SLEEPERS).map(|_| client.only_at(&sleeper)).collect();
        for client in &mut clients {
            let parameters = json!([client.session(), vm]);
            client.plain("VM.get_name_label", &parameters).await.unwrap();
        }
        Self { clients, vm: vm.to_owned(), name: name.to_owned(), asked: JoinSet::new() }
    }

    /// The even ones read, the odd ones write.
    fn ask(&mut self, limit: Duration) {
        for (place, client) in self.clients.drain(..).enumerate() {
            let mut client = client.with_call_limit(limit);
            let (vm, name) = (self.vm.clone(), self.name.clone());
            self.asked.spawn(async move {
                let session = client.session().to_owned();
                let answer = if place % 2 == 0 {
                    client.plain("VM.get_name_label", &json!([session, vm])).await
                } else {
                    let key = format!("{name}: sleeper {place}");
                    client.plain("VM.add_to_other_config", &json!([session, vm, key, "value"])).await
                };
                (place, answer)
            });
        }
    }

    async fn judge(&mut self, at_next: &mut Client) {
        let record = async |client: &mut Client| client.persist(SOON, "VM.get_record", json!([self.vm])).await.unwrap();
        while let Some(answered) = self.asked.join_next().await {
            let (place, answer) = answered.unwrap();
            let there = record(at_next).await["other_config"].get(format!("{}: sleeper {place}", self.name)).is_some();
            match answer {
                Ok(label) if place % 2 == 0 => {
                    assert_eq!(text(&label), self.name, "an answer from before its sleep");
                }
                Ok(_) => assert!(there, "a write was acknowledged that the pool does not have"),
                Err(error) if error.is("HOST_IS_SLAVE") || error.is("HOST_IN_EMERGENCY_MODE") => {
                    assert!(!there, "a write was refused and is there: {error}");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}
