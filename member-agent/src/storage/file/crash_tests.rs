//! The agent dies at every point of every step, and each time the images are whole, `scan` has a true answer, nothing
//! is left behind, and the step can be done again.
//!
//! It really dies: the test runs itself as another process, which aborts at the point that it is told.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::hypervisor::sim::Faults;
use crate::step::{Reason, Refusal};
use crate::storage::words::{Access, NewVolume, StoreSpec, StoreState};
use crate::storage::{Place, Programs, Site, Source, Store, User, Users};

const MIB: u64 = 1024 * 1024;
const SR: Uuid = Uuid::from_u128(1);
const VOLUME: Uuid = Uuid::from_u128(0x10);
const OTHER: Uuid = Uuid::from_u128(0x20);

struct Nobody;

#[async_trait]
impl Users for Nobody {
    fn all(&self) -> Vec<User> {
        Vec::new()
    }
    async fn relink(&self, _: &User, _: &Path) -> Result<(), Refusal> {
        Ok(())
    }
    async fn resize(&self, _: &User, _: u64) -> Result<(), Refusal> {
        Ok(())
    }
    async fn join(&self, _: &User, _: Option<&Path>) -> Result<(), Refusal> {
        Ok(())
    }
}

async fn store(dir: &Path, programs: Option<PathBuf>) -> Arc<dyn Store> {
    let device_config = BTreeMap::from([("location".to_owned(), dir.join("store").display().to_string())]);
    let site = Site {
        state_dir: dir.to_owned(),
        storage_dir: dir.to_owned(),
        boot_id: String::new(),
        simulated: false,
        faults: Arc::new(Faults::open(dir, "sim-stores")),
        programs: Programs::new(programs),
        users: Arc::new(Nobody),
        tasks: TaskTracker::new(),
        shutdown: CancellationToken::new(),
    };
    fs::create_dir_all(dir.join("store")).expect("directory");
    let spec = StoreSpec { sr: SR, driver: "file".to_owned(), device_config };
    let store = super::open(Place { spec, site: Arc::new(site) }).expect("opens");
    store.attach().await.expect("attaches");
    store
}

fn location(vdi: Uuid) -> String {
    format!("{vdi}.qcow2")
}

/// The steps that are died at.
async fn act(store: &dyn Store, what: &str) -> Result<(), Refusal> {
    let volume = location(VOLUME);
    match what {
        "create" => {
            let new = NewVolume { vdi: OTHER, virtual_size: 4 * MIB, kind: "user".to_owned(), raw: false };
            store.create_volume(&new).await.map(drop)
        }
        "snapshot" => store.branch(&volume, OTHER, true).await.map(drop),
        "clone" => store.branch(&volume, OTHER, false).await.map(drop),
        "resize" => store.resize(&volume, 128 * MIB).await.map(drop),
        "copy" => {
            let access = Access { read_only: true, sharable: false, vm: None };
            let state = store.volume(&volume).await?;
            let source = Source { opened: store.open(&volume, access).await?, state };
            store.fill(&source, OTHER, "").await.map(drop)
        }
        "revert" => store.revert(&volume, &location(OTHER)).await.map(drop),
        "destroy" => store.destroy_volume(&location(OTHER)).await,
        "join" => store.scan().await.map(drop),
        other => panic!("there is no step {other}"),
    }
}

/// What the other process does.
#[tokio::test]
#[ignore = "run by the other tests, which tell it where"]
async fn died_at() {
    let Some(dir) = std::env::var_os("XENITH_DIE_IN").map(PathBuf::from) else { return };
    let programs = dir.join("programs");
    let store = store(&dir, programs.exists().then_some(programs)).await;
    let what = std::env::var("XENITH_DIE_OF").expect("a step");
    if let Err(refusal) = act(&*store, &what).await {
        panic!("{refusal}");
    }
}

fn elsewhere(dir: &Path, what: &str, last: usize) -> Output {
    let program = std::env::current_exe().expect("a path");
    let test = format!("{}::died_at", module_path!().split_once("::").expect("below the crate").1);
    let mut command = Command::new(program);
    command.args(["--exact", &test, "--ignored", "--nocapture", "--test-threads=1"]);
    command.env("XENITH_DIE_IN", dir).env("XENITH_DIE_OF", what).env("XENITH_DIE_AT", last.to_string());
    command.output().expect("runs")
}

fn qemu(program: &str, dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(dir).output().expect("runs");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    said
}

fn write(dir: &Path, vdi: Uuid, pattern: u8, range: &str) {
    let command = format!("write -P {pattern} {range}");
    qemu("qemu-io", &dir.join("store"), &["-f", "qcow2", "-c", &command, &location(vdi)]);
}

