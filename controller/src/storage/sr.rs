//! What is done to an SR: made, looked into, destroyed.

use std::collections::BTreeMap;
use std::sync::Arc;

use datamodel::enums::StorageOperations as SrOp;
use datamodel::fields::{pbd, pool, sm, sr, vm};
use datamodel::{ApiError, ClassKind, Host, OpaqueRef, Pbd, Pool, Ref, Sm, Sr, Value, Vm, errors};
use proto::agent::step::Action;
use proto::agent::{CreateStore, DestroyStore, ProbeStore, Store, StoreState};
use raft_store::{NewRow, Row, State, Transaction};

use super::{pbd as connection, reach, rules, scan, vdi as disk};
use crate::agent::Performed;
use crate::call::{Call, find};
use crate::failure::{Served, refuse};
use crate::membership::is_live;
use crate::operations::{Ending, Journal, Kind, Planned, Seen, run};

pub(super) const KINDS: &[&dyn Kind] = &[&Create, &Destroy, &Look::Scan, &Look::Update, &Probe::Text, &Probe::Records];

/// The documented error of an SR whose type no driver has.
pub(crate) fn check_type(state: &State, ty: &str) -> Result<(), ApiError> {
    if state.all::<Sm>().any(|row| row.get(sm::TYPE) == ty) { Ok(()) } else { Err(errors::sr_unknown_driver(ty)) }
}

/// A new SR: made at one host, plugged there, and at every other host where it is shared.
struct Create;

/// What a new SR is to be.
pub(crate) struct Wanted {
    pub(crate) host: Ref<Host>,
    pub(crate) device_config: BTreeMap<String, String>,
    pub(crate) physical_size: i64,
    pub(crate) fields: Vec<(u16, Value)>,
}

pub(crate) async fn create(call: &Call, wanted: Wanted) -> Served<Ref<Sr>> {
    let (reference, uuid) = (call.reference::<Sr>(), call.uuid());
    run(call, &Create, move |draft| {
        let made = foreseen(&wanted.fields);
        draft.row(wanted.host)?;
        check_type(draft.state, &made.get(sr::TYPE))?;
        connection::check_config(&wanted.device_config)?;
        let mut hosts = vec![wanted.host];
        if made.get(sr::SHARED) {
            let others = draft.state.all::<Host>().filter(|row| row.typed::<Host>() != wanted.host);
            hosts.extend(others.map(|row| row.typed::<Host>()));
        }
        let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
        let config = serde_json::to_string(&wanted.device_config).unwrap_or_default();
        draft.on(wanted.host).note("made", reference).note("uuid", uuid).note("hosts", hosts.join(" "));
        draft.note("device_config", config).note("physical_size", wanted.physical_size);
        draft.note_fields(Sr::ID, &wanted.fields);
        Ok(())
    })
    .await?;
    Ok(reference)
}

/// An SR as it will be.
fn foreseen(fields: &[(u16, Value)]) -> Row {
    Row::of_defaults(Sr::ID, OpaqueRef::NULL).with_values(fields)
}

fn noted_store(journal: &Journal) -> Store {
    let config: BTreeMap<String, String> = serde_json::from_str(journal.parameter("device_config")).unwrap_or_default();
    reach::store_with(journal.parameter("uuid"), &foreseen(&journal.fields(Sr::ID)).get(sr::TYPE), config)
}

fn noted_hosts(journal: &Journal) -> Vec<Ref<Host>> {
    let references = journal.parameter("hosts").split_whitespace().filter_map(|text| text.parse().ok());
    references.map(Ref::from_opaque).collect()
}

