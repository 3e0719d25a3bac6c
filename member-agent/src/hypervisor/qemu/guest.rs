//! What the guest says of itself, through the agent that runs in it.
//!
//! A guest without an agent never opens its port, and costs nothing. One that does is asked at once and then at a modest
//! pace, by a task that ends when the port closes. The guest is a stranger: what it says is bounded in bytes and in time, only
//! what is understood is taken, and of that only so much. Nothing it says changes anything but what is shown.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::domain::Domain;
use super::nics;
use crate::hypervisor::domain::{GuestMetrics, Vif};

/// Between two rounds of questions, and after a round that failed.
const PACE: Duration = Duration::from_secs(10);
/// The first rounds come sooner: a guest that boots gets its addresses a moment after its agent.
const EAGER: Duration = Duration::from_secs(2);
const EAGER_ROUNDS: u32 = 5;
/// How long the guest may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest answer that is heard.
const LONGEST: usize = 256 * 1024;
/// What is kept of it: letters of a text, addresses of a NIC.
const LETTERS: usize = 128;
const ADDRESSES: usize = 16;

/// What came of a round of questions.
#[derive(Debug)]
pub(super) enum Heard {
    Metrics(Box<GuestMetrics>),
    Silence,
}

impl Domain {
    /// Begins or ends the interview: the guest's agent has opened its port, or closed it.
    pub(super) fn port_changed(&mut self, open: bool) {
        self.interview = None;
        if open {
            let end = self.shared.shutdown.child_token();
            let interview =
                Interview { dir: self.dir.clone(), vifs: self.description.spec.vifs.clone(), tell: self.tell.clone() };
            self.interview = Some(end.clone().drop_guard());
            self.shared.tasks.spawn(interview.run(end));
        } else {
            self.falls_silent();
        }
    }

    /// After a time without a connection: whether the port is open, and how large the guest is.
    pub(super) async fn look_at_guest(&mut self) {
        if let Ok(ports) = self.execute("query-chardev", json!({})).await {
            let ports = ports.as_array().map(Vec::as_slice).unwrap_or_default();
            let open = ports.iter().any(|port| port["label"] == "agent" && port["frontend-open"] == true);
            self.port_changed(open);
        }
        if let Ok(balloon) = self.execute("query-balloon", json!({})).await
            && let Some(actual) = balloon["actual"].as_u64()
        {
            self.take_on(|state| state.memory_actual = actual);
        }
    }

    pub(super) async fn on_heard(&mut self, heard: Heard) {
        match heard {
            Heard::Silence => self.falls_silent(),
            // What was on its way when the port closed.
            Heard::Metrics(_) if self.interview.is_none() => {}
            Heard::Metrics(mut metrics) => {
                let known = self.state().guest.as_ref().is_some_and(|guest| guest.can_balloon);
                metrics.can_balloon = known || self.balloon_lives().await;
                self.take_on(|state| state.guest = Some(*metrics));
            }
        }
    }

    fn falls_silent(&mut self) {
        self.take_on(|state| {
            if let Some(guest) = &mut state.guest {
                guest.agent_live = false;
            }
        });
    }
}

struct Interview {
    dir: PathBuf,
    vifs: Vec<Vif>,
    tell: mpsc::Sender<Heard>,
}

impl Interview {
    async fn run(self, end: CancellationToken) {
        tokio::select! {
            () = end.cancelled() => {}
            () = self.talk() => {}
        }
    }

    async fn talk(&self) {
        let mut rounds = 0;
        let mut line = None;
        loop {
            let heard = match self.round(&mut line, rounds).await {
                Ok(metrics) => Heard::Metrics(Box::new(metrics)),
                Err(error) => {
                    tracing::debug!(dir = %self.dir.display(), %error, "the guest's agent is not understood");
                    line = None;
                    Heard::Silence
                }
            };
            if self.tell.send(heard).await.is_err() {
                return;
            }
            rounds += 1;
            sleep(if rounds < EAGER_ROUNDS { EAGER } else { PACE }).await;
        }
    }

    async fn round(&self, line: &mut Option<Line>, number: u32) -> io::Result<GuestMetrics> {
        let line = match line {
            Some(line) => line,
            None => line.insert(Line::open(&self.dir).await?),
        };
        line.agree(u64::from(number) + 1).await?;
        let info = line.ask("guest-info").await?;
        let os = line.ask("guest-get-osinfo").await?;
        let interfaces = line.ask("guest-network-get-interfaces").await?;
        Ok(understand(&info, &os, interfaces, &self.vifs))
    }
}

