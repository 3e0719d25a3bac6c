//! The pool's authority and its hosts' certificates, made anew while the pool serves.
//!
//! Three phases, each written down before it begins and over only when every host's agent shows it: all trust the new
//! authority beside the old one; all have certificates of the new one; all trust the new one alone. So at no moment do
//! two hosts of the pool disbelieve each other, whoever dies meanwhile and whoever is master. A host that is away stops
//! the rotation where it is until it is back or forgotten.
//!
//! One host after the other is told, the master last: its controller starts anew on its new files, with the lead handed
//! over if it has it, and the next one is told when it is heard again. Agents read the files by themselves, and tell the
//! master what they read; a witness, which has no agent, tells it itself.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::{member, pool, pool_secret};
use datamodel::{Host, Member, Pool, PoolSecret, Ref, errors};
use proto::agent::HelloRequest;
use raft_store::{LogIndex, Row, State, Transaction};
use uuid::Uuid;

use super::seat::Surroundings;
use super::{admission, expect_no_ha, is_live, member_of, node_id, persist};
use crate::call::Call;
use crate::certificates::{self, Issued};
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};

/// A controller that is to start anew has begun to within this time after its files were seen.
const SETTLED: Duration = Duration::from_millis(500);
/// A host that was heard within this time is there.
const HEARD: Duration = Duration::from_millis(300);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Everybody is to trust the new authority, too.
const TRUST: &str = "trust";
/// Everybody is to have a certificate of the new authority.
const CERTIFY: &str = "certify";
/// Nobody is to trust the old authority any more.
const DROP: &str = "drop";

fn secret(state: &State) -> Served<&Arc<Row>> {
    state.all::<PoolSecret>().next().ok_or_else(|| Failure::Api(errors::internal_error("the pool has no authority")))
}

fn hosts(state: &State) -> impl Iterator<Item = &Arc<Row>> {
    parties(state).filter(|row| !row.get(member::WITNESS))
}

/// All that have certificates of the pool: its hosts, and its witness.
fn parties(state: &State) -> impl Iterator<Item = &Arc<Row>> {
    state.all::<Member>().filter(|row| row.get(member::STANDING) != super::LEAVING)
}

/// `pool.rotate_secret`: the secret is another at once, the authority and all certificates are on their way.
/// `pool.is_psr_pending` is true until they are.
pub(crate) async fn rotate(cx: &Call) -> Served<()> {
    persist(cx, |state, change| {
        expect_no_ha(state)?;
        if let Some(row) = state.all::<Host>().find(|row| !is_live(state, row)) {
            return refuse(errors::cannot_contact_host(row.typed::<Host>()));
        }
        if hosts(state).any(|row| !row.get(member::REPLICA)) {
            return refuse(errors::operation_not_allowed("A host without a controller cannot take other certificates"));
        }
        let row = secret(state)?;
        if !row.get(pool_secret::PHASE).is_empty() {
            return refuse(errors::operation_not_allowed("The last rotation is still under way"));
        }
        let old = admission::authority(state)?;
        let name = state.all::<Pool>().next().map(|row| row.uuid().to_owned()).unwrap_or_default();
        let new = certificates::create_authority(&name).map_err(|error| errors::internal_error(error.to_string()))?;
        let reference = row.typed::<PoolSecret>();
        change
            .expect_row(row)
            .set(reference, pool_secret::SECRET, format!("{}/{}", Uuid::new_v4(), Uuid::new_v4()))
            .set(reference, pool_secret::CA_CERTIFICATE, format!("{}{}", old.certificate, new.certificate))
            .set(reference, pool_secret::CA_KEY, new.key)
            .set(reference, pool_secret::PHASE, TRUST.to_owned());
        if let Some(pool_row) = state.all::<Pool>().next() {
            change.set(pool_row.typed::<Pool>(), pool::IS_PSR_PENDING, true);
        }
        Ok(())
    })
    .await
}

/// `host.refresh_server_certificate`: the host's certificate among the pool's hosts is made anew.
pub(crate) async fn refresh(cx: &Call, this: Ref<Host>) -> Served<()> {
    cx.row(this)?;
    let authority = admission::authority(&cx.state)?;
    let row = member_of(&cx.state, this).cloned().ok_or_else(|| errors::host_offline(this))?;
    let epoch = cx.shared.epoch().ok_or(Failure::NotLeader)?;
    let reply = ask(&cx.shared, &cx.state, &row, epoch).await.ok_or_else(|| errors::host_offline(this))?;
    let certificate = renewed(&authority, &row, &reply)?;
    persist(cx, |_, change| {
        change.expect_row(&row).set(row.typed::<Member>(), member::CERTIFICATE, certificate.clone());
        Ok(())
    })
    .await
}

/// A certificate for the key that the member has.
fn renewed(authority: &Issued, row: &Row, has: &Certificates) -> Served<String> {
    let told = |error: &dyn std::fmt::Display| Failure::Api(errors::internal_error(error.to_string()));
    let address = if row.get(member::WITNESS) {
        row.get(member::PEER_ADDRESS).parse::<SocketAddr>().map_err(|error| told(&error))?.ip()
    } else {
        row.get(member::API_ADDRESS).parse().map_err(|error| told(&error))?
    };
    certificates::renew(authority, &has.certificate, &row.get(member::HOST_UUID), &[address])
        .map_err(|error| told(&error))
}

/// What a member has now: its certificate, and those of whom it believes.
struct Certificates {
    certificate: String,
    authorities: String,
}

