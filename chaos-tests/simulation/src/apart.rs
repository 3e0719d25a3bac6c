//! Each run in a process of its own, forked from one that has run nothing: whatever a library keeps for all of a
//! process's life (tokio counts the seeds that it gives out) is then the same for each run, the first or the thousandth.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{PipeReader, Read as _, Write as _};

use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{ForkResult, Pid, fork};

use crate::run::{Report, prepare, run};
use crate::trace::Trace;
use crate::world::Plan;

/// Runs plans, as many at once as there are processors; no more are begun once `go_on` says so. To be called by a process
/// that has no other thread.
///
/// # Errors
/// When no process can be had.
pub fn run_apart(
    plans: impl Iterator<Item = Plan>,
    printed: bool,
    mut go_on: impl FnMut(&Report) -> bool,
) -> std::io::Result<Vec<Report>> {
    prepare();
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut plans = plans.fuse();
    let mut running: BTreeMap<Pid, (u64, PipeReader)> = BTreeMap::new();
    let mut reports = Vec::new();
    let mut over = false;
    loop {
        while !over && running.len() < processors {
            let Some(plan) = plans.next() else { break };
            let (pid, reader) = begin(plan, printed)?;
            running.insert(pid, (plan.seed, reader));
        }
        if running.is_empty() {
            return Ok(reports);
        }
        let status = wait()?;
        let Some((seed, mut reader)) = status.pid().and_then(|pid| running.remove(&pid)) else { continue };
        let mut text = String::new();
        reader.read_to_string(&mut text)?;
        let report = match serde_json::from_str(&text) {
            Ok(report) if matches!(status, WaitStatus::Exited(_, 0)) => report,
            _ => Report { seed, failures: vec![format!("the run ended with {status:?}")], ..Report::default() },
        };
        over |= !go_on(&report);
        reports.push(report);
    }
}

/// Starts a run; what it comes to is to be read when its process has ended.
fn begin(plan: Plan, printed: bool) -> std::io::Result<(Pid, PipeReader)> {
    let (reader, mut writer) = std::io::pipe()?;
    // SAFETY: the calling process has one thread, so that no lock is held by another that the child would miss.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok((child, reader)),
        ForkResult::Child => {
            drop(reader);
            let report = run(plan, if printed { Trace::printed() } else { Trace::default() });
            // A report that cannot be written is missed by who reads it. It fits into the pipe.
            let written = serde_json::to_string(&report).is_ok_and(|text| writer.write_all(text.as_bytes()).is_ok());
            drop(writer);
            std::process::exit(i32::from(!written));
        }
    }
}
