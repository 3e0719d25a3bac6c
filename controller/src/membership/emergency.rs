//! What a host answers without a master: who sits at it may log in to this host alone, and say what is to become of
//! it.
//!
//! `pool.emergency_transition_to_master` is the way back when a majority is lost for good, and the only unsafe step
//! there is: the host begins the pool anew, alone, with all that it has. Its authority is new, so that hosts of before
//! can neither talk to it nor be taken for its own; they come back by `emergency_reset_master`, empty.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::{host, member, pool, pool_secret};
use datamodel::{
    ApiError, Host, Member as MemberRow, OpaqueRef, Pool, PoolSecret, Ref, Session, Value, arguments, errors, model,
};
use parking_lot::Mutex;
use raft_store::{Leadership, Member, State, Transaction};
use serde_json::json;

use super::join::{Credential, ask_in, login as login_abroad};
use super::seat::{self, AskError, Parting, Seat};
use super::trust::Trust;
use super::{expect_no_ha, is_live, node_id, shown};
use crate::call::{Call, Refusal, Reply, Request, Transport};
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::sessions::hash_for;
use crate::{certificates, password};

/// So many local sessions at once; somebody who needs more has lost the others.
const MOST_SESSIONS: usize = 500;
/// A pool that has no master for this long has not just lost one.
const ELECTION: Duration = Duration::from_secs(2);

/// Sessions of this host alone. They end with the controller's process.
#[derive(Default)]
pub(crate) struct LocalSessions(Mutex<HashSet<OpaqueRef>>);

impl LocalSessions {
    fn open(&self, shared: &Shared) -> Served<Value> {
        let mut open = self.0.lock();
        if open.len() >= MOST_SESSIONS {
            open.clear();
        }
        let reference = OpaqueRef::from_uuid(shared.uuid());
        open.insert(reference);
        Ok(Value::Ref(reference))
    }

    fn holds(&self, text: &str) -> bool {
        text.parse().is_ok_and(|reference: OpaqueRef| self.0.lock().contains(&reference))
    }

    fn close(&self, text: &str) {
        if let Ok(reference) = text.parse::<OpaqueRef>() {
            self.0.lock().remove(&reference);
        }
    }
}

/// Whether a host answers this by itself, master or not.
pub(crate) fn serves(name: &str) -> bool {
    matches!(
        name,
        "session.slave_local_login_with_password"
            | "session.slave_local_login"
            | "host.is_in_emergency_mode"
            | "host.emergency_reset_server_certificate"
            | "host.emergency_disable_tls_verification"
            | "host.emergency_reenable_tls_verification"
            | "pool.emergency_transition_to_master"
            | "pool.emergency_reset_master"
    )
}

/// Answers what a host answers by itself, master or not; none for all the rest.
pub(crate) async fn serve(shared: &Arc<Shared>, request: &Request) -> Option<Result<Reply, Refusal>> {
    let message = model().message(&request.method)?;
    let name = message.full_name;
    let logout = name == "session.local_logout";
    if !logout && !serves(name) {
        return None;
    }
    let given = match arguments(message, request.params.clone()) {
        Ok(given) => given,
        Err(error) => return Some(Err(Refusal::Api(error))),
    };
    if logout && !shared.local_sessions.holds(&given.session) {
        // A session of the pool.
        return None;
    }
    let text = |place: usize| given.values.get(place).and_then(Value::as_str).unwrap_or_default().to_owned();
    let answer = async {
        match name {
            "session.slave_local_login_with_password" => {
                login(shared, request.caller.transport, text(0), text(1)).await?;
                return shared.local_sessions.open(shared);
            }
            "session.slave_local_login" => {
                login_with_secret(&shared.store.state(), &text(0)).await?;
                return shared.local_sessions.open(shared);
            }
            _ => {}
        }
        check_session(shared, &given.session)?;
        match name {
            "session.local_logout" => shared.local_sessions.close(&given.session),
            "host.is_in_emergency_mode" => {
                return Ok(Value::Bool(leadership(shared, ELECTION).await == Leadership::Electing));
            }
            "host.emergency_reset_server_certificate" => shown::reset_here(shared).await?,
            "host.emergency_disable_tls_verification" => {
                return refuse(errors::operation_not_allowed("Hosts of one pool always verify one another"));
            }
            // It is never off.
            "host.emergency_reenable_tls_verification" => {}
            "pool.emergency_transition_to_master" => begin_anew(shared).await?,
            "pool.emergency_reset_master" => follow(shared, &text(0)).await?,
            _ => {}
        }
        Ok(Value::Void)
    };
    Some(answer.await.map(Reply::Value).map_err(|failure: Failure| Refusal::Api(failure.into_api())))
}