/// A host's agent is asked; a witness has none and answers itself.
async fn ask(shared: &Shared, state: &State, row: &Row, epoch: LogIndex) -> Option<Certificates> {
    if row.get(member::WITNESS) {
        let peers = &shared.surroundings().ok()?.peers;
        let (certificate, authorities) = peers.certificates(&row.get(member::PEER_ADDRESS)).await?;
        return Some(Certificates { certificate, authorities });
    }
    let agent = shared.agents.at(&row.get(member::AGENT_ADDRESS)).ok()?;
    let pool = state.all::<Pool>().next().map(|row| row.uuid().to_owned()).unwrap_or_default();
    let reply = agent.hello(HelloRequest { version: 1, pool, epoch: epoch.0 }).await.ok()?;
    Some(Certificates { certificate: reply.certificate, authorities: reply.authorities })
}

/// A witness that is away for this long is left out: it may be gone for good, and three hosts do without it.
const WITNESS_GONE: Duration = Duration::from_secs(60);

fn is_gone(shared: &Shared, row: &Row) -> bool {
    let seen = shared.store.progress();
    let silent = seen.get(&node_id(row)).and_then(|seen| seen.silent);
    row.get(member::WITNESS) && silent.is_some_and(|silent| silent > WITNESS_GONE)
}

/// Brings a rotation that is under way to its end, as long as this node leads.
pub(crate) async fn keep(shared: &Arc<Shared>, epoch: LogIndex) {
    let mut settled = HashSet::new();
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        if let Err(error) = step(shared, epoch, &mut settled).await {
            tracing::debug!(?error, "the rotation of certificates goes on later");
        }
    }
}

/// Tells the next host, or waits for the one that was told, or begins the next phase.
async fn step(shared: &Arc<Shared>, epoch: LogIndex, settled: &mut HashSet<Ref<Member>>) -> Served<()> {
    let state = shared.store.read().await?;
    let row = secret(&state)?;
    let phase = row.get(pool_secret::PHASE);
    if phase.is_empty() {
        settled.clear();
        return Ok(());
    }
    let bundle = row.get(pool_secret::CA_CERTIFICATE);
    let authority = admission::authority(&state)?;
    let mut change = shared.transaction();
    change.expect_row(row);
    let mut rows: Vec<&Arc<Row>> = parties(&state).filter(|row| !is_gone(shared, row)).collect();
    rows.sort_by_key(|row| node_id(row) == shared.store.node_id());
    for row in rows {
        let reference = row.typed::<Member>();
        if settled.contains(&reference) {
            continue;
        }
        let Some(reply) = ask(shared, &state, row, epoch).await else { return Ok(()) };
        let (told, shown) = if phase == CERTIFY {
            (row.get(member::CERTIFIER) == authority.certificate, reply.certificate == row.get(member::CERTIFICATE))
        } else {
            (row.get(member::TRUSTS) == bundle, reply.authorities == bundle)
        };
        if !told {
            change.expect_row(row);
            if phase == CERTIFY {
                change.set(reference, member::CERTIFICATE, renewed(&authority, row, &reply)?).set(
                    reference,
                    member::CERTIFIER,
                    authority.certificate,
                );
            } else {
                change.set(reference, member::TRUSTS, bundle);
            }
            shared.store.commit(change).await?;
            return Ok(());
        }
        if !shown {
            return Ok(());
        }
        tokio::time::sleep(SETTLED).await;
        let seen = shared.store.progress();
        let silent = seen.get(&node_id(row)).and_then(|seen| seen.silent);
        if row.get(member::REPLICA) && silent.is_none_or(|silent| silent > HEARD) {
            return Ok(());
        }
        settled.insert(reference);
    }
    let reference = row.typed::<PoolSecret>();
    match phase.as_str() {
        TRUST => {
            change.set(reference, pool_secret::PHASE, CERTIFY.to_owned());
        }
        CERTIFY => {
            change.set(reference, pool_secret::CA_CERTIFICATE, authority.certificate).set(
                reference,
                pool_secret::PHASE,
                DROP.to_owned(),
            );
        }
        _ => finish(&state, &mut change, reference),
    }
    shared.store.commit(change).await?;
    settled.clear();
    tracing::info!(phase, "a phase of the rotation of certificates is over");
    Ok(())
}

fn finish(state: &State, change: &mut Transaction, reference: Ref<PoolSecret>) {
    change.set(reference, pool_secret::PHASE, String::new());
    if let Some(pool_row) = state.all::<Pool>().next() {
        change.set(pool_row.typed::<Pool>(), pool::IS_PSR_PENDING, false);
    }
}

/// The authorities and the certificate that a member is to have: what its row says, and what it has where that says
/// nothing. None where those are what it has.
#[must_use]
pub fn told_to_have(state: &State, node: u64, ca: &str, certificate: &str) -> Option<(String, String)> {
    let row = parties(state).find(|row| node_id(row) == node)?;
    let or = |told: String, has: &str| if told.is_empty() { has.to_owned() } else { told };
    let told = (or(row.get(member::TRUSTS), ca), or(row.get(member::CERTIFICATE), certificate));
    (told.0 != ca || told.1 != certificate).then_some(told)
}

/// Whether this host was told to have other certificates: then its files are those now, and it starts anew.
pub(crate) async fn follow(shared: &Shared, surroundings: &Surroundings, state: &State) -> Served<bool> {
    let config = &shared.config;
    let told = told_to_have(state, shared.store.node_id(), &config.ca_certificate, &config.certificate);
    let Some((trusts, certificate)) = told else { return Ok(false) };
    surroundings.home.renew(&trusts, &certificate).await.map_err(super::seat::unwritten)?;
    tracing::info!("this host's certificates are others now: starting anew on them");
    surroundings.home.restart();
    Ok(true)
}
