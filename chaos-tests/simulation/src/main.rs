//! `simulate`: runs seeds, as many at once as there are processors; a seed alone is told as it happens.

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use simulation::{Plan, Planted, Report, run_apart};

/// Simulates pools in trouble.
#[derive(Parser)]
struct Flags {
    /// So many seeds.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// This seed alone, told as it happens; RUST_LOG adds what the program itself logs.
    #[arg(long)]
    seed: Option<u64>,
    /// Plant a mistake.
    #[arg(long)]
    planted: Option<Mistake>,
    /// Let this kind of trouble (a number, see trouble.rs) come every other time.
    #[arg(long)]
    favourite: Option<u64>,
    /// End with the first seed that shows this text.
    #[arg(long)]
    until: Option<String>,
    /// Say the number of each seed's trace.
    #[arg(long)]
    traces: bool,
}

/// The mistakes that can be planted.
#[derive(Clone, Copy, ValueEnum)]
enum Mistake {
    AcknowledgesBeforeSync,
    ReadsWhileDeposed,
    KeepsItsLease,
    ForgetsTombstones,
    VotesBehindItsFence,
    BelievesOldAnswers,
    CountsLearners,
    TrustsAllClocks,
}

impl From<Mistake> for Planted {
    fn from(mistake: Mistake) -> Self {
        match mistake {
            Mistake::AcknowledgesBeforeSync => Self::AcknowledgesBeforeSync,
            Mistake::ReadsWhileDeposed => Self::ReadsWhileDeposed,
            Mistake::KeepsItsLease => Self::KeepsItsLease,
            Mistake::ForgetsTombstones => Self::ForgetsTombstones,
            Mistake::VotesBehindItsFence => Self::VotesBehindItsFence,
            Mistake::BelievesOldAnswers => Self::BelievesOldAnswers,
            Mistake::CountsLearners => Self::CountsLearners,
            Mistake::TrustsAllClocks => Self::TrustsAllClocks,
        }
    }
}

#[allow(clippy::print_stdout)]
fn main() -> std::io::Result<ExitCode> {
    let flags = Flags::parse();
    let planted = flags.planted.map(Planted::from);
    let plan = |seed| Plan { planted, favourite: flags.favourite, ..Plan::of(seed) };
    if let Some(seed) = flags.seed {
        if std::env::var_os("RUST_LOG").is_some() {
            let filter = tracing_subscriber::EnvFilter::from_default_env();
            tracing_subscriber::fmt().with_env_filter(filter).without_time().with_ansi(false).init();
        }
        let reports = run_apart(std::iter::once(plan(seed)), true, |_| true)?;
        reports.iter().for_each(|report| println!("trace {:016x}", report.hash));
        return Ok(ended(&reports));
    }
    let began = std::time::Instant::now();
    let reports = run_apart((flags.first..flags.first + flags.seeds).map(plan), false, |report| {
        if flags.traces {
            println!("seed {} trace {:016x}", report.seed, report.hash);
        }
        report.failures.iter().for_each(|failure| println!("seed {}: {failure}", report.seed));
        let shows = |sign| report.failures.iter().any(|failure| failure.contains(sign));
        !flags.until.as_deref().is_some_and(shows)
    })?;
    let acknowledged: u64 = reports.iter().map(|report| report.acknowledged).sum();
    println!(
        "{} seeds in {:.1} s: {acknowledged} commits and calls answered, {} seeds broke a promise",
        reports.len(),
        began.elapsed().as_secs_f64(),
        reports.iter().filter(|report| !report.failures.is_empty()).count()
    );
    Ok(ended(&reports))
}

/// Tells how the first seed that broke a promise came to do so.
#[allow(clippy::print_stdout)]
fn ended(reports: &[Report]) -> ExitCode {
    let broken = reports.iter().filter(|report| !report.failures.is_empty()).min_by_key(|report| report.seed);
    let Some(report) = broken else { return ExitCode::SUCCESS };
    println!("seed {}; the end of its story:", report.seed);
    report.last.iter().for_each(|line| println!("  {line}"));
    println!("again: make simulate SEED={}", report.seed);
    ExitCode::FAILURE
}
