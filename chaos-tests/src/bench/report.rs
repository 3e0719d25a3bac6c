//! What was measured, as Markdown: for people on standard output, and for `docs/benchmarks.md` between two marks.

use std::fmt::{Display, Write};
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

/// One kind of load at one number of clients, at both peers.
#[derive(Clone, Debug)]
pub struct Load {
    /// How many clients at once.
    pub clients: usize,
    /// The pool's rounds.
    pub pool: Rounds,
    /// Etcd's rounds, where etcd is installed.
    pub etcd: Option<Rounds>,
}

/// How a run was asked for.
#[derive(Clone, Debug)]
pub struct Run {
    /// The day, as it was passed in.
    pub date: String,
    /// Version of the pool.
    pub pool_version: String,
    /// Version of etcd, where it is installed.
    pub etcd_version: Option<String>,
    /// A slice that is too short to be quoted.
    pub quick: bool,
    /// Rounds of each load.
    pub rounds: usize,
    /// Seconds of each.
    pub seconds: f64,
}

/// All that a run measured.
#[derive(Clone, Debug)]
pub struct Report {
    /// The machine.
    pub machine: Machine,
    /// The run.
    pub run: Run,
    /// Acknowledged writes.
    pub writes: Vec<Load>,
    /// Linearizable reads.
    pub reads: Vec<Load>,
    /// Milliseconds without a writer, one for each killed leader of the pool.
    pub pool_failovers: Vec<f64>,
    /// The same of etcd.
    pub etcd_failovers: Vec<f64>,
    /// From writes to their events.
    pub events: Delays,
    /// All records at once.
    pub bulk: Vec<Bulk>,
    /// Virtual machines and disks, where they were asked for.
    pub real: Option<Real>,
    /// The large pool, where it was asked for.
    pub scale: Option<Scale>,
}

impl Report {
    /// The whole of it.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Self { machine, run, .. } = self;
        writeln!(
            out,
            "{}Measured on {} with xenith {}{}: {} cores ({}), {:.0} GiB of memory, Linux {}, data on {} whose 4 KiB \
             write with fdatasync takes {:.2} ms (p50) and {:.2} ms (p99). {} rounds of {:.0} s for each load, \
             alternating; rates are the median round's, latencies those of all rounds. The load generator shares the \
             cores with everything it measures.\n",
            if run.quick { "**A quick run: too short to be quoted.** " } else { "" },
            run.date,
            run.pool_version,
            run.etcd_version.as_ref().map(|version| format!(" and etcd {version}")).unwrap_or_default(),
            machine.cores,
            machine.processor,
            machine.memory_gib,
            machine.kernel,
            machine.file_system,
            machine.sync[0],
            machine.sync[1],
            run.rounds,
            run.seconds,
        )?;
        writeln!(out, "## Acknowledged writes\n")?;
        writeln!(
            out,
            "`VM.set_name_description` with a new text of 64 bytes, over JSON-RPC and TLS with keep-alive, one \
             connection for each client; etcd: put of 64 bytes over plaintext gRPC, all clients on one connection, with \
             which it is faster. Latencies in ms.\n"
        )?;
        loads(out, &self.writes)?;
        writeln!(out, "## Reads\n")?;
        writeln!(
            out,
            "`VM.get_record`, linearizable, the whole record; etcd: linearizable range of one key with 64 bytes.\n"
        )?;
        loads(out, &self.reads)?;
        self.failovers(out)?;
        writeln!(out, "## Events\n")?;
        writeln!(
            out,
            "One client waits in `event.from`, another sets a VM's description, {} times. Milliseconds to the event; \
             below zero it came before the writer's own answer.\n",
            self.events.after_start.len()
        )?;
        writeln!(out, "| from | p50 | p99 |\n| --- | ---: | ---: |")?;
        let [acknowledged, started] = [&self.events.after_acknowledgement, &self.events.after_start];
        for (from, delays) in [("the write's acknowledgement", acknowledged), ("the write's start", started)] {
            writeln!(out, "| {from} | {:.2} | {:.2} |", quantile(delays, 0.5), quantile(delays, 0.99))?;
        }
        writeln!(
            out,
            "\n## All records\n\n`VM.get_all_records` over JSON-RPC and TLS, one connection; median call.\n"
        )?;
        writeln!(out, "| VMs | answer, MB | ms | MB/s |\n| ---: | ---: | ---: | ---: |")?;
        for bulk in &self.bulk {
            let megabytes = bulk.bytes as f64 / 1e6;
            writeln!(out, "| {} | {megabytes:.1} | {:.1} | {:.0} |", bulk.vms, bulk.milliseconds, bulk.rate())?;
        }
        self.real.as_ref().map_or(Ok(()), |real| real.write(out))?;
        self.scale.as_ref().map_or(Ok(()), |scale| large(out, scale))
    }

    fn failovers(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "## Failover\n")?;
        writeln!(
            out,
            "Milliseconds from SIGKILL of the leader to the first acknowledged write, by a client that knows all members \
             and tries one after the other, each for at most 100 ms. Default timings of both.\n"
        )?;
        writeln!(out, "| | rounds | median | p99 | worst |\n| --- | ---: | ---: | ---: | ---: |")?;
        for (name, times) in [("xenith", &self.pool_failovers), ("etcd", &self.etcd_failovers)] {
            if !times.is_empty() {
                let (middle, high) = (median(times.iter().copied()), quantile(times, 0.99));
                let worst = quantile(times, 1.0);
                writeln!(out, "| {name} | {} | {middle:.0} | {high:.0} | {worst:.0} |", times.len())?;
            }
        }
        if !self.pool_failovers.is_empty() && !self.etcd_failovers.is_empty() {
            let [pool, etcd] = [&self.pool_failovers, &self.etcd_failovers].map(|all| median(all.iter().copied()));
            writeln!(out, "| etcd ÷ xenith | | {:.2} | | |", etcd / pool)?;
        }
        writeln!(out)
    }
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

