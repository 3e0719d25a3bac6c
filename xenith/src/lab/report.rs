//! What `status`, and every other lab command at its end, prints.

use std::time::Duration;

use serde::Serialize;

use super::layout::Layout;
use super::plan::Plan;
use super::process::{Daemon, daemon};
use super::rpc::pool_view;

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
        let hosts: Vec<_> = plan.hosts.iter().map(|host| host_report(layout, plan, host)).collect();
        let awake = hosts.iter().filter(|host| matches!(host.state, HostState::Running | HostState::Partial));
        let master = std::thread::scope(|scope| {
            let asked: Vec<_> = awake.map(|host| scope.spawn(move || pool_view(host.socket.as_ref(), limit))).collect();
            let answers = asked.into_iter().filter_map(|answer| answer.join().ok()?.ok());
            // Each is forwarded to the master, so that they cannot differ for longer than a change of masters takes.
            answers.filter_map(|view| view.master).last()
        });
        let master = hosts.iter().find(|host| Some(&host.uuid) == master.as_ref()).map(|host| host.name.clone());
        Self { hosts, master, user: plan.user.clone(), password: plan.password.clone() }
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
    }
}
