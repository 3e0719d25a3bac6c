//! Messages of the class VDI.

use std::collections::BTreeMap;

use datamodel::enums::{OnBoot, VdiOperations as VdiOp, VdiType};
use datamodel::fields::{sr, vbd, vdi};
use datamodel::{ClassKind, FieldValue, OpaqueRef, Pool, Ref, Session, Sr, Timestamp, Value, Vbd, Vdi, errors};
use raft_store::{Row, Transaction};

use crate::call::Call;
use crate::failure::{Served, refuse};
use crate::implicit;
use crate::operations::refresh;
use crate::storage::{rules, vdi as disk, volumes};

type Strings = BTreeMap<String, String>;

pub(super) async fn create(cx: &Call, record: Value) -> Served<Ref<Vdi>> {
    let fields = implicit::chosen(cx, Vdi::ID, record)?;
    let made = Row::of_defaults(Vdi::ID, OpaqueRef::NULL).with_values(&fields);
    if made.get(vdi::TYPE) == VdiType::CbtMetadata {
        return refuse(errors::vdi_incompatible_type("", VdiType::CbtMetadata.as_str()));
    }
    if made.get(vdi::VIRTUAL_SIZE) <= 0 {
        return refuse(errors::invalid_value("virtual_size", made.get(vdi::VIRTUAL_SIZE).to_string()));
    }
    disk::create(cx, fields).await
}

pub(super) async fn destroy(cx: &Call, this: Ref<Vdi>) -> Served<()> {
    disk::destroy(cx, this).await
}

pub(super) async fn snapshot(cx: &Call, this: Ref<Vdi>, _driver: Strings) -> Served<Ref<Vdi>> {
    disk::snapshot(cx, this).await
}

pub(super) async fn clone(cx: &Call, this: Ref<Vdi>, _driver: Strings) -> Served<Ref<Vdi>> {
    disk::clone(cx, this).await
}

pub(super) async fn copy(cx: &Call, this: Ref<Vdi>, into: Ref<Sr>, base: Ref<Vdi>, onto: Ref<Vdi>) -> Served<Ref<Vdi>> {
    let row = cx.row(this)?;
    if cx.state.row(onto).is_some() {
        return disk::copy_into(cx, this, onto, base).await;
    }
    let into = if into.is_null() { row.get(vdi::SR) } else { into };
    if cx.row(into)?.get(sr::CONTENT_TYPE) == "iso" {
        return refuse(errors::operation_not_allowed("a disk cannot be copied into a library of CDs"));
    }
    disk::copy(cx, this, into).await
}

pub(super) async fn resize(cx: &Call, this: Ref<Vdi>, size: i64) -> Served<()> {
    disk::resize(cx, this, size, VdiOp::Resize).await
}

pub(super) async fn resize_online(cx: &Call, this: Ref<Vdi>, size: i64) -> Served<()> {
    disk::resize(cx, this, size, VdiOp::ResizeOnline).await
}

pub(super) async fn update(cx: &Call, this: Ref<Vdi>) -> Served<()> {
    disk::update(cx, this).await
}

