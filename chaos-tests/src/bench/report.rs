//! What was measured, as Markdown: for people on standard output, and for `docs/benchmarks.md` between two marks.

use std::fmt::{Arguments, Write};
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, ensure};

use super::bulk::Bulk;
use super::disks::Disks;
use super::events::Delays;
use super::load::{Rounds, median, quantile};
use super::machine::Machine;
use super::machines::{Boots, Starts};
use super::restore::Restored;
use super::scale::{Scale, Watched};

const BEGIN: &str = "<!-- measured: begin (written by `make bench`) -->";
const END: &str = "<!-- measured: end -->";
/// The document, when there is none yet.
const FIRST: &str = "# Benchmarks\n\nMeasured by `make bench`.\n\n";

/// What was measured so far. Each section is told as soon as it is there: a run takes a quarter of an hour, and one that
/// fails at its end has still said what it had.
#[derive(Debug, Default)]
pub struct Report(String);

impl Report {
    /// One more section, on standard output too.
    #[allow(clippy::print_stdout, reason = "standard output is for the result")]
    pub fn add(&mut self, section: &str) -> anyhow::Result<()> {
        let gap = if self.0.is_empty() { "" } else { "\n" };
        let mut out = std::io::stdout().lock();
        write!(out, "{gap}{section}")?;
        out.flush()?;
        self.0.push_str(gap);
        self.0.push_str(section);
        Ok(())
    }

    /// The whole of it.
    pub fn text(&self) -> &str {
        &self.0
    }
}

/// One kind of load at one number of clients, at both peers.
#[derive(Clone, Debug)]
pub struct Load {
    /// How many clients at once.
    pub clients: usize,
    /// The pool's rounds.
    pub pool: Rounds,
    /// The peer's rounds, where there is one.
    pub peer: Option<Rounds>,
}

/// How a run was asked for.
#[derive(Clone, Debug)]
pub struct Run {
    /// The day, as it was passed in.
    pub date: String,
    /// Version of the pool.
    pub pool_version: String,
    /// What it is measured beside, where there is such a thing: a name, and a version.
    pub peer: Option<(String, String)>,
    /// A slice that is too short to be quoted.
    pub quick: bool,
    /// Rounds of each load.
    pub rounds: usize,
    /// Seconds of each.
    pub seconds: f64,
}

/// What was measured, where and how.
pub fn head(machine: &Machine, run: &Run) -> String {
    format!(
        "{}Measured on {} with xenith {}{}: {} cores ({}), {:.0} GiB of memory, Linux {}, data on {} whose 4 KiB \
         write with fdatasync takes {:.2} ms (p50) and {:.2} ms (p99). {} rounds of {:.0} s for each load, \
         by turns; rates are the median round's, a ratio is the median of those of \
         a round and the peer's next, latencies are those of all rounds. The load generator shares the \
         cores with everything it measures.\n",
        if run.quick { "**A quick run: too short to be quoted.** " } else { "" },
        run.date,
        run.pool_version,
        run.peer.as_ref().map(|(name, version)| format!(" and {name} {version}")).unwrap_or_default(),
        machine.cores,
        machine.processor,
        machine.memory_gib,
        machine.kernel,
        machine.file_system,
        machine.sync[0],
        machine.sync[1],
        run.rounds,
        run.seconds,
    )
}

/// Acknowledged writes.
pub fn writes(measured: &[Load], peer: &str) -> String {
    format!(
        "## Acknowledged writes\n\n`VM.set_name_description` with a new text of 64 bytes, over JSON-RPC and TLS with \
         keep-alive, one connection for each client; etcd: put of 64 bytes over plaintext gRPC, all clients on one \
         connection, with which it is faster. Latencies in ms.\n\n{}",
        loads(measured, peer)
    )
}

/// Linearizable reads.
pub fn reads(measured: &[Load], peer: &str) -> String {
    format!(
        "## Reads\n\n`VM.get_record`, linearizable, the whole record; etcd: linearizable range of one key with 64 \
         bytes.\n\n{}",
        loads(measured, peer)
    )
}

/// Milliseconds without a writer, one for each killed leader of the pool, and of etcd.
pub fn failovers(pool: &[f64], etcd: &[f64]) -> String {
    let mut out =
        "## Failover\n\nMilliseconds from SIGKILL of the leader to the first acknowledged write, by a client \
                   that knows all members and tries one after the other, each for at most 100 ms. Default timings of \
                   both.\n\n| | rounds | median | p99 | worst |\n| --- | ---: | ---: | ---: | ---: |\n"
            .to_owned();
    for (name, times) in [("xenith", pool), ("etcd", etcd)] {
        if !times.is_empty() {
            let [high, worst] = [0.99, 1.0].map(|share| quantile(times, share));
            row(&mut out, format_args!("{name} | {} | {:.0} | {high:.0} | {worst:.0}", times.len(), middle(times)));
        }
    }
    if !pool.is_empty() && !etcd.is_empty() {
        row(&mut out, format_args!("etcd ÷ xenith | | {:.2} | |", middle(etcd) / middle(pool)));
    }
    out
}

