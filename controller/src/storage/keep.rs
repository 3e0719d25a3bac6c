//! What the master does for storage by itself: plugs what a host that booted had plugged, and looks into stores that have
//! changed, so that figures stay true and links that nobody uses are joined.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::{pbd, sr};
use datamodel::{Pbd, Ref, Sr, Vdi};
use raft_store::{LogIndex, Row, State, Transaction};
use tokio::time::Instant;

use super::{PLUG_AT_BOOT, connected, pbd as connection, sr as store};
use crate::call::Call;
use crate::controller::Shared;
use crate::failure::{Failure, Served};
use crate::membership::is_live;

const LOOK: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 1_000 });
/// A connection that could not be plugged is tried again after this.
const PLUG_AGAIN: Duration = Duration::from_secs(3);
/// A store is looked into no more often than this.
const SCAN_EVERY: Duration = Duration::from_secs(30);

/// Ends when dropped.
pub(crate) async fn keep(shared: &Arc<Shared>) {
    let mut tried: HashMap<Ref<Pbd>, Instant> = HashMap::new();
    let mut looked: HashMap<Ref<Sr>, (Instant, LogIndex)> = HashMap::new();
    loop {
        tokio::time::sleep(LOOK).await;
        let state = shared.store.state();
        plug_what_booted(shared, &state, &mut tried).await;
        scan_what_changed(shared, &state, &mut looked).await;
    }
}

/// A call that the master makes itself.
async fn own_call(shared: &Arc<Shared>, message: &str) -> Served<Call> {
    Call::of_the_pool(shared, shared.store.read().await?, message)
}

/// Connections that wait to be plugged, at hosts that are heard. One host's do not wait for another's.
async fn plug_what_booted(shared: &Arc<Shared>, state: &State, tried: &mut HashMap<Ref<Pbd>, Instant>) {
    let waits = |row: &&Arc<Row>| {
        let live = state.row(row.get(pbd::HOST)).is_some_and(|host_row| is_live(state, host_row));
        let at_once = tried.get(&row.typed()).is_none_or(|when| when.elapsed() >= PLUG_AGAIN);
        !row.get(pbd::CURRENTLY_ATTACHED) && row.get(pbd::OTHER_CONFIG).contains_key(PLUG_AT_BOOT) && live && at_once
    };
    let waiting: Vec<Ref<Pbd>> = state.all::<Pbd>().filter(waits).map(|row| row.typed()).collect();
    let plugs = waiting.iter().map(|this| async move {
        let plugged = match own_call(shared, "PBD.plug").await {
            Ok(call) => connection::plug(&call, *this).await,
            Err(failure) => Err(failure),
        };
        if let Err(Failure::Api(error)) = plugged {
            tracing::warn!(pbd = %this, %error, "a store is not plugged");
        }
    });
    futures::future::join_all(plugs).await;
    for this in waiting {
        tried.insert(this, Instant::now());
    }
    // What is plugged by now is plugged at once after the next boot.
    let state = shared.store.state();
    tried.retain(|this, _| state.row(*this).is_some_and(|row| !row.get(pbd::CURRENTLY_ATTACHED)));
}

/// When a store's disks, or its connections, changed last.
fn changed(state: &State, row: &Row) -> LogIndex {
    let disks = row.get(sr::VDIS).into_iter().filter_map(|disk: Ref<Vdi>| state.row(disk));
    let connections = row.get(sr::PBDS).into_iter().filter_map(|pbd: Ref<Pbd>| state.row(pbd));
    disks.chain(connections).map(|row| row.modified).max().unwrap_or_default()
}

/// Stores whose disks or connections changed since they were looked into, and those that somebody else may write to.
async fn scan_what_changed(shared: &Arc<Shared>, state: &State, looked: &mut HashMap<Ref<Sr>, (Instant, LogIndex)>) {
    let mut due = Vec::new();
    for row in state.all::<Sr>().filter(|row| connected(state, row)) {
        let this = row.typed::<Sr>();
        let changed = changed(state, row);
        let asked = row.get(sr::OTHER_CONFIG).get("auto-scan").is_some_and(|value| value == "true");
        match looked.get(&this) {
            // A master that has just come looks when something happens.
            None => drop(looked.insert(this, (Instant::now(), changed))),
            Some((when, _)) if when.elapsed() < SCAN_EVERY => {}
            Some((_, seen)) if *seen == changed && !asked => {}
            Some(_) if !row.get(sr::CURRENT_OPERATIONS).is_empty() => {}
            Some(_) => due.push(this),
        }
    }
    for this in due {
        let scanned = match own_call(shared, "SR.scan").await {
            Ok(call) => store::scan(&call, this).await,
            Err(failure) => Err(failure),
        };
        if let Err(Failure::Api(error)) = scanned {
            tracing::warn!(sr = %this, %error, "a store is not looked into");
        }
        let state = shared.store.state();
        if let Some(row) = state.row(this) {
            looked.insert(this, (Instant::now(), changed(&state, row)));
        }
    }
    looked.retain(|this, _| state.row(*this).is_some());
}

/// A host has booted: what it had plugged is plugged no more, and is to be plugged again.
pub(crate) fn unplugged_by_boot(state: &State, change: &mut Transaction, host_ref: Ref<datamodel::Host>) {
    let here = |row: &&Arc<Row>| row.get(pbd::HOST) == host_ref && row.get(pbd::CURRENTLY_ATTACHED);
    for row in state.all::<Pbd>().filter(here) {
        let this = row.typed::<Pbd>();
        change.set(this, pbd::CURRENTLY_ATTACHED, false);
        change.put(this, pbd::OTHER_CONFIG, PLUG_AT_BOOT.to_owned(), "true".to_owned());
    }
}
