//! `simulate`: runs seeds, one after the other on each processor; a seed alone is told as it happens.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::Parser;
use parking_lot::Mutex;
use simulation::{Plan, Report, Trace, run};

/// Simulates pools in trouble.
#[derive(Parser)]
struct Flags {
    /// So many seeds.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// This seed alone, told as it happens.
    #[arg(long)]
    seed: Option<u64>,
    /// So many at once.
    #[arg(long)]
    jobs: Option<usize>,
}

#[allow(clippy::print_stdout)]
fn main() -> ExitCode {
    let flags = Flags::parse();
    if let Some(seed) = flags.seed {
        let report = run(Plan::of(seed), Trace::printed());
        println!("trace {:016x}", report.hash);
        return ended(&[report]);
    }
    let next = AtomicU64::new(flags.first);
    let failed: Mutex<Vec<Report>> = Mutex::default();
    let acknowledged = AtomicU64::new(0);
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let began = std::time::Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..flags.jobs.unwrap_or(processors) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= flags.first + flags.seeds {
                        return;
                    }
                    let report = run(Plan::of(seed), Trace::default());
                    acknowledged.fetch_add(report.acknowledged, Ordering::Relaxed);
                    if !report.failures.is_empty() {
                        println!("seed {seed}: {}", report.failures[0]);
                        failed.lock().push(report);
                    }
                }
            });
        }
    });
    println!(
        "{} seeds in {:.1} s, {} commits acknowledged, {} seeds failed",
        flags.seeds,
        began.elapsed().as_secs_f64(),
        acknowledged.into_inner(),
        failed.lock().len()
    );
    let failed = failed.into_inner();
    ended(&failed.into_iter().take(1).collect::<Vec<_>>())
}

#[allow(clippy::print_stdout)]
fn ended(reports: &[Report]) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for report in reports.iter().filter(|report| !report.failures.is_empty()) {
        code = ExitCode::FAILURE;
        println!("seed {} broke a promise; the end of its story:", report.seed);
        report.last.iter().for_each(|line| println!("  {line}"));
        report.failures.iter().for_each(|failure| println!("  {failure}"));
        println!("again: make simulate SEED={}", report.seed);
    }
    code
}