/// Whether the volume has this pattern there; -U: whoever else has it open.
fn reads(dir: &Path, vdi: Uuid, pattern: u8, range: &str) -> bool {
    let command = format!("read -P {pattern} {range}");
    let path = location(vdi);
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-r", "-f", "qcow2", "-c", &command, &path]).current_dir(dir.join("store"));
    let output = qemu_io.output().expect("runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success() && !said.contains("verification failed")
}

fn images(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir.join("store")).expect("list").filter_map(Result::ok);
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with("image-")).collect()
}

fn all_clean(dir: &Path, when: &str) {
    let unclean = unclean(dir, when);
    assert!(unclean.is_none(), "{}", unclean.unwrap_or_default());
}

/// What is wrong with an image, if something is with any.
fn unclean(dir: &Path, when: &str) -> Option<String> {
    images(dir).into_iter().find_map(|image| {
        let output = Command::new("qemu-img").args(["check", &image]).current_dir(dir.join("store")).output();
        let output = output.expect("runs");
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.code() != Some(0)).then(|| format!("{when}: {image}: {said}"))
    })
}

/// Waits until nothing works in the store any more: of two qemu-imgs that run at once, one outlives whoever began them,
/// and what it has open is in use as long as it does.
fn until_alone(dir: &Path) {
    let store = fs::canonicalize(dir.join("store")).expect("store");
    let name = dir.to_string_lossy().into_owned();
    // In the store, or just about to be started there by one whose environment names it.
    let works = |entry: &fs::DirEntry| {
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == store)
            || String::from_utf8_lossy(&environment).contains(&name)
    };
    let begun = std::time::Instant::now();
    while fs::read_dir("/proc").expect("proc").flatten().any(|entry| works(&entry)) {
        assert!(begun.elapsed().as_secs() < 30, "something goes on in {}", store.display());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// A volume with a snapshot below it where the step needs one.
async fn prepare(dir: &Path, what: &str) {
    let store = store(dir, None).await;
    let new = NewVolume { vdi: VOLUME, virtual_size: 64 * MIB, kind: "user".to_owned(), raw: false };
    store.create_volume(&new).await.expect("made");
    write(dir, VOLUME, 1, "0 2M");
    if matches!(what, "revert" | "destroy" | "join") {
        store.branch(&location(VOLUME), OTHER, true).await.expect("snapshot");
        write(dir, VOLUME, 2, "1M 2M");
    }
    if what == "join" {
        store.destroy_volume(&location(OTHER)).await.expect("destroyed");
    }
}

/// What holds after a crash, whether the step had its effect or not.
fn whole(dir: &Path, what: &str, state: &StoreState, when: &str) {
    let has = |vdi: Uuid| state.volumes.iter().find(|volume| volume.vdi == Some(vdi));
    let volume = has(VOLUME).unwrap_or_else(|| panic!("{when}: the volume is gone"));
    assert!(reads(dir, VOLUME, 1, "0 1M"), "{when}: the volume lost what was written first");
    let later = matches!(what, "destroy" | "join");
    assert!(!later || reads(dir, VOLUME, 2, "1M 2M"), "{when}: the volume lost what was written later");
    assert!(what != "revert" || reads(dir, VOLUME, 1, "0 2M") || reads(dir, VOLUME, 2, "1M 2M"), "{when}: neither");
    assert!([64 * MIB, 128 * MIB].contains(&volume.virtual_size), "{when}: {volume:?}");
    if let Some(other) = has(OTHER) {
        assert_eq!(other.read_only, matches!(what, "snapshot" | "revert" | "destroy"), "{when}: {other:?}");
        assert!(what == "create" || reads(dir, OTHER, 1, "0 2M"), "{when}: the other one is not what it was");
    }
}

/// After the step itself.
fn done(dir: &Path, what: &str, state: &StoreState, when: &str) {
    whole(dir, what, state, when);
    let has = |vdi: Uuid| state.volumes.iter().find(|volume| volume.vdi == Some(vdi));
    assert_eq!(has(OTHER).is_some(), !matches!(what, "destroy" | "join" | "resize"), "{when}: {state:?}");
    if what == "resize" {
        assert_eq!(has(VOLUME).map(|volume| volume.virtual_size), Some(128 * MIB), "{when}");
    }
    if what == "revert" {
        assert!(reads(dir, VOLUME, 1, "0 2M"), "{when}: it did not go back");
    }
}

async fn nothing_is_left(dir: &Path, store: &dyn Store, when: &str) {
    for vdi in [VOLUME, OTHER] {
        store.destroy_volume(&location(vdi)).await.expect("destroyed");
    }
    store.scan().await.expect("scan");
    let left: Vec<_> = fs::read_dir(dir.join("store")).expect("list").filter_map(Result::ok).collect();
    let left: Vec<_> = left.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    assert!(left.iter().all(|name| name.starts_with(".xenith-")), "{when}: {left:?}");
}

async fn dies_everywhere(what: &str, least: usize) {
    let mut deaths = 0;
    loop {
        let place = tempfile::tempdir().expect("directory");
        let dir = place.path();
        prepare(dir, what).await;
        let output = elsewhere(dir, what, deaths);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let died = said.lines().find(|line| line.starts_with("dies at ")).map(str::to_owned);
        let when = died.clone().map_or_else(|| format!("{what}, to its end"), |at| format!("{what} {at}"));
        assert_eq!(output.status.success(), died.is_none(), "{when}: {said}");
        // Before anybody looks, it is whole already.
        all_clean(dir, &when);
        let store = store(dir, None).await;
        let state = store.scan().await.expect("scan");
        all_clean(dir, &when);
        whole(dir, what, &state, &when);
        if died.is_some() {
            // What a master does that never got an answer.
            match act(&*store, what).await {
                Err(refusal) if refusal.reason == Reason::VolumeExists => {}
                outcome => outcome.unwrap_or_else(|refusal| panic!("{when}, again: {refusal}")),
            }
        }
        let state = store.scan().await.expect("scan");
        done(dir, what, &state, &when);
        all_clean(dir, &when);
        nothing_is_left(dir, &*store, &when).await;
        if died.is_none() {
            break;
        }
        deaths += 1;
    }
    assert!(deaths >= least, "{what} has only {deaths} points to die at");
}

macro_rules! dies_in {
    ($($test:ident $what:literal $least:literal),+ $(,)?) => {
        $(#[tokio::test] async fn $test() { dies_everywhere($what, $least).await; })+
    };
}

dies_in!(
    an_agent_that_dies_making_a_volume_leaves_all_or_nothing "create" 3,
    an_agent_that_dies_in_a_snapshot_leaves_images_whole "snapshot" 5,
    an_agent_that_dies_in_a_clone_leaves_images_whole "clone" 5,
    an_agent_that_dies_in_a_resize_leaves_images_whole "resize" 1,
    an_agent_that_dies_in_a_copy_leaves_all_or_nothing "copy" 4,
    an_agent_that_dies_going_back_to_a_snapshot_leaves_images_whole "revert" 4,
    an_agent_that_dies_removing_a_volume_leaves_the_others_whole "destroy" 2,
    an_agent_that_dies_joining_images_leaves_them_whole "join" 4,
);

/// With the agent its children die on a machine that loses power: here qemu-img is killed within its work.
#[tokio::test]
async fn a_qemu_img_that_is_killed_in_the_middle_leaves_images_whole() {
    for (what, verb) in [("join", "commit"), ("copy", "convert"), ("resize", "resize"), ("snapshot", "create")] {
        for after in ["0.004", "0.008", "0.016"] {
            let place = tempfile::tempdir().expect("directory");
            let dir = place.path();
            prepare(dir, what).await;
            write(dir, VOLUME, 1, "0 1M");
            write(dir, VOLUME, 9, "8M 24M");
            let programs = dir.join("programs");
            fs::create_dir(&programs).expect("directory");
            let script = format!(
                "#!/bin/sh\nif [ \"$1\" = {verb} ]; then timeout -s KILL {after} /usr/bin/env -i PATH=\"$PATH\" qemu-img \"$@\"; \
                 kill -9 $PPID; exit 1; fi\nexec qemu-img \"$@\"\n"
            );
            fs::write(programs.join("qemu-img"), script).expect("write");
            fs::set_permissions(programs.join("qemu-img"), fs::Permissions::from_mode(0o755)).expect("mode");
            let when = format!("{what}, killed after {after} s");
            elsewhere(dir, what, usize::MAX);
            until_alone(dir);
            let store = store(dir, None).await;
            let mut state = store.scan().await.expect("scan");
            // What a qemu-img still had open in the first scan goes in a later one, and so do clusters that belong to
            // nobody, which a killed one may leave.
            for _again in 0..100 {
                if unclean(dir, &when).is_none() {
                    break;
                }
                state = store.scan().await.expect("scan");
            }
            all_clean(dir, &when);
            whole(dir, what, &state, &when);
            assert!(reads(dir, VOLUME, 9, "8M 24M"), "{when}");
            match act(&*store, what).await {
                Err(refusal) if refusal.reason == Reason::VolumeExists => {}
                outcome => outcome.unwrap_or_else(|refusal| panic!("{when}, again: {refusal}")),
            }
            all_clean(dir, &when);
            nothing_is_left(dir, &*store, &when).await;
        }
    }
}
