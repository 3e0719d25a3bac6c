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
use serde_json::json;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::description::Description;
use super::process::Process;
use super::qmp::{Event, Qmp, QmpError};
use crate::facts::unix_seconds;
use crate::hypervisor::domain::{Action, DomainState, Power, Reason, Refusal, StepKind};
use crate::hypervisor::roster::Roster;

/// How long QEMU may take for a command that takes it no time.
const COMMAND: Duration = Duration::from_secs(5);
/// How long QEMU may take to end when it is asked to; then it is ended by force.
const QUIT: Duration = Duration::from_secs(3);
/// Between two tries to reach a QEMU that lives but does not listen.
const RECONNECT: Duration = Duration::from_millis(500);
/// A guest that does not listen yet would miss a single press of the power button.
const PRESS_AGAIN: Duration = Duration::from_secs(5);
/// A guest that fails sooner than this many seconds after its start would only fail again: it is not restarted.
const TOO_SOON: u64 = 120;
/// How often the console's log is looked at, and how long it may get.
const LOG_CHECK: Duration = Duration::from_secs(10);
const LOG_LIMIT: u64 = 1 << 20;

pub(super) type Answer = Result<DomainState, Refusal>;

/// The ways to the tasks of all domains.
pub(super) type Handles = Mutex<HashMap<Uuid, mpsc::Sender<Request>>>;

/// What a domain can be asked for.
#[derive(Debug)]
pub(super) struct Request {
    pub kind: StepKind,
    /// Asks the guest first (reboot).
    pub clean: bool,
    /// How long the guest has to obey.
    pub limit: Duration,
    pub by: String,
    pub answer: oneshot::Sender<Answer>,
}

/// What all domains of the driver share.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub roster: Arc<Roster>,
    pub handles: Arc<Handles>,
    pub tasks: TaskTracker,
    pub shutdown: CancellationToken,
}

