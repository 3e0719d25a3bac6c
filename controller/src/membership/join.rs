//! The host's side of a join, and of the way out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::{local_user, member};
use datamodel::{ApiError, Host, LocalUser, Member, Ref, errors};
use raft_store::State;
use serde_json::{Value as Json, json};
use uuid::Uuid;

use super::admission::{self, Admission, Application};
use super::seat::{self, Abroad, Alone, AskError, Parting, Seat, Surroundings};
use super::trust::Trust;
use super::{LEAVING, departure, expect_no_ha, is_live, member_of, node_id, persist, rotation, stranger};
use crate::call::Call;
use crate::certificates;
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};

/// A redirect to the master is followed so often.
const MOST_REDIRECTIONS: usize = 3;
/// What a host hears of itself in the log is acted on this much later at most.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How a host shows that it may ask to be let in.
pub(super) enum Credential {
    /// An account of the pool.
    Account(String, String),
    /// What every host of the pool knows.
    Secret(String),
}

/// `pool.join` and `pool.join_force`: this host, a pool of its own, becomes one of another pool.
pub(crate) async fn join(cx: &Call, address: String, user: String, password: String, force: bool) -> Served<()> {
    let surroundings = cx.shared.surroundings()?;
    let trust = Trust::of(&*cx.latest().await?);
    let door = login(&*surroundings.abroad, trust, &address, Credential::Account(user, password)).await?;
    let parting = Parting::begin(&cx.shared)?;
    let rows = admission::bring(&*cx.latest().await?);
    let seat = ask_in(surroundings, &door, rows, force).await?;
    let place = surroundings.home.begin().await.map_err(seat::unwritten)?;
    seat::take(surroundings, &place, &seat).await?;
    parting.for_good();
    Ok(())
}

/// Another pool's master, a session there, and what it has shown so far.
pub(super) struct Door {
    master: String,
    session: String,
    trust: Trust,
}

/// Somebody who asks to be let in, as the pool's hosts reach it.
#[derive(Debug, Clone, Copy)]
pub struct Newcomer {
    /// Of no host.
    pub uuid: Uuid,
    /// Where it listens for peers.
    pub address: SocketAddr,
}

/// Asks a pool's master for a witness's vote; the seat that it has.
///
/// # Errors
/// What the master has against it.
pub async fn enrol_witness(
    abroad: Arc<dyn Abroad>,
    newcomer: &Newcomer,
    master: &str,
    user: &str,
    password: &str,
) -> Result<Seat, ApiError> {
    let account = Credential::Account(user.to_owned(), password.to_owned());
    let ask = async {
        let door = login(&*abroad, Trust::default(), master, account).await?;
        let application = Application {
            version: admission::VERSION,
            host_uuid: newcomer.uuid,
            address: newcomer.address.ip(),
            peer_address: newcomer.address.to_string(),
            agent_address: String::new(),
            public_key: String::new(),
            witness: true,
            force: false,
            rows: String::new(),
        };
        enter(&*abroad, &door, application).await
    };
    ask.await.map_err(Failure::into_api)
}

/// Asks a pool's master to let this host in; the seat that it has there.
pub(super) async fn ask_in(surroundings: &Surroundings, door: &Door, rows: String, force: bool) -> Served<Seat> {
    let this = &surroundings.this;
    let application = Application {
        version: admission::VERSION,
        host_uuid: this.host_uuid,
        address: this.api_address,
        peer_address: this.peer_address.clone(),
        agent_address: this.agent_address.clone(),
        public_key: String::new(),
        witness: false,
        force,
        rows,
    };
    enter(&*surroundings.abroad, door, application).await
}

async fn enter(abroad: &dyn Abroad, door: &Door, application: Application) -> Served<Seat> {
    let key = certificates::new_key().map_err(|error| errors::internal_error(error.to_string()))?;
    let application = Application { public_key: key.public.clone(), ..application };
    let text = serde_json::to_string(&application).map_err(|error| errors::internal_error(error.to_string()))?;
    let (master, session) = (&door.master, json!(door.session));
    let answer = abroad.ask(&door.trust, master, "pool.admit", vec![session.clone(), json!(text)]).await;
    // A session that cannot be ended now expires by itself.
    let _ = abroad.ask(&door.trust, master, "session.logout", vec![session]).await;
    let answer = answer.map_err(|error| match error {
        AskError::Refused(description) if description.first().is_some_and(|code| code == "MESSAGE_METHOD_UNKNOWN") => {
            errors::hosts_not_compatible()
        }
        other => seat::told_by(other),
    })?;
    let admission: Option<Admission> = answer.as_str().and_then(|text| serde_json::from_str(text).ok());
    let admission = admission.ok_or_else(errors::joining_host_service_failed)?;
    Ok(Seat {
        node_id: admission.node_id,
        ca: admission.ca,
        identity: certificates::Issued { certificate: admission.certificate, key: key.private },
        alone: None,
    })
}

