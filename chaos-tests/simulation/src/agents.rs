//! Agents of simulated hosts: they keep domains, and the rules of an agent. They outlive the controllers' processes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use controller::{Agent, AgentError, Agents, Performed};
use futures::StreamExt;
use futures::stream::{BoxStream, poll_fn};
use parking_lot::Mutex;
use proto::agent::agent_event::Event;
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::{
    AgentEvent, Beat, DomainList, DomainState, HelloReply, HelloRequest, HostFacts, PowerState, Refusal, Step,
    StoreState, WatchRequest,
};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::broken;
use crate::chance::Chance;
use crate::kernel;
use crate::network::{Lane, Network, Place};
use crate::trace::Trace;

/// The agent of a node is at its place and this.
pub const AGENT: Place = 100;
const MEMORY: u64 = 64 << 30;
/// Nobody says of a machine that it is off which comes on again so soon.
const SOON: i64 = 1_500_000_000;
const STORE: u64 = 1 << 40;
/// Who is not answered for so long does not know whether the step was done.
const LOST: Duration = Duration::from_secs(3);

/// The uuid of a node's host.
#[must_use]
pub fn host_uuid(node: u64) -> Uuid {
    Uuid::from_u128(0xa6e7 << 64 | u128::from(node))
}

/// All agents of a pool.
#[derive(Clone)]
pub struct Hosts(Arc<Mutex<Inner>>);

struct Inner {
    chance: Chance,
    trace: Trace,
    hosts: BTreeMap<u64, Host>,
}

#[derive(Default)]
struct Host {
    /// The machine is off until then.
    off_until: Option<i64>,
    /// How often it was switched on.
    boots: u64,
    epoch: u64,
    domains: BTreeMap<String, DomainState>,
    done: BTreeMap<(String, u32), Result<Performed, Refusal>>,
    next_domid: i64,
    watchers: Vec<mpsc::UnboundedSender<AgentEvent>>,
}

fn refusal(reason: Reason, detail: impl ToString) -> Refusal {
    Refusal { reason: reason.into(), detail: detail.to_string(), ..Refusal::default() }
}

/// Stores are there, and empty.
fn of_store(step: &Step) -> Option<Result<Performed, Refusal>> {
    match step.action.as_ref()? {
        Action::AttachStore(_) | Action::DetachStore(_) | Action::ScanStore(_) => {
            Some(Ok(Performed::Store(StoreState {
                sr: step.vm.clone(),
                physical_size: STORE,
                ..StoreState::default()
            })))
        }
        _ => None,
    }
}

impl Host {
    fn admit(&mut self, epoch: u64) -> Result<(), Refusal> {
        if epoch < self.epoch {
            return Err(refusal(Reason::StaleEpoch, self.epoch));
        }
        self.epoch = epoch;
        Ok(())
    }

    fn tell(&mut self, event: Event) {
        self.watchers.retain(|watcher| watcher.send(AgentEvent { event: Some(event.clone()) }).is_ok());
    }

    fn perform(&mut self, step: &Step) -> Result<Performed, Refusal> {
        self.admit(step.epoch)?;
        if let Some(outcome) = self.done.get(&(step.operation.clone(), step.number)) {
            return outcome.clone();
        }
        let outcome = of_store(step).unwrap_or_else(|| self.act(step).map(Performed::Domain));
        self.done.insert((step.operation.clone(), step.number), outcome.clone());
        outcome
    }

