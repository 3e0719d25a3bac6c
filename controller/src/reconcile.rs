//! What is, against what the rows say: one task for each host, as long as this node leads.
//!
//! A host's agent first tells every domain it has, then every change, and beats twice a second. The
//! rows follow: a domain that ended by itself halts its VM, a host that came back without its domains
//! halts them all, a host that is silent shows `live = false`. VMs of a silent host keep their state:
//! nobody can know whether they still run, and without high availability nobody may start them elsewhere.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::{host, host_metrics, member, vm};
use datamodel::{Host, Member, Ref, Vm};
use futures::StreamExt;
use proto::agent::agent_event::Event;
use proto::agent::{DestroyDomain, DomainState, HelloRequest, PowerState, Step, WatchRequest, step::Action};
use raft_store::{CommitError, LogIndex, Row};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::controller::Shared;
use crate::failure::{Failure, Served};
use crate::first_boot;
use crate::membership::LEAVING;
use crate::operations::{is_shown, refresh, show};

/// A host that is silent for this long is shown as not live.
const SILENCE: Duration = Duration::from_secs(3);
const RETRY: Duration = Duration::from_millis(250);
/// `memory_free` is written when it moved by this much, so that beats do not become log entries.
const MEMORY_STEP: i64 = 16 << 20;

/// Follows every host until the term ends.
pub(crate) async fn run(shared: &Arc<Shared>, epoch: LogIndex, term: CancellationToken) {
    let mut hosts: JoinSet<()> = JoinSet::new();
    let mut followed: HashMap<Ref<Member>, AbortHandle> = HashMap::new();
    let mut applied = shared.store.applied();
    loop {
        let state = shared.store.state();
        let wanted = |row: &&Arc<Row>| row.get(member::STANDING) != LEAVING && !row.get(member::WITNESS);
        for row in state.all::<Member>().filter(wanted) {
            let reference = row.typed::<Member>();
            if let Entry::Vacant(place) = followed.entry(reference) {
                let (shared, term) = (Arc::clone(shared), term.clone());
                place.insert(hosts.spawn(async move {
                    tokio::select! {
                        () = follow(&shared, reference, epoch) => {}
                        () = term.cancelled() => {}
                    }
                }));
            }
        }
        // Who has left is no longer asked.
        followed.retain(|reference, task| {
            let stays = state.row(*reference).is_some_and(|row| wanted(&row));
            if !stays {
                task.abort();
            }
            stays
        });
        while hosts.try_join_next().is_some() {}
        tokio::select! {
            changed = applied.changed() => if changed.is_err() { return },
            () = term.cancelled() => return,
        }
        // Members change seldom: a look now and then is enough.
        tokio::time::sleep(RETRY).await;
    }
}

