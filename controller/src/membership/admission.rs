//! How a pool takes a host in.
//!
//! First the master checks what the host brings, gives it a node id and a certificate, and writes down a member row
//! that holds its application: nothing of it shows. The host then takes its seat, or dies on the way and is what it
//! was. Once its agent answers under this pool's authority, everything it brings is written in one transaction.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use datamodel::enums::CertificateType;
use datamodel::fields::{certificate, host, host_metrics, member, network, pbd, pif, pool, pool_secret, sr, vm};
use datamodel::{
    Certificate, ClassId, ClassKind, Host, Key, Member, Network, OpaqueRef, Pbd, Pif, Pool, PoolSecret, Ref, Relation,
    Sr, Timestamp, Value, Vm, errors,
};
use raft_store::{NewRow, Row, State, Transaction, decode_rows, encode_rows};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{JOINING, departure, is_live, node_id, precondition, trust};
use crate::call::Call;
use crate::certificates::{self, Issued};
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};

/// Of applications.
pub(crate) const VERSION: u32 = 1;
/// A host without a good reason to bring more is refused, before its rows fill the log.
const LARGEST_APPLICATION: usize = 3 << 20;

/// What a host says of itself when it asks to be let in.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Application {
    pub(crate) version: u32,
    pub(crate) host_uuid: Uuid,
    pub(crate) address: IpAddr,
    pub(crate) peer_address: String,
    pub(crate) agent_address: String,
    /// PEM.
    pub(crate) public_key: String,
    /// It votes, and does nothing else.
    pub(crate) witness: bool,
    /// Pass over differences of software and processors.
    pub(crate) force: bool,
    /// What it brings: rows in base 64; empty for a host that comes back to what the pool still has of it.
    pub(crate) rows: String,
}

/// What it is told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Admission {
    pub(crate) node_id: u64,
    pub(crate) ca: String,
    pub(crate) certificate: String,
}

/// Everything that a host brings along; the pool it leaves, its sessions and tasks stay behind.
const BROUGHT: &[&str] = &[
    "host",
    "host_metrics",
    "host_cpu",
    "network",
    "PIF",
    "PIF_metrics",
    "SR",
    "PBD",
    "VDI",
    "VM",
    "VM_metrics",
    "VM_guest_metrics",
    "VBD",
    "VBD_metrics",
    "VIF",
    "VIF_metrics",
    "VTPM",
    "console",
    "secret",
    "PCI",
    "PGPU",
    "PUSB",
    "Feature",
];
/// What the pool looks at besides.
const SHOWN: &[&str] = &[
    "pool",
    "SM",
    "Bond",
    "tunnel",
    "VLAN",
    "network_sriov",
    "Cluster_host",
    "SDN_controller",
    "Certificate",
    "trusted",
];

/// A host's rows for an application.
pub(crate) fn bring(state: &State) -> String {
    let classes = BROUGHT.iter().chain(SHOWN).filter_map(|name| ClassId::named(name));
    let rows = classes.flat_map(|class| state.rows(class)).filter(|row| {
        // Every pool has these.
        row.class != Vm::ID || !row.get(vm::IS_DEFAULT_TEMPLATE)
    });
    BASE64.encode(encode_rows(rows))
}

impl Application {
    fn state(&self) -> Served<State> {
        let unreadable = |reason: String| {
            tracing::warn!(reason, "a host's application cannot be read");
            Failure::Api(errors::hosts_not_compatible())
        };
        let bytes = BASE64.decode(&self.rows).map_err(|error| unreadable(error.to_string()))?;
        decode_rows(&bytes).map_err(|error| unreadable(error.to_string()))
    }
}

