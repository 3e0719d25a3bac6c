//! A VM's life, with its rows right at each step.

use std::time::{Duration, Instant};

use chaos_tests::client::Client;
use chaos_tests::lab::{Host, Lab, What};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{SOON, processes_with, refusal, template, text, until};

/// How soon the pool must show that a domain died by itself.
const NOTICED: Duration = Duration::from_secs(2);
/// A real guest under emulation takes its time to shut down.
const GUEST_LIMIT: Duration = Duration::from_secs(90);

/// A VM and a client that acts on it.
struct Subject {
    client: Client,
    vm: String,
}

impl Subject {
    /// A provisioned VM that has never run.
    async fn new(lab: &Lab, name: &str) -> Self {
        let mut client = lab.client().await.unwrap().with_call_limit(GUEST_LIMIT);
        let template = template(&mut client, "Xenith guest").await;
        let vm = text(&client.call("VM.clone", json!([template, name])).await.unwrap());
        let mut subject = Self { client, vm };
        subject.does("provision", json!([])).await;
        let record = subject.record().await;
        assert_eq!((&record["name_label"], &record["is_a_template"]), (&json!(name), &json!(false)));
        subject
    }

    async fn does(&mut self, message: &str, more: Value) {
        let parameters = self.parameters(more);
        let answer = self.client.call(&format!("VM.{message}"), parameters).await;
        assert_eq!(answer.unwrap_or_else(|error| panic!("VM.{message}: {error}")), "", "VM.{message}");
    }

    async fn refuses(&mut self, message: &str, more: Value, expected: &str, actual: &str) {
        let parameters = self.parameters(more);
        let (code, params) = refusal(self.client.call(&format!("VM.{message}"), parameters).await);
        assert_eq!(code, "VM_BAD_POWER_STATE", "VM.{message}");
        assert_eq!(params, [self.vm.as_str(), expected, actual], "VM.{message}");
    }

    fn parameters(&self, more: Value) -> Value {
        let mut all = vec![json!(self.vm)];
        all.extend(more.as_array().unwrap().iter().cloned());
        Value::Array(all)
    }

    async fn record(&mut self) -> Value {
        self.client.call("VM.get_record", json!([self.vm])).await.unwrap()
    }

    async fn metrics(&mut self) -> Value {
        let record = self.record().await;
        self.client.call("VM_metrics.get_record", json!([record["metrics"]])).await.unwrap()
    }

    /// The rows of a VM that has a domain, in that power state.
    async fn has_domain(&mut self, power_state: &str) -> Value {
        let record = self.record().await;
        assert_eq!(record["power_state"], power_state);
        assert!(record["domid"].as_i64().is_some_and(|domid| domid > 0), "domid {}", record["domid"]);
        let host = self.client.call("host.get_record", json!([record["resident_on"]])).await.unwrap();
        assert!(host["resident_VMs"].as_array().unwrap().contains(&json!(self.vm)), "{}", host["resident_VMs"]);
        self.is_idle(&record, power_state);
        record
    }

    /// The rows of a VM that has none.
    async fn is_halted(&mut self) {
        let record = self.record().await;
        assert_eq!((&record["power_state"], &record["domid"]), (&json!("Halted"), &json!(-1)));
        assert_eq!(record["resident_on"], "OpaqueRef:NULL");
        self.is_idle(&record, "Halted");
    }

    fn is_idle(&self, record: &Value, power_state: &str) {
        assert!(record["current_operations"].as_object().unwrap().is_empty(), "{}", record["current_operations"]);
        let allowed: Vec<_> = record["allowed_operations"].as_array().unwrap().iter().map(text).collect();
        let (able, unable): (&[&str], &[&str]) = match power_state {
            "Halted" => (&["start", "start_on", "destroy", "clone"], &["pause", "clean_shutdown"]),
            "Running" => {
                (&["pause", "clean_shutdown", "hard_shutdown", "hard_reboot"], &["start", "destroy", "unpause"])
            }
            "Paused" => (&["unpause", "hard_shutdown"], &["start", "pause", "destroy"]),
            other => panic!("{other}"),
        };
        assert!(able.iter().all(|operation| allowed.iter().any(|it| it == operation)), "{power_state}: {allowed:?}");
        assert!(!unable.iter().any(|operation| allowed.iter().any(|it| it == operation)), "{power_state}: {allowed:?}");
    }
}

/// What the guest's console has told so far; nothing of a simulated one.
fn console(lab: &Lab, uuid: &str) -> String {
    let log = |host: &Host| lab.dir().join(&host.name).join("agent/domains").join(uuid).join("console.log");
    let told = lab.made().hosts.iter().filter_map(|host| std::fs::read(log(host)).ok());
    told.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect()
}

/// Waits until a real guest has said something new: one that is reset or asked before its firmware is done tests that
/// firmware, not the pool.
async fn speaks(lab: &Lab, real: bool, uuid: &str, before: usize) {
    let spoken = || console(lab, uuid).get(before..).is_some_and(|new| new.contains("XENITH-GUEST"));
    until(GUEST_LIMIT, "the guest to speak", async || (!real || spoken()).then_some(())).await;
}