/// Follows one host for ever: connects, listens, and shows it dead when it is silent.
async fn follow(shared: &Arc<Shared>, reference: Ref<Member>, epoch: LogIndex) {
    if let Some(row) = shared.store.state().row(reference) {
        // A connection from an earlier membership says nothing of this one.
        shared.agents.forget(&row.get(member::AGENT_ADDRESS));
    }
    let mut heard = tokio::time::Instant::now();
    loop {
        if let Err(reason) = listen(shared, reference, epoch, &mut heard).await {
            tracing::debug!(member = %reference, reason, "a host is not heard");
        }
        if heard.elapsed() > SILENCE
            && let Err(error) = show_live(shared, reference, false).await
        {
            tracing::debug!(?error, "a silent host is not shown yet");
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn listen(
    shared: &Arc<Shared>,
    reference: Ref<Member>,
    epoch: LogIndex,
    heard: &mut tokio::time::Instant,
) -> Result<(), String> {
    let state = shared.store.state();
    let row = state.row(reference).ok_or("the member is gone")?;
    let agent = shared.agents.at(&row.get(member::AGENT_ADDRESS)).map_err(|error| error.to_string())?;
    let pool = state.all::<datamodel::Pool>().next().map(|row| row.uuid().to_owned()).unwrap_or_default();
    let hello = HelloRequest { version: 1, pool: pool.clone(), epoch: epoch.0 };
    let reply = agent.hello(hello).await.map_err(|error| error.to_string())?;
    let told = |failure: Failure| format!("{failure:?}");
    let host_ref = first_boot::attach(shared, reference, &reply).await.map_err(told)?;
    *heard = tokio::time::Instant::now();
    let request = WatchRequest { pool: pool.clone(), epoch: epoch.0 };
    let mut events = agent.watch(request).await.map_err(|error| error.to_string())?;
    let mut synced = false;
    let mut crossed = Crossed::new();
    loop {
        let event = match tokio::time::timeout(SILENCE, events.next()).await {
            Ok(Some(event)) => event.map_err(|error| error.to_string())?,
            Ok(None) => return Err("the agent ended the stream".into()),
            Err(_) => return Err("the agent is silent".into()),
        };
        *heard = tokio::time::Instant::now();
        match event.event {
            Some(Event::All(list)) => {
                crossed = all_domains(shared, &agent, &pool, epoch, host_ref, &list.domains).await.map_err(told)?;
                if !synced {
                    // Live only when its domains are known: who sees a live host may trust what it runs.
                    show_live(shared, reference, true).await.map_err(told)?;
                    synced = true;
                }
            }
            Some(Event::Domain(domain)) => {
                if settle(shared, host_ref, &domain).await.map_err(told)? {
                    crossed.remove(&domain.vm);
                } else {
                    crossed.insert(domain.vm.clone(), domain);
                }
            }
            Some(Event::Beat(beat)) => {
                if disagree(shared, host_ref, &mut crossed).await.map_err(told)? {
                    // What was heard is old by now: the host is asked anew for all that it has.
                    return Ok(());
                }
                show_memory(shared, host_ref, beat.memory_total, beat.memory_free).await.map_err(told)?;
            }
            None => {}
        }
    }
}

/// Domains that changed while an operation was at work on their VM, as they were last heard of.
type Crossed = BTreeMap<String, DomainState>;

/// Whether an operation that is over left a VM otherwise than its domain was heard to be: a guest that ends while it is
/// being started is told of by the host before the start is recorded. Forgets what agrees.
async fn disagree(shared: &Arc<Shared>, host_ref: Ref<Host>, crossed: &mut Crossed) -> Served<bool> {
    if crossed.is_empty() {
        return Ok(false);
    }
    let state = shared.store.read().await?;
    let mut disagree = false;
    crossed.retain(|_, domain| {
        let row = state.by_uuid(<Vm as datamodel::ClassKind>::ID, &domain.vm);
        let busy = row.is_some_and(|row| !row.get(vm::CURRENT_OPERATIONS).is_empty());
        let agrees = match row.filter(|row| row.get(vm::RESIDENT_ON) == host_ref) {
            Some(row) => is_shown(&state, row, domain),
            None => !placement_state(domain),
        };
        disagree |= !busy && !agrees;
        busy
    });
    Ok(disagree)
}

/// Every domain of a host: VMs that should be there and are not have ended; domains that no VM stands for go.
async fn all_domains(
    shared: &Arc<Shared>,
    agent: &Arc<dyn Agent>,
    pool: &str,
    epoch: LogIndex,
    host_ref: Ref<Host>,
    domains: &[DomainState],
) -> Served<Crossed> {
    let state = shared.store.read().await?;
    let mut crossed = Crossed::new();
    let there: HashMap<&str, &DomainState> = domains.iter().map(|domain| (domain.vm.as_str(), domain)).collect();
    // One that is being started here, too: an operation that is repeated answers what was so when it was first done.
    let here =
        |row: &&Arc<Row>| row.get(vm::RESIDENT_ON) == host_ref || row.get(vm::SCHEDULED_TO_BE_RESIDENT_ON) == host_ref;
    for row in state.all::<Vm>().filter(here).filter(|row| !row.get(vm::IS_CONTROL_DOMAIN)) {
        if !there.contains_key(row.uuid()) {
            let gone = DomainState {
                vm: row.uuid().to_owned(),
                state: PowerState::Halted.into(),
                domid: -1,
                ..Default::default()
            };
            if !settle(shared, host_ref, &gone).await? {
                crossed.insert(gone.vm.clone(), gone);
            }
        }
    }
    for domain in domains {
        let known = state.by_uuid(<Vm as datamodel::ClassKind>::ID, &domain.vm);
        let ours = known.is_some_and(|row| {
            row.get(vm::RESIDENT_ON) == host_ref || row.get(vm::SCHEDULED_TO_BE_RESIDENT_ON) == host_ref
        });
        if ours {
            if !settle(shared, host_ref, domain).await? {
                crossed.insert(domain.vm.clone(), domain.clone());
            }
        } else if placement_state(domain) {
            // A start whose outcome was lost, or a VM that was declared dead and is started elsewhere: never two of it.
            tracing::warn!(vm = domain.vm, host = %host_ref, "a domain that the pool does not know here is ended");
            let step = Step {
                pool: pool.to_owned(),
                epoch: epoch.0,
                operation: shared.uuid().to_string(),
                vm: domain.vm.clone(),
                traceparent: String::new(),
                number: 0,
                action: Some(Action::Destroy(DestroyDomain {})),
            };
            if let Err(error) = agent.perform(step, Duration::from_secs(30)).await {
                tracing::warn!(vm = domain.vm, %error, "the stray domain is still there");
            }
        }
    }
    Ok(crossed)
}

fn placement_state(domain: &DomainState) -> bool {
    matches!(domain.state(), PowerState::Running | PowerState::Paused)
}

/// Makes a VM's rows say what its domain is. False where that is for an operation to say, or cannot be said yet.
async fn settle(shared: &Arc<Shared>, host_ref: Ref<Host>, domain: &DomainState) -> Served<bool> {
    for _ in 0..8 {
        let state = shared.store.read().await?;
        let Some(row) = state.by_uuid(<Vm as datamodel::ClassKind>::ID, &domain.vm) else {
            return Ok(!placement_state(domain));
        };
        let here = row.get(vm::RESIDENT_ON) == host_ref;
        if !row.get(vm::CURRENT_OPERATIONS).is_empty() {
            let coming = row.get(vm::SCHEDULED_TO_BE_RESIDENT_ON) == host_ref;
            return Ok(!here && !coming);
        }
        if !here {
            // A domain that should not be here is ended when the host is asked for all that it has.
            return Ok(!placement_state(domain));
        }
        if is_shown(&state, row, domain) {
            return Ok(true);
        }
        tracing::info!(vm = domain.vm, host = %host_ref, state = ?domain.state(), reason = domain.reason, "a domain changed by itself");
        let mut change = shared.transaction();
        change.expect_row(row);
        show(shared, &state, &mut change, row, host_ref, domain);
        refresh(&state, &mut change);
        match shared.store.commit(change).await {
            Ok(_) => return Ok(true),
            Err(CommitError::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

async fn show_live(shared: &Arc<Shared>, reference: Ref<Member>, live: bool) -> Served<()> {
    let state = shared.store.read().await?;
    let Some(row) = state.row(reference) else { return Ok(()) };
    let Some(host_row) = state.row(row.get(member::HOST)) else { return Ok(()) };
    let metrics = host_row.get(host::METRICS);
    if state.row(metrics).is_none_or(|row| row.get(host_metrics::LIVE) == live) {
        return Ok(());
    }
    tracing::info!(host = host_row.name_label(), live, "a host's life changed");
    let mut change = shared.transaction();
    change.set(metrics, host_metrics::LIVE, live).set(metrics, host_metrics::LAST_UPDATED, shared.now());
    shared.store.commit(change).await?;
    Ok(())
}

async fn show_memory(shared: &Arc<Shared>, host_ref: Ref<Host>, total: u64, free: u64) -> Served<()> {
    let state = shared.store.state();
    let Some(host_row) = state.row(host_ref) else { return Ok(()) };
    let metrics_ref = host_row.get(host::METRICS);
    let Some(metrics) = state.row(metrics_ref) else { return Ok(()) };
    let (total, free) = (i64::try_from(total).unwrap_or(i64::MAX), i64::try_from(free).unwrap_or(i64::MAX));
    let moved = (metrics.get(host_metrics::MEMORY_FREE) - free).abs() >= MEMORY_STEP;
    if !moved && metrics.get(host_metrics::MEMORY_TOTAL) == total {
        return Ok(());
    }
    let mut change = shared.transaction();
    change.set(metrics_ref, host_metrics::MEMORY_TOTAL, total).set(metrics_ref, host_metrics::MEMORY_FREE, free).set(
        metrics_ref,
        host_metrics::LAST_UPDATED,
        shared.now(),
    );
    shared.store.commit(change).await?;
    Ok(())
}
