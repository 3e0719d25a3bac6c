//! One domain: a task that owns its state and its process from the start to the end.
//!
//! ```text
//!              pause ┌────────┐ unpause
//!   (built) ─► Running ◄────► Paused
//!                 │ guest switches itself off, panics, or its process dies; destroy
//!                 ▼
//!              (gone): directory removed, roster told, task over
//! ```
//!
//! Requests, QEMU's events and the process's end come to the task one after the other, so there is never a doubt
//! about what was first. Waiting for a guest to obey does not hold up the task: what was asked is a field with a
//! deadline, and a destroy that comes meanwhile is done at once.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::description::Description;
use super::guest;
use super::process::Process;
use super::qmp::{Event, Qmp, QmpError};
use super::request::{Answer, Pending, Request, Wait, What, answer};
use crate::facts::unix_seconds;
use crate::hypervisor::domain::{Action, Disk, DomainState, Power, Reason, Refusal, StepKind};
use crate::hypervisor::roster::Roster;

/// How long QEMU may take for a command that takes it no time.
pub(super) const COMMAND: Duration = Duration::from_secs(5);
/// How long QEMU may take to end when it is asked to; then it is ended by force.
const QUIT: Duration = Duration::from_secs(3);
/// Between two tries to reach a QEMU that lives but does not listen.
const RECONNECT: Duration = Duration::from_millis(500);
/// A guest that fails sooner than this many seconds after its start would only fail again: it is not restarted.
const TOO_SOON: u64 = 120;
/// How often the console's log is looked at, and how long it may get.
const LOG_CHECK: Duration = Duration::from_secs(10);
const LOG_LIMIT: u64 = 1 << 20;

/// The ways to the tasks of all domains.
pub(super) type Handles = Mutex<HashMap<Uuid, mpsc::Sender<Request>>>;

/// The disks of all domains, those included that are being built.
pub(super) type Images = Mutex<HashMap<Uuid, Vec<Disk>>>;

/// What all domains of the driver share.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub roster: Arc<Roster>,
    pub handles: Arc<Handles>,
    pub images: Arc<Images>,
    pub version: Arc<str>,
    pub tasks: TaskTracker,
    pub shutdown: CancellationToken,
}

/// The process is on its way out.
#[derive(Debug)]
struct Ending {
    power: Power,
    by: String,
    reason: String,
    /// When it is ended by force.
    kill: Option<Instant>,
    answers: Vec<oneshot::Sender<Answer>>,
}

/// What the task owns.
#[derive(Debug)]
pub(super) struct Domain {
    pub(super) description: Description,
    pub(super) dir: PathBuf,
    process: Process,
    child: Option<Child>,
    qmp: Option<Qmp>,
    events: mpsc::Receiver<Event>,
    pub(super) shared: Shared,
    /// What was asked and takes its time.
    pub(super) pending: Vec<Pending>,
    ending: Option<Ending>,
    reconnect: Instant,
    /// The guest's agent, while it has its port open.
    pub(super) interview: Option<DropGuard>,
    pub(super) tell: mpsc::Sender<guest::Heard>,
    heard: mpsc::Receiver<guest::Heard>,
}

impl Domain {
    /// A domain whose process is there. `child` only if this agent started it; `link` only if QEMU answered.
    pub fn new(
        description: Description,
        dir: &Path,
        process: Process,
        child: Option<Child>,
        link: Option<(Qmp, mpsc::Receiver<Event>)>,
        shared: Shared,
    ) -> Self {
        let (qmp, events) = match link {
            Some((qmp, events)) => (Some(qmp), events),
            None => (None, mpsc::channel(1).1),
        };
        let (tell, heard) = mpsc::channel(4);
        Self {
            description,
            dir: dir.to_owned(),
            process,
            child,
            qmp,
            events,
            shared,
            pending: Vec::new(),
            ending: None,
            reconnect: Instant::now() + RECONNECT,
            interview: None,
            tell,
            heard,
        }
    }

    /// The VM it is the domain of.
    pub fn vm(&self) -> Uuid {
        self.state().vm
    }

