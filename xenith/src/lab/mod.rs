//! The lab: a whole pool on one machine, for newcomers, tests and benchmarks alike.
//!
//! Each host has a loopback address of its own, so all of them use the same ports, as real hosts do. Its two daemons are
//! the real ones, started apart from the command that starts them; a lab command looks at what is there, changes it and
//! ends. Standard output is one JSON object, the state of the lab; progress goes to standard error.

mod configs;
mod layout;
mod plan;
mod power;
mod process;
mod report;
mod rpc;
mod start;

use std::io::Write;
use std::time::Duration;

use anyhow::Context;

use self::layout::Layout;
use self::plan::Plan;
use self::report::Report;
use crate::cli::{Lab, OnHost, What};

/// How long a host that is started again may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long `status` asks for the master.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// How long the others do: whoever has just killed a master does not want to wait for the next one.
const BRIEFLY: Duration = Duration::from_millis(250);

/// Runs one lab command.
pub fn run(command: &Lab) -> anyhow::Result<()> {
    let (layout, plan) = match command {
        Lab::Up(flags) => {
            let layout = Layout::make(&flags.dir)?;
            let lock = layout.lock()?;
            let plan = Plan::load_or_make(&layout, flags)?;
            configs::write(&layout, &plan)?;
            start::all(&layout, &plan)?;
            drop(lock);
            start::wait_until_serving(&layout, &plan, Duration::from_secs(flags.wait))?;
            (layout, plan)
        }
        Lab::Status(at) => existing(&at.dir)?,
        Lab::Kill(on) => on_host(on, power::kill)?,
        Lab::Pause(on) => on_host(on, power::pause)?,
        Lab::Resume(on) => on_host(on, power::resume)?,
        Lab::Start(on) => restart(on)?,
        Lab::Down(at) => {
            let (layout, plan) = existing(&at.dir)?;
            let lock = layout.lock()?;
            power::down(&layout, &plan)?;
            drop(lock);
            (layout, plan)
        }
    };
    let patience = if matches!(command, Lab::Up(_) | Lab::Status(_)) { ASK_LIMIT } else { BRIEFLY };
    print(&Report::now(&layout, &plan, patience))
}

fn existing(dir: &std::path::Path) -> anyhow::Result<(Layout, Plan)> {
    let layout = Layout::existing(dir)?;
    let plan = Plan::load(&layout)?.with_context(|| {
        format!("there is no lab in {}; make one with: xenith lab up --dir {}", dir.display(), dir.display())
    })?;
    Ok((layout, plan))
}

fn on_host(
    on: &OnHost,
    act: impl FnOnce(&layout::HostLayout, What) -> anyhow::Result<()>,
) -> anyhow::Result<(Layout, Plan)> {
    let (layout, plan) = existing(&on.dir)?;
    let place = layout.host(&plan.host(&on.host)?.name);
    let lock = layout.lock()?;
    act(&place, on.what)?;
    drop(lock);
    Ok((layout, plan))
}

fn restart(on: &OnHost) -> anyhow::Result<(Layout, Plan)> {
    let (layout, plan) = existing(&on.dir)?;
    let host = plan.host(&on.host)?;
    let lock = layout.lock()?;
    start::host(&layout, &plan, host, on.what)?;
    drop(lock);
    start::wait_until_listening(&layout, &plan, host, on.what, START_LIMIT)?;
    Ok((layout, plan))
}

#[allow(clippy::print_stdout, reason = "standard output is where a lab command answers")]
fn print(report: &Report) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    std::io::stdout().lock().write_all(text.as_bytes()).context("cannot write to standard output")
}