impl Real {
    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Self { starts, boots, disks } = self;
        writeln!(
            out,
            "\n## Virtual machines\n\n`VM.start` from the call to its answer, when the VM runs. On the simulated driver: {} \
             hosts, {} clients, {} calls. On QEMU under emulation, {} starts of the lab's guest, by turns with the same QEMU \
             with the same command line, started by hand and told over QMP to go on.\n",
            starts.hosts,
            starts.clients,
            starts.calls.len(),
            boots.bare.len(),
        )?;
        writeln!(out, "| | |\n| --- | ---: |")?;
        let middle = |times: &[f64]| median(times.iter().copied());
        let both = |times: &[f64]| format!("{:.1} / {:.1}", middle(times), quantile(times, 0.99));
        let more = middle(&boots.through_the_pool) - middle(&boots.bare);
        let rows: [(&str, String); 5] = [
            ("starts per second, simulated (median round)", format!("{:.0}", middle(&starts.rates))),
            ("… ms (p50 / p99)", both(&starts.calls)),
            ("a start on QEMU, ms (p50 / p99)", both(&boots.through_the_pool)),
            ("bare QEMU, ms (p50 / p99)", both(&boots.bare)),
            ("the pool's part, ms (difference of the medians)", format!("{more:.1}")),
        ];
        for (name, value) in rows {
            writeln!(out, "| {name} | {value} |")?;
        }
        writeln!(
            out,
            "\n## Disks\n\nThe `file` driver. Clone and snapshot of a sparse disk of 10 GiB, {} times each; copies of a disk with \
             {} MiB of noise into the same SR, by turns with `qemu-img convert` of the same image; both are synced when they count as done.\n",
            disks.clone.len(),
            disks.copied >> 20,
        )?;
        writeln!(out, "| | |\n| --- | ---: |")?;
        let (copy, convert) = (disks.rate(middle(&disks.copy)), disks.rate(middle(&disks.convert)));
        let rows: [(&str, String); 5] = [
            ("`VDI.clone`, ms (p50 / p99)", both(&disks.clone)),
            ("`VDI.snapshot`, ms (p50 / p99)", both(&disks.snapshot)),
            ("`VDI.copy`, MB/s (median)", format!("{copy:.0}")),
            ("`qemu-img convert`, MB/s (median)", format!("{convert:.0}")),
            ("copy ÷ convert", format!("{:.2}", copy / convert)),
        ];
        for (name, value) in rows {
            writeln!(out, "| {name} | {value} |")?;
        }
        Ok(())
    }
}