/// `pool.admit`: a host that is not of the pool asks to be.
pub(crate) async fn admit(cx: &Call, text: String) -> Served<String> {
    if text.len() > LARGEST_APPLICATION {
        return refuse(errors::operation_not_allowed("The host has more objects than can join a pool"));
    }
    let application: Application =
        serde_json::from_str(&text).map_err(|_| Failure::Api(errors::hosts_not_compatible()))?;
    if application.version != VERSION {
        return refuse(errors::hosts_not_compatible());
    }
    let theirs = application.state()?;
    // One at a time: a node id is the index of the entry that made its row, and entries hold many transactions.
    let _turn = cx.shared.admissions.lock().await;
    let state = cx.latest().await?;
    let comes_back = application.rows.is_empty();
    if comes_back {
        super::expect_no_ha(&state)?;
    } else {
        precondition::check(&state, &theirs, application.force)?;
    }
    let uuid = application.host_uuid.to_string();
    let known = state.by_uuid(Host::ID, &uuid);
    if known.is_some_and(|row| is_live(&state, row) || application.witness) {
        return refuse(errors::operation_not_allowed("Host is already part of a pool"));
    }
    let authority = authority(&state)?;
    let certificate = certificates::sign(&authority, &application.public_key, &uuid, &[application.address])
        .map_err(|error| errors::internal_error(error.to_string()))?;
    let id = reserve(cx, &state, &application).await?;
    let ca = state.all::<PoolSecret>().next().map(|row| row.get(pool_secret::CA_CERTIFICATE)).unwrap_or_default();
    let admission = Admission { node_id: id, ca, certificate };
    tracing::info!(host = uuid, node = id, "a host may join");
    serde_json::to_string(&admission).map_err(|error| errors::internal_error(error.to_string()).into())
}

/// The pool's authority, with its key.
pub(crate) fn authority(state: &State) -> Served<Issued> {
    let row = state.all::<PoolSecret>().next();
    let authority = row.map(|row| Issued {
        certificate: certificates::newest(&row.get(pool_secret::CA_CERTIFICATE)).to_owned(),
        key: row.get(pool_secret::CA_KEY),
    });
    match authority.filter(|authority| !authority.key.is_empty()) {
        Some(authority) => Ok(authority),
        None => {
            let uuid = state.all::<Pool>().next().and_then(|row| state.row(row.get(pool::MASTER)));
            let uuid = uuid.map(|row| row.uuid().to_owned()).unwrap_or_default();
            refuse(errors::pool_joining_master_certificate_not_in_pool_bundle(uuid))
        }
    }
}

/// A member row with a node id that nobody ever had. Rows of earlier lives of the same host go.
async fn reserve(cx: &Call, state: &State, application: &Application) -> Served<u64> {
    let uuid = application.host_uuid.to_string();
    let reference: Ref<Member> = cx.reference();
    let mut change = cx.transaction();
    // A pool has one witness.
    let replaced =
        |row: &&Arc<Row>| row.get(member::HOST_UUID) == uuid || (application.witness && row.get(member::WITNESS));
    for row in state.all::<Member>().filter(replaced) {
        change.delete(row.typed::<Member>());
    }
    change.insert(
        NewRow::new(reference, cx.uuid())
            .with(member::HOST_UUID, uuid)
            .with(
                member::API_ADDRESS,
                if application.witness { String::new() } else { application.address.to_string() },
            )
            .with(member::PEER_ADDRESS, application.peer_address.clone())
            .with(member::AGENT_ADDRESS, application.agent_address.clone())
            // A witness brings nothing, and no agent of it will be heard.
            .with(member::STANDING, if application.witness { "member" } else { JOINING }.to_owned())
            .with(member::SINCE, cx.now())
            .with(member::WITNESS, application.witness)
            // Not one yet: it has no number.
            .with(member::REPLICA, false)
            .with(member::APPLICATION, application.rows.clone()),
    );
    let mut index = cx.shared.store.commit(change).await?;
    let taken = state.all::<Member>().map(|row| node_id(row)).max().unwrap_or(0);
    while index.0 <= taken {
        let mut change = cx.transaction();
        change.touch(Member::ID, reference.opaque());
        index = cx.shared.store.commit(change).await?;
    }
    let mut change = cx.transaction();
    change
        .expect_exists(Member::ID, reference.opaque())
        .set(reference, member::NODE_ID, i64::try_from(index.0).unwrap_or(i64::MAX))
        .set(reference, member::REPLICA, true);
    cx.shared.store.commit(change).await?;
    Ok(index.0)
}

