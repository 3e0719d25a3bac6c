//! A host with a store, as the master sees it.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use member_agent::StoreChoice;
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::*;
use uuid::Uuid;

use super::{Client, Host, PATIENCE, POOL, operation};

/// A host with one store.
pub struct Place {
    pub host: Host,
    pub client: Client,
    pub store: Store,
}

pub type Did = Result<outcome::Result, Refusal>;

impl Place {
    /// A store of a driver that has to have a directory, in one of the host's own.
    pub async fn of(driver: &str) -> Self {
        Self::beside("sim", driver).await
    }

    /// The same, on a host with that hypervisor.
    pub async fn beside(hypervisor: &str, driver: &str) -> Self {
        let choice = if driver == "sim" { StoreChoice::Sim } else { StoreChoice::Real };
        let host = Host::start_with(hypervisor, |config| config.stores = choice).await;
        if matches!(driver, "nfs" | "lvm") {
            return Self::in_the_machine(host, driver).await;
        }
        let driver = if driver == "sim" { "file" } else { driver };
        let config = HashMap::from([("location".to_owned(), "local".to_owned())]);
        Self::on(host, driver, config).await
    }

    /// A store in the machine that has an NFS server at 127.0.0.1 and an empty device: made and attached.
    async fn in_the_machine(host: Host, driver: &str) -> Self {
        // What the test before this one left there.
        let left = ran(Command::new("vgs").args(["--noheadings", "-o", "vg_name"]));
        for group in left.split_whitespace().filter(|name| name.starts_with("xenith-")) {
            ran(Command::new("vgremove").args(["-q", "-ff", "-y", group]));
        }
        let config: &[(&str, &str)] = match driver {
            "nfs" => &[("server", "127.0.0.1"), ("serverpath", "/export"), ("nfsversion", "4.2")],
            _ => &[("device", "/dev/vdb")],
        };
        let config = config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let mut place = Self::on(host, driver, config).await;
        let store = Some(place.store.clone());
        place.store_step(Action::CreateStore(CreateStore { store, physical_size: 0 })).await.expect("made");
        let attach = place.attach();
        place.store_step(attach).await.expect("attached");
        place
    }

    /// Another host of the same pool, which has the same store attached.
    pub async fn elsewhere(&self, hypervisor: &str) -> Self {
        let host = Host::start_with(hypervisor, |config| config.stores = StoreChoice::Real).await;
        let mut place = Self { client: host.client().await, host, store: self.store.clone() };
        if let Some(location) = place.store.device_config.get_mut("location") {
            *location = self.dir().display().to_string();
        }
        let attach = place.attach();
        place.store_step(attach).await.expect("attached");
        place
    }

    pub async fn on(host: Host, driver: &str, device_config: HashMap<String, String>) -> Self {
        let client = host.client().await;
        let store = Store { sr: Uuid::new_v4().to_string(), driver: driver.to_owned(), device_config };
        Self { host, client, store }
    }

    pub async fn step_as(&mut self, operation: &str, number: u32, action: Action) -> Did {
        let step = Step {
            pool: POOL.to_owned(),
            epoch: self.client.epoch,
            operation: operation.to_owned(),
            vm: self.store.sr.clone(),
            traceparent: String::new(),
            number,
            action: Some(action),
        };
        match self.client.calls.perform(step).await.expect("call").into_inner().result.expect("outcome") {
            outcome::Result::Refusal(refusal) => Err(refusal),
            done => Ok(done),
        }
    }

    pub async fn step(&mut self, action: Action) -> Did {
        self.step_as(&operation(), 0, action).await
    }

    pub async fn store_step(&mut self, action: Action) -> Result<StoreState, Refusal> {
        self.step(action).await.map(|done| match done {
            outcome::Result::Store(state) => state,
            other => panic!("a store, not {other:?}"),
        })
    }

    pub async fn volume_step(&mut self, action: Action) -> Result<VolumeState, Refusal> {
        self.step(action).await.map(|done| match done {
            outcome::Result::Volume(state) => state,
            other => panic!("a volume, not {other:?}"),
        })
    }

    pub fn volume(&self, vdi: Uuid) -> Option<VolumeRef> {
        Some(VolumeRef { store: Some(self.store.clone()), vdi: vdi.to_string(), location: String::new() })
    }

    pub fn attach(&self) -> Action {
        Action::AttachStore(AttachStore { store: Some(self.store.clone()) })
    }

    /// As the pool probes: what is there has no SR yet.
    pub fn probe(&self) -> Action {
        Action::ProbeStore(ProbeStore { store: Some(Store { sr: String::new(), ..self.store.clone() }) })
    }

    pub fn create_of(&self, vdi: Uuid, virtual_size: u64, kind: &str) -> Action {
        Action::CreateVolume(CreateVolume {
            volume: self.volume(vdi),
            virtual_size,
            kind: kind.to_owned(),
            sm_config: HashMap::new(),
        })
    }

