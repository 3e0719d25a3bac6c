//! One QEMU process per domain, driven by QMP, on KVM where that works.
//!
//! The processes are nobody's children for long: they outlive the agent, which finds them again by the directory
//! they work in. `launch` says what a spec means on the command line, `blocks` and `nics` what disks and NICs do;
//! `domain` owns a living one, with `plugging` for its disks, `saving` for its memory on disk, `balance` for what it has of
//! its host, and `guest` for what its guest says; `description` is what is kept about it, `process` notices its end, `qmp`
//! talks to it, `probe` chooses the accelerator.

mod balance;
mod blocks;
mod description;
mod domain;
mod guest;
mod launch;
mod nics;
mod plugging;
mod probe;
mod process;
mod qmp;
mod request;
mod saving;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use uuid::Uuid;

use super::domain::{Disk, DomainSpec, DomainState, Medium, Power, Reason, Reboot, Refusal};
use super::roster::{Reservation, Roster};
use super::saved::Saved;
use super::{DomainIds, Features, Hypervisor, OpenError, Plugged, Site, Unplug};
use crate::config::{AcceleratorChoice, Config};
use crate::facts::unix_seconds;
use crate::files;
use description::{Description, Phase};
use domain::{Domain, Handles, Images, Shared};
use launch::Accelerator;
use process::Process;
use qmp::{Event, Qmp};
use request::{Request, What};

/// How long QEMU may take from its start to its first answer, on a machine that is busy.
const LAUNCH: Duration = Duration::from_secs(30);
/// How long a QEMU of a former agent may take to answer before the agent serves without it.
const FIND: Duration = Duration::from_secs(2);
/// The longest a step waits for a domain's task, beyond what the guest was given.
const STEP: Duration = Duration::from_secs(30);
/// How long the guest has to let go of a vCPU.
const VCPUS: Duration = Duration::from_secs(20);
/// How long memory may take on its way to an image or from one.
const MEMORY: Duration = Duration::from_secs(1200);
/// A reset that meets the building of another machine begins again so often.
const RESETS: u32 = 3;
/// How long images may take to be joined.
const JOIN: Duration = Duration::from_secs(24 * 3600);

/// What a start has come to: a domain that may run.
struct Built {
    description: Description,
    process: Process,
    child: Child,
    link: (Qmp, mpsc::Receiver<Event>),
}

/// An image that a domain is to be filled from.
struct Source {
    path: PathBuf,
    saved: Saved,
    file: fs::File,
}

/// The driver.
#[derive(Debug)]
pub struct Qemu {
    binary: PathBuf,
    version: String,
    accelerator: Accelerator,
    domains: PathBuf,
    ids: DomainIds,
    shared: Shared,
}

/// Whether there is a QEMU on this machine.
pub(super) fn present(config: &Config) -> bool {
    let binary = binary(config);
    if binary.components().count() > 1 {
        return binary.exists();
    }
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(&binary).exists()))
}

fn binary(config: &Config) -> PathBuf {
    config.qemu_binary.clone().unwrap_or_else(|| PathBuf::from("qemu-system-x86_64"))
}

impl Qemu {
    /// Finds QEMU, its accelerator, and the domains of a former agent.
    pub async fn open(site: Site) -> Result<Self, OpenError> {
        let binary = binary(&site.config);
        let version = version(&binary).await?;
        let accelerator = match site.config.accelerator {
            AcceleratorChoice::Kvm => Accelerator::Kvm,
            AcceleratorChoice::Tcg => Accelerator::Tcg,
            AcceleratorChoice::Auto => probe::accelerator(&binary, &version, &site.config.state_dir).await,
        };
        let domains = site.config.state_dir.join("domains");
        fs::create_dir_all(&domains)?;
        let shared = Shared {
            roster: Roster::new(site.capacity),
            handles: Arc::new(Handles::default()),
            images: Arc::new(Images::default()),
            version: version.as_str().into(),
            tasks: site.tasks,
            shutdown: site.shutdown,
        };
        let ids = DomainIds::open(&site.config.state_dir, &site.boot_id)?;
        let driver = Self { binary, version, accelerator, domains: fs::canonicalize(domains)?, ids, shared };
        driver.find_again().await?;
        Ok(driver)
    }

