//! Disks of a living domain: they come, go, change their medium, and change over to other images.
//!
//! What takes QEMU more than one command is written down before the first, and finished or undone by whoever finds it.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::blocks::{self, Attached, Node, why_not_open};
use super::domain::Domain;
use super::qmp::Event;
use super::request::{Join, Pending, Wait, What, answer};
use crate::hypervisor::domain::{Disk, DomainState, ImageFormat, Medium, Reason, Refusal};

/// What the names of jobs that join images begin with.
const JOIN: &str = "join-";
/// How long QEMU may take to change a device over to nothing.
const CHANGE_OVER: Duration = Duration::from_secs(4);

impl Domain {
    pub(super) async fn plug(&mut self, disk: Disk, by: &str) -> Result<DomainState, Refusal> {
        if let Some(there) = self.description.disk(&disk.vbd) {
            if there.empty {
                return Err(Refusal::new(Reason::InUse, "the guest has not let go of this disk's device yet"));
            }
            return Ok(self.done(by, |_| {}));
        }
        if disk.cdrom {
            return Err(Refusal::new(Reason::Unsupported, "a CD drive comes with its domain; only its medium changes"));
        }
        if disk.path.is_empty() {
            return Err(Refusal::new(Reason::NoSuchVolume, "a disk needs an image"));
        }
        let device = blocks::device_id(&disk);
        if self.description.disks.iter().any(|there| blocks::device_id(&there.disk) == device) {
            return Err(Refusal::new(Reason::InUse, format!("the device {device} is there already")));
        }
        let node = self.description.node(&disk.path);
        let image = blocks::image(&disk, &node, false);
        let device = blocks::device(&disk, Some(&node), self.description.spec.vcpus_max, None);
        let vbd = disk.vbd.clone();
        let attached = Attached { disk: disk.clone(), nodes: vec![node], coming: true, ..Attached::default() };
        self.description.disks.push(attached);
        self.keep();
        let mut came = self.execute("blockdev-add", image).await;
        if came.is_ok() {
            came = self.execute("device_add", device).await;
        }
        if let Err(refusal) = came {
            self.forget(&vbd).await;
            return Err(opening(refusal));
        }
        self.has_come(&vbd);
        Ok(self.done_disks(by))
    }

    /// Its device is there: it is the domain's from now on.
    fn has_come(&mut self, vbd: &str) {
        if let Some(attached) = self.description.disk(vbd) {
            attached.coming = false;
            let disk = attached.disk.clone();
            self.description.spec.disks.retain(|there| there.vbd != disk.vbd);
            self.description.spec.disks.push(disk);
        }
        self.keep();
    }

    /// Asks the guest to let go, or takes the image away; gives the device that is waited for.
    pub(super) async fn unplug(&mut self, vbd: &str, force: bool, by: &str) -> Result<Option<String>, Refusal> {
        let Some(attached) = self.description.disk(vbd) else {
            self.done_disks(by);
            return Ok(None);
        };
        if attached.disk.cdrom {
            return Err(Refusal::new(Reason::Unsupported, "a CD drive goes with its domain; only its medium changes"));
        }
        let (device, taken_away) = (blocks::device_id(&attached.disk), attached.empty);
        let asked = self.execute("device_del", json!({ "id": device })).await;
        if let Err(refusal) = asked
            && refusal.detail.contains("not found")
        {
            self.forget(vbd).await;
            self.done_disks(by);
            return Ok(None);
        }
        if taken_away {
            // Its image went by force: what is left of it is the guest's to let go of.
            self.done_disks(by);
            return Ok(None);
        }
        if !force {
            return Ok(Some(device));
        }
        self.take_image_away(vbd).await?;
        self.done_disks(by);
        Ok(None)
    }