/// A local session, or one of the pool's as far as this host knows it.
fn check_session(shared: &Shared, text: &str) -> Served<()> {
    use datamodel::fields::session;
    let superuser = || {
        let reference: Ref<Session> = text.parse().map(Ref::from_opaque).unwrap_or(Ref::NULL);
        shared.store.state().row(reference).is_some_and(|row| row.get(session::IS_LOCAL_SUPERUSER))
    };
    if shared.local_sessions.holds(text) || superuser() {
        return Ok(());
    }
    refuse(errors::session_invalid(text))
}

async fn login(shared: &Shared, transport: Transport, user: String, secret: String) -> Served<()> {
    if transport == Transport::Unix {
        return Ok(());
    }
    let (known, hash) = hash_for(&shared.store.state(), &user);
    if known && user == "root" && password::fits(secret, hash).await {
        return Ok(());
    }
    refused(user).await
}

/// Whoever knows the pool's secret is a host of it.
pub(crate) async fn login_with_secret(state: &State, secret: &str) -> Served<()> {
    let known = state.all::<PoolSecret>().next().map(|row| row.get(pool_secret::SECRET)).unwrap_or_default();
    // Compared in full, so that the clock tells nothing.
    let same = known.len() == secret.len()
        && known.bytes().zip(secret.bytes()).fold(0, |different, (one, other)| different | (one ^ other)) == 0;
    if same && !known.is_empty() {
        return Ok(());
    }
    refused("pool".to_owned()).await
}

async fn refused(user: String) -> Served<()> {
    tracing::warn!(user, "login refused");
    tokio::time::sleep(crate::sessions::FAILURE_DELAY).await;
    refuse(ApiError::new(errors::SESSION_AUTHENTICATION_FAILED, vec![user, "Authentication failure".to_owned()]))
}

/// Who leads, after as long as an election may take. A lead that this node cannot prove is none.
async fn leadership(shared: &Shared, limit: Duration) -> Leadership {
    let mut leadership = shared.store.leadership();
    let known = async {
        loop {
            let known = leadership.wait_for(|leadership| *leadership != Leadership::Electing).await.ok()?.clone();
            match known {
                Leadership::Leader { .. } if shared.store.read().await.is_err() => {
                    leadership.changed().await.ok()?;
                }
                known => return Some(known),
            }
        }
    };
    tokio::time::timeout(limit, known).await.ok().flatten().unwrap_or(Leadership::Electing)
}

/// `pool.emergency_transition_to_master`: begins the pool anew with this host alone.
async fn begin_anew(shared: &Arc<Shared>) -> Served<()> {
    match leadership(shared, shared.config.election_wait).await {
        Leadership::Leader { .. } => return Ok(()),
        Leadership::Follower { .. } => {
            return refuse(errors::operation_not_allowed(
                "The pool has a master and a majority: use pool.designate_new_master",
            ));
        }
        Leadership::Electing => {}
    }
    let state = shared.store.state();
    expect_no_ha(&state)?;
    let knows_itself = state.all::<MemberRow>().any(|row| node_id(row) == shared.store.node_id());
    if shared.store.is_fenced() || !knows_itself {
        return refuse(errors::operation_not_allowed("This host has no copy of the pool's database"));
    }
    let surroundings = shared.surroundings()?;
    let this = &surroundings.this;
    let uuid = this.host_uuid.to_string();
    let failed = |error: certificates::CertificateError| Failure::Api(errors::internal_error(error.to_string()));
    let authority = certificates::create_authority(&uuid).map_err(failed)?;
    let identity = certificates::issue(&authority, &uuid, &[this.api_address]).map_err(failed)?;
    let parting = Parting::begin(shared)?;
    let place = surroundings.home.begin().await.map_err(seat::unwritten)?;
    let member = |node_id| Member {
        node_id,
        peer_address: this.peer_address.clone(),
        api_address: this.api_address.to_string(),
    };
    let decide = |begin: raft_store::LogIndex, state: &State| {
        let mut change = shared.transaction();
        only_this(state, &mut change, &uuid, begin.0);
        if let Some(row) = state.all::<PoolSecret>().next() {
            let reference = row.typed::<PoolSecret>();
            change.set(reference, pool_secret::CA_CERTIFICATE, authority.certificate.clone()).set(
                reference,
                pool_secret::CA_KEY,
                authority.key.clone(),
            );
        }
        (member(begin.0), change)
    };
    let begun = shared.store.begin_anew(&place.join("db"), decide).await;
    let node_id = begun.map_err(|error| errors::internal_error(error.to_string()))?;
    tracing::warn!(node_id, "the pool begins anew with this host alone; the others have to come back empty");
    seat::take(surroundings, &place, &Seat { node_id, ca: authority.certificate, identity, alone: None }).await?;
    parting.for_good();
    Ok(())
}