    /// Takes in the domains that a former agent left, and clears away what is none.
    async fn find_again(&self) -> io::Result<()> {
        let mut living = process::living_in(&self.domains)?;
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.domains)? {
            let dir = entry?.path();
            let pids = living.remove(&dir).unwrap_or_default();
            match (Description::load(&dir), pids.as_slice()) {
                (Ok(description), [pid]) if description.phase == Phase::Live => {
                    found.push(self.take_in(description, dir.clone(), *pid));
                }
                (description, _) => {
                    let why = description.map_or_else(|error| error.to_string(), |it| format!("{:?}", it.phase));
                    tracing::info!(dir = %dir.display(), ?pids, why, "this is no domain any more");
                    take_down(&pids).await;
                    fs::remove_dir_all(&dir)?;
                }
            }
        }
        for (dir, pids) in living {
            tracing::warn!(dir = %dir.display(), ?pids, "a QEMU without a directory is ended");
            take_down(&pids).await;
        }
        for outcome in join_all(found).await {
            outcome?;
        }
        Ok(())
    }

    async fn take_in(&self, description: Description, dir: PathBuf, pid: i32) -> io::Result<()> {
        let state = description.state.clone();
        self.shared.images.lock().insert(state.vm, description.images());
        let Ok(process) = Process::open(pid) else {
            tracing::info!(vm = %state.vm, pid, "a domain ended while it was found");
            self.shared.images.lock().remove(&state.vm);
            return fs::remove_dir_all(&dir);
        };
        tracing::info!(vm = %state.vm, domid = state.domid, pid, "found a domain again");
        let link = match Qmp::connect(&dir, FIND, &self.shared.tasks).await {
            Ok(link) => Some(link),
            Err(error) => {
                tracing::warn!(vm = %state.vm, %error, "its QEMU does not listen yet");
                None
            }
        };
        let domain = Domain::new(description, &dir, process, None, link, self.shared.clone());
        self.look_after(domain, || self.shared.roster.adopt(state));
        Ok(())
    }

    /// Hands a domain to a task of its own. It is entered in the roster by `enter`: after there is a way to it, so
    /// that who sees it can reach it, and before its task runs, so that nobody hears of its end first.
    fn look_after(&self, domain: Domain, enter: impl FnOnce()) {
        let (handle, mailbox) = mpsc::channel(16);
        self.shared.handles.lock().insert(domain.vm(), handle);
        enter();
        self.shared.tasks.spawn(domain.run(mailbox));
    }

    async fn build(
        &self,
        spec: DomainSpec,
        paused: bool,
        by: &str,
        from: Option<Source>,
    ) -> Result<DomainState, Refusal> {
        launch::check(&spec)?;
        let vm = spec.vm;
        let reservation = self.shared.roster.reserve(vm, spec.memory())?;
        let dir = self.domains.join(vm.to_string());
        self.shared.images.lock().insert(vm, spec.disks.clone());
        match self.build_in(&dir, spec, paused, by, from, &reservation).await {
            Ok(Built { description, process, child, link }) => {
                let (state, pid) = (description.state.clone(), process.pid());
                let domain = Domain::new(description, &dir, process, Some(child), Some(link), self.shared.clone());
                self.look_after(domain, || reservation.settle(state.clone()));
                tracing::info!(vm = %state.vm, domid = state.domid, pid, "a domain is there");
                Ok(state)
            }
            Err(refusal) => {
                let _ = fs::remove_dir_all(&dir);
                self.shared.images.lock().remove(&vm);
                Err(refusal)
            }
        }
    }

    async fn build_in(
        &self,
        dir: &Path,
        spec: DomainSpec,
        paused: bool,
        by: &str,
        from: Option<Source>,
        reservation: &Reservation,
    ) -> Result<Built, Refusal> {
        let domid = self.ids.next().map_err(Refusal::failed)?;
        let _ = fs::remove_dir_all(dir);
        fs::create_dir(dir).map_err(Refusal::failed)?;
        let state = self.first_state(&spec, dir, domid, paused, by, from.as_ref());
        let mut description = Description::new(spec, state);
        let arguments = launch::arguments(&description, self.accelerator, from.as_ref().map(|from| &from.saved));
        // Before there is a process, so that a successor that finds one knows it as half built.
        description.save(dir).map_err(Refusal::failed)?;
        let boot_failed = |what: String| Refusal::new(Reason::BootFailed, what);
        let mut child = launch::spawn(&self.binary, dir, &arguments)
            .map_err(|error| boot_failed(format!("{}: {error}", self.binary.display())))?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).ok_or_else(|| boot_failed("no process".into()))?;
        let process = Process::open(pid).map_err(Refusal::failed)?;

        let image = from.as_ref().map(|from| from.path.clone());
        let refused = |what: String| {
            let image = image.as_deref().and_then(|image| saving::why_not_filled(image, &what));
            image.or_else(|| blocks::why_not_open(&what)).unwrap_or_else(|| boot_failed(what))
        };
        let linked = tokio::select! {
            link = self.switch_on(dir, &description, paused, from) => match link {
                Ok(link) => Ok(link),
                // It may be on its way out, and its last words are better than ours.
                Err(refusal) => match timeout(FIND, process.ended()).await {
                    Ok(()) => Err(refused(said(dir))),
                    Err(_) => Err(refusal),
                },
            },
            () = process.ended() => Err(refused(said(dir))),
            () = reservation.cancelled() => Err(Refusal::new(Reason::BadState, "halted")),
        };
        let finished = linked.and_then(|link| {
            description.phase = Phase::Live;
            description.save(dir).map_err(Refusal::failed)?;
            Ok(link)
        });
        match finished {
            Ok(link) => Ok(Built { description, process, child, link }),
            Err(refusal) => {
                process.kill();
                let _ = timeout(STEP, child.wait()).await;
                Err(refusal)
            }
        }
    }

    /// Waits for QEMU to answer, fills it if it is to be, and lets the vCPUs run.
    async fn switch_on(
        &self,
        dir: &Path,
        description: &Description,
        paused: bool,
        from: Option<Source>,
    ) -> Result<(Qmp, mpsc::Receiver<Event>), Refusal> {
        let failed = |error: qmp::QmpError| Refusal::new(Reason::BootFailed, format!("{error}: {}", said(dir)));
        let (spec, state) = (&description.spec, &description.state);
        let mut link = Qmp::connect(dir, LAUNCH, &self.shared.tasks).await.map_err(failed)?;
        nics::connect(spec, state.domid).await?;
        match from {
            Some(Source { file, .. }) => saving::fill(&mut link, file, MEMORY).await.map_err(failed)?,
            None if spec.target() < spec.memory() => {
                balance::inflate(&link.0, spec.target(), LAUNCH).await.map_err(failed)?;
            }
            None => {}
        }
        if !paused {
            link.0.execute("cont", json!({}), LAUNCH).await.map_err(failed)?;
        }
        Ok(link)
    }

    fn first_state(
        &self,
        spec: &DomainSpec,
        dir: &Path,
        domid: i64,
        paused: bool,
        by: &str,
        from: Option<&Source>,
    ) -> DomainState {
        let console = |protocol: &str, socket: &str| super::domain::Console {
            protocol: protocol.to_owned(),
            location: format!("unix:{}", dir.join(socket).display()),
        };
        DomainState {
            vm: spec.vm,
            power: if paused { Power::Paused } else { Power::Running },
            domid,
            memory_actual: from.map_or(spec.memory(), |from| from.saved.memory_actual),
            memory_target: spec.target(),
            start_time: unix_seconds(),
            consoles: vec![console("rfb", "vnc"), console("vt100", "console")],
            generation: spec.generation,
            ..DomainState::halted(spec.vm, by, "")
        }
    }

    /// Builds a domain anew when its guest has gone off, as another machine. One that was reset meanwhile has rebooted.
    async fn reboot_anew(&self, vm: Uuid, spec: DomainSpec, limit: Duration, by: &str) -> Result<DomainState, Refusal> {
        let ended = self.ask(vm, What::Reboot { clean: true, anew: true }, limit, by).await?;
        if ended.power != Power::Halted {
            return Ok(ended);
        }
        match self.start(spec, false, by).await {
            Err(refusal) if refusal.reason == Reason::DomainExists => {
                self.shared.roster.built(vm, LAUNCH).await.ok_or_else(|| Refusal::new(Reason::BadState, "halted"))
            }
            outcome => outcome,
        }
    }

    /// Builds a domain anew whatever its guest wants. A clean reboot may be at building one at the same moment.
    async fn reset_anew(&self, vm: Uuid, spec: DomainSpec, by: &str) -> Result<DomainState, Refusal> {
        let mut attempts = 0;
        loop {
            self.destroy(vm, by).await?;
            attempts += 1;
            match self.start(spec.clone(), false, by).await {
                Err(refusal) if refusal.reason == Reason::DomainExists && attempts < RESETS => {}
                outcome => return outcome,
            }
        }
    }

    /// Hands a request to the domain's task and waits for what comes of it.
    async fn ask(&self, vm: Uuid, what: What, limit: Duration, by: &str) -> Result<DomainState, Refusal> {
        let handle = self.shared.handles.lock().get(&vm).cloned().ok_or_else(|| Refusal::no_such_domain(vm))?;
        let (answer, answered) = oneshot::channel();
        let request = Request { what, limit, by: by.to_owned(), answer };
        // A task that has just ended takes no request: the domain is gone.
        let late = |_| Refusal::new(Reason::TimedOut, "the domain's QEMU does not answer");
        let sent = timeout(STEP, handle.send(request)).await.map_err(late)?;
        sent.map_err(|_| Refusal::no_such_domain(vm))?;
        let outcome = timeout(limit.saturating_add(STEP), answered).await.map_err(late)?;
        outcome.unwrap_or_else(|_| Err(Refusal::no_such_domain(vm)))
    }
}