/// The whole life of a VM, as much of it as both drivers have.
async fn life(lab: &Lab, real: bool) {
    let mut it = Subject::new(lab, "a life").await;
    it.is_halted().await;
    it.refuses("pause", json!([]), "running", "halted").await;

    it.does("start", json!([true, false])).await;
    it.has_domain("Paused").await;
    it.does("unpause", json!([])).await;
    let running = it.has_domain("Running").await;
    let metrics = it.metrics().await;
    assert_ne!(metrics["start_time"], "19700101T00:00:00Z");
    assert!(metrics["memory_actual"].as_i64() > Some(0), "{metrics}");
    it.refuses("start", json!([false, false]), "halted", "running").await;
    it.refuses("unpause", json!([]), "paused", "running").await;
    it.refuses("destroy", json!([]), "halted, suspended", "running").await;

    it.does("pause", json!([])).await;
    it.has_domain("Paused").await;
    it.does("unpause", json!([])).await;
    let uuid = text(&running["uuid"]);
    speaks(lab, real, &uuid, 0).await;
    let told = console(lab, &uuid).len();
    it.does("hard_reboot", json!([])).await;
    let rebooted = it.has_domain("Running").await;
    assert_eq!(rebooted["resident_on"], running["resident_on"]);
    speaks(lab, real, &uuid, told).await;
    it.does("clean_shutdown", json!([])).await;
    it.is_halted().await;

    let host = lab.made().others()[1].name.clone();
    let host = lab.host_reference(&mut it.client, &host).await.unwrap();
    it.does("start_on", json!([host, false, false])).await;
    assert_eq!(it.has_domain("Running").await["resident_on"], host.as_str());
    it.does("hard_shutdown", json!([])).await;
    it.is_halted().await;
    let metrics = it.record().await["metrics"].clone();
    it.does("destroy", json!([])).await;
    for (class, reference) in [("VM", json!(it.vm)), ("VM_metrics", metrics)] {
        let (code, params) = refusal(it.client.call(&format!("{class}.get_record"), json!([reference])).await);
        assert_eq!((code.as_str(), &params[..]), ("HANDLE_INVALID", &[class.to_owned(), text(&reference)][..]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_simulated_vm_lives_with_its_rows_right_at_each_step() {
    life(&Lab::sim().await.unwrap(), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_ends_as_its_call_does_and_is_seen_on_the_vm_meanwhile() {
    let lab = Lab::sim().await.unwrap();
    let mut it = Subject::new(&lab, "asynchronous").await;
    let class = json!([format!("VM/{}", it.vm)]);
    let token = text(&it.client.call("event.from", json!([class, "", 0.0])).await.unwrap()["token"]);
    let task = text(&it.client.call("Async.VM.start", json!([it.vm, false, false])).await.unwrap());
    let ended = until(SOON, "the task's end", async || {
        let record = it.client.call("task.get_record", json!([task])).await.unwrap();
        (record["status"] != "pending").then_some(record)
    })
    .await;
    assert_eq!((&ended["status"], &ended["progress"]), (&json!("success"), &json!(1.0)));
    assert!(["", "<value></value>"].contains(&text(&ended["result"]).as_str()), "{}", ended["result"]);
    it.has_domain("Running").await;
    let batch = it.client.call("event.from", json!([class, token, 0.0])).await.unwrap();
    assert_eq!(batch["events"].as_array().unwrap().len(), 1, "changes to one object collapse");

    let failing = text(&it.client.call("Async.VM.start", json!([it.vm, false, false])).await.unwrap());
    let ended = until(SOON, "the failing task's end", async || {
        let record = it.client.call("task.get_record", json!([failing])).await.unwrap();
        (record["status"] != "pending").then_some(record)
    })
    .await;
    assert_eq!(ended["status"], "failure");
    assert_eq!(ended["error_info"], json!(["VM_BAD_POWER_STATE", it.vm, "halted", "running"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_guest_lives_and_its_domain_outlives_the_daemons_and_its_death_is_seen() {
    let lab = Lab::up(3, "qemu").await.unwrap();
    life(&lab, true).await;

    let mut it = Subject::new(&lab, "a real guest").await;
    let host = lab.made().others()[0].name.clone();
    let reference = lab.host_reference(&mut it.client, &host).await.unwrap();
    it.does("start_on", json!([reference, false, false])).await;
    let before = it.has_domain("Running").await;
    let uuid = text(&before["uuid"]);
    let domain = || processes_with(&[lab.dir().to_str().unwrap(), &uuid]);
    let [process] = domain()[..] else { panic!("processes of the domain: {:?}", domain()) };

    // Neither daemon's death is the guest's.
    for what in [What::Agent, What::Controller] {
        lab.kill(&host, what).await.unwrap();
        assert_eq!(domain(), [process]);
        lab.start(&host, what).await.unwrap();
        until(SOON, "the VM to run as before", async || {
            let record = it.client.persist(SOON, "VM.get_record", json!([it.vm])).await.unwrap();
            (record["power_state"] == "Running" && record["domid"] == before["domid"]).then_some(())
        })
        .await;
    }
    until(SOON, "the agent to drive the domain it found again", async || {
        it.client.persist(SOON, "VM.pause", json!([it.vm])).await.ok()
    })
    .await;
    it.does("unpause", json!([])).await;
    assert_eq!(domain(), [process]);

    kill(Pid::from_raw(process), Signal::SIGKILL).unwrap();
    let died = Instant::now();
    until(SOON, "the pool to see that the domain is gone", async || {
        (it.record().await["power_state"] == "Halted").then_some(())
    })
    .await;
    assert!(died.elapsed() < NOTICED, "seen after {:?}", died.elapsed());
    it.is_halted().await;
    it.does("destroy", json!([])).await;
}
