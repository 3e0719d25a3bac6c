//! Whether a host may join: one function over what the pool has and what the host brings, in the documented order.

use std::collections::BTreeMap;
use std::sync::Arc;

use datamodel::enums::{CertificateType, NetworkPurpose, VmPowerState};
use datamodel::fields::{
    certificate, cluster_host, host, network, pbd, pif, pool, sdn_controller, sm, sr, vdi, vlan, vm,
};
use datamodel::{
    ApiError, Bond, Certificate, ClusterHost, Host, Network, NetworkSriov, Pif, Pool, Ref, SdnController, Sm, Sr,
    Tunnel, Vdi, Vlan, Vm, errors,
};
use raft_store::{Row, State};

use super::is_live;

/// As many as a pool holds.
const MOST_HOSTS: usize = 64;

/// Refuses a host that may not join. `force` passes over differences of software and processors.
pub(crate) fn check(ours: &State, theirs: &State, force: bool) -> Result<(), ApiError> {
    let joiner = master(theirs).ok_or_else(errors::host_still_booting)?;
    let management = management_pif(theirs, joiner).ok_or_else(errors::host_still_booting)?;
    if [theirs, ours].into_iter().any(|state| state.all::<Pool>().any(|row| row.get(pool::HA_ENABLED))) {
        return Err(errors::ha_is_enabled());
    }
    if let Some(row) = theirs.all::<ClusterHost>().find(|row| row.get(cluster_host::ENABLED)) {
        return Err(errors::clustering_enabled(row.typed::<ClusterHost>()));
    }
    membership(ours, theirs, joiner)?;
    if theirs.all::<Host>().nth(1).is_some() {
        return Err(errors::joining_host_cannot_be_master_of_other_hosts());
    }
    vms(theirs)?;
    let master = master(ours).ok_or_else(errors::host_still_booting)?;
    for row in [joiner, master] {
        if !row.get(host::PENDING_GUIDANCES).is_empty() {
            return Err(errors::host_pending_mandatory_guidance_not_empty(row.typed::<Host>()));
        }
    }
    software(joiner, master, force)?;
    if theirs.all::<Sr>().any(|row| brings_shared(theirs, row)) {
        return Err(errors::joining_host_cannot_contain_shared_srs());
    }
    networks(ours, theirs, management)?;
    if joiner.get(host::EXTERNAL_AUTH_TYPE) != master.get(host::EXTERNAL_AUTH_TYPE)
        || joiner.get(host::EXTERNAL_AUTH_SERVICE_NAME) != master.get(host::EXTERNAL_AUTH_SERVICE_NAME)
    {
        return Err(errors::pool_joining_external_auth_mismatch());
    }
    if joiner.get(host::EDITION) != master.get(host::EDITION) {
        return Err(errors::license_host_pool_mismatch());
    }
    addresses(ours, theirs, master, joiner, management)?;
    versions(master, joiner)?;
    trust(ours, theirs)?;
    drivers(ours, theirs)
}

fn master(state: &State) -> Option<&Arc<Row>> {
    state.row(state.all::<Pool>().next()?.get(pool::MASTER))
}

fn management_pif<'a>(state: &'a State, of: &Row) -> Option<&'a Arc<Row>> {
    state.all::<Pif>().find(|row| row.get(pif::HOST) == of.typed::<Host>() && row.get(pif::MANAGEMENT))
}

/// A host is of one pool; one that was lost and has begun anew may come back.
fn membership(ours: &State, theirs: &State, joiner: &Row) -> Result<(), ApiError> {
    let uuid = |state: &State| state.all::<Pool>().next().map(|row| row.uuid().to_owned());
    if uuid(ours) == uuid(theirs) {
        return Err(errors::operation_not_allowed("Host cannot become slave of itself"));
    }
    let known = ours.by_uuid(<Host as datamodel::ClassKind>::ID, joiner.uuid());
    if known.is_some_and(|row| is_live(ours, row)) {
        return Err(errors::operation_not_allowed("Host is already part of a pool"));
    }
    if known.is_none() && ours.all::<Host>().count() >= MOST_HOSTS {
        return Err(errors::operation_not_allowed("The pool has 64 hosts"));
    }
    Ok(())
}