#[async_trait]
impl Hypervisor for Qemu {
    fn features(&self) -> Features {
        Features {
            name: "qemu",
            version: self.version.clone(),
            accelerator: self.accelerator.name(),
            abilities: &["console:rfb", "console:vt100", "disk:plug", "memory:balloon", "suspend"],
        }
    }

    fn roster(&self) -> &Arc<Roster> {
        &self.shared.roster
    }

    async fn start(&self, spec: DomainSpec, paused: bool, by: &str) -> Result<DomainState, Refusal> {
        self.build(spec, paused, by, None).await
    }

    async fn destroy(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal> {
        self.shared.roster.cancel_building(vm, STEP).await?;
        match self.ask(vm, What::Destroy, Duration::ZERO, by).await {
            Err(refusal) if refusal.reason == Reason::NoSuchDomain => Ok(DomainState::halted(vm, by, "")),
            outcome => outcome,
        }
    }

    async fn pause(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal> {
        self.ask(vm, What::Pause, Duration::ZERO, by).await
    }

    async fn unpause(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal> {
        self.ask(vm, What::Unpause, Duration::ZERO, by).await
    }

    async fn shutdown(&self, vm: Uuid, limit: Duration, by: &str) -> Result<DomainState, Refusal> {
        self.ask(vm, What::Shutdown, limit, by).await
    }

    async fn reboot(&self, vm: Uuid, reboot: Reboot, by: &str) -> Result<DomainState, Refusal> {
        let kept = Description::load(&self.domains.join(vm.to_string())).ok();
        let anew = kept.and_then(|kept| {
            let spec = reboot.spec.clone().unwrap_or_else(|| kept.spec.clone());
            let young = self.shared.roster.is_building(vm) || kept.firmware_may_be_at_work();
            ((young && !reboot.clean) || !kept.spec.same_machine(&spec)).then_some(spec)
        });
        match anew {
            // Another machine: the old one goes as asked, then the new one is built. So does one that is too young to
            // be reset.
            Some(spec) => {
                launch::check(&spec)?;
                if reboot.clean {
                    self.reboot_anew(vm, spec, reboot.limit, by).await
                } else {
                    self.reset_anew(vm, spec, by).await
                }
            }
            None => self.ask(vm, What::Reboot { clean: reboot.clean, anew: false }, reboot.limit, by).await,
        }
    }

    async fn suspend(&self, vm: Uuid, into: &Path, keep_running: bool, by: &str) -> Result<DomainState, Refusal> {
        match self.ask(vm, What::Suspend { into: into.to_owned(), keep_running }, MEMORY, by).await {
            Err(refusal) if refusal.reason == Reason::NoSuchDomain && Saved::is_of(into, vm, by) => {
                Ok(DomainState::halted(vm, by, "suspended"))
            }
            outcome => outcome,
        }
    }

    async fn resume(&self, mut spec: DomainSpec, from: &Path, paused: bool, by: &str) -> Result<DomainState, Refusal> {
        let (saved, file) = Saved::open(from)?;
        if saved.driver != "qemu" || saved.vm != spec.vm {
            let detail = format!("{} is of VM {} by {}", from.display(), saved.vm, saved.driver);
            return Err(Refusal::new(Reason::Damaged, detail));
        }
        // The machine is what it was, whatever is wanted of it next.
        spec.memory_static_max = saved.memory;
        spec.memory_target = saved.memory_target;
        spec.vcpus_at_startup = saved.vcpus;
        self.build(spec, paused, by, Some(Source { path: from.to_owned(), saved, file })).await
    }

    async fn set_memory_target(&self, vm: Uuid, bytes: u64, by: &str) -> Result<DomainState, Refusal> {
        self.ask(vm, What::MemoryTarget(bytes), Duration::ZERO, by).await
    }

    async fn set_vcpus(&self, vm: Uuid, number: u32, by: &str) -> Result<DomainState, Refusal> {
        self.ask(vm, What::Vcpus(number), VCPUS, by).await
    }

    async fn send_sysrq(&self, vm: Uuid, letter: char, by: &str) -> Result<DomainState, Refusal> {
        self.ask(vm, What::SysRq(letter), Duration::ZERO, by).await
    }

    async fn plug_disk(&self, vm: Uuid, disk: Disk, by: &str) -> Result<DomainState, Refusal> {
        self.ask(vm, What::Plug(disk), Duration::ZERO, by).await
    }

    async fn unplug_disk(&self, vm: Uuid, vbd: &str, how: Unplug, by: &str) -> Result<DomainState, Refusal> {
        self.ask(vm, What::Unplug { vbd: vbd.to_owned(), force: how.force }, how.limit, by).await
    }

    async fn change_medium(
        &self,
        vm: Uuid,
        vbd: &str,
        medium: Option<Medium>,
        by: &str,
    ) -> Result<DomainState, Refusal> {
        self.ask(vm, What::Medium { vbd: vbd.to_owned(), medium }, Duration::ZERO, by).await
    }

    fn plugged(&self) -> Vec<Plugged> {
        let images = self.shared.images.lock();
        let disks = images.iter().flat_map(|(vm, disks)| disks.iter().map(|disk| (*vm, disk.clone())));
        disks.map(|(vm, disk)| Plugged { vm, disk }).collect()
    }

    async fn relink_disk(&self, vm: Uuid, vbd: &str, overlay: &Path) -> Result<(), Refusal> {
        let what = What::Relink { vbd: vbd.to_owned(), overlay: overlay.to_owned() };
        self.ask(vm, what, Duration::ZERO, "").await.map(drop)
    }

    async fn resize_disk(&self, vm: Uuid, vbd: &str, bytes: u64) -> Result<(), Refusal> {
        self.ask(vm, What::Resize { vbd: vbd.to_owned(), bytes }, Duration::ZERO, "").await.map(drop)
    }

    async fn join_disk(&self, vm: Uuid, vbd: &str, base: Option<&Path>) -> Result<(), Refusal> {
        let what = What::Join { vbd: vbd.to_owned(), base: base.map(Path::to_owned) };
        self.ask(vm, what, JOIN, "").await.map(drop)
    }
}

/// What QEMU wrote before it ended.
fn said(dir: &Path) -> String {
    let said = files::tail(&dir.join("qemu.log"), 2000);
    if said.is_empty() { "QEMU ended without a word".to_owned() } else { said }
}

/// Ends processes that are no domains, and waits a moment for their end.
async fn take_down(pids: &[i32]) {
    for pid in pids {
        match Process::open(*pid) {
            Ok(process) => {
                process.kill();
                if timeout(FIND, process.ended()).await.is_err() {
                    tracing::error!(pid, "a QEMU does not end");
                }
            }
            Err(error) => tracing::debug!(pid, %error, "a QEMU has ended by itself"),
        }
    }
}

/// Asks QEMU for its version: "7.2.22".
async fn version(binary: &Path) -> Result<String, OpenError> {
    let failed = |why: String| OpenError::Program { program: binary.display().to_string(), why };
    let call = Command::new(binary).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = timeout(LAUNCH, call).await.map_err(|_| failed("no answer".into()))?;
    let output = output.map_err(|error| failed(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_once("version ").and_then(|(_, rest)| rest.split_whitespace().next());
    version.map(str::to_owned).ok_or_else(|| failed(String::from_utf8_lossy(&output.stderr).into_owned()))
}
