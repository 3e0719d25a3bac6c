//! Sessions: rows like all others, so that they outlive a master.
//!
//! Only `last_active` is kept in memory and written back now and then: a write for each call would be a
//! write for each read. A new master starts its own clock for every session; nobody is logged out by a
//! change of masters.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::{local_user, session, task};
use datamodel::{ApiError, ClassKind, LocalUser, Ref, Session, Task, Timestamp, errors};
use parking_lot::Mutex;
use raft_store::{NewRow, State};

use crate::call::{Call, Caller, Transport};
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::password;

/// Sessions end after a day of silence.
const IDLE_SECONDS: i64 = 24 * 3600;
/// So many sessions per originator and per user; the least recently active go first.
const SESSIONS_IN_A_GROUP: usize = 500;
const WRITE_BACK_SECONDS: i64 = 600;
const PASS_EVERY: Duration = Duration::from_secs(30);
/// A failed login is answered after this long; others are not held up.
pub(crate) const FAILURE_DELAY: Duration = Duration::from_secs(2);

/// Who hosts are, when they log in with the pool's secret.
pub(crate) const HOSTS: &str = "pool";

/// When sessions were last used, as this master saw it.
#[derive(Default)]
pub(crate) struct Activity {
    seen: Mutex<HashMap<Ref<Session>, Timestamp>>,
}

impl Activity {
    pub(crate) fn touch(&self, session: Ref<Session>, now: Timestamp) {
        self.seen.lock().insert(session, now);
    }

    /// What an earlier term saw says nothing about this one.
    pub(crate) fn forget(&self) {
        self.seen.lock().clear();
    }

    fn last(&self, session: Ref<Session>) -> Option<Timestamp> {
        self.seen.lock().get(&session).copied()
    }

    fn keep(&self, state: &State) {
        self.seen.lock().retain(|session, _| state.row(*session).is_some());
    }
}

/// `session.login_with_password`.
pub(crate) async fn login(call: &Call, user: String, secret: String, originator: String) -> Served<Ref<Session>> {
    if call.caller.transport == Transport::Tcp {
        verify(&call.state, &call.caller, &user, &secret).await?;
    }
    open(call, user, originator).await
}

/// A session of somebody who has been recognised.
pub(crate) async fn open(call: &Call, user: String, originator: String) -> Served<Ref<Session>> {
    let user = if call.caller.transport == Transport::Unix { "root".to_owned() } else { user };
    let superuser = user == "root" || user == HOSTS;
    let now = call.now();
    let host = call
        .state
        .all::<datamodel::Member>()
        .find(|row| u64::try_from(row.get(datamodel::fields::member::NODE_ID)) == Ok(call.shared.store.node_id()))
        .map_or(Ref::NULL, |row| row.get(datamodel::fields::member::HOST));
    let reference: Ref<Session> = call.reference();
    let mut change = call.transaction();
    change.insert(
        NewRow::new(reference, call.uuid())
            .with(session::THIS_HOST, host)
            .with(session::LAST_ACTIVE, now)
            .with(session::VALIDATION_TIME, now)
            .with(session::IS_LOCAL_SUPERUSER, superuser)
            .with(session::AUTH_USER_NAME, user)
            .with(session::ORIGINATOR, originator)
            .with(session::ROLE, "pool-admin".to_owned()),
    );
    call.commit(change).await?;
    call.shared.sessions.touch(reference, now);
    Ok(reference)
}

/// Whether a name is known, and the hash to check against. An unknown name costs what a wrong password costs, so
/// that nobody learns names from the clock: it is checked against somebody else's hash, and refused whatever comes of it.
pub(crate) fn hash_for(state: &State, user: &str) -> (bool, String) {
    let account = state.all::<LocalUser>().find(|row| row.get(local_user::NAME) == user);
    let checked = account.or_else(|| state.all::<LocalUser>().next());
    (account.is_some(), checked.map(|row| row.get(local_user::PASSWORD_HASH)).unwrap_or_default())
}