impl Kind for Create {
    fn verb(&self) -> &'static str {
        "sr_create"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let journal = seen.journal;
        let (store, uuid) = (noted_store(journal), journal.parameter("uuid"));
        let physical_size = u64::try_from(journal.number("physical_size")).unwrap_or(0);
        let create = Action::CreateStore(CreateStore { store: Some(store.clone()), physical_size });
        // What was there before, and is the reason why it was refused, is not destroyed.
        let create = Planned::new(journal.host, uuid, create)
            .undone_by(Action::DestroyStore(DestroyStore { store: Some(store.clone()) }))
            .undone_if_known();
        let attach = noted_hosts(journal).into_iter().enumerate().map(|(place, host_ref)| {
            let attach = connection::attach(host_ref, store.clone());
            // Other hosts plug it when they can.
            if place == 0 { attach } else { attach.may_fail() }
        });
        let mut plan = vec![create];
        plan.extend(attach);
        let look = proto::agent::ScanStore { store: Some(store), known: Vec::new() };
        plan.push(Planned::new(journal.host, uuid, Action::ScanStore(look)).may_fail());
        Ok(plan)
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let journal = end.journal;
        let reference: Ref<Sr> = journal.object("made");
        let mut fields = journal.fields(Sr::ID);
        fields.push((sr::UUID.index(), Value::str(journal.parameter("uuid"))));
        let as_made = Row::of_defaults(Sr::ID, reference.opaque()).with_values(&fields);
        end.change.insert_values(Sr::ID, reference.opaque(), fields);
        let hosts = noted_hosts(journal);
        let config: BTreeMap<String, String> =
            serde_json::from_str(journal.parameter("device_config")).unwrap_or_default();
        for (place, host_ref) in hosts.iter().enumerate().filter(|(_, host)| end.state.row(**host).is_some()) {
            let attached = matches!(journal.outcomes.get(place + 1), Some(Performed::Store(_)));
            let mut row = NewRow::new(Ref::<Pbd>::new(end.shared.uuid()), end.shared.uuid())
                .with(pbd::HOST, *host_ref)
                .with(pbd::SR, reference)
                .with(pbd::DEVICE_CONFIG, config.clone())
                .with(pbd::CURRENTLY_ATTACHED, attached);
            if !attached {
                row = row.with(pbd::OTHER_CONFIG, super::plug_at_boot());
            }
            end.change.insert(row);
        }
        match journal.outcomes.get(hosts.len() + 1) {
            Some(Performed::Store(found)) => scan::show(end, &as_made, found),
            _ => scan::show_figures(end.change, &as_made, journal.store(1)?),
        }
        Ok(Value::Ref(reference.opaque()))
    }
}

/// Its end, and that of all that is in it.
struct Destroy;

pub(crate) async fn destroy(call: &Call, this: Ref<Sr>) -> Served<()> {
    run(call, &Destroy, move |draft| {
        disk::hold_store(draft, this, SrOp::Destroy)?;
        let row = draft.row(this)?;
        let hosts = row.get(sr::PBDS).into_iter().filter_map(|reference: Ref<Pbd>| draft.state.row(reference));
        let hosts: Vec<Ref<Host>> = hosts.map(|row| row.get(pbd::HOST)).collect();
        let live = |host: &&Ref<Host>| draft.state.row(**host).is_some_and(|row| is_live(draft.state, row));
        let Some(host_ref) = hosts.iter().find(live).copied() else {
            return refuse(errors::host_offline(hosts.first().copied().unwrap_or(Ref::NULL)));
        };
        draft.on(host_ref).note("sr", this);
        Ok(())
    })
    .await
    .map(drop)
}

impl Kind for Destroy {
    fn verb(&self) -> &'static str {
        "sr_destroy"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let store = reach::store(seen.state, seen.journal.object("sr"), seen.journal.host)?;
        let subject = store.sr.clone();
        let action = Action::DestroyStore(DestroyStore { store: Some(store) });
        Ok(vec![Planned::new(seen.journal.host, subject, action)])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        remove(end.state, end.change, end.journal.object("sr"));
        Ok(Value::Void)
    }
}

/// Adds the end of an SR's rows: its connections, its disks, and what points at it.
pub(crate) fn remove(state: &State, change: &mut Transaction, this: Ref<Sr>) {
    let Some(row) = state.row(this) else { return };
    for reference in row.get(sr::PBDS) {
        change.delete::<Pbd>(reference);
    }
    for disk in row.get(sr::VDIS).into_iter().filter_map(|reference| state.row::<datamodel::Vdi>(reference)) {
        super::volumes::remove(state, change, disk);
    }
    for pool_row in state.all::<Pool>() {
        for field in [pool::DEFAULT_SR, pool::SUSPEND_IMAGE_SR, pool::CRASH_DUMP_SR] {
            if pool_row.get(field) == this {
                change.set(pool_row.typed::<Pool>(), field, Ref::NULL);
            }
        }
    }
    for vm_row in state.all::<Vm>().filter(|row| row.get(vm::SUSPEND_SR) == this) {
        change.set(vm_row.typed::<Vm>(), vm::SUSPEND_SR, Ref::NULL);
    }
    change.delete(this);
}

/// `SR.forget`: the pool knows it no longer; what is in it stays.
pub(crate) async fn forget(call: &Call, this: Ref<Sr>) -> Served<()> {
    let row = call.row(this)?;
    rules::check_sr(&call.state, &row, SrOp::Forget)?;
    let mut change = call.transaction();
    change.expect_row(&row);
    remove(&call.state, &mut change, this);
    crate::operations::refresh(&call.state, &mut change);
    call.commit(change).await.map(drop)
}

/// Looks into a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Scan,
    Update,
}

async fn look(call: &Call, this: Ref<Sr>, what: &'static Look) -> Served<()> {
    run(call, what, move |draft| {
        let operation = if *what == Look::Scan { SrOp::Scan } else { SrOp::Update };
        disk::hold_store(draft, this, operation)?;
        let host_ref = reach::worker(draft.state, &[this], None)?;
        draft.on(host_ref).note("sr", this);
        scan::note_owed(draft);
        Ok(())
    })
    .await
    .map(drop)
}