fn vms(theirs: &State) -> Result<(), ApiError> {
    let guests = || theirs.all::<Vm>().filter(|row| !row.get(vm::IS_CONTROL_DOMAIN));
    if guests().any(|row| row.get(vm::POWER_STATE) == VmPowerState::Running) {
        return Err(errors::joining_host_cannot_have_running_vms());
    }
    if guests().any(|row| !row.get(vm::CURRENT_OPERATIONS).is_empty()) {
        return Err(errors::joining_host_cannot_have_vms_with_current_operations());
    }
    Ok(())
}

fn word(row: &Row, key: &str) -> String {
    row.get(host::SOFTWARE_VERSION).get(key).cloned().unwrap_or_default()
}

fn software(joiner: &Row, master: &Row, force: bool) -> Result<(), ApiError> {
    let differs = |key: &str| word(joiner, key) != word(master, key);
    if ["platform_version", "product_brand"].iter().any(|key| differs(key)) {
        return Err(errors::hosts_not_compatible());
    }
    if force {
        return Ok(());
    }
    if ["xapi", "git_id", "build_number"].iter().any(|key| differs(key)) {
        return Err(errors::hosts_not_homogeneous("Software version differs"));
    }
    let vendor = |row: &Row| row.get(host::CPU_INFO).get("vendor").cloned();
    if vendor(joiner) != vendor(master) {
        return Err(errors::hosts_not_homogeneous("CPUs differ"));
    }
    Ok(())
}

/// A shared SR of the host's own. The one that comes with every new pool does not count while it is empty: it stays
/// behind.
pub(super) fn brings_shared(theirs: &State, row: &Row) -> bool {
    let this = row.typed::<Sr>();
    let of_first_boot = row.get(sr::OTHER_CONFIG).get("i18n-key").is_some_and(|key| key == "shared-storage");
    let empty = || !theirs.all::<Vdi>().any(|disk| disk.get(vdi::SR) == this);
    row.get(sr::SHARED) && !row.get(sr::IS_TOOLS_SR) && !(of_first_boot && empty())
}

/// Whether a PBD leads to something that the host brings along.
pub(super) fn is_brought(theirs: &State, row: &Row) -> bool {
    let target: Ref<Sr> = row.get(pbd::SR);
    theirs.row(target).is_some_and(|sr_row| !sr_row.get(sr::SHARED))
}

fn networks(ours: &State, theirs: &State, management: &Row) -> Result<(), ApiError> {
    if theirs.all::<Bond>().next().is_some() {
        return Err(errors::pool_joining_host_has_bonds());
    }
    if theirs.all::<Tunnel>().next().is_some() {
        return Err(errors::pool_joining_host_has_tunnels());
    }
    if theirs.all::<NetworkSriov>().next().is_some() {
        return Err(errors::pool_joining_host_has_network_sriovs());
    }
    let carries_management = |row: &&Arc<Row>| row.get(vlan::UNTAGGED_PIF) == management.typed::<Pif>();
    if !theirs.all::<Vlan>().all(|row| carries_management(&row)) {
        return Err(errors::pool_joining_host_has_non_management_vlans());
    }
    let remote = master(ours).and_then(|row| management_pif(ours, row)).map_or(-1, |row| row.get(pif::VLAN));
    let local = management.get(pif::VLAN);
    if local != remote {
        return Err(errors::pool_joining_host_management_vlan_does_not_match(local.to_string(), remote.to_string()));
    }
    Ok(())
}

