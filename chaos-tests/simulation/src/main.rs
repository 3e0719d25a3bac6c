//! `simulate`: runs seeds, as many at once as there are processors; a seed alone is told as it happens.

use std::process::ExitCode;

use clap::Parser;
use simulation::{Plan, Report, Trace, run, run_many};

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
}

#[allow(clippy::print_stdout)]
fn main() -> ExitCode {
    let flags = Flags::parse();
    if let Some(seed) = flags.seed {
        let report = run(Plan::of(seed), Trace::printed());
        println!("trace {:016x}", report.hash);
        return ended(&[report]);
    }
    let began = std::time::Instant::now();
    let reports = run_many((flags.first..flags.first + flags.seeds).map(Plan::of), |report| {
        if let Some(failure) = report.failures.first() {
            println!("seed {}: {failure}", report.seed);
        }
        true
    });
    let acknowledged: u64 = reports.iter().map(|report| report.acknowledged).sum();
    let failed: Vec<Report> = reports.into_iter().filter(|report| !report.failures.is_empty()).collect();
    println!(
        "{} seeds in {:.1} s: {acknowledged} commits acknowledged, {} seeds broke a promise",
        flags.seeds,
        began.elapsed().as_secs_f64(),
        failed.len()
    );
    ended(&failed)
}

/// Tells how the first seed that broke a promise came to do so.
#[allow(clippy::print_stdout)]
fn ended(failed: &[Report]) -> ExitCode {
    let Some(report) = failed.iter().find(|report| !report.failures.is_empty()) else { return ExitCode::SUCCESS };
    println!("seed {}; the end of its story:", report.seed);
    report.last.iter().chain(&report.failures).for_each(|line| println!("  {line}"));
    println!("again: make simulate SEED={}", report.seed);
    ExitCode::FAILURE
}