/// Checks a name and a password.
pub(crate) async fn verify(state: &State, caller: &Caller, user: &str, secret: &str) -> Served<()> {
    let (known, checked) = hash_for(state, user);
    if password::fits(secret.to_owned(), checked).await && known {
        return Ok(());
    }
    tracing::warn!(user, peer = ?caller.peer, "login refused");
    tokio::time::sleep(FAILURE_DELAY).await;
    refuse(ApiError::new(
        errors::SESSION_AUTHENTICATION_FAILED,
        vec![user.to_owned(), "Authentication failure".to_owned()],
    ))
}

/// `session.change_password`: for the account of a local superuser's session.
pub(crate) async fn change_password(call: &Call, new: String) -> Served<()> {
    let row = call.session_row().cloned().ok_or(Failure::NotLeader)?;
    if !row.get(session::IS_LOCAL_SUPERUSER) {
        return refuse(errors::user_is_not_local_superuser("only the local superuser may change its password"));
    }
    if new.is_empty() {
        return refuse(errors::change_password_rejected("the new password is empty"));
    }
    let hash = tokio::task::spawn_blocking(move || password::hash(&new)).await;
    let hash = hash
        .ok()
        .and_then(Result::ok)
        .ok_or_else(|| errors::change_password_rejected("the password cannot be hashed"))?;
    let account = call.state.all::<LocalUser>().find(|row| row.get(local_user::NAME) == "root");
    let account = account.ok_or_else(|| errors::internal_error("the pool has no local account"))?;
    let mut change = call.transaction();
    change.set(account.typed::<LocalUser>(), local_user::PASSWORD_HASH, hash);
    call.commit(change).await?;
    Ok(())
}

/// Ends sessions that nobody used for a day, and the oldest of groups that grew too big; writes activity back.
pub(crate) async fn collect(shared: &Arc<Shared>) {
    loop {
        tokio::time::sleep(PASS_EVERY).await;
        if let Err(error) = pass(shared).await {
            tracing::warn!(?error, "sessions were not collected");
        }
    }
}

pub(crate) async fn pass(shared: &Arc<Shared>) -> Served<()> {
    let state = shared.store.read().await?;
    let now = shared.grown();
    shared.sessions.keep(&state);
    let mut groups: HashMap<String, Vec<(Timestamp, Ref<Session>)>> = HashMap::new();
    let mut change = shared.transaction();
    for row in state.all::<Session>() {
        let reference = row.typed::<Session>();
        let written = row.get(session::LAST_ACTIVE);
        let last = shared.sessions.last(reference).map_or(written, |seen| seen.max(written));
        // A session that a task still runs under is in use, however long it takes.
        let working = row.get(session::TASKS).iter().any(|reference: &Ref<Task>| {
            state.row(*reference).is_some_and(|row| row.get(task::STATUS) == datamodel::enums::TaskStatusType::Pending)
        });
        if working {
            continue;
        }
        if now.0 - last.0 > IDLE_SECONDS {
            change.delete(reference);
            continue;
        }
        if last.0 - written.0 >= WRITE_BACK_SECONDS {
            change.set(reference, session::LAST_ACTIVE, last);
        }
        let originator = row.get(session::ORIGINATOR);
        let group =
            if originator.is_empty() { format!("user {}", row.get(session::AUTH_USER_NAME)) } else { originator };
        groups.entry(group).or_default().push((last, reference));
    }
    for members in groups.values_mut().filter(|members| members.len() > SESSIONS_IN_A_GROUP) {
        members.sort_unstable();
        for (_, reference) in &members[..members.len() - SESSIONS_IN_A_GROUP] {
            change.delete(*reference);
        }
    }
    if !change.is_empty() {
        shared.store.commit(change).await?;
    }
    Ok(())
}

/// Ends a session.
pub(crate) async fn logout(call: &Call, reference: Ref<Session>) -> Served<()> {
    let mut change = call.transaction();
    for row in call.state.all::<datamodel::Registration>() {
        if row.get(datamodel::fields::registration::SESSION) == reference {
            change.delete(row.typed::<datamodel::Registration>());
        }
    }
    change.expect_exists(Session::ID, reference.opaque()).delete(reference);
    call.commit(change).await?;
    Ok(())
}