/// From writes to their events.
pub fn events(heard: &Delays) -> String {
    let mut out = format!(
        "## Events\n\nOne client waits in `event.from`, another sets a VM's description, {} times. Milliseconds to the \
         event; below zero it came before the writer's own answer.\n\n| from | p50 | p99 |\n| --- | ---: | ---: |\n",
        heard.after_start.len()
    );
    let [acknowledged, started] = [&heard.after_acknowledgement, &heard.after_start];
    for (from, delays) in [("the write's acknowledgement", acknowledged), ("the write's start", started)] {
        row(&mut out, format_args!("{from} | {:.2} | {:.2}", quantile(delays, 0.5), quantile(delays, 0.99)));
    }
    out
}

/// All records at once.
pub fn bulk(measured: &[Bulk]) -> String {
    let mut out = "## All records\n\n`VM.get_all_records` over JSON-RPC and TLS, one connection; median call.\n\n\
                   | VMs | answer, MB | ms | MB/s |\n| ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for bulk in measured {
        let megabytes = bulk.bytes as f64 / 1e6;
        row(&mut out, format_args!("{} | {megabytes:.1} | {:.1} | {:.0}", bulk.vms, bulk.milliseconds, bulk.rate()));
    }
    out
}

/// Virtual machines and their disks.
#[derive(Clone, Debug)]
pub struct Real {
    /// Simulated machines, many at once.
    pub starts: Starts,
    /// A real guest.
    pub boots: Boots,
    /// Images.
    pub disks: Disks,
}

/// Virtual machines and disks.
pub fn real(measured: &Real) -> String {
    let Real { starts, boots, disks } = measured;
    let mut out = format!(
        "## Virtual machines\n\n`VM.start` from the call to its answer, when the VM runs. On the simulated driver: {} \
         hosts, {} clients, {} calls. On QEMU under emulation, {} starts of the lab's guest, by turns with the same QEMU \
         with the same command line, started by hand and told over QMP to go on.\n\n| | |\n| --- | ---: |\n",
        starts.hosts,
        starts.clients,
        starts.calls.len(),
        boots.bare.len(),
    );
    let both = |times: &[f64]| format!("{:.1} / {:.1}", middle(times), quantile(times, 0.99));
    let more = middle(&boots.through_the_pool) - middle(&boots.bare);
    for (name, value) in [
        ("starts per second, simulated (median round)", format!("{:.0}", middle(&starts.rates))),
        ("… ms (p50 / p99)", both(&starts.calls)),
        ("a start on QEMU, ms (p50 / p99)", both(&boots.through_the_pool)),
        ("bare QEMU, ms (p50 / p99)", both(&boots.bare)),
        ("the pool's part, ms (difference of the medians)", format!("{more:.1}")),
    ] {
        row(&mut out, format_args!("{name} | {value}"));
    }
    out.push_str(&format!(
        "\n## Disks\n\nThe `file` driver. Clone and snapshot of a sparse disk of 10 GiB, {} times each; copies of a disk \
         with {} MiB of noise into the same SR, by turns with `qemu-img convert` of the same image; both are synced when \
         they count as done.\n\n| | |\n| --- | ---: |\n",
        disks.clone.len(),
        disks.copied >> 20,
    ));
    let (copy, convert) = (disks.rate(middle(&disks.copy)), disks.rate(middle(&disks.convert)));
    for (name, value) in [
        ("`VDI.clone`, ms (p50 / p99)", both(&disks.clone)),
        ("`VDI.snapshot`, ms (p50 / p99)", both(&disks.snapshot)),
        ("`VDI.copy`, MB/s (median)", format!("{copy:.0}")),
        ("`qemu-img convert`, MB/s (median)", format!("{convert:.0}")),
        ("copy ÷ convert", format!("{:.2}", copy / convert)),
    ] {
        row(&mut out, format_args!("{name} | {value}"));
    }
    out
}