pub(crate) async fn scan(call: &Call, this: Ref<Sr>) -> Served<()> {
    look(call, this, &Look::Scan).await
}

pub(crate) async fn update(call: &Call, this: Ref<Sr>) -> Served<()> {
    look(call, this, &Look::Update).await
}

impl Kind for Look {
    fn verb(&self) -> &'static str {
        match self {
            Self::Scan => "sr_scan",
            Self::Update => "sr_update",
        }
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        Ok(vec![scan::step(seen.state, seen.journal.object("sr"), seen.journal.host)?])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let row = find(end.state, end.journal.object::<Sr>("sr"))?;
        let found = end.journal.store(0)?;
        match self {
            Self::Scan => scan::show(end, &row, found),
            Self::Update => scan::show_figures(end.change, &row, found),
        }
        Ok(Value::Void)
    }
}

/// What could be plugged, told as text or as records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probe {
    Text,
    Records,
}

async fn probe_with(
    call: &Call,
    host_ref: Ref<Host>,
    (ty, config): (String, BTreeMap<String, String>),
    how: &'static Probe,
) -> Served<Value> {
    run(call, how, move |draft| {
        draft.row(host_ref)?;
        check_type(draft.state, &ty)?;
        connection::check_config(&config)?;
        let config = serde_json::to_string(&config).unwrap_or_default();
        draft.on(host_ref).note("type", &ty).note("device_config", config);
        Ok(())
    })
    .await
}

pub(crate) async fn probe(
    call: &Call,
    host_ref: Ref<Host>,
    ty: String,
    config: BTreeMap<String, String>,
) -> Served<String> {
    let answer = probe_with(call, host_ref, (ty, config), &Probe::Text).await?;
    Ok(answer.as_str().unwrap_or_default().to_owned())
}

pub(crate) async fn probe_ext(
    call: &Call,
    host_ref: Ref<Host>,
    ty: String,
    config: BTreeMap<String, String>,
) -> Served<Value> {
    probe_with(call, host_ref, (ty, config), &Probe::Records).await
}

impl Kind for Probe {
    fn verb(&self) -> &'static str {
        match self {
            Self::Text => "sr_probe",
            Self::Records => "sr_probe_ext",
        }
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let journal = seen.journal;
        let config: BTreeMap<String, String> =
            serde_json::from_str(journal.parameter("device_config")).unwrap_or_default();
        let store = Some(reach::store_with("", journal.parameter("type"), config));
        // A probe is about no SR yet: its subject is the operation itself.
        Ok(vec![Planned::new(journal.host, journal.uuid.clone(), Action::ProbeStore(ProbeStore { store }))])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let found = end.journal.store(0)?;
        Ok(match self {
            Self::Text => Value::str(as_text(found)),
            Self::Records => as_records(end.state, found),
        })
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The list that clients have always got: an SR each, with its uuid.
fn as_text(found: &StoreState) -> String {
    let mut out = String::from("<?xml version=\"1.0\" ?>\n<SRlist>\n");
    for probed in found.probed.iter().filter(|probed| !probed.sr.is_empty()) {
        out.push_str("\t<SR>\n\t\t<UUID>");
        out.push_str(&escaped(&probed.sr));
        out.push_str("</UUID>\n");
        for (key, value) in &probed.device_config {
            out.push_str(&format!("\t\t<{0}>{1}</{0}>\n", escaped(key), escaped(value)));
        }
        out.push_str("\t</SR>\n");
    }
    out.push_str("</SRlist>\n");
    out
}

fn text_map<'a>(pairs: impl IntoIterator<Item = (&'a String, &'a String)>) -> Value {
    Value::map(pairs.into_iter().map(|(key, value)| (datamodel::Key::from(key.as_str()), Value::str(value.as_str()))))
}

fn as_records(state: &State, found: &StoreState) -> Value {
    let record = |fields: Vec<(&'static str, Value)>| {
        Value::Record(fields.into_iter().map(|(name, value)| (name.into(), value)).collect())
    };
    Value::set(found.probed.iter().map(|probed| {
        let known: Option<&Arc<Row>> = state.by_uuid(Sr::ID, &probed.sr);
        let stat = if probed.sr.is_empty() {
            Value::Absent
        } else {
            let name = known.map_or("", |row| row.name_label());
            record(vec![
                ("uuid", Value::str(probed.sr.as_str())),
                ("name_label", Value::str(name)),
                ("name_description", Value::str("")),
                ("free_space", Value::Int(0)),
                ("total_space", Value::Int(0)),
                ("clustered", Value::Bool(false)),
                ("health", Value::Enum("healthy")),
            ])
        };
        record(vec![
            ("configuration", text_map(&probed.device_config)),
            ("complete", Value::Bool(probed.complete)),
            ("sr", stat),
            ("extra_info", text_map(&probed.extra)),
        ])
    }))
}
