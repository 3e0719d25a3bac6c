//! Starting what is dead, and waiting until it serves.

use std::collections::BTreeSet;
use std::io::{Read, Seek, SeekFrom};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::layout::{HostLayout, Layout};
use super::plan::{Host, Plan};
use super::power;
use super::process::{Daemon, daemon, spawn};
use super::rpc::{PoolView, Socket, pool_view};
use crate::cli::What;

const LOOK_AGAIN: Duration = Duration::from_millis(25);
/// How long one host may take to describe its pool.
const ASK_LIMIT: Duration = Duration::from_secs(3);
const CONNECT_LIMIT: Duration = Duration::from_millis(500);
/// How much of a daemon's log is shown when it ends at once.
const LOG_TAIL: i64 = 2_000;

/// Starts what is dead of every host and continues what is paused: agents first, so that a master finds them there.
pub fn all(layout: &Layout, plan: &Plan) -> anyhow::Result<()> {
    for host in &plan.hosts {
        power::resume(&layout.host(&host.name), What::Host)?;
    }
    let dead: Vec<_> = plan.hosts.iter().flat_map(|host| dead(layout, host, What::Host)).collect();
    start(layout, plan, dead)
}

/// Starts what is dead of one host.
pub fn host(layout: &Layout, plan: &Plan, host: &Host, what: What) -> anyhow::Result<()> {
    start(layout, plan, dead(layout, host, what))
}

/// The daemons of a host that do not run, of those that are meant.
fn dead<'a>(layout: &Layout, host: &'a Host, what: What) -> Vec<(Daemon, &'a Host)> {
    let place = layout.host(&host.name);
    let mut dead = Vec::new();
    if what != What::Controller && daemon(Daemon::Agent, &place.agent_config()).is_none() {
        dead.push((Daemon::Agent, host));
    }
    if what != What::Agent && host.replica && daemon(Daemon::Controller, &place.controller_config()).is_none() {
        dead.push((Daemon::Controller, host));
    }
    dead
}

/// All or nothing, as far as it can be known: no daemon is started while an address of any is taken.
fn start(layout: &Layout, plan: &Plan, mut dead: Vec<(Daemon, &Host)>) -> anyhow::Result<()> {
    dead.sort_by_key(|(daemon, _)| *daemon == Daemon::Controller);
    for (daemon, host) in &dead {
        let addresses = match daemon {
            Daemon::Agent => vec![plan.agent(host)],
            Daemon::Controller => vec![plan.api(host), plan.peer(host)],
        };
        addresses.into_iter().try_for_each(must_be_free)?;
    }
    for (daemon, host) in dead {
        let place = layout.host(&host.name);
        let (config, log) = match daemon {
            Daemon::Agent => (place.agent_config(), place.agent_log()),
            Daemon::Controller => (place.controller_config(), place.controller_log()),
        };
        eprintln!("{}: starting the {}", host.name, daemon.name());
        spawn(daemon, &config, &log)?;
    }
    Ok(())
}

/// A daemon that was killed has its sockets for a moment longer than its name.
const LETS_GO_WITHIN: Duration = Duration::from_secs(2);

fn must_be_free(address: SocketAddr) -> anyhow::Result<()> {
    let deadline = Instant::now() + LETS_GO_WITHIN;
    loop {
        // Bound and let go again. Another program may still come in between; then the daemon itself says so in its log.
        match TcpListener::bind(address) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
                return Err(error).with_context(|| format!("cannot listen on {address}"));
            }
            Err(_) if Instant::now() < deadline => std::thread::sleep(LOOK_AGAIN),
            Err(_) => bail!(
                "{address} is in use by another program, perhaps by another lab: stop that one (xenith lab down --dir \
                 …), or give this lab other addresses in a new directory (--base 127.0.72.1 or --port 9443)"
            ),
        }
    }
}