/// The way to the guest's agent.
#[derive(Debug)]
struct Line {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Line {
    /// As for QMP, the directory is opened first: a socket's path may be too long.
    async fn open(dir: &Path) -> io::Result<Self> {
        let opened = fs::File::open(dir)?;
        let stream = UnixStream::connect(format!("/proc/self/fd/{}/agent", opened.as_raw_fd())).await?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// Finds the end of whatever the guest was saying before.
    async fn agree(&mut self, number: u64) -> io::Result<()> {
        self.say(&json!({ "execute": "guest-sync", "arguments": { "id": number } })).await?;
        let agreed = async {
            // Answers of before are few; a guest that says anything else for ever is given up by its bytes.
            let mut heard = 0;
            while heard < LONGEST {
                let answer = self.line().await?;
                heard += answer.len();
                let said = serde_json::from_slice::<Value>(&answer).unwrap_or_default();
                if said["return"].as_u64() == Some(number) {
                    return Ok(());
                }
            }
            Err(io::Error::other("the guest does not answer what it is asked"))
        };
        timeout(PATIENCE, agreed).await?
    }

    /// What it answers; nothing when it does not know the question.
    async fn ask(&mut self, question: &str) -> io::Result<Value> {
        self.say(&json!({ "execute": question })).await?;
        let answer = timeout(PATIENCE, self.line()).await??;
        let mut said: Value = serde_json::from_slice(&answer)?;
        Ok(said["return"].take())
    }

    async fn say(&mut self, what: &Value) -> io::Result<()> {
        timeout(PATIENCE, self.stream.write_all(format!("{what}\n").as_bytes())).await?
    }

    async fn line(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                return Ok(self.buffer.drain(..=end).collect());
            }
            if self.buffer.len() > LONGEST {
                return Err(io::Error::other("the guest says too much"));
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Interface {
    hardware_address: String,
    ip_addresses: Vec<Address>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Address {
    ip_address: String,
}

/// Makes of what was said what is shown.
fn understand(info: &Value, os: &Value, interfaces: Value, vifs: &[Vif]) -> GuestMetrics {
    let mut metrics = GuestMetrics { agent_live: true, can_plug_disks: true, ..GuestMetrics::default() };
    let mut os_version = BTreeMap::new();
    for (key, said) in [("name", "pretty-name"), ("uname", "kernel-release"), ("distro", "id")] {
        os_version.insert(key.to_owned(), text(&os[said]));
    }
    let version = text(&os["version-id"]);
    let mut numbers = version.split('.').map(str::to_owned);
    os_version.insert("major".to_owned(), numbers.next().unwrap_or_default());
    os_version.insert("minor".to_owned(), numbers.next().unwrap_or_default());
    os_version.retain(|_, value| !value.is_empty());
    metrics.os_version = os_version;

    let version = text(&info["version"]);
    let numbers = version.split('.').map(str::to_owned).chain(std::iter::repeat("0".to_owned()));
    let names = ["major", "minor", "micro", "build"];
    metrics.pv_drivers_version = names.into_iter().map(str::to_owned).zip(numbers).collect();

    // The power button is heard by whoever runs an agent; the rest needs nothing of the guest.
    for feature in ["feature-shutdown", "feature-poweroff", "feature-reboot", "feature-suspend", "feature-vcpu-hotplug"]
    {
        metrics.other.insert(feature.to_owned(), "1".to_owned());
    }
    let interfaces = serde_json::from_value::<Vec<Interface>>(interfaces).unwrap_or_default();
    for (position, vif) in vifs.iter().enumerate() {
        let same = |it: &&Interface| !vif.mac.is_empty() && it.hardware_address.eq_ignore_ascii_case(&vif.mac);
        if let Some(interface) = interfaces.iter().find(same) {
            addresses(nics::number(vif, position), interface, &mut metrics.networks);
        }
    }
    metrics
}

fn addresses(nic: usize, interface: &Interface, networks: &mut BTreeMap<String, String>) {
    let said = interface.ip_addresses.iter().take(ADDRESSES);
    let (four, six): (Vec<IpAddr>, Vec<IpAddr>) =
        said.filter_map(|it| it.ip_address.parse().ok()).partition(IpAddr::is_ipv4);
    if let Some(first) = four.first() {
        networks.insert(format!("{nic}/ip"), first.to_string());
    }
    for (number, address) in four.iter().enumerate() {
        networks.insert(format!("{nic}/ipv4/{number}"), address.to_string());
    }
    for (number, address) in six.iter().enumerate() {
        networks.insert(format!("{nic}/ipv6/{number}"), address.to_string());
    }
}

/// A text of the guest's, made fit to be shown.
fn text(said: &Value) -> String {
    let said = said.as_str().unwrap_or_default();
    said.chars().filter(|letter| !letter.is_control()).take(LETTERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    const MAC: &str = "02:00:00:00:00:0A";

    fn vifs() -> Vec<Vif> {
        vec![Vif { device: "1".into(), mac: MAC.into(), ..Vif::default() }]
    }

    /// Plays a guest that answers each question with what `answer` makes of it.
    async fn hear(answer: fn(&Value) -> Vec<u8>) -> io::Result<GuestMetrics> {
        let dir = tempfile::tempdir().expect("directory");
        let listener = UnixListener::bind(dir.path().join("agent")).expect("bind");
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.expect("accept");
            let (read, mut write) = stream.into_split();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let question = serde_json::from_str(&line).expect("question");
                if write.write_all(&answer(&question)).await.is_err() {
                    return;
                }
            }
        });
        let (tell, _told) = mpsc::channel(1);
        Interview { dir: dir.path().to_owned(), vifs: vifs(), tell }.round(&mut None, 0).await
    }

    fn sync(question: &Value) -> Option<Vec<u8>> {
        let id = question["arguments"]["id"].as_u64()?;
        Some(format!("{{\"return\": 77}}\n{{\"return\": {id}}}\n").into_bytes())
    }

    #[tokio::test]
    async fn an_honest_guest_is_understood_also_after_a_stale_answer() {
        let metrics = hear(|question| {
            sync(question).unwrap_or_else(|| match question["execute"].as_str() {
                Some("guest-info") => b"{\"return\": {\"version\": \"7.2.22\"}}\n".to_vec(),
                Some("guest-get-osinfo") => {
                    b"{\"return\": {\"pretty-name\": \"Tiny\\u001b[2J 1\", \"id\": \"tiny\", \"version-id\": \"12\"}}\n"
                        .to_vec()
                }
                _ => {
                    let interface = json!({ "name": "eth0", "hardware-address": MAC.to_lowercase(), "ip-addresses":
                        [{ "ip-address": "10.0.2.15" }, { "ip-address": "fe80::1" }, { "ip-address": "<script>" }] });
                    format!("{}\n", json!({ "return": [{ "name": "lo" }, interface] })).into_bytes()
                }
            })
        });
        let metrics = metrics.await.expect("understood");
        let networks: Vec<_> = metrics.networks.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(networks, [("1/ip", "10.0.2.15"), ("1/ipv4/0", "10.0.2.15"), ("1/ipv6/0", "fe80::1")]);
        assert_eq!(metrics.os_version["name"], "Tiny[2J 1");
        assert_eq!((metrics.os_version["major"].as_str(), metrics.pv_drivers_version["micro"].as_str()), ("12", "22"));
        assert_eq!(metrics.pv_drivers_version["build"], "0");
        assert!(metrics.agent_live);
    }

    #[tokio::test]
    async fn a_guest_that_talks_without_end_is_given_up() {
        let endless = hear(|question| sync(question).unwrap_or_else(|| vec![b'x'; 2 * LONGEST]));
        assert!(endless.await.expect_err("too much").to_string().contains("too much"));
        let nonsense = hear(|_| b"{\"return\": -1}\n".repeat(LONGEST / 8));
        assert!(nonsense.await.is_err());
    }

    #[tokio::test]
    async fn a_guest_that_answers_with_anything_else_is_shown_with_what_is_understood() {
        let deep = hear(|question| sync(question).unwrap_or_else(|| [vec![b'['; 10_000], vec![b'\n']].concat()));
        assert!(deep.await.is_err());
        let odd =
            hear(|question| sync(question).unwrap_or_else(|| b"{\"return\": [1, {\"version\": 7}, null]}\n".to_vec()));
        let metrics = odd.await.expect("heard");
        assert!(metrics.networks.is_empty() && metrics.os_version.is_empty());
        let unknown = hear(|question| sync(question).unwrap_or_else(|| b"{\"error\": {\"desc\": \"?\"}}\n".to_vec()));
        let metrics = unknown.await.expect("heard");
        assert_eq!(metrics.pv_drivers_version["minor"], "0");
    }
}