/// The agent of a joining host has answered under this pool's authority: what the host brings is written. The host, or
/// none where it brings nothing and has to be made.
pub(crate) fn bring_in(
    shared: &Shared,
    state: &State,
    change: &mut Transaction,
    row: &Row,
) -> Served<Option<Ref<Host>>> {
    let this = row.typed::<Member>();
    change.set(this, member::STANDING, "member".to_owned()).set(this, member::APPLICATION, String::new());
    if let Some(known) = state.by_uuid(Host::ID, &row.get(member::HOST_UUID)) {
        let reference = known.typed::<Host>();
        change.set(this, member::HOST, reference).set(reference, host::ADDRESS, row.get(member::API_ADDRESS)).set(
            reference,
            host::ENABLED,
            true,
        );
        return Ok(Some(reference));
    }
    let rows = row.get(member::APPLICATION);
    if rows.is_empty() {
        return Ok(None);
    }
    let bytes = BASE64.decode(&rows).map_err(|error| errors::internal_error(error.to_string()))?;
    let theirs = decode_rows(&bytes).map_err(|error| errors::internal_error(error.to_string()))?;
    let Some(host_row) = theirs.all::<Host>().next() else { return Ok(None) };
    let reference = host_row.typed::<Host>();
    Luggage::sort(state, &theirs).insert(change);
    trust::adopt(shared, state, &theirs, change);
    change
        .set(this, member::HOST, reference)
        .set(reference, host::ADDRESS, row.get(member::API_ADDRESS))
        .set(reference, host::ENABLED, true)
        .set(host_row.get(host::METRICS), host_metrics::LIVE, false);
    connect(shared, state, change, reference);
    if let Some(pool_row) = state.all::<Pool>().next() {
        let all = state.all::<Host>().map(|row| row.get(host::CPU_INFO)).chain([host_row.get(host::CPU_INFO)]);
        change.expect_row(pool_row).set(pool_row.typed::<Pool>(), pool::CPU_INFO, departure::processors(all));
    }
    Ok(Some(reference))
}

/// To every shared SR of the pool, as the master is connected to it; and the certificate it shows its peers.
fn connect(shared: &Shared, state: &State, change: &mut Transaction, of: Ref<Host>) {
    let master = state.all::<Pool>().next().map_or(Ref::NULL, |row| row.get(pool::MASTER));
    for sr_row in state.all::<Sr>().filter(|row| row.get(sr::SHARED)) {
        let target = sr_row.typed::<Sr>();
        let pattern = state.all::<Pbd>().find(|row| row.get(pbd::SR) == target && row.get(pbd::HOST) == master);
        let Some(pattern) = pattern else { continue };
        let mut device: BTreeMap<String, String> = pattern.get(pbd::DEVICE_CONFIG);
        device.remove("SRmaster");
        change.insert(
            NewRow::new(Ref::<Pbd>::new(shared.uuid()), shared.uuid())
                .with(pbd::HOST, of)
                .with(pbd::SR, target)
                .with(pbd::CURRENTLY_ATTACHED, true)
                .with(pbd::DEVICE_CONFIG, device),
        );
    }
    change.insert(
        NewRow::new(Ref::<Certificate>::new(shared.uuid()), shared.uuid())
            .with(certificate::HOST, of)
            .with(certificate::TYPE, CertificateType::HostInternal)
            .with(certificate::NAME, "pool member".to_owned())
            .with(certificate::NOT_BEFORE, shared.now())
            .with(certificate::NOT_AFTER, Timestamp(shared.now().0 + 10 * 365 * 86400)),
    );
}