    /// The device stays as long as the guest wants, above nothing: reads give zeros, writes go nowhere, and the image is
    /// closed. What was written before is in the image.
    async fn take_image_away(&mut self, vbd: &str) -> Result<(), Refusal> {
        let Some(top) =
            self.description.disk(vbd).filter(|there| !there.empty).and_then(|it| it.nodes.first().cloned())
        else {
            return Ok(());
        };
        let size = self.virtual_size(&top).await?;
        let nothing = self.description.node("");
        let options = json!({ "driver": "null-co", "node-name": nothing.name, "size": size, "read-zeroes": true });
        self.execute("blockdev-add", options).await?;
        let job = format!("empty-{}", top.name);
        let begun = json!({ "job-id": job, "device": top.name, "target": nothing.name, "sync": "none" });
        let mut changed = self.execute("blockdev-mirror", begun).await.map(drop);
        if changed.is_ok() {
            changed = self.change_over(&job).await;
        }
        if let Err(refusal) = changed {
            let _ = self.execute("blockdev-del", json!({ "node-name": nothing.name })).await;
            return Err(refusal);
        }
        if let Some(attached) = self.description.disk(vbd) {
            let before = std::mem::replace(&mut attached.nodes, vec![nothing]);
            attached.empty = true;
            let vbd = attached.disk.vbd.clone();
            self.description.spec.disks.retain(|disk| disk.vbd != vbd);
            self.keep();
            self.close(&before).await;
        }
        Ok(())
    }

    async fn change_over(&self, job: &str) -> Result<(), Refusal> {
        let deadline = Instant::now() + CHANGE_OVER;
        let mut told = false;
        while Instant::now() < deadline {
            let jobs = self.execute("query-block-jobs", json!({})).await?;
            let Some(state) = entry(&jobs, "device", job) else { return Ok(()) };
            if !told && state["ready"] == true {
                self.execute("block-job-complete", json!({ "device": job })).await?;
                told = true;
            }
            sleep(Duration::from_millis(10)).await;
        }
        let _ = self.execute("block-job-cancel", json!({ "device": job, "force": true })).await;
        Err(Refusal::new(Reason::TimedOut, "QEMU does not let go of the image"))
    }

    async fn virtual_size(&self, node: &Node) -> Result<u64, Refusal> {
        let nodes = self.execute("query-named-block-nodes", json!({ "flat": true })).await?;
        let size = entry(&nodes, "node-name", &node.name).and_then(|it| it["image"]["virtual-size"].as_u64());
        size.ok_or_else(|| Refusal::failed("QEMU does not tell the disk's size"))
    }

    /// A device is gone: the guest has let go of it.
    pub(super) async fn device_went(&mut self, device: &str, path: &str) {
        self.vcpu_went(path);
        let gone = self.description.disks.iter().find(|there| blocks::device_id(&there.disk) == device);
        if device.is_empty() || gone.is_none() {
            return;
        }
        if let Some(vbd) = gone.map(|attached| attached.disk.vbd.clone()) {
            self.forget(&vbd).await;
        }
        let mut told = false;
        while let Some(pending) = self.take_pending(|wait| matches!(wait, Wait::Unplugged(it) if it == device)) {
            let state = self.done_disks(&pending.request.by);
            answer(pending.request.answer, Ok(state));
            told = true;
        }
        if !told {
            let disks = self.description.vbds();
            self.take_on(|state| state.disks = disks);
        }
    }

    /// There is no such disk any more.
    async fn forget(&mut self, vbd: &str) {
        let Some(at) = self.description.disks.iter().position(|attached| attached.disk.vbd == vbd) else {
            return;
        };
        let attached = self.description.disks.remove(at);
        self.description.spec.disks.retain(|disk| disk.vbd != vbd);
        self.close(&attached.nodes).await;
        self.keep();
    }

    /// Closes images that nothing reads any more, from above to below.
    async fn close(&self, nodes: &[Node]) {
        for node in nodes {
            if let Err(refusal) = self.execute("blockdev-del", json!({ "node-name": node.name })).await {
                tracing::debug!(vm = %self.vm(), node = node.name, %refusal, "a node was not there");
            }
        }
    }

    fn done_disks(&mut self, by: &str) -> DomainState {
        let disks = self.description.vbds();
        self.done(by, |state| state.disks = disks)
    }