/// A session on the other pool's master, wherever a redirect leads.
pub(super) async fn login(abroad: &dyn Abroad, trust: Trust, address: &str, credential: Credential) -> Served<Door> {
    let (method, params) = match credential {
        Credential::Account(user, password) => {
            ("session.login_with_password", vec![json!(user), json!(password), json!("2.21"), json!("xenith-join")])
        }
        Credential::Secret(secret) => ("session.slave_login", vec![json!("OpaqueRef:NULL"), json!(secret)]),
    };
    let mut master = address.to_owned();
    for _ in 0..MOST_REDIRECTIONS {
        match abroad.ask(&trust, &master, method, params.clone()).await {
            Ok(Json::String(session)) => return Ok(Door { master, session, trust }),
            Ok(_) => return refuse(errors::joining_host_service_failed()),
            Err(AskError::Refused(description)) if description.first().is_some_and(|code| code == "HOST_IS_SLAVE") => {
                let port = address.rsplit_once(':').map(|(_, port)| port).filter(|_| !address.ends_with(']'));
                let next = description.get(1).cloned().unwrap_or_default();
                master = port.map_or_else(|| next.clone(), |port| format!("{next}:{port}"));
            }
            Err(error) => return Err(seat::told_by(error).into()),
        }
    }
    refuse(errors::joining_host_connection_failed())
}

/// `pool.eject`: the host's rows go, with the storage that only it had, and the host hears of it through the log: it
/// wipes itself and is a pool of its own again. Where it dies first it hears of it when it is back, or asks (`stranger`).
pub(crate) async fn eject(cx: &Call, this: Ref<Host>) -> Served<()> {
    let row = cx.row(this)?;
    let master =
        |state: &State| state.all::<datamodel::Pool>().any(|row| row.get(datamodel::fields::pool::MASTER) == this);
    if master(&cx.state) {
        return refuse(errors::internal_error("Cannot eject master"));
    }
    expect_no_ha(&cx.state)?;
    if !is_live(&cx.state, &row) {
        return refuse(errors::host_offline(this));
    }
    persist(cx, |state, change| {
        let row = crate::call::find(state, this)?;
        if master(state) {
            return refuse(errors::internal_error("Cannot eject master"));
        }
        if departure::guests(state, this).next().is_some() {
            return refuse(errors::operation_not_allowed("VM resident on host"));
        }
        if let Some(member_row) = member_of(state, this) {
            let reference = member_row.typed::<Member>();
            change.expect_row(member_row);
            if member_row.get(member::REPLICA) {
                change
                    .set(reference, member::STANDING, LEAVING.to_owned())
                    .set(reference, member::SINCE, cx.now())
                    .set(reference, member::HOST, Ref::NULL);
            } else {
                change.delete(reference);
            }
        }
        departure::remove(state, change, &row, departure::Storage::Forgotten);
        Ok(())
    })
    .await
}

/// Watches for the word that this host is to go, and goes; and for other certificates, and takes them.
pub(crate) async fn attend(shared: &Arc<Shared>) {
    let Ok(surroundings) = shared.surroundings() else { return };
    let mut applied = shared.store.applied();
    let forgotten = stranger::found_out(shared, surroundings);
    tokio::pin!(forgotten);
    let mut is_forgotten = false;
    loop {
        let state = shared.store.state();
        let this = shared.store.node_id();
        let told = state.all::<Member>().any(|row| node_id(row) == this && row.get(member::STANDING) == LEAVING);
        if told || is_forgotten {
            match leave(shared, surroundings, &state).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::error!(?error, "this host has left its pool and cannot begin anew; trying again")
                }
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        }
        match rotation::follow(shared, surroundings, &state).await {
            Ok(false) => {}
            Ok(true) => return,
            Err(error) => tracing::error!(?error, "this host's new certificates are not written yet"),
        }
        tokio::select! {
            changed = applied.changed() => if changed.is_err() { return },
            () = &mut forgotten => is_forgotten = true,
        }
        // Members change seldom, and this is looked at on every host: not for each of a thousand commits a second.
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn leave(shared: &Shared, surroundings: &Surroundings, state: &State) -> Served<()> {
    tracing::warn!("this host is not of its pool any more: it begins anew as a pool of its own");
    let parting = Parting::begin(shared)?;
    let seat = alone(surroundings, state)?;
    let place = surroundings.home.begin().await.map_err(seat::unwritten)?;
    seat::take(surroundings, &place, &seat).await?;
    parting.for_good();
    Ok(())
}

/// The seat of a host that is a pool of its own: with an authority of its own, and root's password as it was.
pub(super) fn alone(surroundings: &Surroundings, state: &State) -> Served<Seat> {
    let this = &surroundings.this;
    let failed = |error: certificates::CertificateError| Failure::Api(errors::internal_error(error.to_string()));
    let uuid = this.host_uuid.to_string();
    let authority = certificates::create_authority(&uuid).map_err(failed)?;
    let identity = certificates::issue(&authority, &uuid, &[this.api_address]).map_err(failed)?;
    let hash = state.all::<LocalUser>().find(|row| row.get(local_user::NAME) == "root");
    let password_hash = hash.map(|row| row.get(local_user::PASSWORD_HASH)).unwrap_or_default();
    Ok(Seat {
        node_id: 1,
        ca: authority.certificate,
        identity,
        alone: Some(Alone { ca_key: authority.key, password_hash }),
    })
}
