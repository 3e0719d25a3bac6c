//! Measures a three-host pool beside a three-node etcd on this machine, prints the result and writes it down.

use std::path::{Path, PathBuf};
use std::time::Duration;

use chaos_tests::bench::bulk::{self, Bulk};
use chaos_tests::bench::etcd::{self, Etcd};
use chaos_tests::bench::load::{Rounds, round};
use chaos_tests::bench::machine::Machine;
use chaos_tests::bench::pool::Pool;
use chaos_tests::bench::report::{self, Load, Real, Report, Run, put_into};
use chaos_tests::bench::scale::{self, Size};
use chaos_tests::bench::{disks, events, failover, machines, restore};
use clap::Parser;
use tokio::process::Command;

const CLIENTS: [usize; 3] = [1, 16, 64];
/// The peer takes seconds for each.
const PEER_KILLS: u64 = 20;
const WARM: Duration = Duration::from_millis(500);

/// Measure a pool of three simulated hosts and, where etcd is installed, etcd beside it
#[derive(Parser, Debug)]
struct Flags {
    /// The xenith program [default: what is built beside this program]
    #[arg(long, value_name = "FILE")]
    xenith: Option<PathBuf>,
    /// Where both peers keep their data while it runs: a real disk, or the numbers mean little
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Write the result into this document, between its marks
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// The day to write down
    #[arg(long, value_name = "DATE", default_value = "an unnamed day")]
    date: String,
    /// Rounds of each load [default: 5]
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of each round [default: 4]
    #[arg(long)]
    seconds: Option<f64>,
    /// Leaders to kill; of the peer, 20 at most [default: 100]
    #[arg(long)]
    failovers: Option<u64>,
    /// Measure the large pool alone
    #[arg(long)]
    only_scale: bool,
    /// Measure dump and restore of a database with --vms VMs alone
    #[arg(long, conflicts_with = "only_scale")]
    only_restore: bool,
    /// Measure virtual machines and disks alone
    #[arg(long, conflicts_with_all = ["only_scale", "only_restore"])]
    only_real: bool,
    /// Leave the large pool out
    #[arg(long, conflicts_with = "only_scale")]
    no_scale: bool,
    /// VMs of the large pool
    #[arg(long)]
    vms: Option<usize>,
    /// Watchers of the large pool
    #[arg(long)]
    watchers: Option<usize>,
    /// A short slice of everything, to see that it works
    #[arg(long)]
    quick: bool,
    /// Leave etcd out even where it is installed
    #[arg(long)]
    no_etcd: bool,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let program = flags.xenith.clone().map_or_else(chaos_tests::lab::program, Ok)?;
    let machine = Machine::look(&flags.dir)?;
    let etcd_program = if flags.no_etcd { None } else { etcd::program() };
    let run = Run {
        date: flags.date.clone(),
        pool_version: version(&program).await?,
        etcd_version: match &etcd_program {
            Some(program) => Some(version(program).await?),
            None => None,
        },
        quick: flags.quick,
        rounds: flags.rounds.unwrap_or(if flags.quick { 2 } else { 5 }),
        seconds: flags.seconds.unwrap_or(if flags.quick { 1.0 } else { 4.0 }),
    };
    let kills = flags.failovers.unwrap_or(if flags.quick { 2 } else { 100 });
    if run.etcd_version.is_none() {
        eprintln!("without etcd: it is not installed, or not wanted");
    }

    let mut size = if flags.quick {
        Size { hosts: 8, vms: 2_000, watchers: 20, changes: 200, seconds: 1.0 }
    } else {
        Size { hosts: 64, vms: 64_000, watchers: 200, changes: 1_000, seconds: 10.0 }
    };
    size.vms = flags.vms.unwrap_or(size.vms);
    size.watchers = flags.watchers.unwrap_or(size.watchers);
    if flags.only_scale {
        return print(&report::alone(&scale::measure(&program, &flags.dir, size).await?));
    }
    if flags.only_restore {
        return print(&report::restore_alone(&restore::alone(&program, &flags.dir, size.vms).await?));
    }
    if flags.only_real {
        return print(&report::real_alone(&real(&flags, &program).await?));
    }
    eprintln!("starting the peers in {}", flags.dir.display());
    let mut pool = Pool::start(&program, &flags.dir).await?;
    let mut peer = match &etcd_program {
        Some(program) => Some(Etcd::start(program, &flags.dir).await?),
        None => None,
    };
    let (writes, reads) = loads(&run, &mut pool, peer.as_mut()).await?;