/// A large pool.
pub fn large(scale: &Scale) -> String {
    let size = &scale.size;
    let mut out = format!(
        "## A large pool\n\n{} hosts with an agent each, {} VMs; three hosts keep the state (so many controllers on this \
         machine would measure its scheduler). {:.0} s for each measurement.\n\n| | |\n| --- | ---: |\n",
        size.hosts, size.vms, size.seconds
    );
    let read = &scale.read;
    let ratio = scale.writes_beside_reads.latency(0.99) / scale.writes.latency(0.99);
    let delays = |watched: &Watched| format!("{:.1} / {:.1}", watched.event(0.5), watched.event(0.99));
    for (name, value) in [
        ("VMs made per second (`VM.clone`, 16 clients)", format!("{:.0}", scale.making)),
        ("memory per VM at the master, before it is read, KiB", format!("{:.1}", scale.bytes_per_vm / 1024.0)),
        ("JSON of a VM, KiB", format!("{:.1}", scale.encoding / 1024.0)),
        ("first `VM.get_all_records`, ms", format!("{:.0}", scale.first_read)),
        ("later ones, ms (median)", format!("{:.0}", read.milliseconds)),
        ("… MB/s", format!("{:.0}", read.rate())),
        ("writes per second, 64 clients", format!("{:.0}", scale.writes.rate())),
        ("… p99, ms", format!("{:.1}", scale.writes.latency(0.99))),
        ("… p99 while another client reads all records again and again", format!("{ratio:.1} times that")),
        ("changes per second while each watcher follows VMs of its own", format!("{:.0}", scale.by_one.changed)),
        ("… from a write's start to its event, ms (p50 / p99)", delays(&scale.by_one)),
        ("changes per second while every watcher follows every VM", format!("{:.0}", scale.by_all.changed)),
        ("… from a write's start to its event, ms (p50 / p99)", delays(&scale.by_all)),
        ("a host's controller starts from its disk and serves, s", format!("{:.1}", scale.restart)),
        ("a voter that lost its database has caught up, s", format!("{:.1}", scale.catch_up)),
    ] {
        row(&mut out, format_args!("{name} | {value}"));
    }
    restored(&mut out, &scale.restored);
    out.push_str(&format!(
        "\n{} watchers wait in `event.from`; {} changes a second were asked for.\n",
        size.watchers, size.changes
    ));
    out
}

/// What a restore gave, alone.
pub fn restore_alone(measured: &Restored) -> String {
    let mut text = format!("| a pool of {} VMs | |\n| --- | ---: |\n", measured.vms);
    restored(&mut text, measured);
    text
}

fn restored(out: &mut String, restored: &Restored) {
    for (name, value) in [
        ("the database as a file, MB", format!("{:.0}", restored.bytes as f64 / 1e6)),
        ("… fetched, s", format!("{:.1}", restored.dump)),
        ("… put back as a dry run, s", format!("{:.1}", restored.dry_run)),
        ("… put back, with another name for every VM, s", format!("{:.1}", restored.restore)),
        ("longest pause of 4 writers meanwhile, ms", format!("{:.0}", restored.pause)),
        ("… while nothing else is done, ms", format!("{:.0}", restored.pause_at_rest)),
    ] {
        row(out, format_args!("{name} | {value}"));
    }
    if !restored.same_master {
        row(out, format_args!("another host became master over it | yes"));
    }
}

fn loads(loads: &[Load], name: &str) -> String {
    let mut out = format!(
        "| clients | xenith /s | {name} /s | ratio | xenith p50 | p99 | {name} p50 | p99 |\n\
         | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
    );
    for Load { clients, pool, peer } in loads {
        let of_peer = |value: &dyn Fn(&Rounds) -> String| peer.as_ref().map_or_else(|| "–".to_owned(), value);
        row(
            &mut out,
            format_args!(
                "{clients} | {:.0} | {} | {} | {:.2} | {:.2} | {} | {}",
                pool.rate(),
                of_peer(&|peer| format!("{:.0}", peer.rate())),
                of_peer(&|peer| format!("{:.2}", pool.beside(peer))),
                pool.latency(0.5),
                pool.latency(0.99),
                of_peer(&|peer| format!("{:.2}", peer.latency(0.5))),
                of_peer(&|peer| format!("{:.2}", peer.latency(0.99))),
            ),
        );
    }
    out
}

fn row(out: &mut String, cells: Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "| {cells} |");
}

fn middle(times: &[f64]) -> f64 {
    median(times.iter().copied())
}

/// Puts the text between the document's marks; what people wrote around them stays.
pub fn put_into(path: &Path, text: &str) -> anyhow::Result<()> {
    let old = match std::fs::read_to_string(path) {
        Ok(old) => old,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => format!("{FIRST}{BEGIN}\n{END}\n"),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let new = replaced(&old, text).with_context(|| format!("{} has no marks to write between", path.display()))?;
    std::fs::write(path, new).with_context(|| format!("cannot write {}", path.display()))
}

fn replaced(old: &str, text: &str) -> anyhow::Result<String> {
    let (before, rest) = old.split_once(BEGIN).context(BEGIN)?;
    let (_, after) = rest.split_once(END).context(END)?;
    ensure!(!text.contains(END), "the text has a mark in it");
    Ok(format!("{before}{BEGIN}\n{}\n{END}{after}", text.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_wrote_around_the_measured_part_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("benchmarks.md");
        put_into(&path, "one").unwrap();
        let written = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{}\nA remark.\n", written.replace("Measured by", "Indeed measured by")))
            .unwrap();
        put_into(&path, "two\n").unwrap();
        let written = std::fs::read_to_string(&path).unwrap();
        assert!(written.contains("Indeed measured by") && written.ends_with("\nA remark.\n"), "{written}");
        assert!(written.contains(&format!("{BEGIN}\ntwo\n{END}")) && !written.contains("one"), "{written}");
        std::fs::write(&path, "no marks").unwrap();
        put_into(&path, "three").unwrap_err();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "no marks");
    }
}
