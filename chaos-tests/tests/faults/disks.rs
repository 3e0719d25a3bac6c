//! Disks that are full, and disks that give back something else than was written.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use chaos_tests::history::load::Load;
use chaos_tests::lab::{Lab, What};
use chaos_tests::namespace::MOUNTS;
use serde_json::json;

use crate::long_life::write_much;
use crate::support::{SOON, new_vm, refusal, until};
use crate::{SOME, log};

const REPAIRED: &str = "all that this node had lost is there again";

fn database(lab: &Lab, host: &str) -> PathBuf {
    lab.dir().join(host).join("controller")
}

/// Files of a database with that ending, the largest last.
fn files(lab: &Lab, host: &str, ending: &str) -> Vec<PathBuf> {
    let files = std::fs::read_dir(database(lab, host)).unwrap().map(|file| file.unwrap());
    let mut found: Vec<_> = files
        .filter(|file| file.path().extension().is_some_and(|extension| extension == ending))
        .map(|file| (file.metadata().unwrap().len(), file.path()))
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// Flips bits here and there in a part of a file, given in tenths of it.
fn flip(path: &Path, tenths: std::ops::Range<u64>) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    for place in (length * tenths.start / 10..length * tenths.end / 10).step_by(97) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, place).unwrap();
        file.write_all_at(&[byte[0] ^ 0x55], place).unwrap();
    }
}

/// What is done to a database while its host is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    /// The end of the log is something else.
    Tail,
    /// The end of the log is not there: it looks as a crash would leave it, and was acknowledged.
    Cut,
    /// Files that hold rows, and with them the snapshot, are something else.
    Rows,
    /// The database says that it is empty.
    Gone,
}