    fn act(&mut self, step: &Step) -> Result<DomainState, Refusal> {
        let there = self.domains.get(&step.vm).map(DomainState::state);
        let running = || there.ok_or_else(|| refusal(Reason::NoSuchDomain, ""));
        let (state, fresh) = match step.action.as_ref() {
            Some(Action::Start(_)) if there.is_some() => return Err(refusal(Reason::DomainExists, "")),
            Some(Action::Start(start)) if start.paused => (PowerState::Paused, true),
            Some(Action::Start(_)) => (PowerState::Running, true),
            Some(Action::Pause(_)) => (running().map(|_| PowerState::Paused)?, false),
            Some(Action::Unpause(_)) => (running().map(|_| PowerState::Running)?, false),
            Some(Action::Reboot(_)) => (running().map(|_| PowerState::Running)?, true),
            Some(Action::Shutdown(_)) => (running().map(|_| PowerState::Halted)?, false),
            Some(Action::Destroy(_)) => (PowerState::Halted, false),
            _ => return Err(refusal(Reason::Unsupported, "")),
        };
        let domain = if state == PowerState::Halted {
            self.domains.remove(&step.vm);
            DomainState { vm: step.vm.clone(), state: state.into(), domid: -1, ..DomainState::default() }
        } else {
            if fresh {
                self.next_domid += 1;
            }
            let known = self.domains.get(&step.vm).map_or(self.next_domid, |domain| domain.domid);
            let domid = if fresh { self.next_domid } else { known };
            DomainState { vm: step.vm.clone(), state: state.into(), domid, ..DomainState::default() }
        };
        if state != PowerState::Halted {
            self.domains.insert(step.vm.clone(), domain.clone());
        }
        self.tell(Event::Domain(domain.clone()));
        Ok(domain)
    }
}

impl Hosts {
    /// Hosts without domains, one for each node.
    #[must_use]
    pub fn new(nodes: u64, chance: Chance, trace: Trace) -> Self {
        let hosts = (1..=nodes).map(|node| (node, Host::default())).collect();
        Self(Arc::new(Mutex::new(Inner { chance, trace, hosts })))
    }

    /// The agents, as the controller of a node reaches them.
    #[must_use]
    pub fn seen_from(&self, network: &Network, from: Place) -> Agents {
        let (hosts, network) = (self.clone(), network.clone());
        Agents::with(move |address| {
            let node = address.rsplit('-').next().and_then(|node| node.parse().ok());
            let node = node.ok_or_else(|| AgentError::Unreachable(address.to_owned()))?;
            Ok(Arc::new(Remote { hosts: hosts.clone(), network: network.clone(), from, node }) as Arc<dyn Agent>)
        })
    }

    /// A machine goes off until then, and its guests are gone.
    pub fn switch_off(&self, node: u64, until: i64) {
        self.with(node, |host| {
            host.off_until = Some(until);
            host.boots += 1;
            host.domains.clear();
            host.watchers.clear();
        });
    }

    /// A machine that is off for some time yet.
    #[must_use]
    pub fn off(&self) -> Option<u64> {
        let inner = self.0.lock();
        let soon = kernel::now() + SOON;
        inner.hosts.iter().find(|(_, host)| host.off_until.is_some_and(|until| until > soon)).map(|(node, _)| *node)
    }

    /// Every machine is on.
    pub fn mend(&self) {
        self.0.lock().hosts.values_mut().for_each(|host| host.off_until = None);
    }

    /// A guest ends by itself, on some host.
    pub fn lose_a_domain(&self) {
        let inner = &mut *self.0.lock();
        let node = 1 + inner.chance.below(inner.hosts.len() as u64);
        let Some(host) = inner.hosts.get_mut(&node) else { return };
        let Some((vm, _)) = host.domains.pop_first() else { return };
        crate::tell!(inner.trace, "the guest of {vm} ends on host {node}");
        host.tell(Event::Domain(DomainState {
            vm,
            state: PowerState::Halted.into(),
            domid: -1,
            ..DomainState::default()
        }));
    }

    /// Every domain, by VM: its host and its state. A VM that runs twice breaks a promise.
    #[must_use]
    pub fn domains(&self) -> BTreeMap<String, (u64, PowerState)> {
        let inner = self.0.lock();
        let mut out: BTreeMap<String, (u64, PowerState)> = BTreeMap::new();
        for (node, host) in &inner.hosts {
            for (vm, domain) in &host.domains {
                if let Some((other, _)) = out.insert(vm.clone(), (*node, domain.state())) {
                    broken!(inner.trace, "VM {vm} runs on host {other} and on host {node}");
                }
            }
        }
        out
    }

    /// How long a step takes.
    fn effort(&self) -> Duration {
        let chance = &mut self.0.lock().chance;
        if chance.one_in(10) { chance.millis(500, 5_000) } else { chance.millis(1, 80) }
    }

    fn is_off(&self, node: u64) -> bool {
        let is_off = |host: &mut Host| host.off_until.is_some_and(|until| until > kernel::now());
        self.with(node, is_off).unwrap_or(true)
    }