/// Virtual machines and disks alone.
pub fn real_alone(real: &Real) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = real.write(&mut text);
    text
}

fn large(out: &mut String, scale: &Scale) -> std::fmt::Result {
    let size = &scale.size;
    writeln!(
        out,
        "\n## A large pool\n\n{} hosts with an agent each, {} VMs; three hosts keep the state (so many controllers on \
         this machine would measure its scheduler). {:.0} s for each measurement.\n",
        size.hosts, size.vms, size.seconds
    )?;
    writeln!(out, "| | |\n| --- | ---: |")?;
    let read = &scale.read;
    let ratio = scale.writes_beside_reads.latency(0.99) / scale.writes.latency(0.99);
    let delays = |watched: &Watched| format!("{:.1} / {:.1}", watched.event(0.5), watched.event(0.99));
    let rows: [(&str, String); 15] = [
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
    ];
    for (name, value) in rows {
        writeln!(out, "| {name} | {value} |")?;
    }
    restored(out, &scale.restored)?;
    writeln!(
        out,
        "\n{} watchers wait in `event.from`; {} changes a second were asked for.",
        size.watchers, size.changes
    )
}

fn restored(out: &mut String, restored: &Restored) -> std::fmt::Result {
    let rows: [(&str, String); 6] = [
        ("the database as a file, MB", format!("{:.0}", restored.bytes as f64 / 1e6)),
        ("… fetched, s", format!("{:.1}", restored.dump)),
        ("… put back as a dry run, s", format!("{:.1}", restored.dry_run)),
        ("… put back, with another name for every VM, s", format!("{:.1}", restored.restore)),
        ("longest pause of 4 writers meanwhile, ms", format!("{:.0}", restored.pause)),
        ("… while nothing else is done, ms", format!("{:.0}", restored.pause_at_rest)),
    ];
    for (name, value) in rows {
        writeln!(out, "| {name} | {value} |")?;
    }
    if !restored.same_master {
        writeln!(out, "| another host became master over it | yes |")?;
    }
    Ok(())
}

fn loads(out: &mut String, loads: &[Load]) -> std::fmt::Result {
    writeln!(
        out,
        "| clients | xenith /s | etcd /s | ratio | xenith p50 | p99 | etcd p50 | p99 |\n\
         | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )?;
    for Load { clients, pool, etcd } in loads {
        let of_etcd = |value: &dyn Fn(&Rounds) -> String| etcd.as_ref().map_or_else(|| "–".to_owned(), value);
        let cells: [&dyn Display; 8] = [
            clients,
            &format!("{:.0}", pool.rate()),
            &of_etcd(&|etcd| format!("{:.0}", etcd.rate())),
            &of_etcd(&|etcd| format!("{:.2}", pool.rate() / etcd.rate())),
            &format!("{:.2}", pool.latency(0.5)),
            &format!("{:.2}", pool.latency(0.99)),
            &of_etcd(&|etcd| format!("{:.2}", etcd.latency(0.5))),
            &of_etcd(&|etcd| format!("{:.2}", etcd.latency(0.99))),
        ];
        for cell in cells {
            write!(out, "| {cell} ")?;
        }
        writeln!(out, "|")?;
    }
    writeln!(out)
}

/// The large pool's part alone.
pub fn alone(scale: &Scale) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = large(&mut text, scale);
    text
}

/// What a restore gave, alone.
pub fn restore_alone(measured: &Restored) -> String {
    let mut text = format!("| a pool of {} VMs | |\n| --- | ---: |\n", measured.vms);
    // Writing to a string cannot fail.
    let _ = restored(&mut text, measured);
    text
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
