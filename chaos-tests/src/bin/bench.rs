//! Measures a three-host pool beside a three-node etcd on this machine, prints the result and writes it down.

use std::path::{Path, PathBuf};
use std::time::Duration;

use chaos_tests::bench::bulk::{self, Bulk};
use chaos_tests::bench::etcd::{self, Etcd};
use chaos_tests::bench::load::Rounds;
use chaos_tests::bench::machine::Machine;
use chaos_tests::bench::peer::Peer;
use chaos_tests::bench::pool::Pool;
use chaos_tests::bench::report::{self, Load, Real, Report, Run, put_into};
use chaos_tests::bench::scale::{self, Size};
use chaos_tests::bench::{disks, events, failover, machines, restore};
use chaos_tests::lab::Lab;
use clap::Parser;
use tokio::process::Command;

/// The peer takes seconds for each.
const PEER_KILLS: u64 = 20;

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
    /// Another build of xenith, to measure writes and reads beside it in etcd's place
    #[arg(long, value_name = "FILE", conflicts_with = "write", requires = "only_loads")]
    against: Option<PathBuf>,
    /// Rounds of each load [default: 7]
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
    /// How many clients write and read at once, one load for each number
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', default_values_t = [1, 16, 64])]
    clients: Vec<usize>,
    /// Measure writes and reads alone
    #[arg(long, conflicts_with_all = ["only_scale", "only_restore", "only_real", "write"])]
    only_loads: bool,
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
    let mut size = if flags.quick {
        Size { hosts: 8, vms: 2_000, watchers: 20, changes: 200, seconds: 1.0 }
    } else {
        Size { hosts: 64, vms: 64_000, watchers: 200, changes: 1_000, seconds: 10.0 }
    };
    size.vms = flags.vms.unwrap_or(size.vms);
    size.watchers = flags.watchers.unwrap_or(size.watchers);
    let mut report = Report::default();
    if flags.only_scale {
        return report.add(&report::large(&scale::measure(&program, &flags.dir, size).await?));
    }
    if flags.only_restore {
        return report.add(&report::restore_alone(&restore::alone(&program, &flags.dir, size.vms).await?));
    }
    if flags.only_real {
        return report.add(&report::real(&real(&flags, &program).await?));
    }
    let (mut peer, name, version) = beside(&flags).await?;
    if peer.is_none() {
        eprintln!("without etcd: it is not installed, or not wanted");
    }
    let run = Run {
        date: flags.date.clone(),
        pool_version: version_of(&program).await?,
        peer: peer.is_some().then(|| (name.to_owned(), version)),
        quick: flags.quick,
        rounds: flags.rounds.unwrap_or(if flags.quick { 2 } else { 7 }),
        seconds: flags.seconds.unwrap_or(if flags.quick { 1.0 } else { 4.0 }),
    };
    report.add(&report::head(&machine, &run))?;

    eprintln!("starting the pool in {}", flags.dir.display());
    let mut pool = Peer::Pool(Box::new(Pool::start(&program, &flags.dir).await?));
    let (writes, reads) = loads(&run, &flags.clients, &mut pool, peer.as_mut()).await?;
    report.add(&report::writes(&writes, name))?;
    report.add(&report::reads(&reads, name))?;
    let (Peer::Pool(mut pool), false) = (pool, flags.only_loads) else { return Ok(()) };

    let mut etcd = match peer {
        Some(Peer::Etcd(etcd)) => Some(etcd),
        _ => None,
    };
    let (pool_failovers, etcd_failovers) = failovers(&flags, &mut pool, etcd.as_mut()).await?;
    report.add(&report::failovers(&pool_failovers, &etcd_failovers))?;
    drop(etcd);

    eprintln!("events");
    report.add(&report::events(&events::measure(&mut pool, if flags.quick { 100 } else { 2_000 }).await?))?;
    let mut all = Vec::<Bulk>::new();
    for vms in if flags.quick { [100, 1_000] } else { [1_000, 10_000] } {
        eprintln!("all records of {vms} VMs");
        all.push(bulk::measure(&mut pool, vms, if flags.quick { 3 } else { 15 }).await?);
    }
    report.add(&report::bulk(&all))?;
    drop(pool);
    report.add(&report::real(&real(&flags, &program).await?))?;
    if !flags.no_scale {
        report.add(&report::large(&scale::measure(&program, &flags.dir, size).await?))?;
    }
    match &flags.write {
        Some(path) => put_into(path, report.text()),
        None => Ok(()),
    }
}

/// What the pool is measured beside, its name, and its version.
async fn beside(flags: &Flags) -> anyhow::Result<(Option<Peer>, &'static str, String)> {
    if let Some(other) = &flags.against {
        let version = version_of(other).await?;
        return Ok((
            Some(Peer::Pool(Box::new(Pool::over(Lab::beside(other, &flags.dir).await?).await?))),
            "the other",
            version,
        ));
    }
    match etcd::program().filter(|_| !flags.no_etcd) {
        Some(program) => {
            let version = version_of(&program).await?;
            Ok((Some(Peer::Etcd(Etcd::start(&program, &flags.dir).await?)), "etcd", version))
        }
        None => Ok((None, "etcd", String::new())),
    }
}

/// Leaders are killed, by turns of the pool and of the peer, which takes seconds for each.
async fn failovers(
    flags: &Flags,
    pool: &mut Pool,
    mut peer: Option<&mut Etcd>,
) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let kills = flags.failovers.unwrap_or(if flags.quick { 2 } else { 100 });
    let (mut of_pool, mut of_etcd) = (Vec::new(), Vec::new());
    for round in 0..kills {
        let took = failover::of_pool(pool, round).await?;
        of_pool.push(took);
        if let Some(peer) = peer.as_deref_mut().filter(|_| round < PEER_KILLS) {
            of_etcd.push(failover::of_etcd(peer, round).await?);
        }
        eprintln!("failover {}: {took:.0} ms, etcd {:.0?} ms", round + 1, of_etcd.last());
    }
    Ok((of_pool, of_etcd))
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
async fn loads(
    run: &Run,
    clients: &[usize],
    pool: &mut Peer,
    mut peer: Option<&mut Peer>,
) -> anyhow::Result<(Vec<Load>, Vec<Load>)> {
    let measured = Duration::from_secs_f64(run.seconds);
    let empty = |clients| Load { clients, pool: Rounds::default(), peer: peer.as_ref().map(|_| Rounds::default()) };
    let mut writes: Vec<_> = clients.iter().copied().map(empty).collect();
    let mut reads = writes.clone();
    let mut number = 0;
    for turn in 1..=run.rounds {
        for (write, read) in writes.iter_mut().zip(&mut reads) {
            let clients = write.clients;
            number += 1;
            eprintln!("round {turn} of {}: {clients} clients", run.rounds);
            write.pool.add(pool.write(clients, number, measured).await?);
            if let (Some(peer), Some(rounds)) = (peer.as_deref_mut(), &mut write.peer) {
                rounds.add(peer.write(clients, number, measured).await?);
            }
            read.pool.add(pool.read(clients, number, measured).await?);
            if let (Some(peer), Some(rounds)) = (peer.as_deref_mut(), &mut read.peer) {
                rounds.add(peer.read(clients, number, measured).await?);
            }
        }
    }
    Ok((writes, reads))
}

/// The last word of the first line of `--version`.
async fn version_of(program: &Path) -> anyhow::Result<String> {
    let output = Command::new(program).arg("--version").output().await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().next().and_then(|line| line.split(' ').next_back()).unwrap_or("of no known version").to_owned())
}
