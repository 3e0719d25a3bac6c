//! A domain's memory goes to an image, and comes from one.
//!
//! The vCPUs stand still while it is written, so that each page is written once. QEMU writes through a file that the
//! agent has opened for it. Once all is written, QEMU has closed the disks: either it ends, or it is told to go on and
//! opens them again. What goes wrong before leaves the domain as it was.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::domain::{COMMAND, Domain};
use super::qmp::{Event, Qmp, QmpError};
use super::request::{Pending, Request, Wait, What, answer};
use crate::hypervisor::domain::{Power, Reason, Refusal};
use crate::hypervisor::saved::Saved;

/// As fast as the disk takes it.
const BANDWIDTH: u64 = 1 << 40;
/// How long QEMU may take to stop writing.
const CANCEL: Duration = Duration::from_secs(4);
const NAME: &str = "memory";

/// A suspend that is under way.
#[derive(Debug)]
pub(super) struct Saving {
    file: File,
    was: Power,
}

impl Domain {
    pub(super) async fn suspend(&mut self, request: Request) {
        match self.begin_saving(&request).await {
            Ok(saving) => self.wait(request, Wait::Saved(saving)),
            Err(refusal) => {
                self.undo_saving().await;
                answer(request.answer, Err(refusal));
            }
        }
    }

    async fn begin_saving(&mut self, request: &Request) -> Result<Saving, Refusal> {
        let What::Suspend { into, .. } = &request.what else {
            return Err(Refusal::failed("no suspend"));
        };
        // A job at them would keep QEMU from letting go of the images.
        self.stop_joins().await?;
        let (was, memory, image) = (self.state().power, self.description.spec.memory(), into.clone());
        let opened = tokio::task::spawn_blocking(move || Saved::begin(&image, memory)).await;
        let file = opened.map_err(Refusal::failed)??;
        let given = file.try_clone().map_err(Refusal::failed)?;
        self.description.saving = Some(was == Power::Running);
        self.keep();
        if was == Power::Running {
            self.command("stop").await?;
        }
        let qmp = self.qmp()?;
        prepare(qmp).await.map_err(Refusal::failed)?;
        qmp.give(NAME, given.into(), COMMAND).await.map_err(Refusal::failed)?;
        self.execute("migrate", json!({ "uri": format!("fd:{NAME}") })).await?;
        Ok(Saving { file, was })
    }

    pub(super) async fn look_at_saving(&mut self, pending: Pending) {
        let progress = match self.execute("query-migrate", json!({})).await {
            Ok(progress) => progress,
            // The connection comes back, or the time is up.
            Err(_) => return self.pending.push(pending),
        };
        match progress["status"].as_str().unwrap_or_default() {
            "completed" => self.saved(pending).await,
            "failed" | "cancelled" => {
                let said = progress["error-desc"].as_str().unwrap_or("QEMU could not write the memory");
                let reason = if said.contains("No space left") { Reason::NoSpace } else { Reason::Failed };
                self.give_up_saving(pending, Refusal::new(reason, said)).await;
            }
            _ => self.pending.push(pending),
        }
    }

    /// All is written: signs it, and ends the domain or lets it go on.
    async fn saved(&mut self, pending: Pending) {
        let Pending { request, wait, deadline, look } = pending;
        let Wait::Saved(Saving { file, was }) = wait else { return };
        let record = self.record(&request.by).await;
        let signed = tokio::task::spawn_blocking(move || record.finish(&file).map(|()| file)).await;
        let signed = signed.map_err(Refusal::failed).and_then(|signed| signed.map_err(Refusal::failed));
        let file = match signed {
            Ok(file) => file,
            Err(refusal) => {
                self.undo_saving().await;
                return answer(request.answer, Err(refusal));
            }
        };
        if matches!(request.what, What::Suspend { keep_running: false, .. }) {
            return self.end(Power::Halted, &request.by, "suspended", vec![request.answer]).await;
        }
        self.undo_saving().await;
        let going_on = self.description.saving.is_none();
        let outcome = if going_on {
            Ok(self.done(&request.by, |state| state.power = was))
        } else {
            Err(Refusal::failed("the domain does not go on"))
        };
        drop((file, deadline, look));
        answer(request.answer, outcome);
    }

