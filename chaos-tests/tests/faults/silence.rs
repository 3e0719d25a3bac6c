//! Connections that go silent: nothing comes through any more, and nobody is told.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use chaos_tests::client::{Client, Endpoint, trust_anyone};
use chaos_tests::lab::{Lab, What};
use chaos_tests::relay::{Flow, Relay};
use rustls::pki_types::ServerName;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

use crate::support::{SOON, new_vm, text, until};

/// The connection between two hosts asks whether the other is there, and waits for the answer for so long at most.
const PING: Duration = Duration::from_secs(4);
/// A call that could not be sent on looks for a master for so long.
const PATIENCE: Duration = Duration::from_secs(5);
/// What a machine with other things to do may add.
const SLACK: Duration = Duration::from_secs(3);

/// Peers and agents of labs listen on the ports after the API's.
const PEER: u16 = 1;
const AGENT: u16 = 2;
/// Where they listen in truth, so that a relay has their address.
const ASIDE: u16 = 1000;

/// Moves what a host listens on aside and puts a relay in its place: all who know the host's address come through it.
async fn in_between(lab: &Lab, host: &str, what: What) -> Relay {
    let (file, offset) = if what == What::Agent { ("agent.toml", AGENT) } else { ("controller.toml", PEER) };
    let (ip, api) = match lab.made().host(host).unwrap().endpoint().unwrap() {
        Endpoint::Https(address) => (address.ip(), address.port()),
        other => panic!("{other}"),
    };
    let known = SocketAddr::new(ip, api + offset);
    let aside = SocketAddr::new(ip, api + offset + ASIDE);
    lab.kill(host, what).await.unwrap();
    let path = lab.dir().join(host).join(file);
    let config = std::fs::read_to_string(&path).unwrap();
    let moved = config.replace(&format!("listen = \"{known}\""), &format!("listen = \"{aside}\""));
    assert_ne!(moved, config, "{file} says where it listens");
    std::fs::write(&path, moved).unwrap();
    // The lab wants to find the address free before it starts the daemon, and taken before it says that it did.
    let taking = async {
        until(SOON, "the daemon to listen aside", async || TcpStream::connect(aside).await.ok()).await;
        Relay::start(known, aside).await.unwrap()
    };
    let (started, relay) = tokio::join!(lab.start(host, what), taking);
    started.unwrap();
    relay
}

/// A pool whose master is reached by its peers through a relay, and a member that sends calls on to it.
struct Between {
    lab: Lab,
    relay: Relay,
    client: Client,
    vm: String,
    master: String,
    member: String,
}

async fn between() -> Between {
    let lab = Lab::sim().await.unwrap();
    let first = lab.made().master.clone().unwrap();
    let relay = in_between(&lab, &first, What::Controller).await;
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "behind a relay").await;
    // The host with the relay is master again.
    let host = lab.host_reference(&mut client, &first).await.unwrap();
    until(SOON, "the host to be live again", async || {
        client.persist(SOON, "pool.designate_new_master", json!([host])).await.ok()?;
        (lab.status().await.unwrap().master.as_deref() == Some(&first)).then_some(())
    })
    .await;
    let client = lab.client().await.unwrap();
    let member = lab.made().hosts.iter().find(|host| host.name != first).unwrap().name.clone();
    Between { lab, relay, client, vm, master: first, member }
}

impl Between {
    fn at(&self, host: &str, limit: Duration) -> Client {
        let host = self.lab.made().host(host).unwrap();
        self.client.only_at(&host.endpoint().unwrap()).with_call_limit(limit)
    }