/// What the guest was asked for and has not done yet.
#[derive(Debug)]
struct Asked {
    request: Request,
    deadline: Instant,
    press: Instant,
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
    description: Description,
    dir: PathBuf,
    process: Process,
    child: Option<Child>,
    qmp: Option<Qmp>,
    events: mpsc::Receiver<Event>,
    shared: Shared,
    asked: Option<Asked>,
    ending: Option<Ending>,
    reconnect: Instant,
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
        let dir = dir.to_owned();
        let reconnect = Instant::now() + RECONNECT;
        Self { description, dir, process, child, qmp, events, shared, asked: None, ending: None, reconnect }
    }

    /// The VM it is the domain of.
    pub fn vm(&self) -> Uuid {
        self.state().vm
    }

    /// Lives until the process has ended, or the agent does.
    pub async fn run(mut self, mut mailbox: mpsc::Receiver<Request>) {
        // What happened before anybody listened.
        self.examine().await;
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
                () = at(self.asked.as_ref().map(|asked| asked.deadline)) => self.time_is_up(),
                () = at(self.asked.as_ref().map(|asked| asked.press)) => self.press_again().await,
                () = at(self.ending.as_ref().and_then(|ending| ending.kill)) => self.end_by_force(),
                () = sleep_until(self.reconnect), if !connected => self.connect_again().await,
                _ = log_check.tick() => bound_log(&self.dir),
            }
        }
        self.finish();
    }

    fn state(&self) -> &DomainState {
        &self.description.state
    }

    /// Takes on a new state, on disk first, then before everybody. Nothing new is not told.
    fn take_on(&mut self, change: impl FnOnce(&mut DomainState)) -> DomainState {
        let mut state = self.state().clone();
        change(&mut state);
        if state != *self.state() {
            self.description.state = state.clone();
            if let Err(error) = self.description.save(&self.dir) {
                tracing::error!(vm = %state.vm, %error, "a domain's state is not kept");
            }
            self.shared.roster.publish(state.clone());
        }
        state
    }

    async fn command(&self, name: &'static str) -> Result<(), Refusal> {
        let qmp = self.qmp.as_ref().ok_or_else(|| Refusal::failed(QmpError::Closed))?;
        qmp.execute(name, json!({}), COMMAND).await.map(drop).map_err(Refusal::failed)
    }

    async fn on_request(&mut self, request: Request) {
        if let Some(ending) = &mut self.ending {
            // Whoever wants it gone waits for the same end; nothing else makes sense any more.
            if request.kind == StepKind::Destroy {
                ending.answers.push(request.answer);
            } else {
                answer(request.answer, Err(Refusal::no_such_domain(self.description.state.vm)));
            }
            return;
        }
        if let Err(refusal) = request.kind.check(self.state().power, request.clean) {
            return answer(request.answer, Err(refusal));
        }
        match request.kind {
            StepKind::Start => answer(request.answer, Err(Refusal::new(Reason::DomainExists, ""))),
            StepKind::Destroy => self.end(Power::Halted, &request.by, "destroyed", vec![request.answer]).await,
            StepKind::Pause => {
                let done = self.command("stop").await;
                self.conclude(request, done, Power::Paused);
            }
            StepKind::Unpause => {
                let done = self.command("cont").await;
                self.conclude(request, done, Power::Running);
            }
            StepKind::Reboot if !request.clean => {
                let done = self.begin_anew(&request.by, "").await;
                answer(request.answer, done.map(|()| self.state().clone()));
            }
            StepKind::Shutdown | StepKind::Reboot => self.ask_guest(request).await,
            other => answer(request.answer, Err(Refusal::new(Reason::Unsupported, format!("{other:?}")))),
        }
    }

    fn conclude(&mut self, request: Request, done: Result<(), Refusal>, power: Power) {
        let outcome = done.map(|()| {
            self.take_on(|state| {
                state.power = power;
                state.last_operation.clone_from(&request.by);
                state.reason.clear();
            })
        });
        answer(request.answer, outcome);
    }

    async fn ask_guest(&mut self, request: Request) {
        if self.asked.is_some() {
            let refusal = Refusal::failed("the guest has been asked already and has not done it yet");
            return answer(request.answer, Err(refusal));
        }
        match self.command("system_powerdown").await {
            Ok(()) => {
                let now = Instant::now();
                self.asked = Some(Asked { deadline: now + request.limit, press: now + PRESS_AGAIN, request });
            }
            Err(refusal) => answer(request.answer, Err(refusal)),
        }
    }

    async fn press_again(&mut self) {
        let pressed = self.command("system_powerdown").await;
        if let Some(asked) = &mut self.asked {
            asked.press = Instant::now() + PRESS_AGAIN;
            if let Err(refusal) = pressed {
                tracing::warn!(vm = %self.description.state.vm, %refusal, "cannot press the power button");
            }
        }
    }

    fn time_is_up(&mut self) {
        if let Some(asked) = self.asked.take() {
            let detail = format!("the guest did not obey within {} ms", asked.request.limit.as_millis());
            answer(asked.request.answer, Err(Refusal::new(Reason::TimedOut, detail)));
        }
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
            _ => {}
        }
    }

    /// Asks QEMU how the domain is, and takes that on.
    async fn examine(&mut self) {
        let (Some(qmp), None) = (&self.qmp, &self.ending) else {
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
        let (by, answers) = match self.asked.take() {
            Some(asked) if asked.request.kind == StepKind::Reboot => {
                let done = self.begin_anew(&asked.request.by, "").await;
                return answer(asked.request.answer, done.map(|()| self.state().clone()));
            }
            Some(asked) => (asked.request.by, vec![asked.request.answer]),
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

    /// Resets the machine and lets it run: the same domain, a new guest.
    async fn begin_anew(&mut self, by: &str, reason: &str) -> Result<(), Refusal> {
        self.command("system_reset").await?;
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
    async fn end(&mut self, power: Power, by: &str, reason: &str, answers: Vec<oneshot::Sender<Answer>>) {
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
        self.reconnect = Instant::now() + RECONNECT;
    }

    async fn connect_again(&mut self) {
        match Qmp::connect(&self.dir, RECONNECT, &self.shared.tasks).await {
            Ok((qmp, events)) => {
                self.qmp = Some(qmp);
                self.events = events;
                self.examine().await;
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
        self.shared.roster.remove(last.clone());
        for waiting in ending.answers {
            answer(waiting, Ok(last.clone()));
        }
        if let Some(asked) = self.asked.take() {
            let gone = Refusal::failed(format!("the domain has ended meanwhile: {}", last.reason));
            let off = asked.request.kind == StepKind::Shutdown;
            answer(asked.request.answer, if off { Ok(last) } else { Err(gone) });
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

/// Nobody may be waiting any more; that is theirs to know.
fn answer(to: oneshot::Sender<Answer>, outcome: Answer) {
    let _ = to.send(outcome);
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