/// Waits until one host's daemons take connections.
pub fn wait_until_listening(
    layout: &Layout,
    plan: &Plan,
    host: &Host,
    what: What,
    limit: Duration,
) -> anyhow::Result<()> {
    let place = layout.host(&host.name);
    let socket = Socket::new(place.socket(), ASK_LIMIT);
    wait(limit, &format!("{} to answer", host.name), || {
        must_live(&place, host, what)?;
        let agent = what == What::Controller || connects(plan.agent(host));
        let controller = what == What::Agent || !host.replica || (connects(plan.api(host)) && socket.is_served());
        Ok(agent && controller)
    })
}

/// Waits until every host serves: a login works, it takes clients, and its pool, whichever that is, shows it enabled
/// and live.
pub fn wait_until_serving(layout: &Layout, plan: &Plan, limit: Duration) -> anyhow::Result<()> {
    let mut told = String::new();
    let mut tell = |stage: String| {
        if told != stage {
            eprintln!("{stage}");
            told = stage;
        }
    };
    wait(limit, "the pool to serve", || {
        for host in &plan.hosts {
            must_live(&layout.host(&host.name), host, What::Host)?;
        }
        if let Some(host) = plan.hosts.iter().find(|host| host.replica && !connects(plan.api(host))) {
            tell(format!("waiting for {} to listen", host.name));
            return Ok(false);
        }
        // Asked once for each pool: the first host that is not yet seen to serve speaks for its own.
        let mut serving = BTreeSet::new();
        for host in plan.hosts.iter().filter(|host| host.replica) {
            if serving.contains(&host.uuid.to_string()) {
                continue;
            }
            match pool_view(&layout.host(&host.name).socket(), ASK_LIMIT) {
                Ok(PoolView { master: Some(_), serving: more, .. }) => serving.extend(more),
                Ok(_) => {}
                Err(error) => {
                    tell(format!("waiting for the pool: {error:#}"));
                    return Ok(false);
                }
            }
            if !serving.contains(&host.uuid.to_string()) {
                tell(format!("waiting for the pool to enable {}", host.name));
                return Ok(false);
            }
        }
        if let Some(host) = plan.hosts.iter().find(|host| !serving.contains(&host.uuid.to_string())) {
            tell(format!("waiting for the pool to enable {}", host.name));
            return Ok(false);
        }
        tell(format!("the pool serves: {} hosts", plan.hosts.len()));
        Ok(true)
    })
}

fn wait(limit: Duration, what: &str, mut done: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    while !done()? {
        if Instant::now() > deadline {
            bail!(
                "waited {} s for {what}, in vain; the logs are DIR/host*/{{controller,agent}}.log, and \
                 `xenith lab down --dir DIR` stops what runs",
                limit.as_secs()
            );
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

fn connects(address: SocketAddr) -> bool {
    TcpStream::connect_timeout(&address, CONNECT_LIMIT).is_ok()
}

/// A daemon that ended at once is told with the end of its log, rather than waited for.
fn must_live(place: &HostLayout, host: &Host, what: What) -> anyhow::Result<()> {
    if what != What::Controller && daemon(Daemon::Agent, &place.agent_config()).is_none() {
        bail!(
            "{}: the agent has ended. Its log ({}) ends so:\n{}",
            host.name,
            place.agent_log().display(),
            tail(&place.agent_log())
        );
    }
    if what != What::Agent && host.replica && daemon(Daemon::Controller, &place.controller_config()).is_none() {
        bail!(
            "{}: the controller has ended. Its log ({}) ends so:\n{}",
            host.name,
            place.controller_log().display(),
            tail(&place.controller_log())
        );
    }
    Ok(())
}

fn tail(log: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(log)?;
        let length = file.metadata()?.len() as i64;
        file.seek(SeekFrom::End(-LOG_TAIL.min(length)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_or_else(|error| error.to_string(), |bytes| String::from_utf8_lossy(&bytes).trim_end().to_owned())
}