/// Of all members this one is left; hosts and their guests stay until somebody says what became of them.
fn only_this(state: &State, change: &mut Transaction, uuid: &str, node: u64) {
    for row in state.all::<MemberRow>() {
        let reference = row.typed::<MemberRow>();
        if row.get(member::HOST_UUID) == uuid {
            change.set(reference, member::NODE_ID, i64::try_from(node).unwrap_or(i64::MAX)).set(
                reference,
                member::CERTIFICATE,
                String::new(),
            );
        } else {
            change.delete(reference);
        }
    }
    for row in state.all::<Host>().filter(|row| row.uuid() != uuid && is_live(state, row)) {
        change.set(row.get(host::METRICS), datamodel::fields::host_metrics::LIVE, false);
    }
}

/// `pool.emergency_reset_master`: forgets what this host has of the pool and asks the master at that address to be
/// taken back.
async fn follow(shared: &Arc<Shared>, address: &str) -> Served<()> {
    match leadership(shared, ELECTION).await {
        Leadership::Follower { leader } if leader.api_address == address => return Ok(()),
        Leadership::Electing => {}
        _ => return refuse(errors::operation_not_allowed("The pool has a master and a majority")),
    }
    let surroundings = shared.surroundings()?;
    let state = shared.store.state();
    let secret = state.all::<PoolSecret>().next().map(|row| row.get(pool_secret::SECRET)).unwrap_or_default();
    let door = login_abroad(&*surroundings.abroad, Trust::of(&state), address, Credential::Secret(secret)).await?;
    let parting = Parting::begin(shared)?;
    let seat = ask_in(surroundings, &door, String::new(), false).await?;
    let place = surroundings.home.begin().await.map_err(seat::unwritten)?;
    seat::take(surroundings, &place, &seat).await?;
    parting.for_good();
    Ok(())
}

/// `pool.recover_slaves`: every host that sits in an emergency is told who is master. The hosts that answered.
pub(crate) async fn recover(cx: &Call) -> Served<Vec<Ref<Host>>> {
    let surroundings = cx.shared.surroundings()?;
    let state = &cx.state;
    let secret = state.all::<PoolSecret>().next().map(|row| row.get(pool_secret::SECRET)).unwrap_or_default();
    let master = state.all::<Pool>().next().map_or(Ref::NULL, |row| row.get(pool::MASTER));
    let address = state.row(master).map(|row| row.get(host::ADDRESS)).unwrap_or_default();
    let nodes = cx.shared.store.progress();
    let follows = |this: Ref<Host>| {
        let row = super::member_of(state, this);
        row.and_then(|row| nodes.get(&node_id(row)))
            .is_some_and(|seen| seen.silent.is_some_and(|silent| silent < HEARD))
    };
    let lost = state.all::<Host>().filter(|row| row.typed::<Host>() != master && !follows(row.typed::<Host>()));
    let told = lost.map(|row| async {
        let there = row.get(host::ADDRESS);
        let (abroad, trust) = (&surroundings.abroad, Trust::of(state));
        let session = abroad.ask(&trust, &there, "session.slave_local_login", vec![json!(secret)]).await?;
        abroad.ask(&trust, &there, "pool.emergency_reset_master", vec![session, json!(address)]).await?;
        Ok::<_, AskError>(row.typed::<Host>())
    });
    let told = futures::future::join_all(told).await;
    Ok(told
        .into_iter()
        .filter_map(|answer| answer.inspect_err(|error| tracing::info!(?error, "a host was not recovered")).ok())
        .collect())
}

/// A host that was heard within this time follows.
const HEARD: Duration = Duration::from_secs(1);