fn addresses(ours: &State, theirs: &State, master: &Row, joiner: &Row, management: &Row) -> Result<(), ApiError> {
    if word(master, "network_backend") != word(joiner, "network_backend") {
        return Err(errors::operation_not_allowed("Network backends differ"));
    }
    let controllers = |state: &State| {
        let mut all: Vec<String> = state.all::<SdnController>().map(|row| row.get(sdn_controller::ADDRESS)).collect();
        all.sort_unstable();
        all
    };
    if controllers(ours) != controllers(theirs) {
        return Err(errors::operation_not_allowed("SDN controllers differ"));
    }
    let ours_management = management_pif(ours, master);
    if ours_management
        .is_some_and(|row| row.get(pif::PRIMARY_ADDRESS_TYPE) != management.get(pif::PRIMARY_ADDRESS_TYPE))
    {
        return Err(errors::operation_not_allowed("Primary address types of the management interfaces differ"));
    }
    let purposes = |state: &State, purpose: NetworkPurpose| {
        state.all::<Network>().any(|row| row.get(network::PURPOSE).contains(&purpose))
    };
    let mixed =
        |one: &State, other: &State| purposes(one, NetworkPurpose::Nbd) && purposes(other, NetworkPurpose::InsecureNbd);
    if mixed(ours, theirs) || mixed(theirs, ours) {
        return Err(errors::operation_not_allowed("Secure and insecure NBD networks cannot be mixed"));
    }
    Ok(())
}

fn versions(master: &Row, joiner: &Row) -> Result<(), ApiError> {
    let api = |row: &Row| format!("{}.{}", row.get(host::API_VERSION_MAJOR), row.get(host::API_VERSION_MINOR));
    if api(joiner) != api(master) {
        return Err(errors::pool_joining_host_must_have_same_api_version(api(joiner), api(master)));
    }
    let schema = |row: &Row| word(row, "db_schema");
    if schema(joiner) != schema(master) {
        return Err(errors::pool_joining_host_must_have_same_db_schema(schema(joiner), schema(master)));
    }
    Ok(())
}

fn trust(ours: &State, theirs: &State) -> Result<(), ApiError> {
    let verifies = |state: &State| state.all::<Pool>().any(|row| row.get(pool::TLS_VERIFICATION_ENABLED));
    if verifies(ours) != verifies(theirs) {
        return Err(errors::pool_joining_host_tls_verification_mismatch());
    }
    let authorities = |state: &State| -> BTreeMap<String, String> {
        let all = state.all::<Certificate>().filter(|row| row.get(certificate::TYPE) == CertificateType::Ca);
        all.map(|row| (row.get(certificate::NAME), row.get(certificate::FINGERPRINT))).collect()
    };
    let known = authorities(ours);
    let conflicts: Vec<String> = authorities(theirs)
        .into_iter()
        .filter(|(name, print)| known.get(name).is_some_and(|ours| ours != print))
        .map(|(name, _)| name)
        .collect();
    if conflicts.is_empty() {
        return Ok(());
    }
    Err(ApiError::new(errors::POOL_JOINING_HOST_CA_CERTIFICATES_CONFLICT, conflicts))
}

/// The host must have every driver of the pool, with all that the pool's can.
fn drivers(ours: &State, theirs: &State) -> Result<(), ApiError> {
    for wanted in ours.all::<Sm>() {
        let have = theirs.all::<Sm>().find(|row| row.get(sm::TYPE) == wanted.get(sm::TYPE));
        let features = have.map(|row| row.get(sm::FEATURES)).unwrap_or_default();
        let enough = have.is_some()
            && wanted
                .get(sm::FEATURES)
                .iter()
                .all(|(name, version)| features.get(name).is_some_and(|has| has >= version));
        if !enough {
            let have = have.map_or_else(String::new, |row| row.reference.to_string());
            return Err(errors::pool_joining_sm_features_incompatible(wanted.reference.to_string(), have));
        }
    }
    Ok(())
}