    pub(super) async fn change_medium(
        &mut self,
        vbd: &str,
        medium: Option<&Medium>,
        by: &str,
    ) -> Result<DomainState, Refusal> {
        let attached = self.description.disk(vbd).ok_or_else(|| no_such_disk(vbd))?;
        if !attached.disk.cdrom {
            return Err(Refusal::new(Reason::Unsupported, "only a CD drive changes its medium"));
        }
        let disk = attached.disk.with(medium);
        if disk == attached.disk {
            return Ok(self.done(by, |_| {}));
        }
        let (drive, before) = (blocks::device_id(&disk), attached.nodes.clone());
        let node = (!disk.path.is_empty()).then(|| self.description.node(&disk.path));
        if let Some(node) = &node {
            self.goes_over_to(vbd, Some(node.clone()));
            // Before anything is taken out: an image that does not open leaves the drive as it is.
            if let Err(refusal) = self.execute("blockdev-add", blocks::image(&disk, node, false)).await {
                self.goes_over_to(vbd, None);
                return Err(opening(refusal));
            }
        }
        let changed = self.exchange(&drive, node.as_ref()).await;
        if let Err(refusal) = changed {
            // What is in the drive now only QEMU knows.
            self.look_at_disks().await;
            return Err(refusal);
        }
        self.close(&before).await;
        self.holds(vbd, disk, node.into_iter().collect());
        Ok(self.done_disks(by))
    }

    async fn exchange(&self, drive: &str, node: Option<&Node>) -> Result<(), Refusal> {
        self.execute("blockdev-open-tray", json!({ "id": drive, "force": true })).await?;
        self.execute("blockdev-remove-medium", json!({ "id": drive })).await?;
        if let Some(node) = node {
            self.execute("blockdev-insert-medium", json!({ "id": drive, "node-name": node.name })).await?;
        }
        self.execute("blockdev-close-tray", json!({ "id": drive })).await.map(drop)
    }

    fn goes_over_to(&mut self, vbd: &str, node: Option<Node>) {
        if let Some(attached) = self.description.disk(vbd) {
            attached.next = node;
        }
        self.keep();
    }

    /// The disk has this image now.
    fn holds(&mut self, vbd: &str, disk: Disk, nodes: Vec<Node>) {
        if let Some(there) = self.description.spec.disks.iter_mut().find(|there| there.vbd == vbd) {
            there.clone_from(&disk);
        }
        if let Some(attached) = self.description.disk(vbd) {
            *attached = Attached { disk, nodes, ..Attached::default() };
        }
        self.keep();
    }

    pub(super) async fn relink(&mut self, vbd: &str, overlay: &Path) -> Result<(), Refusal> {
        let path = overlay.to_str().ok_or_else(|| Refusal::failed("a path that is no text"))?;
        let (disk, nodes) = self.image_of(vbd)?;
        let file = blocks::file_at(path).ok_or_else(|| Refusal::new(Reason::NoSuchVolume, path))?;
        if nodes[0].file == Some(file) {
            return Ok(());
        }
        self.stop_joins().await?;
        let disk = Disk { path: path.to_owned(), format: ImageFormat::Qcow2, ..disk };
        let node = self.description.node(path);
        self.goes_over_to(vbd, Some(node.clone()));
        let mut changed = self.execute("blockdev-add", blocks::image(&disk, &node, true)).await;
        if changed.is_ok() {
            changed = self.execute("blockdev-snapshot", json!({ "node": nodes[0].name, "overlay": node.name })).await;
        }
        if let Err(refusal) = changed {
            self.close(std::slice::from_ref(&node)).await;
            self.goes_over_to(vbd, None);
            return Err(opening(refusal));
        }
        self.holds(vbd, disk, [vec![node], nodes].concat());
        Ok(())
    }

    /// A disk that has an image, and its nodes, of which there is at least one.
    fn image_of(&mut self, vbd: &str) -> Result<(Disk, Vec<Node>), Refusal> {
        let attached = self.description.disk(vbd).filter(|it| !it.empty && !it.nodes.is_empty());
        attached.map(|it| (it.disk.clone(), it.nodes.clone())).ok_or_else(|| no_such_disk(vbd))
    }