#[allow(clippy::too_many_arguments)]
pub(super) async fn introduce(
    cx: &Call,
    uuid: String,
    name: String,
    description: String,
    store: Ref<Sr>,
    ty: VdiType,
    sharable: bool,
    read_only: bool,
    other_config: Strings,
    location: String,
    xenstore_data: Strings,
    sm_config: Strings,
    managed: bool,
    _virtual_size: i64,
    _physical_utilisation: i64,
    metadata_of_pool: Ref<Pool>,
    is_a_snapshot: bool,
    snapshot_time: Timestamp,
    snapshot_of: Ref<Vdi>,
) -> Served<Ref<Vdi>> {
    cx.row(store)?;
    let Ok(parsed) = uuid.parse::<uuid::Uuid>() else { return refuse(errors::uuid_invalid("VDI", uuid)) };
    let fields = vec![
        (vdi::NAME_LABEL.index(), name.into_value()),
        (vdi::NAME_DESCRIPTION.index(), description.into_value()),
        (vdi::SR.index(), store.into_value()),
        (vdi::TYPE.index(), ty.into_value()),
        (vdi::SHARABLE.index(), sharable.into_value()),
        (vdi::READ_ONLY.index(), read_only.into_value()),
        (vdi::OTHER_CONFIG.index(), other_config.into_value()),
        (vdi::LOCATION.index(), location.into_value()),
        (vdi::XENSTORE_DATA.index(), xenstore_data.into_value()),
        (vdi::SM_CONFIG.index(), sm_config.into_value()),
        (vdi::MANAGED.index(), managed.into_value()),
        (vdi::METADATA_OF_POOL.index(), metadata_of_pool.into_value()),
        (vdi::IS_A_SNAPSHOT.index(), is_a_snapshot.into_value()),
        (vdi::SNAPSHOT_TIME.index(), snapshot_time.into_value()),
        (vdi::SNAPSHOT_OF.index(), snapshot_of.into_value()),
    ];
    disk::introduce(cx, parsed.hyphenated().to_string(), fields).await
}

/// The row goes; the image stays, and comes back with the next scan.
pub(super) async fn forget(cx: &Call, this: Ref<Vdi>) -> Served<()> {
    let row = cx.row(this)?;
    rules::check_vdi(&cx.state, &row, VdiOp::Forget)?;
    let mut change = cx.transaction();
    change.expect_row(&row);
    volumes::remove(&cx.state, &mut change, &row);
    refresh(&cx.state, &mut change);
    cx.commit(change).await.map(drop)
}

/// A disk that nobody uses is moved. One in use would have to be mirrored, which no driver here does.
pub(super) async fn pool_migrate(cx: &Call, this: Ref<Vdi>, into: Ref<Sr>, _options: Strings) -> Served<Ref<Vdi>> {
    let row = cx.row(this)?;
    cx.row(into)?;
    let attached = |drive: &Ref<Vbd>| cx.state.row(*drive).is_some_and(|row| row.get(vbd::CURRENTLY_ATTACHED));
    if row.get(vdi::VBDS).iter().any(attached) {
        return refuse(errors::sr_does_not_support_migration(row.get(vdi::SR), "VDI_MIRROR"));
    }
    disk::relocate(cx, this, into).await
}

async fn set(cx: &Call, row: &Row, write: impl FnOnce(&mut Transaction)) -> Served<()> {
    let mut change = cx.transaction();
    change.expect_row(row);
    write(&mut change);
    refresh(&cx.state, &mut change);
    cx.commit(change).await.map(drop)
}

pub(super) async fn set_name_label(cx: &Call, this: Ref<Vdi>, value: String) -> Served<()> {
    let row = cx.row(this)?;
    set(cx, &row, |change| {
        change.set(this, vdi::NAME_LABEL, value);
    })
    .await
}

pub(super) async fn set_name_description(cx: &Call, this: Ref<Vdi>, value: String) -> Served<()> {
    let row = cx.row(this)?;
    set(cx, &row, |change| {
        change.set(this, vdi::NAME_DESCRIPTION, value);
    })
    .await
}

/// Whoever uses a disk was told how: that does not change under it.
fn check_unused(cx: &Call, row: &Row, word: &str) -> Served<()> {
    let this = row.typed::<Vdi>();
    if !row.get(vdi::MANAGED) {
        return refuse(errors::vdi_not_managed(this));
    }
    let used = |drive: &Ref<Vbd>| {
        cx.state
            .row(*drive)
            .is_some_and(|row| row.get(vbd::CURRENTLY_ATTACHED) || !row.get(vbd::CURRENT_OPERATIONS).is_empty())
    };
    if row.get(vdi::VBDS).iter().any(used) { refuse(errors::vdi_in_use(this, word)) } else { Ok(()) }
}