    async fn record(&self, by: &str) -> Saved {
        let (spec, state) = (&self.description.spec, self.state());
        let machine = self.execute("qom-get", json!({ "path": "/machine", "property": "type" })).await;
        let machine =
            machine.ok().and_then(|it| it.as_str().and_then(|it| it.strip_suffix("-machine")).map(str::to_owned));
        Saved {
            machine: machine.unwrap_or_default(),
            memory: spec.memory(),
            memory_actual: state.memory_actual,
            memory_target: state.memory_target,
            vcpus: spec.vcpus_at_startup,
            ..Saved::new("qemu", &self.shared.version, state.vm, by)
        }
    }

    pub(super) async fn give_up_saving(&mut self, pending: Pending, refusal: Refusal) {
        self.undo_saving().await;
        answer(pending.request.answer, Err(refusal));
    }

    /// The domain goes on as it was before its memory was to be written, whoever began that and however far it came.
    pub(super) async fn undo_saving(&mut self) {
        let Some(ran) = self.description.saving else { return };
        if self.pending.iter().any(|pending| matches!(pending.wait, Wait::Saved(_))) {
            return;
        }
        let undone = async {
            // What hangs in a write that does not end is no reason for the guest to stand still.
            if let Err(refusal) = self.stop_writing().await {
                tracing::warn!(vm = %self.vm(), %refusal, "the memory is still being written");
            }
            // After all was written QEMU has the disks closed, and opens them only to go on.
            let status = self.qmp()?.status(COMMAND).await.map_err(Refusal::failed)?;
            if ran || status == "postmigrate" {
                self.command("cont").await?;
            }
            if !ran {
                self.command("stop").await?;
            }
            Ok::<(), Refusal>(())
        };
        match undone.await {
            Ok(()) => {
                self.description.saving = None;
                self.keep();
            }
            Err(refusal) => tracing::error!(vm = %self.vm(), %refusal, "a domain does not go on after a suspend"),
        }
    }

    async fn stop_writing(&self) -> Result<(), Refusal> {
        let deadline = Instant::now() + CANCEL;
        while Instant::now() < deadline {
            let progress = self.execute("query-migrate", json!({})).await?;
            match progress["status"].as_str() {
                Some("setup" | "active" | "device" | "cancelling" | "pre-switchover" | "wait-unplug") => {
                    self.command("migrate_cancel").await?;
                }
                _ => return Ok(()),
            }
            sleep(Duration::from_millis(20)).await;
        }
        Err(Refusal::new(Reason::TimedOut, "QEMU does not stop writing"))
    }
}

async fn prepare(qmp: &Qmp) -> Result<(), QmpError> {
    let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
    qmp.execute("migrate-set-capabilities", events, COMMAND).await?;
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": BANDWIDTH }), COMMAND).await.map(drop)
}

/// Fills a new QEMU from an image, whose file stands where the memory begins. Returns when it is filled; a QEMU that
/// cannot be ends.
pub(super) async fn fill(
    (qmp, events): &mut (Qmp, mpsc::Receiver<Event>),
    file: File,
    limit: Duration,
) -> Result<(), QmpError> {
    let deadline = Instant::now() + limit;
    prepare(qmp).await?;
    qmp.give(NAME, file.into(), COMMAND).await?;
    qmp.execute("migrate-incoming", json!({ "uri": format!("fd:{NAME}") }), COMMAND).await?;
    while Instant::now() < deadline {
        let progress = qmp.execute("query-migrate", json!({}), limit).await?;
        match progress["status"].as_str() {
            Some("completed") => {
                // What QEMU tells while it is filled is no news of the guest.
                while events.try_recv().is_ok() {}
                return Ok(());
            }
            Some("failed") => {
                return Err(QmpError::Refused(progress["error-desc"].as_str().unwrap_or("load failed").to_owned()));
            }
            _ => sleep(Duration::from_millis(10)).await,
        }
    }
    Err(QmpError::Late("migrate-incoming"))
}

/// Why QEMU would not be filled, if it is the image that is wrong.
pub(super) fn why_not_filled(image: &Path, said: &str) -> Option<Refusal> {
    let damaged = ["load of migration failed", "Not a migration stream", "Failed to load", "load failed"];
    let detail = || format!("{}: {said}", image.display());
    damaged.iter().any(|words| said.contains(words)).then(|| Refusal::new(Reason::Damaged, detail()))
}