    eprintln!("events");
    let heard = events::measure(&mut pool, if flags.quick { 100 } else { 2_000 }).await?;

    let (mut pool_failovers, mut etcd_failovers) = (Vec::new(), Vec::new());
    for round in 0..kills {
        pool_failovers.push(failover::of_pool(&mut pool, round).await?);
        if let Some(peer) = peer.as_mut().filter(|_| round < PEER_KILLS) {
            etcd_failovers.push(failover::of_etcd(peer, round).await?);
        }
        eprintln!(
            "failover {}: {:.0} ms, etcd {:.0?} ms",
            round + 1,
            pool_failovers[round as usize],
            etcd_failovers.last()
        );
    }
    drop(peer);

    let mut all = Vec::<Bulk>::new();
    for vms in if flags.quick { [100, 1_000] } else { [1_000, 10_000] } {
        eprintln!("all records of {vms} VMs");
        all.push(bulk::measure(&mut pool, vms, if flags.quick { 3 } else { 15 }).await?);
    }
    drop(pool);
    let real = Some(real(&flags, &program).await?);
    let large = if flags.no_scale { None } else { Some(scale::measure(&program, &flags.dir, size).await?) };

    let report = Report {
        machine,
        run,
        writes,
        reads,
        pool_failovers,
        etcd_failovers,
        events: heard,
        bulk: all,
        real,
        scale: large,
    };
    let text = report.markdown();
    print(&text)?;
    match &flags.write {
        Some(path) => put_into(path, &text),
        None => Ok(()),
    }
}

/// Virtual machines and disks.
async fn real(flags: &Flags, program: &Path) -> anyhow::Result<Real> {
    let (vms, rounds, data) = if flags.quick { (64, 2, 64 << 20) } else { (640, 5, 512 << 20) };
    let starts = machines::starts(program, &flags.dir, 10, vms, rounds).await?;
    let boots = machines::boots(program, &flags.dir, if flags.quick { 2 } else { 15 }).await?;
    let disks = disks::measure(program, &flags.dir, if flags.quick { 2 } else { 9 }, data).await?;
    Ok(Real { starts, boots, disks })
}

/// Writes and reads, at both peers by turns.
async fn loads(run: &Run, pool: &mut Pool, mut peer: Option<&mut Etcd>) -> anyhow::Result<(Vec<Load>, Vec<Load>)> {
    let measured = Duration::from_secs_f64(run.seconds);
    let empty = |clients| Load { clients, pool: Rounds::default(), etcd: peer.as_ref().map(|_| Rounds::default()) };
    let mut writes: Vec<_> = CLIENTS.into_iter().map(empty).collect();
    let mut reads = writes.clone();
    let mut number = 0;
    for turn in 1..=run.rounds {
        for (write, read) in writes.iter_mut().zip(&mut reads) {
            number += 1;
            eprintln!("round {turn} of {}: {} clients", run.rounds, write.clients);
            let (result, _) = round(pool.writers(write.clients).await?, number, WARM, measured).await?;
            write.pool.add(result);
            if let (Some(peer), Some(rounds)) = (peer.as_deref_mut(), &mut write.etcd) {
                rounds.add(round(peer.writers(write.clients).await?, number, WARM, measured).await?.0);
            }
            read.pool.add(round(pool.readers(read.clients).await?, number, WARM, measured).await?.0);
            if let (Some(peer), Some(rounds)) = (peer.as_deref_mut(), &mut read.etcd) {
                rounds.add(round(peer.readers(read.clients).await?, number, WARM, measured).await?.0);
            }
        }
    }
    Ok((writes, reads))
}

/// The last word of the first line of `--version`.
async fn version(program: &std::path::Path) -> anyhow::Result<String> {
    let output = Command::new(program).arg("--version").output().await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().next().and_then(|line| line.split(' ').next_back()).unwrap_or("of no known version").to_owned())
}

#[allow(clippy::print_stdout, reason = "standard output is for the result")]
fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write;
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}