    pub fn destroy(&self, vdi: Uuid) -> Action {
        Action::DestroyVolume(DestroyVolume { volume: self.volume(vdi) })
    }

    pub fn snapshot(&self, vdi: Uuid, into: Uuid) -> Action {
        Action::SnapshotVolume(SnapshotVolume { volume: self.volume(vdi), into: into.to_string() })
    }

    pub fn clone_of(&self, vdi: Uuid, into: Uuid) -> Action {
        Action::CloneVolume(CloneVolume { volume: self.volume(vdi), into: into.to_string() })
    }

    pub fn resize(&self, vdi: Uuid, virtual_size: u64) -> Action {
        Action::ResizeVolume(ResizeVolume { volume: self.volume(vdi), virtual_size })
    }

    pub fn copy(&self, from: Uuid, into: Uuid) -> Action {
        Action::CopyVolume(CopyVolume { from: self.volume(from), into: self.volume(into), base: None })
    }

    pub fn revert(&self, vdi: Uuid, snapshot: Uuid) -> Action {
        Action::RevertVolume(RevertVolume { volume: self.volume(vdi), snapshot: self.volume(snapshot) })
    }

    pub async fn made(&mut self, size: u64) -> Uuid {
        let vdi = Uuid::new_v4();
        let create = self.create_of(vdi, size, "user");
        self.volume_step(create).await.expect("made");
        vdi
    }

    pub async fn scan(&mut self) -> StoreState {
        let scan = Action::ScanStore(ScanStore { store: Some(self.store.clone()), known: Vec::new() });
        self.store_step(scan).await.expect("scan")
    }

    /// Scans until there are so many images: a join that takes longer than a scan waits for goes on by itself.
    pub async fn joined(&mut self, images: usize) -> StoreState {
        let begun = Instant::now();
        loop {
            let state = self.scan().await;
            if self.images().len() == images {
                return state;
            }
            assert!(begun.elapsed() < PATIENCE, "not {images} images: {:?}", self.images());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn vdis(&mut self) -> BTreeSet<String> {
        self.scan().await.volumes.into_iter().map(|volume| volume.vdi).collect()
    }

    /// Where the images are.
    pub fn dir(&self) -> PathBuf {
        let (state, sr) = (&self.host.config.state_dir, &self.store.sr);
        match self.store.device_config.get("location").map(PathBuf::from) {
            Some(location) if location.is_absolute() => location,
            Some(location) => state.join("storage").join(location).join(sr),
            None => state.join("mounts").join(sr).join(sr),
        }
    }

    pub fn path(&self, vdi: Uuid) -> PathBuf {
        if self.store.driver == "lvm" {
            return PathBuf::from(format!("/dev/xenith-{}/{vdi}", self.store.sr));
        }
        self.dir().join(format!("{vdi}.qcow2"))
    }

    /// qemu-io at work on a volume. A logical volume is there once it is active.
    fn qemu_io(&self, arguments: &[&str], vdi: Uuid) -> String {
        let lvm = self.store.driver == "lvm";
        if lvm {
            ran(Command::new("lvchange").args(["-q", "-ay", "-K", &format!("xenith-{}/{vdi}", self.store.sr)]));
        }
        let format = if lvm { "raw" } else { "qcow2" };
        ran(Command::new("qemu-io").args(["-f", format]).args(arguments).arg(self.path(vdi)))
    }

    pub fn write(&self, vdi: Uuid, pattern: u8, range: &str) {
        let command = format!("write -P {pattern} {range}");
        self.qemu_io(&["-c", &command], vdi);
    }

    /// The volume begins with these bytes.
    pub fn begins_with(&self, vdi: Uuid, bytes: &[u8]) {
        let file = self.host.dir.path().join("bytes");
        fs::write(&file, bytes).expect("write");
        let command = format!("write -s {} 0 {}", file.display(), bytes.len());
        self.qemu_io(&["-c", &command], vdi);
    }

    pub fn reads(&self, vdi: Uuid, pattern: u8, range: &str) -> bool {
        let command = format!("read -P {pattern} {range}");
        !self.qemu_io(&["-r", "-c", &command], vdi).contains("verification failed")
    }

    pub fn images(&self) -> Vec<PathBuf> {
        if self.store.driver == "lvm" {
            return Vec::new();
        }
        let entries = fs::read_dir(self.dir()).expect("list").filter_map(Result::ok).map(|entry| entry.path());
        entries.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("image-")).collect()
    }

    pub fn all_clean(&self) {
        for image in self.images().iter().filter(|image| image.extension().is_some_and(|it| it == "qcow2")) {
            ran(Command::new("qemu-img").arg("check").arg(image));
        }
    }
}

pub fn ran(command: &mut Command) -> String {
    let output = command.output().expect("runs");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

pub fn why<T: std::fmt::Debug>(did: Result<T, Refusal>) -> Reason {
    did.expect_err("refused").reason()
}
