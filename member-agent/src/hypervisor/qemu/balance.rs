//! What a living domain has of its host: memory and vCPUs; and the keys that are pressed for it.

use std::time::Duration;

use serde_json::{Value, json};

use super::domain::Domain;
use super::qmp::Qmp;
use super::request::{Wait, answer};
use crate::hypervisor::domain::{DomainState, Reason, Refusal};

const BALLOON: &str = "/machine/peripheral/balloon/virtio-backend";
/// How long a key is held.
const HELD: Duration = Duration::from_millis(100);

/// Tells the balloon how large the guest should be. The guest follows when its driver runs.
pub(super) async fn inflate(qmp: &Qmp, target: u64, limit: Duration) -> Result<(), super::qmp::QmpError> {
    qmp.execute("balloon", json!({ "value": target }), limit).await.map(drop)
}

impl Domain {
    pub(super) async fn set_memory_target(&mut self, bytes: u64, by: &str) -> Result<DomainState, Refusal> {
        let mut spec = self.description.spec.clone();
        spec.memory_target = bytes;
        let target = spec.target();
        if target > self.description.spec.memory() {
            let detail = format!("the domain was built for {} bytes", self.description.spec.memory());
            return Err(Refusal::new(Reason::Unsupported, detail));
        }
        if !self.balloon_lives().await {
            return Err(Refusal::new(Reason::NoGuestSupport, "the guest has no balloon driver"));
        }
        let before = self.state().memory_target;
        self.shared.roster.retarget(self.vm(), target)?;
        if let Err(refusal) = self.execute("balloon", json!({ "value": target })).await {
            let _ = self.shared.roster.retarget(self.vm(), before);
            return Err(refusal);
        }
        self.description.spec.memory_target = bytes;
        Ok(self.done(by, |state| state.memory_target = target))
    }

    /// Whether the guest drives the balloon. A QEMU that cannot tell is believed.
    pub(super) async fn balloon_lives(&self) -> bool {
        match self.execute("x-query-virtio-status", json!({ "path": BALLOON })).await {
            Ok(status) => status["status"].to_string().contains("DRIVER_OK"),
            Err(refusal) => refusal.detail.contains("not been found") || refusal.detail.contains("not found"),
        }
    }

    pub(super) fn balloon_is(&mut self, told: &Value) {
        if let Some(actual) = told["actual"].as_u64() {
            self.take_on(|state| {
                state.memory_actual = actual;
                if let Some(guest) = &mut state.guest {
                    guest.can_balloon = true;
                }
            });
        }
    }

    pub(super) async fn send_sysrq(&mut self, letter: char, by: &str) -> Result<DomainState, Refusal> {
        let key = letter.to_ascii_lowercase();
        if !key.is_ascii_alphanumeric() {
            return Err(Refusal::new(Reason::Unsupported, format!("no key is {letter:?}")));
        }
        let keys = ["alt".to_owned(), "sysrq".to_owned(), key.to_string()];
        let keys: Vec<_> = keys.iter().map(|key| json!({ "type": "qcode", "data": key })).collect();
        self.execute("send-key", json!({ "keys": keys, "hold-time": u64::try_from(HELD.as_millis()).unwrap_or(100) }))
            .await?;
        Ok(self.done(by, |_| {}))
    }

    /// Plugs vCPUs, or asks the guest to let go of some: those that are waited for.
    pub(super) async fn set_vcpus(&mut self, number: u32, by: &str) -> Result<Vec<String>, Refusal> {
        if number == 0 || number > self.description.spec.vcpus_max.max(self.description.spec.vcpus_at_startup) {
            let detail = format!("the domain was built for 1 to {} vCPUs", self.description.spec.vcpus_max);
            return Err(Refusal::new(Reason::Unsupported, detail));
        }
        let slots = self.execute("query-hotpluggable-cpus", json!({})).await?;
        let mut slots: Vec<Value> = slots.as_array().cloned().unwrap_or_default();
        let order = |slot: &Value| ["socket-id", "core-id", "thread-id"].map(|id| slot["props"][id].as_u64());
        slots.sort_by_key(order);
        let there = slots.iter().filter(|slot| slot["qom-path"].is_string()).count();
        let wanted = usize::try_from(number).unwrap_or(there);
        for (position, slot) in slots.iter().enumerate().filter(|(_, slot)| slot["qom-path"].is_null()) {
            if position >= wanted {
                break;
            }
            let mut device = slot["props"].clone();
            if let Some(device) = device.as_object_mut() {
                device.insert("driver".into(), slot["type"].clone());
                device.insert("id".into(), format!("vcpu{position}").into());
            }
            self.execute("device_add", device).await?;
            self.has_vcpus(position + 1);
        }
        let mut going = Vec::new();
        for slot in slots.iter().skip(wanted).rev() {
            if let Some(path) = slot["qom-path"].as_str() {
                self.execute("device_del", json!({ "id": path })).await?;
                going.push(path.to_owned());
            }
        }
        self.done(by, |_| {});
        Ok(going)
    }

    fn has_vcpus(&mut self, number: usize) {
        self.description.spec.vcpus_at_startup = u32::try_from(number).unwrap_or(u32::MAX);
        self.keep();
    }

    /// The guest has let go of a vCPU, if that is what this device was.
    pub(super) fn vcpu_went(&mut self, path: &str) {
        let Some(mut pending) =
            self.take_pending(|wait| matches!(wait, Wait::Vcpus(going) if going.iter().any(|it| it == path)))
        else {
            return;
        };
        self.has_vcpus((self.description.spec.vcpus_at_startup as usize).saturating_sub(1).max(1));
        if let Wait::Vcpus(going) = &mut pending.wait {
            going.retain(|it| it != path);
            if !going.is_empty() {
                return self.pending.push(pending);
            }
        }
        answer(pending.request.answer, Ok(self.state().clone()));
    }
}
