//! What is owed of operations that are over: images that could not be removed, domains that may have been started. Their
//! rows stay in the journal until it is done. Until then such an image is nobody's disk, and such a VM starts nowhere.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::operation;
use datamodel::{ClassKind, Host, Operation, Ref};
use proto::agent::step::Action;
use raft_store::{Row, State, Transaction};

use super::adopt::LOOK_AGAIN;
use super::engine;
use super::journal::Journal;
use super::step::Undo;
use crate::controller::Shared;
use crate::failure::Served;
use crate::membership::is_live;

/// What could not be done is tried again so often.
const AGAIN: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 10_000 });

/// Does what is owed of an operation that is over, as far as that can be done now.
pub(super) async fn pay(shared: &Arc<Shared>, mut journal: Journal) -> Served<()> {
    let state = shared.store.read().await?;
    let owed = journal.undo.clone();
    // What is out of reach for good stays: a scan shows it.
    journal.undo.retain(|_, undo| undo.is_possible(&state));
    engine::undo(shared, &mut journal).await?;
    if journal.undo != owed {
        let mut change = shared.transaction();
        if journal.undo.is_empty() {
            change.delete(journal.reference);
        } else {
            change.expect_exists(Operation::ID, journal.reference.opaque());
            journal.owe(&mut change, &journal.undo);
        }
        shared.store.commit(change).await?;
    }
    if !journal.undo.is_empty() {
        // Until it is time, or one of the hosts is there again.
        let live = |state: &State| {
            let hosts = journal.undo.values().filter_map(|undo| state.row(undo.host));
            hosts.filter(|host_row| is_live(state, host_row)).count()
        };
        let before = live(&shared.store.state());
        let again = tokio::time::Instant::now() + AGAIN;
        while tokio::time::Instant::now() < again && live(&shared.store.state()) <= before {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
    Ok(())
}

/// Operations that are over and of which something is still to be undone.
fn debts(state: &State) -> impl Iterator<Item = Journal> + '_ {
    // Those that are under way have a task or a VM; they are many, and this is asked by every start.
    let over = |row: &&Arc<Row>| row.get(operation::TASK).is_null() && row.get(operation::VM).is_null();
    state.all::<Operation>().filter(over).map(|row| Journal::read(row)).filter(Journal::only_owes)
}

/// The host where a VM may have a domain that the pool does not show: its start was not heard to be done, nor its end
/// since. It is nowhere else until that is known, or somebody says that the host is dead.
pub(crate) fn may_run_at(state: &State, vm_row: &Row) -> Option<Ref<Host>> {
    let of = |undo: &Undo| undo.ends_domain() && undo.subject == vm_row.uuid() && state.row(undo.host).is_some();
    debts(state).find_map(|journal| journal.undo.values().find(|undo| of(undo)).map(|undo| undo.host))
}

/// A host is dead, and so are the domains that may have been there.
pub(crate) fn forget_domains_at(state: &State, change: &mut Transaction, host_ref: Ref<Host>) {
    for journal in debts(state) {
        let mut left = journal.undo.clone();
        left.retain(|_, undo| !(undo.ends_domain() && undo.host == host_ref));
        if left.len() == journal.undo.len() {
            continue;
        }
        if left.is_empty() {
            change.delete(journal.reference);
        } else {
            change.expect_exists(Operation::ID, journal.reference.opaque());
            journal.owe(change, &left);
        }
    }
}

/// Uuids of volumes that are still to be undone: they are nobody's disks.
pub(crate) fn owed_volumes(state: &State) -> BTreeSet<String> {
    let owed = |row: &Arc<Row>| Journal::read(row).undo.into_values();
    let volume = |undo: Undo| match undo.action {
        Action::DestroyVolume(destroy) => destroy.volume.map(|volume| volume.vdi),
        _ => None,
    };
    state.all::<Operation>().flat_map(owed).filter_map(volume).collect()
}