    fn with<T>(&self, node: u64, act: impl FnOnce(&mut Host) -> T) -> Option<T> {
        self.0.lock().hosts.get_mut(&node).map(act)
    }
}

/// An agent at the other end of the network.
struct Remote {
    hosts: Hosts,
    network: Network,
    from: Place,
    node: u64,
}

impl Remote {
    /// Asks the agent over the network; none where no answer comes in time.
    async fn ask<T: Send + 'static>(
        &self,
        takes: Duration,
        limit: Duration,
        act: impl FnOnce(&mut Host) -> T + Send + 'static,
    ) -> Option<T> {
        let (tell, told) = oneshot::channel();
        let (from, to, node) = (self.from, AGENT + self.node, self.node);
        let (hosts, network, back) = (self.hosts.clone(), self.network.clone(), self.network.clone());
        let answer = move || {
            if hosts.is_off(node) {
                return;
            }
            if let Some(answer) = hosts.with(node, act) {
                back.post(to, from, move || drop(tell.send(answer)));
            }
        };
        // The agent works for a while, whoever has gone away meanwhile.
        self.network.post(from, to, move || network.later(to, takes, answer));
        tokio::time::timeout(limit, told).await.ok()?.ok()
    }
}

#[async_trait]
impl Agent for Remote {
    async fn hello(&self, request: HelloRequest) -> Result<HelloReply, AgentError> {
        let admitted = self.ask(Duration::ZERO, LOST, move |host| host.admit(request.epoch)).await;
        match admitted {
            None => Err(AgentError::Unreachable("no answer".into())),
            Some(Err(refusal)) => Err(AgentError::Refused(refusal)),
            Some(Ok(())) => {
                let facts = HostFacts {
                    hostname: format!("host{}", self.node),
                    memory_total: MEMORY,
                    memory_free: MEMORY,
                    control_domain_memory: 1 << 28,
                    boot_id: format!("{}.{}", self.node, self.hosts.with(self.node, |host| host.boots).unwrap_or(0)),
                    ..HostFacts::default()
                };
                let host = host_uuid(self.node).to_string();
                Ok(HelloReply { version: 1, host, facts: Some(facts), ..HelloReply::default() })
            }
        }
    }

    async fn perform(&self, step: Step, limit: Duration) -> Result<Performed, AgentError> {
        let takes = self.hosts.effort();
        match self.ask(takes, limit.min(takes + LOST), move |host| host.perform(&step)).await {
            None => Err(AgentError::Unknown("no answer".into())),
            Some(outcome) => outcome.map_err(AgentError::Refused),
        }
    }

    async fn watch(
        &self,
        request: WatchRequest,
    ) -> Result<BoxStream<'static, Result<AgentEvent, AgentError>>, AgentError> {
        let (events, mut told) = mpsc::unbounded_channel();
        let admitted = self
            .ask(Duration::ZERO, LOST, move |host| {
                host.admit(request.epoch)?;
                let domains = host.domains.values().cloned().collect();
                let _ = events.send(AgentEvent { event: Some(Event::All(DomainList { domains })) });
                host.watchers.push(events);
                Ok::<_, Refusal>(())
            })
            .await;
        match admitted {
            None => Err(AgentError::Unreachable("no answer".into())),
            Some(Err(refusal)) => Err(AgentError::Refused(refusal)),
            Some(Ok(())) => {
                let (sender, mut arrived) = mpsc::unbounded_channel();
                let (network, from, to) = (self.network.clone(), self.from, AGENT + self.node);
                tokio::spawn(async move {
                    let lane = Lane::default();
                    loop {
                        let event = match tokio::time::timeout(Duration::from_millis(500), told.recv()).await {
                            Ok(Some(event)) => event,
                            Ok(None) => return,
                            Err(_) => {
                                let beat = Beat { memory_free: MEMORY, memory_total: MEMORY };
                                AgentEvent { event: Some(Event::Beat(beat)) }
                            }
                        };
                        let sender: mpsc::UnboundedSender<_> = sender.clone();
                        if sender.is_closed() {
                            return;
                        }
                        network.post_in_order(&lane, to, from, move || drop(sender.send(Ok(event))));
                    }
                });
                Ok(poll_fn(move |context| arrived.poll_recv(context)).boxed())
            }
        }
    }
}
