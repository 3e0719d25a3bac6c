//! Messages of the class PBD.

use std::collections::BTreeMap;

use datamodel::{ClassKind, Pbd, Ref, Value};

use crate::call::Call;
use crate::failure::Served;
use crate::implicit;
use crate::storage::pbd;

pub(super) async fn create(cx: &Call, record: Value) -> Served<Ref<Pbd>> {
    let fields = implicit::chosen(cx, Pbd::ID, record)?;
    pbd::create(cx, fields).await
}

pub(super) async fn destroy(cx: &Call, this: Ref<Pbd>) -> Served<()> {
    pbd::destroy(cx, this).await
}

pub(super) async fn plug(cx: &Call, this: Ref<Pbd>) -> Served<()> {
    pbd::plug(cx, this).await
}

pub(super) async fn unplug(cx: &Call, this: Ref<Pbd>) -> Served<()> {
    pbd::unplug(cx, this).await
}

pub(super) async fn set_device_config(cx: &Call, this: Ref<Pbd>, value: BTreeMap<String, String>) -> Served<()> {
    pbd::set_device_config(cx, this, value).await
}
