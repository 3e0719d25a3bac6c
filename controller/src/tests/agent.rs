//! An agent whose steps can be held up, and which does what it is asked.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use parking_lot::Mutex;
use proto::agent::agent_event::Event;
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::{
    AgentEvent, Beat, DomainList, DomainState, HelloReply, HelloRequest, HostFacts, Nic, PowerState, Refusal, Step,
    WatchRequest,
};
use tokio::sync::{broadcast, watch};
use uuid::Uuid;

use super::stores::Stores;
use crate::{Agent, AgentError, Performed};

const MEMORY: u64 = 16 << 30;

pub(crate) struct Obedient {
    host: Uuid,
    open: watch::Sender<bool>,
    begun: watch::Sender<usize>,
    domains: broadcast::Sender<DomainState>,
    pub(crate) stores: Stores,
    steps: Mutex<Vec<Step>>,
    refusals: Mutex<VecDeque<Refusal>>,
    loses: AtomicBool,
}

impl Obedient {
    pub(crate) fn new(host: Uuid) -> Self {
        Self {
            host,
            open: watch::Sender::new(true),
            begun: watch::Sender::new(0),
            domains: broadcast::Sender::new(8),
            stores: Stores::default(),
            steps: Mutex::default(),
            refusals: Mutex::default(),
            loses: AtomicBool::new(false),
        }
    }

    /// Steps wait from now on.
    pub(crate) fn hold(&self) {
        self.open.send_replace(false);
    }

    /// Steps that wait go on.
    pub(crate) fn release(&self) {
        self.open.send_replace(true);
    }

    /// The next step is refused for this.
    pub(crate) fn refuse(&self, reason: Reason) {
        self.refuse_saying(reason, "as the test wants it");
    }

    /// The same, in these words.
    pub(crate) fn refuse_saying(&self, reason: Reason, detail: &str) {
        let refusal = Refusal { reason: reason.into(), detail: detail.into(), ..Refusal::default() };
        self.refusals.lock().push_back(refusal);
    }

    /// Whether what comes of steps about domains is heard from now on.
    pub(crate) fn lose(&self, loses: bool) {
        self.loses.store(loses, Ordering::SeqCst);
    }

    /// Every step that was asked for, in order.
    pub(crate) fn steps(&self) -> Vec<Step> {
        self.steps.lock().clone()
    }

    /// Tells of a domain.
    pub(crate) fn tell(&self, domain: DomainState) {
        self.domains.send(domain).expect("nobody watches");
    }

    /// Waits until so many steps have been asked for.
    pub(crate) async fn asked(&self, steps: usize) {
        let mut begun = self.begun.subscribe();
        let enough = begun.wait_for(|begun| *begun >= steps);
        tokio::time::timeout(Duration::from_secs(20), enough).await.expect("no step was asked for").unwrap();
    }
}

#[async_trait]
impl Agent for Obedient {
    async fn hello(&self, _: HelloRequest) -> Result<HelloReply, AgentError> {
        let facts = HostFacts {
            hostname: "host1".into(),
            memory_total: MEMORY,
            memory_free: MEMORY,
            control_domain_memory: 1 << 28,
            boot_id: self.stores.boot_id(),
            nics: vec![Nic { device: "eth0".into(), mtu: 1500, management: true, ..Nic::default() }],
            ..HostFacts::default()
        };
        Ok(HelloReply { version: 1, host: self.host.to_string(), facts: Some(facts), ..HelloReply::default() })
    }

    async fn perform(&self, step: Step, _: Duration) -> Result<Performed, AgentError> {
        self.stores.turn(&step).await;
        if let Some(outcome) = self.stores.perform(&step) {
            return outcome;
        }
        self.begun.send_modify(|begun| *begun += 1);
        let mut open = self.open.subscribe();
        open.wait_for(|open| *open).await.map_err(|error| AgentError::Unknown(error.to_string()))?;
        self.steps.lock().push(step.clone());
        if self.loses.load(Ordering::SeqCst) {
            return Err(AgentError::Unknown("lost".into()));
        }
        if let Some(refusal) = self.refusals.lock().pop_front() {
            return Err(AgentError::Refused(refusal));
        }
        let memory_actual = match &step.action {
            Some(Action::Start(start)) => start.spec.as_ref().map_or(0, |spec| spec.memory_target),
            Some(Action::MemoryTarget(target)) => target.bytes,
            _ => 0,
        };
        let (state, domid) = match step.action {
            Some(
                Action::Start(_)
                | Action::Unpause(_)
                | Action::Reboot(_)
                | Action::Resume(_)
                | Action::MemoryTarget(_)
                | Action::Vcpus(_)
                | Action::Keys(_),
            ) => (PowerState::Running, 7),
            Some(Action::Pause(_)) => (PowerState::Paused, 7),
            // Its domain was paused before.
            Some(Action::Suspend(suspend)) if suspend.keep_running => (PowerState::Paused, 7),
            _ => (PowerState::Halted, -1),
        };
        Ok(Performed::Domain(DomainState {
            vm: step.vm,
            state: state.into(),
            domid,
            memory_actual,
            ..DomainState::default()
        }))
    }

    async fn watch(&self, _: WatchRequest) -> Result<BoxStream<'static, Result<AgentEvent, AgentError>>, AgentError> {
        let event = |event| Ok(AgentEvent { event: Some(event) });
        let all = futures::stream::once(async move { event(Event::All(DomainList { domains: Vec::new() })) });
        let boot = self.stores.booted();
        let beats = futures::stream::unfold(boot, move |mut boot| async move {
            // A host that boots breaks its connections.
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
                _ = boot.changed() => return None,
            }
            Some((event(Event::Beat(Beat { memory_free: MEMORY, memory_total: MEMORY })), boot))
        });
        let domains = futures::stream::unfold(self.domains.subscribe(), move |mut domains| async move {
            domains.recv().await.ok().map(|domain| (event(Event::Domain(domain)), domains))
        });
        let booted = {
            let mut boot = self.stores.booted();
            async move { drop(boot.changed().await) }
        };
        Ok(all.chain(futures::stream::select(beats, domains)).take_until(booted).boxed())
    }
}
