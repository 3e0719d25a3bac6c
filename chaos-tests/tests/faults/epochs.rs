//! What a deposed master still sends, its agents refuse.

use chaos_tests::lab::{Lab, What};
use serde_json::json;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use wire::agent_client::AgentClient;
use wire::refusal::Reason;
use wire::step::Action;

use crate::support::{SOON, new_vm, other_master, text, until};

#[allow(clippy::all, clippy::pedantic, missing_docs, reason = "generated")]
mod wire {
    tonic::include_proto!("xenith.agent.v1");
}

/// No master has it.
const NEVER: u64 = 0;

/// A connection to the agent of a host, as one controller of the lab would make it.
fn agent(lab: &Lab, host: &str, from: &str) -> AgentClient<Channel> {
    let read = |path: &str| std::fs::read_to_string(lab.dir().join(path)).unwrap();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read("ca/ca.pem")))
        .identity(Identity::from_pem(read(&format!("{from}/tls/host.pem")), read(&format!("{from}/tls/host.key"))))
        .domain_name("xenith-peer");
    let address = &lab.made().host(host).unwrap().address;
    let endpoint = Endpoint::from_shared(format!("https://{address}:8445")).unwrap();
    AgentClient::new(endpoint.tls_config(tls).unwrap().connect_lazy())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_late_step_of_a_paused_master_is_refused_by_every_agent() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "not to be touched").await;
    client.call("VM.provision", json!([vm])).await.unwrap();
    client.call("VM.start", json!([vm, false, false])).await.unwrap();
    let uuid = text(&client.call("VM.get_uuid", json!([vm])).await.unwrap());
    let pools = client.call("pool.get_all_records", json!([])).await.unwrap();
    let pool = text(&pools.as_object().unwrap().values().next().unwrap()["uuid"]);

    let master = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
    let mut agents: Vec<_> = lab.made().hosts.iter().map(|host| agent(&lab, &host.name, &master)).collect();
    // What a master of that epoch would send; the refusal names the epoch that the agent holds.
    let mut number = 0;
    let mut step = |epoch: u64| {
        number += 1;
        wire::Step {
            pool: pool.clone(),
            epoch,
            operation: uuid::Uuid::from_u128(number).to_string(),
            vm: uuid.clone(),
            traceparent: String::new(),
            number: 0,
            action: Some(Action::Destroy(wire::DestroyDomain {})),
        }
    };
    let refused = async |agent: &mut AgentClient<Channel>, step: wire::Step| -> u64 {
        match agent.perform(step).await.unwrap().into_inner().result {
            Some(wire::outcome::Result::Refusal(refusal)) if refusal.reason() == Reason::StaleEpoch => {
                refusal.detail.parse().unwrap()
            }
            other => panic!("{other:?}"),
        }
    };
    let epoch = refused(&mut agents[0], step(NEVER)).await;

    lab.pause(&master, What::Controller).await.unwrap();
    let next = other_master(&lab, &master).await;
    for agent in &mut agents {
        until(SOON, "an agent to hear of the next master", async || {
            (refused(agent, step(NEVER)).await > epoch).then_some(())
        })
        .await;
        assert!(refused(agent, step(epoch)).await > epoch);
    }
    let mut client = client.at(&lab.made().host(&next).unwrap().endpoint().unwrap());
    assert_eq!(client.persist(SOON, "VM.get_power_state", json!([vm])).await.unwrap(), "Running");
    lab.resume(&master, What::Controller).await.unwrap();
}
