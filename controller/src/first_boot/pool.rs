//! The rows of a new pool.

use std::collections::BTreeMap;

use datamodel::fields::{local_user, member, network, pool, pool_secret, role, user};
use datamodel::{ClassKind, LocalUser, Member, Network, Pool, PoolSecret, RbacRole, Ref, Role, User};
use raft_store::{NewRow, Transaction};
use uuid::Uuid;

use super::{licence, storage, templates};
use crate::controller::Shared;

/// The pool's reference and the fixed ones of roles follow from names, so that they are the same wherever they are made.
fn fixed<C: ClassKind>(name: &str) -> Uuid {
    // FNV-1a twice over class and name: stable, and without a hash crate for six rows.
    let half = |seed: u64| {
        let text = format!("{}/{name}", C::NAME);
        text.bytes().fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
    };
    Uuid::from_u64_pair(half(0xcbf2_9ce4_8422_2325), half(0x9ae1_6a3b_2f90_404f))
}

pub(super) fn found(shared: &Shared, change: &mut Transaction) {
    let shared_sr = storage::pool_rows(shared, change);
    let pool_ref: Ref<Pool> = Ref::new(shared.uuid());
    let memory_ratios = [("memory-ratio-hvm", "0.25"), ("memory-ratio-pv", "0.25")];
    change.insert(
        NewRow::new(pool_ref, shared.uuid())
            .with(pool::DEFAULT_SR, shared_sr)
            .with(pool::SUSPEND_IMAGE_SR, shared_sr)
            .with(pool::OTHER_CONFIG, memory_ratios.map(|(key, value)| (key.to_owned(), value.to_owned())).into())
            .with(pool::RESTRICTIONS, licence::flags())
            .with(pool::HA_CLUSTER_STACK, "xenith".to_owned())
            .with(pool::TLS_VERIFICATION_ENABLED, true),
    );
    roles(change);
    accounts(shared, change);
    members(shared, change);
    internal_network(shared, change);
    templates::insert(shared, change);
}

/// The six roles, the higher ones holding the lower.
fn roles(change: &mut Transaction) {
    for (place, held) in RbacRole::ALL.into_iter().enumerate() {
        let subroles =
            RbacRole::ALL[..place].iter().map(|lower| Ref::<Role>::new(fixed::<Role>(lower.name()))).collect();
        change.insert(
            NewRow::new(Ref::<Role>::new(fixed::<Role>(held.name())), fixed::<Role>(held.name()))
                .with(role::NAME_LABEL, held.name().to_owned())
                .with(role::NAME_DESCRIPTION, format!("The {} role", held.name()))
                .with(role::SUBROLES, subroles),
        );
    }
}

fn accounts(shared: &Shared, change: &mut Transaction) {
    change.insert(
        NewRow::new(Ref::<User>::new(shared.uuid()), shared.uuid())
            .with(user::SHORT_NAME, "root".to_owned())
            .with(user::FULLNAME, "superuser".to_owned()),
    );
    change.insert(
        NewRow::new(Ref::<LocalUser>::new(shared.uuid()), shared.uuid())
            .with(local_user::NAME, "root".to_owned())
            .with(local_user::PASSWORD_HASH, shared.config.initial_password_hash.clone()),
    );
    change.insert(
        NewRow::new(Ref::<PoolSecret>::new(shared.uuid()), shared.uuid())
            .with(pool_secret::CA_CERTIFICATE, shared.config.ca_certificate.clone())
            .with(pool_secret::CA_KEY, shared.config.ca_key.clone())
            .with(pool_secret::SECRET, format!("{}/{}", Uuid::new_v4(), Uuid::new_v4())),
    );
}

fn members(shared: &Shared, change: &mut Transaction) {
    for initial in &shared.config.initial_members {
        change.insert(
            NewRow::new(Ref::<Member>::new(shared.uuid()), shared.uuid())
                .with(member::NODE_ID, i64::try_from(initial.node_id).unwrap_or(0))
                .with(member::HOST_UUID, initial.host_uuid.to_string())
                .with(member::API_ADDRESS, initial.api_address.to_string())
                .with(member::PEER_ADDRESS, initial.peer_address.clone())
                .with(member::AGENT_ADDRESS, initial.agent_address.clone())
                .with(member::REPLICA, initial.replica)
                .with(member::SINCE, shared.now()),
        );
    }
}

fn internal_network(shared: &Shared, change: &mut Transaction) {
    let other_config: BTreeMap<String, String> = [
        ("is_guest_installer_network", "true"),
        ("is_host_internal_management_network", "true"),
        ("ip_begin", "169.254.0.1"),
        ("ip_end", "169.254.255.254"),
        ("netmask", "255.255.0.0"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    change.insert(
        NewRow::new(Ref::<Network>::new(shared.uuid()), shared.uuid())
            .with(network::NAME_LABEL, "Host internal management network".to_owned())
            .with(network::NAME_DESCRIPTION, "Network on which guests are given addresses by their host".to_owned())
            .with(network::BRIDGE, "xenapi".to_owned())
            .with(network::MTU, 1500)
            .with(network::MANAGED, true)
            .with(network::OTHER_CONFIG, other_config),
    );
}
