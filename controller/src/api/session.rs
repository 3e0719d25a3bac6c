//! Messages of the class session.

use datamodel::{Host, Ref, Session};

use crate::call::Call;
use crate::failure::Served;
use crate::membership::emergency;
use crate::sessions;

pub(super) async fn login_with_password(
    cx: &Call,
    user: String,
    secret: String,
    _version: String,
    originator: String,
) -> Served<Ref<Session>> {
    let originator = if originator.is_empty() { cx.caller.originator.clone() } else { originator };
    sessions::login(cx, user, secret, originator).await
}

/// For hosts of the pool, which know its secret.
pub(super) async fn slave_login(cx: &Call, _host: Ref<Host>, secret: String) -> Served<Ref<Session>> {
    emergency::login_with_secret(&cx.state, &secret).await?;
    sessions::open(cx, sessions::HOSTS.to_owned(), "xenith".to_owned()).await
}

pub(super) async fn logout(cx: &Call) -> Served<()> {
    sessions::logout(cx, cx.session).await
}

pub(super) async fn change_password(cx: &Call, _old: String, new: String) -> Served<()> {
    sessions::change_password(cx, new).await
}

/// Nobody from a directory is logged in: there is no directory yet.
pub(super) async fn get_all_subject_identifiers(_: &Call) -> Served<Vec<String>> {
    Ok(Vec::new())
}
