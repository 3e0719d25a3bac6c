//! What is done to a host from outside: killed, stopped, continued, and in the end shut down with all the others.

use std::time::{Duration, Instant};

use anyhow::bail;
use rustix::process::Signal;

use super::configs;
use super::layout::{HostLayout, Layout};
use super::plan::Plan;
use super::process::{Daemon, Process, daemon, domains};
use crate::cli::What;

/// How long a process may take to obey a signal that it cannot refuse.
const OBEY_LIMIT: Duration = Duration::from_secs(10);
/// How long a daemon may take to end by itself after SIGTERM.
const TERM_LIMIT: Duration = Duration::from_secs(10);

fn controller(place: &HostLayout) -> Option<Process> {
    daemon(Daemon::Controller, &place.controller_config())
}

fn agent(place: &HostLayout) -> Option<Process> {
    daemon(Daemon::Agent, &place.agent_config())
}

/// What runs of a host, as far as it is meant. The controller comes first, then the agent, so that neither sees the
/// domains go and can act on it.
fn processes(place: &HostLayout, what: What) -> Vec<Process> {
    match what {
        What::Controller => controller(place).into_iter().collect(),
        What::Agent => agent(place).into_iter().collect(),
        What::Host => controller(place).into_iter().chain(agent(place)).chain(domains(&place.agent_state())).collect(),
    }
}

/// Sends a signal to all of it at once.
pub fn signal(place: &HostLayout, what: What, signal: Signal) -> anyhow::Result<Vec<Process>> {
    let found = processes(place, what);
    for process in &found {
        process.signal(signal)?;
    }
    Ok(found)
}

/// SIGSTOP, and stopped when this returns.
pub fn pause(place: &HostLayout, what: What) -> anyhow::Result<()> {
    settle(&signal(place, what, Signal::STOP)?, true)
}

/// SIGCONT, and running when this returns.
pub fn resume(place: &HostLayout, what: What) -> anyhow::Result<()> {
    settle(&signal(place, what, Signal::CONT)?, false)
}

/// A signal is obeyed a moment after it was sent.
fn settle(processes: &[Process], stopped: bool) -> anyhow::Result<()> {
    let limit = Instant::now() + OBEY_LIMIT;
    for process in processes {
        while process.is_stopped() != stopped && !process.wait_end(Duration::ZERO) {
            if Instant::now() > limit {
                bail!("process {} does not obey", process.pid());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// SIGKILL, and gone when this returns. A host takes its domains with it, and starts a new boot.
pub fn kill(place: &HostLayout, what: What) -> anyhow::Result<()> {
    let limit = Instant::now() + OBEY_LIMIT;
    // A domain that the agent had just started is seen in the second round, when the agent can start no more.
    loop {
        let killed = signal(place, what, Signal::KILL)?;
        if killed.is_empty() {
            break;
        }
        for process in &killed {
            if !process.wait_end(limit.saturating_duration_since(Instant::now())) {
                bail!("process {} is still there after SIGKILL", process.pid());
            }
        }
    }
    if what == What::Host {
        configs::new_boot(place)?;
    }
    Ok(())
}

/// Ends everything: daemons by SIGTERM, then what is left by SIGKILL, the domains among it.
pub fn down(layout: &Layout, plan: &Plan) -> anyhow::Result<()> {
    let places: Vec<_> = plan.hosts.iter().map(|host| layout.host(&host.name)).collect();
    // Controllers first, all together: while agents still answer, nobody takes a host for dead.
    for find in [controller, agent] {
        let found: Vec<_> = places.iter().filter_map(find).collect();
        for process in &found {
            process.signal(Signal::TERM)?;
            process.signal(Signal::CONT)?;
        }
        let limit = Instant::now() + TERM_LIMIT;
        for process in &found {
            if !process.wait_end(limit.saturating_duration_since(Instant::now())) {
                eprintln!("process {} did not end within {} s of SIGTERM", process.pid(), TERM_LIMIT.as_secs());
            }
        }
    }
    places.iter().try_for_each(|place| kill(place, What::Host))
}