impl Damage {
    fn does(self, lab: &Lab, host: &str) {
        let logs = files(lab, host, "log");
        let log = logs.last().unwrap();
        match self {
            Self::Tail => flip(log, 7..10),
            Self::Cut => {
                let file = OpenOptions::new().write(true).open(log).unwrap();
                file.set_len(file.metadata().unwrap().len() / 2).unwrap();
            }
            Self::Rows => files(lab, host, "sst").iter().for_each(|file| flip(file, 0..10)),
            Self::Gone => {
                let files = std::fs::read_dir(database(lab, host)).unwrap().map(|file| file.unwrap().path());
                for file in files.filter(|file| file.is_file() && !file.ends_with("promises")) {
                    std::fs::remove_file(file).unwrap();
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_database_is_refused_and_repaired_from_the_peers_and_nothing_is_lost_meanwhile() {
    let lab = Lab::sim().await.unwrap();
    let mut load = Load::start(&lab).await.unwrap();
    let damages = [Damage::Tail, Damage::Cut, Damage::Rows, Damage::Gone];
    // One host after the other, so that in the end no host has kept what it had in the beginning.
    for (damage, host) in damages.iter().zip(lab.made().hosts.iter().cycle()) {
        let host = &host.name;
        load.some_more(SOME).await.unwrap();
        lab.kill(host, What::Host).await.unwrap();
        if *damage == Damage::Rows {
            // A start writes into such files what the log holds.
            lab.start(host, What::Host).await.unwrap();
            lab.kill(host, What::Host).await.unwrap();
            assert!(!files(&lab, host, "sst").is_empty());
        }
        let repaired = log(&lab, host).matches(REPAIRED).count();
        damage.does(&lab, host);
        load.some_more(SOME).await.unwrap();
        lab.start(host, What::Host).await.unwrap();
        until(SOON, &format!("the repair after {damage:?}"), async || {
            (log(&lab, host).matches(REPAIRED).count() > repaired).then_some(())
        })
        .await;
        assert!(log(&lab, host).contains("this database is not used any more"), "{damage:?}");
    }
    // Each of those that were repaired counts: with another host down nothing goes without it.
    for host in &lab.made().hosts {
        lab.kill(&host.name, What::Host).await.unwrap();
        load.some_more(SOME).await.unwrap();
        lab.start(&host.name, What::Host).await.unwrap();
    }
    load.some_more(SOME).await.unwrap();
    load.settle(&lab).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_damaged_databases_of_three_never_make_a_majority() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap().with_call_limit(SOON);
    let vm = new_vm(&mut client, "kept by one host alone").await;
    let [one, two, three] = [0, 1, 2].map(|place| lab.made().hosts[place].name.clone());
    lab.kill(&three, What::Controller).await.unwrap();
    client.persist(SOON, "VM.set_name_description", json!([vm, "acknowledged by the two"])).await.unwrap();
    for host in [&one, &two] {
        lab.kill(host, What::Controller).await.unwrap();
        Damage::Cut.does(&lab, host);
    }
    let start = |name| lab.start(name, What::Controller);
    let started = tokio::join!(start(&one), start(&two), start(&three));
    assert!(started.0.is_ok() && started.1.is_ok() && started.2.is_ok());
    // The third has what was there before; with two that remember nothing it could lead, and must not.
    let watched = Instant::now();
    while watched.elapsed() < Duration::from_secs(3) {
        assert_eq!(lab.status().await.unwrap().master, None);
    }
    let answer = refusal(client.call("VM.get_name_description", json!([vm])).await);
    assert_eq!(answer.0, "HOST_IN_EMERGENCY_MODE");
    for host in [&one, &two] {
        assert!(log(&lab, host).contains("this database is not used any more"));
        assert!(!log(&lab, host).contains(REPAIRED));
    }
}

/// Puts a host's database on a small disk of its own.
fn on_a_small_disk(lab: &Lab, host: &str) {
    let (place, before) = (database(lab, host), lab.dir().join(host).join("before"));
    std::fs::rename(&place, &before).unwrap();
    std::fs::create_dir(&place).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=320m", "tmpfs"]).arg(&place).status().unwrap();
    assert!(mounted.success());
    for file in std::fs::read_dir(&before).unwrap().map(|file| file.unwrap()) {
        std::fs::copy(file.path(), place.join(file.file_name())).unwrap();
    }
}

/// Writes until nothing more can be written.
fn fill(path: &Path) {
    let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
    for block in [1 << 20, 4096, 1] {
        loop {
            match file.write_all(&vec![0; block]) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn a_host_whose_disk_is_full_acknowledges_nothing_and_comes_back_when_there_is_room() {
    const NAME: &str = "disks::a_host_whose_disk_is_full_acknowledges_nothing_and_comes_back_when_there_is_room";
    if MOUNTS.is_entered_for(NAME) {
        tokio::runtime::Runtime::new().unwrap().block_on(fill_the_disks_of_a_member_and_of_the_master());
    }
}

async fn fill_the_disks_of_a_member_and_of_the_master() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "written much to").await;
    let mut load = Load::start(&lab).await.unwrap();
    let master = async || until(SOON, "a master", async || lab.status().await.unwrap().master).await;
    for who in ["a member", "the master"] {
        let now = master().await;
        let other = lab.made().hosts.iter().find(|host| host.name != now).unwrap();
        let host = if who == "a member" { &other.name } else { &now };
        lab.kill(host, What::Controller).await.unwrap();
        on_a_small_disk(&lab, host);
        lab.start(host, What::Controller).await.unwrap();
        load.some_more(SOME).await.unwrap();
        if who == "the master" {
            let reference = lab.host_reference(&mut client, host).await.unwrap();
            client.persist(SOON, "pool.designate_new_master", json!([reference])).await.unwrap();
            until(SOON, "the master on the small disk", async || (master().await == *host).then_some(())).await;
        }

        let ballast = database(&lab, host).join("ballast");
        fill(&ballast);
        // The database has some room put by for its log.
        let gone = async || lab.status().await.unwrap().host(host).unwrap().controller_pid.is_none();
        for _ in 0..10 {
            if !gone().await {
                write_much(&client, std::slice::from_ref(&vm), 100).await;
            }
        }
        assert!(gone().await, "{who} goes on with a full disk");
        assert!(log(&lab, host).contains("No space left on device"), "{who}: {}", log(&lab, host));
        load.some_more(SOME).await.unwrap();

        let waits = "this host waits for room";
        let told = log(&lab, host).matches(waits).count();
        let room = async {
            until(SOON, "it to wait for room", async || (log(&lab, host).matches(waits).count() > told).then_some(()))
                .await;
            load.some_more(SOME).await.unwrap();
            std::fs::remove_file(&ballast).unwrap();
        };
        let (started, ()) = tokio::join!(lab.start(host, What::Controller), room);
        started.unwrap();
        // It counts again: without another host nothing goes without it.
        let third = lab.made().hosts.iter().find(|third| third.name != *host).unwrap();
        lab.kill(&third.name, What::Host).await.unwrap();
        load.some_more(SOME).await.unwrap();
        lab.start(&third.name, What::Host).await.unwrap();
    }
    load.settle(&lab).await.unwrap();
    // What is mounted there keeps a directory from being removed.
    for host in &lab.made().hosts {
        // Of the third there is nothing to unmount.
        let _ = Command::new("umount").arg("--lazy").arg(database(&lab, &host.name)).output();
    }
}