    async fn told(&mut self) -> serde_json::Value {
        let vm = self.vm.clone();
        self.at(&self.master.clone(), SOON).call("VM.get_record", json!([vm])).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_between_hosts_that_goes_silent_holds_no_caller_and_no_call_is_done_twice() {
    let mut pool = between().await;
    let session = pool.client.session().to_owned();
    let vm = pool.vm.clone();
    // All of it is under way on one connection when that goes silent.
    let mut watcher = pool.at(&pool.member, Duration::from_secs(60));
    let from = json!([session, [format!("VM/{vm}")], "", 0.0]);
    let token = text(&watcher.plain("event.from", &from).await.unwrap()["token"]);
    let waiting = json!([session, [format!("VM/{vm}")], token, 50.0]);
    let watching = tokio::spawn(async move { watcher.plain("event.from", &waiting).await });
    let mut writer = pool.at(&pool.member, PING + PATIENCE + SLACK);
    writer.call("VM.get_name_label", json!([vm])).await.unwrap();

    pool.relay.set(Flow::NewOnly);
    let begun = Instant::now();
    for key in ["one", "two", "three"] {
        writer.call("VM.add_to_other_config", json!([vm, key, "once"])).await.unwrap();
    }
    let held = begun.elapsed();
    assert!(held < PING + SLACK, "a new connection was not tried for {held:?}");
    assert_eq!(pool.told().await["other_config"]["three"], "once");
    // The one who waited for events was with the master on the silent connection too, and hears of it all the same.
    let batch = timeout(PING + PATIENCE + SLACK, watching).await.expect("a watcher is held").unwrap().unwrap();
    assert_eq!(batch["events"][0]["snapshot"]["other_config"]["one"], "once");
    assert!(begun.elapsed() < PING + PATIENCE + SLACK, "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_cannot_reach_the_master_says_so_in_time_and_serves_again_when_it_can() {
    let mut pool = between().await;
    let vm = pool.vm.clone();
    let mut member = pool.at(&pool.member, Duration::from_secs(60));
    member.call("VM.get_name_label", json!([vm])).await.unwrap();
    pool.relay.set(Flow::Nothing);
    // The master reaches its members and leads on; they do not reach it.
    let mut at_master = pool.at(&pool.master, SOON);
    for (method, parameters) in [
        ("VM.get_name_label", json!([vm])),
        ("VM.add_to_other_config", json!([vm, "key", "value"])),
        ("VM.get_record", json!([vm])),
    ] {
        let begun = Instant::now();
        let answer = member.call(method, parameters).await;
        let held = begun.elapsed();
        let refused = answer.expect_err("nothing comes through");
        assert!(held < PING + PATIENCE + SLACK, "{method} was held for {held:?}: {refused}");
        let told = refused.refusal().map(|failure| failure.code.as_str());
        assert!(matches!(told, Some("HOST_IN_EMERGENCY_MODE" | "INTERNAL_ERROR")), "{method}: {refused}");
        at_master.call("VM.set_name_description", json!([vm, method])).await.unwrap();
    }
    pool.relay.set(Flow::All);
    let begun = Instant::now();
    member.persist(SOON, "VM.set_name_label", json!([vm, "reached again"])).await.unwrap();
    assert!(begun.elapsed() < PING + SLACK, "{:?}", begun.elapsed());
    assert_eq!(pool.told().await["name_label"], "reached again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_whose_connection_goes_silent_is_back_within_seconds_and_delays_no_write() {
    let pool = between().await;
    // The relay's host as a member: its master's entries come through the relay.
    let mut client = pool.at(&pool.master, SOON);
    let next = pool.lab.host_reference(&mut client, &pool.member).await.unwrap();
    client.call("pool.designate_new_master", json!([next])).await.unwrap();
    let mut at_master = pool.at(&pool.member, SOON);
    at_master.persist(SOON, "VM.set_name_label", json!([pool.vm, "written"])).await.unwrap();
    let mut at_member = pool.at(&pool.master, Duration::from_secs(30));
    at_member.persist(SOON, "VM.get_name_label", json!([pool.vm])).await.unwrap();

    pool.relay.set(Flow::NewOnly);
    let begun = Instant::now();
    let mut longest = Duration::ZERO;
    for number in 0.. {
        let write = Instant::now();
        at_master.call("VM.set_name_label", json!([pool.vm, format!("written {number}")])).await.unwrap();
        longest = longest.max(write.elapsed());
        // It knows no master while it hears of none, and follows as soon as there is another connection.
        let answer = at_member.plain("VM.get_name_label", &json!([at_member.session(), pool.vm])).await;
        if answer.is_ok() && begun.elapsed() > PING + SLACK {
            break;
        }
        assert!(begun.elapsed() < PING + PATIENCE + SLACK + SLACK, "{:?}: {answer:?}", begun.elapsed());
    }
    assert!(longest < Duration::from_secs(1), "a write waited {longest:?} for a member that is not needed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_whose_agents_connection_goes_silent_is_shown_dead_within_five_seconds_and_live_again() {
    let lab = Lab::sim().await.unwrap();
    let victim = lab.made().others()[0].name.clone();
    let relay = in_between(&lab, &victim, What::Agent).await;
    let mut client = lab.client().await.unwrap();
    let host = lab.host_reference(&mut client, &victim).await.unwrap();
    let metrics = text(&client.call("host.get_metrics", json!([host])).await.unwrap());
    let mut shown = async |live: bool, limit: Duration| {
        let begun = Instant::now();
        until(SOON, "the host to be shown as it is", async || {
            (client.call("host_metrics.get_live", json!([metrics])).await.unwrap() == live).then_some(())
        })
        .await;
        assert!(begun.elapsed() < limit, "live = {live} was shown after {:?}", begun.elapsed());
    };
    shown(true, SOON).await;
    relay.set(Flow::Nothing);
    shown(false, Duration::from_secs(5)).await;
    relay.set(Flow::All);
    shown(true, PING + PATIENCE + SLACK).await;
}

/// What a client does before it goes silent, and how long the host waits for it.
const SILENCES: [(&str, Duration); 4] = [
    ("before its handshake", Duration::from_secs(10)),
    ("in the middle of a head", Duration::from_secs(60)),
    ("in the middle of a body", Duration::from_secs(60)),
    ("without taking its answer", Duration::from_secs(60)),
];
/// The kernel looks at what is not acknowledged at ever longer intervals.
const BETWEEN_LOOKS: Duration = Duration::from_secs(30);

fn hex(address: SocketAddr) -> String {
    match address.ip() {
        IpAddr::V4(ip) => format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port()),
        IpAddr::V6(ip) => panic!("{ip}"),
    }
}

/// The other ends of a host's connections that still belong to a process, as the kernel writes them.
fn connections(host: SocketAddr) -> impl Iterator<Item = String> {
    const ESTABLISHED: &str = "01";
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let host = hex(host);
    let lines: Vec<Vec<String>> =
        table.lines().map(|line| line.split_ascii_whitespace().map(str::to_owned).collect()).collect();
    let held = move |it: &Vec<String>| it.len() > 9 && it[1] == host && it[3] == ESTABLISHED && it[9] != "0";
    lines.into_iter().filter(held).map(|it| it[2].clone())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes more than a minute; `make soak` runs it"]
async fn a_client_that_goes_silent_at_any_point_is_given_up_in_time() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "large").await;
    // An answer that fits no buffer between the two.
    client.call("VM.add_to_other_config", json!([vm, "much", "x".repeat(3 << 20)])).await.unwrap();
    let session = client.session().to_owned();
    let Endpoint::Https(host) = lab.made().master().unwrap().endpoint().unwrap() else { panic!("over TLS") };
    let mut silent = JoinSet::new();
    for (place, limit) in SILENCES {
        let session = session.clone();
        silent.spawn(async move {
            let stream = TcpStream::connect(host).await.unwrap();
            let this = stream.local_addr().unwrap();
            let call =
                json!({"jsonrpc": "2.0", "id": 1, "method": "VM.get_all_records", "params": [session]}).to_string();
            let whole = format!("POST /jsonrpc HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{call}", call.len());
            let sent = match place {
                "before its handshake" => None,
                "in the middle of a head" => Some("POST /jsonrpc HTTP/1.1\r\nHost: ".to_owned()),
                "in the middle of a body" => Some(whole.trim_end_matches('}').to_owned()),
                _ => Some(whole.repeat(8)),
            };
            let (mut raw, mut over_tls) = (None, None);
            match sent {
                None => raw = Some(stream),
                Some(sent) => {
                    let config = trust_anyone().unwrap();
                    let stream = TlsConnector::from(config).connect(ServerName::from(host.ip()), stream).await.unwrap();
                    let stream = over_tls.insert(stream);
                    stream.write_all(sent.as_bytes()).await.unwrap();
                    stream.flush().await.unwrap();
                }
            }
            let begun = Instant::now();
            assert!(connections(host).any(|other| other == hex(this)), "{place}: it was never there");
            let given_up = async {
                while connections(host).any(|other| other == hex(this)) {
                    sleep(Duration::from_millis(100)).await;
                }
            };
            let limit = limit + if place == "without taking its answer" { BETWEEN_LOOKS } else { SLACK };
            timeout(limit, given_up).await.unwrap_or_else(|_| panic!("{place}: still there after {limit:?}"));
            eprintln!("{place}: given up after {:?}", begun.elapsed());
            drop((raw.take(), over_tls.take()));
        });
    }
    silent.join_all().await;
    client.call("VM.get_name_label", json!([vm])).await.unwrap();
}

/// A machine of its own for a client: a network namespace, and a cable to it.
struct Machine {
    /// Keeps the namespace; everything goes with it.
    process: tokio::process::Child,
    /// This machine's end of the cable.
    cable: String,
    here: IpAddr,
}

async fn run(program: &str, arguments: &[&str]) -> bool {
    tokio::process::Command::new(program).args(arguments).status().await.is_ok_and(|status| status.success())
}

impl Machine {
    /// None where this user may not make one.
    async fn new(lab: &Lab) -> Option<Self> {
        let mut command = tokio::process::Command::new("unshare");
        let process = command.args(["--net", "sleep", "infinity"]).kill_on_drop(true).spawn().ok()?;
        let id = process.id()?;
        let this = lab.base().octets();
        let (cable, there) = (format!("xt{id}"), format!("xu{id}"));
        let (here_ip, there_ip) = (format!("10.{}.{}.1", this[1], this[2]), format!("10.{}.{}.2/30", this[1], this[2]));
        let machine = Self { process, cable, here: here_ip.parse().ok()? };
        let space = format!("/proc/{id}/ns/net");
        let own = std::fs::read_link("/proc/self/ns/net").ok()?;
        until(SOON, "a namespace", async || {
            let made = std::fs::read_link(&space).ok();
            (machine.process.id().is_none() || made.is_some_and(|made| made != own)).then_some(())
        })
        .await;
        let id = id.to_string();
        let cable = machine.cable.as_str();
        let made = run("ip", &["link", "add", cable, "type", "veth", "peer", "name", &there, "netns", &id]).await
            && run("ip", &["addr", "add", &format!("{here_ip}/30"), "dev", cable]).await
            && run("ip", &["link", "set", cable, "up"]).await
            && machine.runs(&["ip", "addr", "add", &there_ip, "dev", &there]).await
            && machine.runs(&["ip", "link", "set", &there, "up"]).await;
        made.then_some(machine)
    }

    fn id(&self) -> String {
        self.process.id().map_or_else(String::new, |id| id.to_string())
    }

    async fn runs(&self, command: &[&str]) -> bool {
        let id = self.id();
        run("nsenter", &[&["-t", &id, "-n"], command].concat()).await
    }

    /// It is gone, as a machine is whose power was cut: it answers nothing, not even that it does not answer.
    async fn vanish(&self) {
        let there = format!("xu{}", self.id());
        assert!(self.runs(&["ip", "link", "set", &there, "down"]).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes more than a minute, and the right to make a network; `make soak` runs it"]
async fn a_client_whose_machine_is_gone_while_it_waits_for_events_is_given_up_in_time() {
    let lab = Lab::sim().await.unwrap();
    let Some(machine) = Machine::new(&lab).await else {
        eprintln!("not proved: this user may make no network");
        return;
    };
    let host = lab.made().master.clone().unwrap();
    let Endpoint::Https(address) = lab.made().master().unwrap().endpoint().unwrap() else { panic!("over TLS") };
    let reached = SocketAddr::new(machine.here, address.port());
    lab.kill(&host, What::Controller).await.unwrap();
    let path = lab.dir().join(&host).join("controller.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let more = config.replacen(&format!("\"{address}\""), &format!("\"{address}\", \"{reached}\""), 1);
    std::fs::write(&path, more).unwrap();
    lab.start(&host, What::Controller).await.unwrap();
    let mut client = lab.client().await.unwrap();
    client.persist(SOON, "VM.get_all", json!([])).await.unwrap();

    // Of a class that nothing happens to: the host that was away plugs its stores, which makes tasks.
    let token = client.call("event.from", json!([["role"], "", 0.0])).await.unwrap()["token"].clone();
    let asked = json!([client.session(), ["role"], token, 3600.0]);
    let body = json!({"jsonrpc": "2.0", "id": 1, "method": "event.from", "params": asked}).to_string();
    let url = format!("https://{reached}/jsonrpc");
    let waiting = ["-t", &machine.id(), "-n", "curl", "-sk", "--data-binary", &body, &url].map(str::to_owned);
    let _waiting = tokio::process::Command::new("nsenter").args(waiting).kill_on_drop(true).spawn().unwrap();
    let there = || connections(reached).next().is_some();
    until(SOON, "the client to wait", async || there().then_some(())).await;
    // Its question is under way; nothing is said from here on.
    sleep(SLACK).await;
    assert!(there());
    machine.vanish().await;
    let begun = Instant::now();
    // Asked after half a minute, given up when a minute has passed.
    let limit = Duration::from_secs(60) + Duration::from_secs(5) + SLACK;
    let given_up = async {
        while there() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(limit, given_up).await.unwrap_or_else(|_| panic!("still there after {limit:?}"));
    eprintln!("given up after {:?}", begun.elapsed());
}