    /// Lives until the process has ended, or the agent does.
    pub async fn run(mut self, mut mailbox: mpsc::Receiver<Request>) {
        // What happened before anybody listened.
        self.take_stock().await;
        let mut log_check = interval(LOG_CHECK);
        log_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let connected = self.qmp.is_some();
            tokio::select! {
                () = self.shared.shutdown.cancelled() => return,
                () = self.process.ended() => break,
                event = self.events.recv(), if connected => match event {
                    Some(event) => self.on_event(&event).await,
                    None => self.disconnect(),
                },
                Some(request) = mailbox.recv() => self.on_request(request).await,
                Some(heard) = self.heard.recv() => self.on_heard(heard).await,
                () = at(self.pending.iter().map(Pending::next).min()) => self.on_time().await,
                () = at(self.ending.as_ref().and_then(|ending| ending.kill)) => self.end_by_force(),
                () = sleep_until(self.reconnect), if !connected => self.connect_again().await,
                _ = log_check.tick() => {
                    bound_log(&self.dir);
                    // What could not be undone before.
                    self.undo_saving().await;
                }
            }
        }
        self.finish();
    }

    pub(super) fn state(&self) -> &DomainState {
        &self.description.state
    }

    /// Takes on a new state, on disk first, then before everybody. Nothing new is not told.
    pub(super) fn take_on(&mut self, change: impl FnOnce(&mut DomainState)) -> DomainState {
        let mut state = self.state().clone();
        change(&mut state);
        if state != *self.state() {
            self.description.state = state.clone();
            self.description.runs();
            self.keep();
            self.shared.roster.publish(state.clone());
        }
        state
    }

    /// Writes down what has changed.
    pub(super) fn keep(&self) {
        if let Err(error) = self.description.save(&self.dir) {
            tracing::error!(vm = %self.vm(), %error, "a domain's state is not kept");
        }
        self.shared.images.lock().insert(self.vm(), self.description.images());
    }

    /// A step was done: takes on what it changed, and who did it.
    pub(super) fn done(&mut self, by: &str, change: impl FnOnce(&mut DomainState)) -> DomainState {
        self.take_on(|state| {
            change(state);
            by.clone_into(&mut state.last_operation);
            state.reason.clear();
        })
    }

    pub(super) fn qmp(&self) -> Result<&Qmp, Refusal> {
        self.qmp.as_ref().ok_or_else(|| Refusal::failed(QmpError::Closed))
    }

    /// Runs a command that takes QEMU no time.
    pub(super) async fn execute(&self, name: &'static str, arguments: Value) -> Result<Value, Refusal> {
        self.qmp()?.execute(name, arguments, COMMAND).await.map_err(Refusal::failed)
    }

    pub(super) async fn command(&self, name: &'static str) -> Result<(), Refusal> {
        self.execute(name, json!({})).await.map(drop)
    }

    async fn on_request(&mut self, request: Request) {
        if let Some(ending) = &mut self.ending {
            // Whoever wants it gone waits for the same end; nothing else makes sense any more.
            if matches!(request.what, What::Destroy) {
                ending.answers.push(request.answer);
            } else {
                answer(request.answer, Err(Refusal::no_such_domain(self.description.state.vm)));
            }
            return;
        }
        let checked = request.what.check(self.state().power).and_then(|()| self.check_pending(&request.what));
        if let Err(refusal) = checked {
            return answer(request.answer, Err(refusal));
        }
        let outcome = match &request.what {
            What::Destroy => return self.end(Power::Halted, &request.by, "destroyed", vec![request.answer]).await,
            What::Pause => self.switch("stop", Power::Paused, &request.by).await,
            What::Unpause => self.switch("cont", Power::Running, &request.by).await,
            What::Reboot { clean: false, .. } => self.reset(&request.by).await.map(Some),
            What::Shutdown | What::Reboot { .. } => return self.ask_guest(request).await,
            What::Suspend { .. } => return self.suspend(request).await,
            What::MemoryTarget(bytes) => self.set_memory_target(*bytes, &request.by).await.map(Some),
            What::Vcpus(number) => match self.set_vcpus(*number, &request.by).await {
                Ok(going) if !going.is_empty() => return self.wait(request, Wait::Vcpus(going)),
                Ok(_) => Ok(Some(self.state().clone())),
                Err(refusal) => Err(refusal),
            },
            What::SysRq(letter) => self.send_sysrq(*letter, &request.by).await.map(Some),
            What::Plug(disk) => self.plug(disk.clone(), &request.by).await.map(Some),
            What::Unplug { vbd, force } => match self.unplug(vbd, *force, &request.by).await {
                Ok(Some(device)) => return self.wait(request, Wait::Unplugged(device)),
                Ok(None) => Ok(Some(self.state().clone())),
                Err(refusal) => Err(refusal),
            },
            What::Medium { vbd, medium } => self.change_medium(vbd, medium.as_ref(), &request.by).await.map(Some),
            What::Relink { vbd, overlay } => self.relink(vbd, overlay).await.map(|()| None),
            What::Resize { vbd, bytes } => self.resize(vbd, *bytes).await.map(|()| None),
            What::Join { vbd, base } => match self.join(vbd, base.as_deref()).await {
                Ok(join) => return self.wait(request, Wait::Joined(join)),
                Err(refusal) => Err(refusal),
            },
        };
        answer(request.answer, outcome.map(|state| state.unwrap_or_else(|| self.state().clone())));
    }

    /// While its memory is being written nothing else can be done with a domain; nor can that begin while something else
    /// is being done to its disks. A join is given up for it.
    fn check_pending(&self, what: &What) -> Result<(), Refusal> {
        let saving = self.pending.iter().any(|pending| matches!(pending.wait, Wait::Saved(_)));
        let busy =
            self.pending.iter().any(|pending| !matches!(pending.wait, Wait::Off | Wait::Saved(_) | Wait::Joined(_)));
        let suspends = matches!(what, What::Suspend { .. });
        if saving && !matches!(what, What::Destroy) {
            return Err(Refusal::new(Reason::BadState, "suspending"));
        }
        if busy && suspends {
            return Err(Refusal::failed("something else is being done to the domain"));
        }
        Ok(())
    }

    async fn switch(&mut self, command: &'static str, power: Power, by: &str) -> Result<Option<DomainState>, Refusal> {
        self.command(command).await?;
        Ok(Some(self.done(by, |state| state.power = power)))
    }

    /// Answers a request later.
    pub(super) fn wait(&mut self, request: Request, wait: Wait) {
        self.pending.push(Pending::new(request, wait));
    }

    async fn ask_guest(&mut self, request: Request) {
        if self.pending.iter().any(|pending| matches!(pending.wait, Wait::Off)) {
            let refusal = Refusal::failed("the guest has been asked already and has not done it yet");
            return answer(request.answer, Err(refusal));
        }
        match self.command("system_powerdown").await {
            Ok(()) => self.wait(request, Wait::Off),
            Err(refusal) => answer(request.answer, Err(refusal)),
        }
    }

    /// Looks after what takes its time: it may be done, or its time may be up.
    async fn on_time(&mut self) {
        let now = Instant::now();
        for mut pending in std::mem::take(&mut self.pending) {
            if pending.next() > now {
                self.pending.push(pending);
            } else if pending.deadline <= now {
                self.time_is_up(pending).await;
            } else {
                pending.look = now + pending.wait.pace();
                self.look_after(pending).await;
            }
        }
    }

    /// Looks how far it is, and answers if it is done.
    async fn look_after(&mut self, pending: Pending) {
        match &pending.wait {
            Wait::Off => {
                if let Err(refusal) = self.command("system_powerdown").await {
                    tracing::warn!(vm = %self.vm(), %refusal, "cannot press the power button");
                }
                self.pending.push(pending);
            }
            Wait::Saved(_) => self.look_at_saving(pending).await,
            Wait::Unplugged(device) => {
                // A guest that did not listen yet has missed it; one that is at it says so, which is no news.
                let asked = self.execute("device_del", json!({ "id": device })).await;
                tracing::debug!(vm = %self.vm(), device, ?asked, "the guest was asked again");
                self.pending.push(pending);
            }
            Wait::Vcpus(_) => self.pending.push(pending),
            Wait::Joined(_) => self.look_at_joining(pending).await,
        }
    }

    async fn time_is_up(&mut self, pending: Pending) {
        let limit = pending.request.limit.as_millis();
        let detail = match &pending.wait {
            Wait::Saved(_) => return self.give_up_saving(pending, Refusal::new(Reason::TimedOut, "")).await,
            Wait::Joined(_) => format!("the images are not joined within {limit} ms"),
            _ => format!("the guest did not obey within {limit} ms"),
        };
        answer(pending.request.answer, Err(Refusal::new(Reason::TimedOut, detail)));
    }

    /// Takes out what waits for something like this.
    pub(super) fn take_pending(&mut self, wanted: impl Fn(&Wait) -> bool) -> Option<Pending> {
        let at = self.pending.iter().position(|pending| wanted(&pending.wait))?;
        Some(self.pending.remove(at))
    }

    async fn on_event(&mut self, event: &Event) {
        tracing::debug!(vm = %self.state().vm, event = event.name, data = %event.data, "QEMU tells");
        if self.ending.is_some() {
            return;
        }
        match event.name.as_str() {
            "SHUTDOWN" if event.flag("guest") => self.guest_went(event.text("reason")).await,
            "GUEST_PANICKED" => self.guest_panicked().await,
            "STOP" | "RESUME" => self.examine().await,
            // Firmware resets as it begins; that is within a second of the last one, and no news.
            "RESET" if event.flag("guest") && unix_seconds() > self.state().start_time + 1 => {
                self.take_on(|state| {
                    state.start_time = unix_seconds();
                    state.last_operation.clear();
                    state.reason = "guest-reset".to_owned();
                });
            }
            "MIGRATION" => {
                if let Some(pending) = self.take_pending(|wait| matches!(wait, Wait::Saved(_))) {
                    self.look_at_saving(pending).await;
                }
            }
            "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" => self.job_ended(event).await,
            "DEVICE_DELETED" => self.device_went(event.text("device"), event.text("path")).await,
            "BALLOON_CHANGE" => self.balloon_is(&event.data),
            "VSERPORT_CHANGE" if event.text("id") == "agent" => self.port_changed(event.flag("open")),
            _ => {}
        }
    }

    /// After a time without a connection: how the domain is, and what has become of what was under way.
    async fn take_stock(&mut self) {
        self.look_at_disks().await;
        self.undo_saving().await;
        self.examine().await;
        self.look_at_guest().await;
    }

    /// Asks QEMU how the domain is, and takes that on.
    async fn examine(&mut self) {
        let (Some(qmp), None, None) = (&self.qmp, &self.ending, self.description.saving) else {
            return;
        };
        let status = match qmp.status(COMMAND).await {
            Ok(status) => status,
            Err(error) => {
                tracing::warn!(vm = %self.state().vm, %error, "QEMU does not tell how the domain is");
                return self.disconnect();
            }
        };
        let (power, reason) = match status.as_str() {
            // The guest went while nobody listened.
            "shutdown" => return self.guest_went("guest-shutdown").await,
            "guest-panicked" => return self.guest_panicked().await,
            "internal-error" => {
                return self.end(Power::Crashed, "", "internal-error", Vec::new()).await;
            }
            "running" | "suspended" => (Power::Running, ""),
            "io-error" => (Power::Paused, "io-error"),
            _ => (Power::Paused, ""),
        };
        if power != self.state().power {
            self.take_on(|state| {
                state.power = power;
                state.last_operation.clear();
                state.reason = reason.to_owned();
            });
        }
    }

    /// The guest has switched itself off, or has reset where that ends the domain.
    async fn guest_went(&mut self, reason: &str) {
        let restart = match reason {
            "guest-reset" => self.description.spec.on_reboot,
            _ => self.description.spec.on_shutdown,
        };
        let (by, answers) = match self.take_pending(|wait| matches!(wait, Wait::Off)) {
            Some(Pending { request, .. }) if matches!(request.what, What::Reboot { anew: false, .. }) => {
                let done = self.begin_anew(&request.by, "").await;
                return answer(request.answer, done.map(|()| self.state().clone()));
            }
            Some(Pending { request, .. }) => (request.by, vec![request.answer]),
            None if restart == Action::Restart => {
                return self.restart_or_end(Power::Halted, reason).await;
            }
            None => (String::new(), Vec::new()),
        };
        self.end(Power::Halted, &by, reason, answers).await;
    }

    async fn guest_panicked(&mut self) {
        let too_soon = unix_seconds() < self.state().start_time + TOO_SOON;
        if self.description.spec.on_crash == Action::Restart && !too_soon {
            self.restart_or_end(Power::Crashed, "guest-panic").await;
        } else {
            self.end(Power::Crashed, "", "guest-panic", Vec::new()).await;
        }
    }

    async fn restart_or_end(&mut self, power: Power, reason: &str) {
        if let Err(refusal) = self.begin_anew("", reason).await {
            tracing::warn!(vm = %self.state().vm, %refusal, "the domain cannot begin anew");
            self.end(power, "", reason, Vec::new()).await;
        }
    }

    /// Begins anew whatever the guest wants. A guest that was asked before is no more: where it was to begin anew it
    /// has, where it was to go off it has not, and the new one is not asked in its place.
    async fn reset(&mut self, by: &str) -> Result<DomainState, Refusal> {
        self.begin_anew(by, "").await?;
        if let Some(Pending { request, .. }) = self.take_pending(|wait| matches!(wait, Wait::Off)) {
            let meant = request.what.kind() == Some(StepKind::Reboot);
            let reset = || Refusal::new(Reason::BadState, "running");
            answer(request.answer, if meant { Ok(self.state().clone()) } else { Err(reset()) });
        }
        Ok(self.state().clone())
    }

    /// Resets the machine and lets it run: the same domain, a new guest.
    async fn begin_anew(&mut self, by: &str, reason: &str) -> Result<(), Refusal> {
        self.command("system_reset").await?;
        self.description.first_run = None;
        self.command("cont").await?;
        self.take_on(|state| {
            state.power = Power::Running;
            state.start_time = unix_seconds();
            state.last_operation = by.to_owned();
            state.reason = reason.to_owned();
        });
        Ok(())
    }

    /// Ends the process: asked first, so that images are closed in order, then by force.
    pub(super) async fn end(&mut self, power: Power, by: &str, reason: &str, answers: Vec<oneshot::Sender<Answer>>) {
        let (by, reason) = (by.to_owned(), reason.to_owned());
        let asked = match &self.qmp {
            Some(qmp) => qmp.execute("quit", json!({}), QUIT).await.is_ok(),
            None => false,
        };
        self.ending = Some(Ending { power, by, reason, kill: Some(Instant::now() + QUIT), answers });
        if !asked {
            self.end_by_force();
        }
    }

    fn end_by_force(&mut self) {
        if let Some(ending) = &mut self.ending {
            ending.kill = None;
            self.process.kill();
        }
    }

    fn disconnect(&mut self) {
        self.qmp = None;
        self.interview = None;
        self.reconnect = Instant::now() + RECONNECT;
    }

    async fn connect_again(&mut self) {
        match Qmp::connect(&self.dir, RECONNECT, &self.shared.tasks).await {
            Ok((qmp, events)) => {
                self.qmp = Some(qmp);
                self.events = events;
                self.take_stock().await;
            }
            Err(error) => {
                tracing::debug!(vm = %self.state().vm, %error, "QEMU lives and does not listen");
                self.reconnect = Instant::now() + RECONNECT;
            }
        }
    }

    /// The process is gone: clears up, then tells everybody.
    fn finish(mut self) {
        let vm = self.state().vm;
        let ending = self.ending.take().unwrap_or_else(|| self.unasked_end());
        let last = self.state().gone(ending.power, &ending.by, &ending.reason);
        if ending.power == Power::Crashed {
            let said = crate::files::tail(&self.dir.join("qemu.log"), 500);
            tracing::warn!(%vm, domid = self.state().domid, reason = ending.reason, said, "a domain died");
        }
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            tracing::warn!(%vm, %error, "a domain's directory stays behind");
        }
        self.shared.handles.lock().remove(&vm);
        self.shared.images.lock().remove(&vm);
        self.shared.roster.remove(last.clone());
        for waiting in ending.answers {
            answer(waiting, Ok(last.clone()));
        }
        for Pending { request, .. } in self.pending.drain(..) {
            // Who wanted it off has what was wanted; who wanted a disk out of it as well.
            let wanted = matches!(request.what, What::Shutdown | What::Unplug { .. });
            let gone = || Refusal::new(Reason::BadState, "halted");
            answer(request.answer, if wanted { Ok(last.clone()) } else { Err(gone()) });
        }
    }

    /// Nobody here ended the process. Its last words may still be in the queue.
    fn unasked_end(&mut self) -> Ending {
        let status = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
        let mut end = (Power::Crashed, status.map_or_else(|| "killed".to_owned(), |status| status.to_string()));
        while let Ok(event) = self.events.try_recv() {
            if event.name == "SHUTDOWN" {
                let power = if event.flag("guest") { Power::Halted } else { Power::Crashed };
                end = (power, event.text("reason").to_owned());
            }
        }
        Ending { power: end.0, by: String::new(), reason: end.1, kill: None, answers: Vec::new() }
    }
}

/// Returns at a time, or never.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Keeps a talkative guest from filling the host's disk: QEMU appends, so the file can be emptied beneath it.
fn bound_log(dir: &Path) {
    let path = dir.join("console.log");
    let long = fs::metadata(&path).is_ok_and(|metadata| metadata.len() > LOG_LIMIT);
    if long {
        let kept = fs::copy(&path, dir.join("console.log.1"))
            .and_then(|_| fs::OpenOptions::new().write(true).open(&path)?.set_len(0));
        if let Err(error) = kept {
            tracing::warn!(dir = %dir.display(), %error, "a console's log grows");
        }
    }
}