pub(super) async fn set_read_only(cx: &Call, this: Ref<Vdi>, value: bool) -> Served<()> {
    let row = cx.row(this)?;
    check_unused(cx, &row, "set_read_only")?;
    set(cx, &row, |change| {
        change.set(this, vdi::READ_ONLY, value);
    })
    .await
}

pub(super) async fn set_sharable(cx: &Call, this: Ref<Vdi>, value: bool) -> Served<()> {
    let row = cx.row(this)?;
    check_unused(cx, &row, "set_sharable")?;
    set(cx, &row, |change| {
        change.set(this, vdi::SHARABLE, value);
    })
    .await
}

pub(super) async fn set_allow_caching(cx: &Call, this: Ref<Vdi>, value: bool) -> Served<()> {
    let row = cx.row(this)?;
    set(cx, &row, |change| {
        change.set(this, vdi::ALLOW_CACHING, value);
    })
    .await
}

pub(super) async fn set_on_boot(cx: &Call, this: Ref<Vdi>, value: OnBoot) -> Served<()> {
    let row = cx.row(this)?;
    if row.get(vdi::ON_BOOT) == value {
        return Ok(());
    }
    rules::check_vdi(&cx.state, &row, VdiOp::SetOnBoot)?;
    set(cx, &row, |change| {
        change.set(this, vdi::ON_BOOT, value);
    })
    .await
}

/// No driver tracks changed blocks: the rules say so for each of these.
async fn tracked(cx: &Call, this: Ref<Vdi>, operation: VdiOp) -> Served<()> {
    let row = cx.row(this)?;
    rules::check_vdi(&cx.state, &row, operation)?;
    refuse(errors::sr_operation_not_supported(row.get(vdi::SR)))
}

pub(super) async fn enable_cbt(cx: &Call, this: Ref<Vdi>) -> Served<()> {
    tracked(cx, this, VdiOp::EnableCbt).await
}

pub(super) async fn disable_cbt(cx: &Call, this: Ref<Vdi>) -> Served<()> {
    if !cx.row(this)?.get(vdi::CBT_ENABLED) {
        return Ok(());
    }
    tracked(cx, this, VdiOp::DisableCbt).await
}

pub(super) async fn data_destroy(cx: &Call, this: Ref<Vdi>) -> Served<()> {
    tracked(cx, this, VdiOp::DataDestroy).await
}

pub(super) async fn list_changed_blocks(cx: &Call, from: Ref<Vdi>, to: Ref<Vdi>) -> Served<String> {
    cx.row(to)?;
    tracked(cx, from, VdiOp::ListChangedBlocks).await?;
    Ok(String::new())
}

/// No network of the pool is for NBD: a disk is offered nowhere.
pub(super) async fn get_nbd_info(cx: &Call, this: Ref<Vdi>) -> Served<Value> {
    let row = cx.row(this)?;
    let ty = row.get(vdi::TYPE);
    if ty == VdiType::CbtMetadata {
        return refuse(errors::vdi_incompatible_type(this, ty.as_str()));
    }
    Ok(Value::set([]))
}

/// The pool's database is on no disk.
fn no_database<T>(cx: &Call, this: Ref<Vdi>) -> Served<T> {
    let row = cx.row(this)?;
    let ty = row.get(vdi::TYPE);
    if ty == VdiType::Metadata {
        return refuse(errors::sr_operation_not_supported(row.get(vdi::SR)));
    }
    refuse(errors::vdi_incompatible_type(this, ty.as_str()))
}

pub(super) async fn open_database(cx: &Call, this: Ref<Vdi>) -> Served<Ref<Session>> {
    no_database(cx, this)
}

pub(super) async fn read_database_pool_uuid(cx: &Call, this: Ref<Vdi>) -> Served<String> {
    no_database(cx, this)
}
