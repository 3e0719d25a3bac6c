//! What `status`, and every other lab command at its end, prints.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::layout::Layout;
use super::plan::Plan;
use super::process::{Daemon, daemon};
use super::rpc::{PoolView, pool_view};

/// A host that cannot say yet what its pool is is asked again after this.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// The lab as of now: the JSON object on standard output.
#[derive(Serialize, Debug)]
pub struct Report {
    /// In the order of the plan.
    pub hosts: Vec<HostReport>,
    /// Name of the master; null while there is none.
    pub master: Option<String>,
    /// The account that clients use.
    pub user: String,
    /// Its password.
    pub password: String,
}

/// One host as of now.
#[derive(Serialize, Debug)]
pub struct HostReport {
    /// `host1`, `host2`, …
    pub name: String,
    /// Its uuid in the pool.
    pub uuid: String,
    /// Its address.
    pub address: String,
    /// Where clients reach it.
    pub url: String,
    /// Its Unix socket.
    pub socket: String,
    /// Null when it does not run.
    pub controller_pid: Option<i32>,
    /// Null when it does not run.
    pub agent_pid: Option<i32>,
    /// What its daemons are doing.
    pub state: HostState,
    /// Uuid of the pool that it says it belongs to; null where nobody answers.
    pub pool: Option<String>,
}

/// What a host's two daemons are doing.
#[derive(Serialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    /// Both run.
    Running,
    /// What is there is stopped (SIGSTOP).
    Paused,
    /// Some of it runs: the other daemon is dead or stopped.
    Partial,
    /// Neither is there.
    Dead,
}

impl Report {
    /// Looks at every process, and asks the running hosts, all at once and for so long, who the master is.
    pub fn now(layout: &Layout, plan: &Plan, limit: Duration) -> Self {
        let mut hosts: Vec<_> = plan.hosts.iter().map(|host| host_report(layout, plan, host)).collect();
        let views: Vec<Option<PoolView>> = std::thread::scope(|scope| {
            let awake = |host: &HostReport| {
                host.controller_pid.is_some() && matches!(host.state, HostState::Running | HostState::Partial)
            };
            let asked: Vec<_> = hosts
                .iter()
                .map(|host| awake(host).then(|| scope.spawn(move || view(host.socket.as_ref(), limit))))
                .collect();
            asked.into_iter().map(|asked| asked?.join().ok()?).collect()
        });
        // Each is forwarded to the master, so that they cannot differ for longer than a change of masters takes. Hosts
        // that began as pools of their own speak of the lab's pool only once they are of it.
        let first = |apart: bool| {
            let these = plan.hosts.iter().zip(&views).filter(move |(host, _)| host.apart == apart);
            these.filter_map(|(_, view)| view.as_ref()).next_back()
        };
        let pool = first(false).or_else(|| first(true));
        let master = pool.and_then(|view| view.master.as_ref());
        let master = hosts.iter().find(|host| Some(&host.uuid) == master).map(|host| host.name.clone());
        for (host, view) in hosts.iter_mut().zip(views.iter()) {
            host.pool = view.as_ref().and_then(|view| view.pool.clone());
        }
        Self { hosts, master, user: plan.user.clone(), password: plan.password.clone() }
    }
}

/// What a host says of its pool; a host that cannot say yet, as while masters change, is asked again until time is up.
fn view(socket: &Path, limit: Duration) -> Option<PoolView> {
    let deadline = Instant::now() + limit;
    loop {
        let told = pool_view(socket, limit);
        let known = told.as_ref().is_ok_and(|view| view.pool.is_some());
        if known || Instant::now() + ASK_AGAIN > deadline {
            return told.ok();
        }
        std::thread::sleep(ASK_AGAIN);
    }
}

fn host_report(layout: &Layout, plan: &Plan, host: &super::plan::Host) -> HostReport {
    let place = layout.host(&host.name);
    let controller = daemon(Daemon::Controller, &place.controller_config());
    let agent = daemon(Daemon::Agent, &place.agent_config());
    let present: Vec<_> = [&controller, &agent].into_iter().flatten().collect();
    let stopped = present.iter().filter(|process| process.is_stopped()).count();
    let state = match (present.len(), stopped) {
        (0, _) => HostState::Dead,
        (2, 0) => HostState::Running,
        (1, 0) if !host.replica => HostState::Running,
        (present, stopped) if present == stopped => HostState::Paused,
        _ => HostState::Partial,
    };
    HostReport {
        name: host.name.clone(),
        uuid: host.uuid.to_string(),
        address: host.address.to_string(),
        url: format!("https://{}", plan.api(host)),
        socket: place.socket().display().to_string(),
        controller_pid: controller.map(|process| process.pid()),
        agent_pid: agent.map(|process| process.pid()),
        state,
        pool: None,
    }
}
