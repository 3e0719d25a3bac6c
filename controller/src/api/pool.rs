//! Messages of the class pool.

use datamodel::fields::pool_secret;
use datamodel::{Host, PoolSecret, Ref, fields};

use crate::call::Call;
use crate::failure::Served;
use crate::membership::trust::{self, Kind};
use crate::membership::{admission, emergency, join, mastership, rotation};

pub(super) async fn designate_new_master(cx: &Call, host: Ref<Host>) -> Served<()> {
    mastership::designate(cx, host).await
}

/// Nothing to do: what is acknowledged is on a majority's disks.
pub(super) async fn sync_database(_: &Call) -> Served<()> {
    Ok(())
}

pub(super) async fn join(cx: &Call, address: String, user: String, password: String) -> Served<()> {
    join::join(cx, address, user, password, false).await
}

pub(super) async fn join_force(cx: &Call, address: String, user: String, password: String) -> Served<()> {
    join::join(cx, address, user, password, true).await
}

pub(super) async fn admit(cx: &Call, application: String) -> Served<String> {
    admission::admit(cx, application).await
}

pub(super) async fn eject(cx: &Call, host: Ref<Host>) -> Served<()> {
    join::eject(cx, host).await
}

pub(super) async fn recover_slaves(cx: &Call) -> Served<Vec<Ref<Host>>> {
    emergency::recover(cx).await
}

/// The secret by which hosts of the pool know one another.
pub(super) async fn initial_auth(cx: &Call) -> Served<String> {
    Ok(cx.state.all::<PoolSecret>().next().map(|row| row.get(pool_secret::SECRET)).unwrap_or_default())
}

pub(super) async fn is_slave(cx: &Call, host: Ref<Host>) -> Served<bool> {
    cx.row(host)?;
    Ok(!cx.state.all::<datamodel::Pool>().any(|row| row.get(fields::pool::MASTER) == host))
}

pub(super) async fn rotate_secret(cx: &Call) -> Served<()> {
    rotation::rotate(cx).await
}

pub(super) async fn install_ca_certificate(cx: &Call, name: String, pem: String) -> Served<()> {
    trust::install(cx, Kind::Authority, name, pem).await
}

pub(super) async fn uninstall_ca_certificate(cx: &Call, name: String) -> Served<()> {
    trust::uninstall(cx, Kind::Authority, name).await
}

pub(super) async fn certificate_list(cx: &Call) -> Served<Vec<String>> {
    Ok(trust::list(&cx.state, Kind::Authority))
}

pub(super) async fn crl_install(cx: &Call, name: String, pem: String) -> Served<()> {
    trust::install(cx, Kind::Revocations, name, pem).await
}

pub(super) async fn crl_uninstall(cx: &Call, name: String) -> Served<()> {
    trust::uninstall(cx, Kind::Revocations, name).await
}

pub(super) async fn crl_list(cx: &Call) -> Served<Vec<String>> {
    Ok(trust::list(&cx.state, Kind::Revocations))
}

/// Nothing to do: they are rows, which every host has.
pub(super) async fn certificate_sync(_: &Call) -> Served<()> {
    Ok(())
}

pub(super) async fn enable_tls_verification(cx: &Call) -> Served<()> {
    trust::enable_verification(cx).await
}
