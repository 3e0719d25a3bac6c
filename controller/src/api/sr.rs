//! Messages of the class SR.

use std::collections::BTreeMap;

use datamodel::enums::StorageOperations as SrOp;
use datamodel::fields::{sm, sr};
use datamodel::{ApiError, Blob, ClassKind, FieldValue, Host, Pbd, Ref, Sm, Sr, Value, errors};
use raft_store::NewRow;

use crate::call::Call;
use crate::failure::{Served, refuse};
use crate::operations::refresh;
use crate::storage::sr::{self as store, Wanted};
use crate::storage::{reach, rules};

type Strings = BTreeMap<String, String>;

/// What a client says of a new SR.
struct Described {
    name: String,
    description: String,
    ty: String,
    content_type: String,
    shared: bool,
    sm_config: Strings,
}

impl Described {
    fn fields(self) -> Vec<(u16, Value)> {
        let ty = self.ty.to_ascii_lowercase();
        let content_type = match (self.content_type.as_str(), ty.as_str()) {
            ("", "iso") => "iso".to_owned(),
            ("", _) => "user".to_owned(),
            (given, _) => given.to_owned(),
        };
        vec![
            (sr::NAME_LABEL.index(), self.name.into_value()),
            (sr::NAME_DESCRIPTION.index(), self.description.into_value()),
            (sr::TYPE.index(), ty.into_value()),
            (sr::CONTENT_TYPE.index(), content_type.into_value()),
            (sr::SHARED.index(), Value::Bool(self.shared)),
            (sr::SM_CONFIG.index(), self.sm_config.into_value()),
        ]
    }
}

#[allow(clippy::too_many_arguments)]
pub(super) async fn create(
    cx: &Call,
    host: Ref<Host>,
    device_config: Strings,
    physical_size: i64,
    name: String,
    description: String,
    ty: String,
    content_type: String,
    shared: bool,
    sm_config: Strings,
) -> Served<Ref<Sr>> {
    cx.row(host)?;
    let fields = Described { name, description, ty, content_type, shared, sm_config }.fields();
    store::create(cx, Wanted { host, device_config, physical_size, fields }).await
}

/// A row for a store that is there already; it is reached once PBDs are made and plugged.
#[allow(clippy::too_many_arguments)]
pub(super) async fn introduce(
    cx: &Call,
    uuid: String,
    name: String,
    description: String,
    ty: String,
    content_type: String,
    shared: bool,
    sm_config: Strings,
) -> Served<Ref<Sr>> {
    let Ok(parsed) = uuid.parse::<uuid::Uuid>() else { return refuse(errors::uuid_invalid("SR", uuid)) };
    let uuid = parsed.hyphenated().to_string();
    if cx.state.by_uuid(Sr::ID, &uuid).is_some() {
        return refuse(errors::sr_uuid_exists(uuid));
    }
    let mut fields = Described { name, description, ty, content_type, shared, sm_config }.fields();
    let ty = fields.iter().find(|(index, _)| *index == sr::TYPE.index()).and_then(|(_, ty)| ty.as_str());
    store::check_type(&cx.state, ty.unwrap_or_default())?;
    fields.extend([
        (sr::UUID.index(), Value::str(uuid)),
        (sr::PHYSICAL_SIZE.index(), Value::Int(-1)),
        (sr::PHYSICAL_UTILISATION.index(), Value::Int(-1)),
    ]);
    let reference = cx.reference::<Sr>();
    let mut change = cx.transaction();
    // Two that introduce the same one at once: the class must be as it was looked at.
    change.expect_class_unchanged(Sr::ID, cx.state.applied);
    change.insert_values(Sr::ID, reference.opaque(), fields);
    refresh(&cx.state, &mut change);
    cx.commit(change).await?;
    Ok(reference)
}

pub(super) async fn make(_cx: &Call, _host: Ref<Host>, _device_config: Strings, _physical_size: i64) -> Served<String> {
    refuse(errors::message_deprecated())
}

pub(super) async fn destroy(cx: &Call, this: Ref<Sr>) -> Served<()> {
    store::destroy(cx, this).await
}

pub(super) async fn forget(cx: &Call, this: Ref<Sr>) -> Served<()> {
    store::forget(cx, this).await
}

pub(super) async fn scan(cx: &Call, this: Ref<Sr>) -> Served<()> {
    store::scan(cx, this).await
}

pub(super) async fn update(cx: &Call, this: Ref<Sr>) -> Served<()> {
    store::update(cx, this).await
}

pub(super) async fn probe(cx: &Call, host: Ref<Host>, config: Strings, ty: String, _sm: Strings) -> Served<String> {
    cx.row(host)?;
    store::probe(cx, host, ty.to_ascii_lowercase(), config).await
}

