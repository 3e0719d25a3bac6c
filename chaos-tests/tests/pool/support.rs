//! What several of these tests do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chaos_tests::client::{CallError, Client};
use chaos_tests::lab::Lab;
use serde_json::{Value, json};
use tokio::time::sleep;

/// How long anything may take that should take a second or two.
pub const SOON: Duration = Duration::from_secs(15);
/// How long the service may pause while the lead is handed over.
pub const HANDOVER: Duration = Duration::from_millis(200);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Asks again until the answer is there. Panics, saying what was awaited, when it is not within the limit.
pub async fn until<T>(limit: Duration, what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {} s: {what}", limit.as_secs());
        sleep(LOOK_AGAIN).await;
    }
}

/// Waits until every host has its stores.
pub async fn plugged(client: &mut Client) {
    until(3 * SOON, "every store to be plugged", async || {
        let pbds = client.persist(SOON, "PBD.get_all_records", json!([])).await.unwrap();
        pbds.as_object().unwrap().values().all(|pbd| pbd["currently_attached"] == true).then_some(())
    })
    .await;
}

/// A text in an answer.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string")).to_owned()
}

/// Reference of the template with that in its name.
pub async fn template(client: &mut Client, name: &str) -> String {
    let vms = client.call("VM.get_all_records", json!([])).await.unwrap();
    let all = vms.as_object().unwrap().iter();
    let found = all.filter(|(_, vm)| vm["is_a_template"] == true);
    let named = found.filter(|(_, vm)| text(&vm["name_label"]).contains(name)).map(|(reference, _)| reference.clone());
    named.min().unwrap_or_else(|| panic!("no template {name:?}"))
}

/// A new halted VM without disks.
pub async fn new_vm(client: &mut Client, name: &str) -> String {
    let template = template(client, "Other install media").await;
    text(&client.call("VM.clone", json!([template, name])).await.unwrap())
}

/// A new interface of a VM, on the network of the host's first NIC; and that network.
pub async fn interface(client: &mut Client, vm: &str) -> (String, String) {
    let pifs = client.call("PIF.get_all_records", json!([])).await.unwrap();
    let first = pifs.as_object().unwrap().values().min_by_key(|pif| text(&pif["device"])).unwrap();
    let network = text(&first["network"]);
    let record = json!({
        "VM": vm, "network": network, "device": "0", "MAC": "", "MTU": 1500, "other_config": {},
        "qos_algorithm_type": "", "qos_algorithm_params": {},
    });
    (text(&client.call("VIF.create", json!([record])).await.unwrap()), network)
}

/// Waits until the lab says that another host is master, and gives its name.
pub async fn other_master(lab: &Lab, than: &str) -> String {
    until(SOON, "another master", async || lab.status().await.unwrap().master.filter(|name| name != than)).await
}

/// The refusal that a call must have got.
pub fn refusal(result: Result<Value, CallError>) -> (String, Vec<String>) {
    match result {
        Err(CallError::Refused(failure)) => (failure.code, failure.params),
        other => panic!("a refusal was expected: {other:?}"),
    }
}

/// Writes as fast as it is answered until told to stop; the longest that one write took, and how many there were.
async fn write_on(mut client: Client, vm: String, stop: Arc<AtomicBool>) -> (Duration, usize) {
    let (mut longest, mut count) = (Duration::ZERO, 0);
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        client.call("VM.set_name_description", json!([vm, format!("{count}")])).await.expect("no call fails");
        longest = longest.max(begun.elapsed());
        count += 1;
    }
    (longest, count)
}

/// Hands the lead over so many times while four clients write at the old master: the longest that a write took each time.
/// No call fails.
pub async fn hand_overs(lab: &Lab, rounds: usize) -> Vec<Duration> {
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "written throughout").await;
    let mut pauses = Vec::new();
    for _ in 0..rounds {
        let master = until(SOON, "a master", async || lab.status().await.unwrap().master).await;
        let next = lab.made().hosts.iter().find(|host| host.name != master).unwrap();
        let reference = lab.host_reference(&mut client, &next.name).await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let at_master = lab.made().host(&master).unwrap().endpoint().unwrap();
        let writers: Vec<_> =
            (0..4).map(|_| tokio::spawn(write_on(client.at(&at_master), vm.clone(), stop.clone()))).collect();
        sleep(Duration::from_millis(200)).await;
        client.call("pool.designate_new_master", json!([reference])).await.unwrap();
        sleep(Duration::from_millis(300)).await;
        stop.store(true, Ordering::Relaxed);
        let mut longest = Duration::ZERO;
        for writer in writers {
            let (pause, count) = writer.await.expect("a call failed");
            assert!(count > 10, "{count} writes");
            longest = longest.max(pause);
        }
        assert_eq!(lab.master_by_pool(&mut client).await.unwrap(), next.name);
        pauses.push(longest);
    }
    pauses
}

/// Whether a process is there; a zombie is not.
pub fn lives(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Ids of the living processes whose command line or working directory has all of these in it.
pub fn processes_with(words: &[&str]) -> Vec<i32> {
    let ids = std::fs::read_dir("/proc").unwrap().flatten();
    let ids = ids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let about = |pid: &i32| {
        let mut about = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let place = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        about.extend_from_slice(place.as_os_str().as_encoded_bytes());
        String::from_utf8_lossy(&about).into_owned()
    };
    let own = std::process::id() as i32;
    ids.filter(|pid| *pid != own && lives(*pid) && words.iter().all(|word| about(pid).contains(word))).collect()
}

/// Whether the pool shows a host as live.
pub async fn is_live(client: &mut Client, host: &str) -> bool {
    let metrics = client.persist(SOON, "host.get_metrics", json!([host])).await.unwrap();
    client.persist(SOON, "host_metrics.get_live", json!([metrics])).await.unwrap() == true
}

/// Waits until a host is a live member of the pool that this client talks to.
pub async fn until_member(client: &mut Client, uuid: &str) -> String {
    until(SOON, "the host to be a live member", async || {
        let host = client.persist(SOON, "host.get_by_uuid", json!([uuid])).await.ok()?;
        let host = text(&host);
        is_live(client, &host).await.then_some(host)
    })
    .await
}

/// A witness of the lab's pool, ended with the test.
pub struct Witness {
    pub process: tokio::process::Child,
    pub dir: tempfile::TempDir,
}

impl Witness {
    /// Enrolled by the lab's master.
    pub async fn enrol(lab: &Lab) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The next address of the lab's.
        let address = std::net::Ipv4Addr::from(u32::from(lab.base()) + 9);
        let config = format!(
            "uuid = \"{}\"\ndata_dir = \"{}\"\nlisten = \"{address}:8444\"\n",
            uuid::Uuid::new_v4(),
            dir.path().join("data").display()
        );
        std::fs::write(dir.path().join("witness.toml"), config).unwrap();
        let log = std::fs::File::create(lab.dir().join("witness.log")).unwrap();
        let master = lab.made().master().unwrap().endpoint().unwrap().to_string();
        let process = tokio::process::Command::new(lab.program())
            .args(["controller", "--witness", "--join", master.trim_start_matches("https://"), "--config"])
            .arg(dir.path().join("witness.toml"))
            .env("XENITH_ROOT_PASSWORD", &lab.made().password)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { process, dir }
    }
}