    pub(super) async fn resize(&mut self, vbd: &str, bytes: u64) -> Result<(), Refusal> {
        let (_, nodes) = self.image_of(vbd)?;
        if bytes < self.virtual_size(&nodes[0]).await? {
            return Err(Refusal::new(Reason::Unsupported, "a disk cannot become smaller"));
        }
        self.stop_joins().await?;
        let resized = self.execute("block_resize", json!({ "node-name": nodes[0].name, "size": bytes })).await;
        resized.map(drop).map_err(opening)
    }

    /// Begins to join images.
    pub(super) async fn join(&mut self, vbd: &str, base: Option<&Path>) -> Result<Join, Refusal> {
        let (disk, nodes) = self.image_of(vbd)?;
        let top = nodes[0].name.clone();
        let job = format!("{JOIN}{}", blocks::device_id(&disk));
        let jobs = self.execute("query-block-jobs", json!({})).await?;
        if entry(&jobs, "device", &job).is_some() {
            return Ok(Join { job, top });
        }
        let mut options = json!({ "job-id": job, "device": top });
        if let (Some(base), Some(options)) = (base, options.as_object_mut()) {
            let name = base.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            options.insert("base-node".into(), self.node_of(base, &nodes).await?.into());
            options.insert("backing-file".into(), name.into());
        }
        self.execute("block-stream", options).await.map_err(opening)?;
        Ok(Join { job, top })
    }

    /// The node that has this file open: one of ours, or one that QEMU opened because an image stands on it.
    async fn node_of(&self, path: &Path, nodes: &[Node]) -> Result<String, Refusal> {
        let missing = || Refusal::new(Reason::NoSuchVolume, path.display().to_string());
        let file = blocks::file_at(&path.to_string_lossy()).ok_or_else(missing)?;
        if let Some(node) = nodes.iter().find(|node| node.file == Some(file)) {
            return Ok(node.name.clone());
        }
        let named = self.execute("query-named-block-nodes", json!({ "flat": true })).await?;
        let named = named.as_array().map(Vec::as_slice).unwrap_or_default();
        let node = named.iter().find(|node| {
            let format = matches!(node["drv"].as_str(), Some("qcow2" | "raw"));
            format && node["file"].as_str().and_then(blocks::file_at) == Some(file)
        });
        node.and_then(|node| node["node-name"].as_str()).map(str::to_owned).ok_or_else(missing)
    }