pub(super) async fn probe_ext(cx: &Call, host: Ref<Host>, config: Strings, ty: String, _sm: Strings) -> Served<Value> {
    cx.row(host)?;
    store::probe_ext(cx, host, ty.to_ascii_lowercase(), config).await
}

pub(super) async fn get_supported_types(cx: &Call) -> Served<Vec<String>> {
    Ok(cx.state.all::<Sm>().map(|row| row.get(sm::TYPE)).collect())
}

pub(super) async fn set_shared(cx: &Call, this: Ref<Sr>, value: bool) -> Served<()> {
    let row = cx.row(this)?;
    let pbds = row.get(sr::PBDS);
    if !value && pbds.len() > 1 {
        return refuse(ApiError::new(
            errors::SR_HAS_MULTIPLE_PBDS,
            pbds.iter().map(|pbd: &Ref<Pbd>| pbd.to_string()).collect(),
        ));
    }
    let mut change = cx.transaction();
    change.expect_row(&row).set(this, sr::SHARED, value);
    cx.commit(change).await.map(drop)
}

pub(super) async fn set_physical_size(cx: &Call, this: Ref<Sr>, value: i64) -> Served<()> {
    let row = cx.row(this)?;
    let mut change = cx.transaction();
    change.expect_row(&row).set(this, sr::PHYSICAL_SIZE, value);
    cx.commit(change).await.map(drop)
}

pub(super) async fn set_name_label(cx: &Call, this: Ref<Sr>, value: String) -> Served<()> {
    cx.row(this)?;
    let mut change = cx.transaction();
    change.set(this, sr::NAME_LABEL, value);
    cx.commit(change).await.map(drop)
}

pub(super) async fn set_name_description(cx: &Call, this: Ref<Sr>, value: String) -> Served<()> {
    cx.row(this)?;
    let mut change = cx.transaction();
    change.set(this, sr::NAME_DESCRIPTION, value);
    cx.commit(change).await.map(drop)
}

/// A store on which every host could meet: shared, and plugged everywhere.
pub(super) async fn assert_can_host_ha_statefile(cx: &Call, this: Ref<Sr>) -> Served<()> {
    let row = cx.row(this)?;
    if !row.get(sr::SHARED) {
        return refuse(errors::ha_constraint_violation_sr_not_shared(this));
    }
    let apart = |host: &Ref<Host>| !reach::reaches(&cx.state, *host, this);
    if cx.state.all::<Host>().map(|row| row.typed::<Host>()).any(|host| apart(&host)) {
        return refuse(errors::sr_not_attached(this));
    }
    Ok(rules::check_sr(&cx.state, &row, SrOp::VdiCreate)?)
}

/// The pool's database is on every host: it is replicated to no disk.
pub(super) async fn assert_supports_database_replication(cx: &Call, this: Ref<Sr>) -> Served<()> {
    cx.row(this)?;
    refuse(errors::sr_operation_not_supported(this))
}

pub(super) async fn enable_database_replication(cx: &Call, this: Ref<Sr>) -> Served<()> {
    assert_supports_database_replication(cx, this).await
}

/// Nothing is replicated to it.
pub(super) async fn disable_database_replication(cx: &Call, this: Ref<Sr>) -> Served<()> {
    cx.row(this).map(drop)
}

/// None yet: figures come with the statistics.
pub(super) async fn get_data_sources(cx: &Call, this: Ref<Sr>) -> Served<Value> {
    cx.row(this)?;
    Ok(Value::set([]))
}

fn no_such_source<T>(source: String) -> Served<T> {
    refuse(errors::invalid_value("data_source", source))
}

pub(super) async fn query_data_source(cx: &Call, this: Ref<Sr>, source: String) -> Served<f64> {
    cx.row(this)?;
    no_such_source(source)
}

pub(super) async fn record_data_source(cx: &Call, this: Ref<Sr>, source: String) -> Served<()> {
    cx.row(this)?;
    no_such_source(source)
}

pub(super) async fn forget_data_source_archives(cx: &Call, this: Ref<Sr>, source: String) -> Served<()> {
    cx.row(this)?;
    no_such_source(source)
}

pub(super) async fn create_new_blob(
    cx: &Call,
    this: Ref<Sr>,
    name: String,
    mime_type: String,
    public: bool,
) -> Served<Ref<Blob>> {
    use datamodel::fields::blob;
    cx.row(this)?;
    let reference = cx.reference::<Blob>();
    let mime_type = if mime_type.is_empty() { "application/octet-stream".to_owned() } else { mime_type };
    let mut change = cx.transaction();
    change.insert(
        NewRow::new(reference, cx.uuid())
            .with(blob::NAME_LABEL, name.clone())
            .with(blob::MIME_TYPE, mime_type)
            .with(blob::PUBLIC, public)
            .with(blob::LAST_UPDATED, cx.now()),
    );
    change.put(this, sr::BLOBS, name, reference);
    cx.commit(change).await?;
    Ok(reference)
}