/// What a host brings, sorted into what is new, what the pool has already, and what stays behind.
struct Luggage {
    /// To be made, in this pool's order of classes.
    new: Vec<Arc<Row>>,
    /// The host's reference → the pool's.
    known: HashMap<OpaqueRef, OpaqueRef>,
    made: HashSet<OpaqueRef>,
}

impl Luggage {
    fn sort(ours: &State, theirs: &State) -> Self {
        let mut sorted = Self { new: Vec::new(), known: HashMap::new(), made: HashSet::new() };
        for class in BROUGHT.iter().filter_map(|name| ClassId::named(name)) {
            for row in theirs.rows(class) {
                if stays_behind(theirs, row) {
                    continue;
                }
                if let Some(ours) = counterpart(ours, theirs, row) {
                    sorted.known.insert(row.reference, ours);
                } else if ours.class_of(row.reference).is_none() {
                    sorted.made.insert(row.reference);
                    sorted.new.push(Arc::clone(row));
                }
            }
        }
        sorted
    }

    /// Objects first, then what ties them together: an end that is not there yet would not be told.
    fn insert(&self, change: &mut Transaction) {
        let mut ties = Vec::new();
        for row in &self.new {
            let mut fields = Vec::new();
            for (def, (index, value)) in row.class.def().fields.iter().zip((0_u16..).zip(row.values())) {
                if *value == def.default {
                    continue;
                }
                match def.relation {
                    Some(Relation::Follower { .. }) => {}
                    Some(_) => ties.push((row.class, row.reference, index, self.here(value))),
                    None => fields.push((index, self.here(value))),
                }
            }
            change.insert_values(row.class, row.reference, fields);
        }
        for (class, reference, field, value) in ties {
            change.set_value(class, reference, field, value);
        }
    }

    /// A value in terms of this pool; what it names and does not come along is named no more.
    fn here(&self, value: &Value) -> Value {
        match value {
            Value::Ref(reference) => Value::Ref(self.reference(*reference).unwrap_or(OpaqueRef::NULL)),
            Value::Set(members) => Value::set(
                members
                    .iter()
                    .filter(|member| !matches!(member, Value::Ref(at) if self.reference(*at).is_none()))
                    .map(|member| self.here(member)),
            ),
            Value::Map(entries) => Value::map(entries.iter().filter_map(|(key, value)| {
                let key = match key {
                    Key::Ref(at) => Key::Ref(self.reference(*at)?),
                    key => key.clone(),
                };
                Some((key, self.here(value)))
            })),
            other => other.clone(),
        }
    }

    fn reference(&self, reference: OpaqueRef) -> Option<OpaqueRef> {
        self.known.get(&reference).copied().or_else(|| self.made.contains(&reference).then_some(reference))
    }
}

/// The shared SR of the host's first boot, and the way to it.
fn stays_behind(theirs: &State, row: &Row) -> bool {
    (row.class == Sr::ID && row.get(sr::SHARED)) || (row.class == Pbd::ID && !precondition::is_brought(theirs, row))
}

/// What the pool has already: objects of the same uuid, and networks on the same bridge where that means the same wire.
fn counterpart(ours: &State, theirs: &State, row: &Row) -> Option<OpaqueRef> {
    if let Some(same) = ours.by_uuid(row.class, row.uuid()) {
        return Some(same.reference);
    }
    if row.class != Network::ID {
        return None;
    }
    let internal =
        row.get(network::OTHER_CONFIG).get("is_host_internal_management_network").is_some_and(|it| it == "true");
    let physical =
        theirs.all::<Pif>().any(|nic| nic.get(pif::NETWORK) == row.typed::<Network>() && nic.get(pif::PHYSICAL));
    if !internal && !physical {
        return None;
    }
    ours.all::<Network>().find(|known| known.get(network::BRIDGE) == row.get(network::BRIDGE)).map(|row| row.reference)
}