    /// Has joins stop, also those that a former agent began: nothing else can be done to an image meanwhile. All stays as it
    /// is, and the next scan joins again.
    pub(super) async fn stop_joins(&self) -> Result<(), Refusal> {
        let deadline = Instant::now() + CHANGE_OVER;
        loop {
            let jobs = self.execute("query-block-jobs", json!({})).await?;
            let jobs = jobs.as_array().map(Vec::as_slice).unwrap_or_default();
            let jobs = jobs.iter().filter_map(|job| job["device"].as_str()).filter(|job| job.starts_with(JOIN));
            let mut left = false;
            for job in jobs {
                left = true;
                // One that has ended meanwhile is not there to be stopped.
                let asked = self.execute("block-job-cancel", json!({ "device": job, "force": true })).await;
                tracing::debug!(vm = %self.vm(), job, ?asked, "a join is given up");
            }
            if !left {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Refusal::new(Reason::InUse, "images are being joined, and QEMU does not stop that"));
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    pub(super) async fn job_ended(&mut self, event: &Event) {
        let job = event.text("device");
        let Some(pending) = self.take_pending(|wait| matches!(wait, Wait::Joined(it) if it.job == job)) else {
            return;
        };
        let cancelled = event.name == "BLOCK_JOB_CANCELLED";
        let error = if cancelled { "the join was given up" } else { event.text("error") };
        let outcome = if error.is_empty() {
            self.drop_joined(&pending).await;
            Ok(self.state().clone())
        } else {
            Err(opening(Refusal::failed(error)))
        };
        answer(pending.request.answer, outcome);
    }

    /// Closes the images whose content the one above them has now.
    async fn drop_joined(&mut self, pending: &Pending) {
        let (What::Join { vbd, base }, Wait::Joined(join)) = (&pending.request.what, &pending.wait) else {
            return;
        };
        let kept = base.as_deref().and_then(|base| blocks::file_at(&base.to_string_lossy()));
        let Some(attached) = self.description.disk(vbd) else { return };
        let base = attached.nodes.iter().position(|node| kept.is_some() && node.file == kept);
        let until = base.unwrap_or(attached.nodes.len());
        // The guest may have gone over to another image meanwhile, above the one that took all in.
        let Some(top) = attached.nodes.iter().position(|node| node.name == join.top) else { return };
        let joined: Vec<Node> = attached.nodes.drain((top + 1).min(until)..until).collect();
        self.close(&joined).await;
        self.keep();
    }

    pub(super) async fn look_at_joining(&mut self, pending: Pending) {
        let Wait::Joined(Join { job, .. }) = &pending.wait else { return };
        let Ok(jobs) = self.execute("query-block-jobs", json!({})).await else {
            return self.pending.push(pending);
        };
        match entry(&jobs, "device", job) {
            Some(_) => self.pending.push(pending),
            // Its end is told as an event, which may still be on the way; if not, it was lost with a connection.
            None if pending.deadline > Instant::now() + Duration::from_secs(5) => {
                self.pending.push(Pending { deadline: Instant::now() + Duration::from_secs(5), ..pending });
            }
            None => self.pending.push(pending),
        }
    }

    /// Compares what is written down of disks with what there is, and makes the one the other.
    pub(super) async fn look_at_disks(&mut self) {
        let Ok(devices) = self.execute("qom-list", json!({ "path": "/machine/peripheral" })).await else { return };
        let Ok(drives) = self.execute("query-block", json!({})).await else { return };
        for attached in self.description.disks.clone() {
            let (device, vbd) = (blocks::device_id(&attached.disk), attached.disk.vbd.clone());
            if entry(&devices, "name", &device).is_none() {
                tracing::info!(vm = %self.vm(), vbd, "a disk went while nobody listened");
                self.forget(&vbd).await;
                continue;
            }
            if attached.coming {
                self.has_come(&vbd);
            }
            let Some(next) = attached.next else { continue };
            let path = format!("/machine/peripheral/{device}");
            let drive = drives.as_array().and_then(|drives| {
                drives.iter().find(|drive| {
                    let qdev = drive["qdev"].as_str().unwrap_or_default();
                    qdev == device || qdev == path || qdev.starts_with(&format!("{path}/"))
                })
            });
            let holds = drive.and_then(|drive| drive["inserted"]["node-name"].as_str());
            if holds == Some(&next.name) {
                let medium = attached.disk.cdrom;
                let format = if medium { ImageFormat::Raw } else { ImageFormat::Qcow2 };
                let disk = Disk { path: next.path.clone(), format, ..attached.disk };
                let below = if medium { Vec::new() } else { attached.nodes };
                self.holds(&vbd, disk, [vec![next], below].concat());
            } else {
                self.close(std::slice::from_ref(&next)).await;
                if attached.disk.cdrom && holds.is_none() {
                    self.close(&attached.nodes).await;
                    self.holds(&vbd, attached.disk.with(None), Vec::new());
                } else {
                    self.goes_over_to(&vbd, None);
                }
            }
        }
        let disks = self.description.vbds();
        self.take_on(|state| state.disks = disks);
    }
}

/// The entry of a list that has this name.
fn entry<'a>(list: &'a Value, key: &str, name: &str) -> Option<&'a Value> {
    list.as_array()?.iter().find(|entry| entry[key] == name)
}

fn no_such_disk(vbd: &str) -> Refusal {
    Refusal::new(Reason::NoSuchDisk, vbd)
}

/// What QEMU says when an image does not open or grow, as a reason.
fn opening(refusal: Refusal) -> Refusal {
    if refusal.detail.contains("No space left") {
        return Refusal { reason: Reason::NoSpace, ..refusal };
    }
    why_not_open(&refusal.detail).unwrap_or(refusal)
}
