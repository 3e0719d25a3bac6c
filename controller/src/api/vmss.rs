//! Messages of the class VMSS: scheduled snapshots.

use std::collections::BTreeMap;

use datamodel::enums::{VmssFrequency as Frequency, VmssType};
use datamodel::fields::vmss;
use datamodel::{ApiError, ClassKind, FieldValue, Key, Ref, Timestamp, Value, Vm, Vmss, errors};
use raft_store::{Row, State, Transaction};

use crate::call::{Call, find, persist};
use crate::failure::{Served, refuse};
use crate::implicit;
use crate::schedules::{self, check_entry, check_schedule, with_defaults};

/// So many snapshots of each VM can be kept.
const RETAINED: std::ops::RangeInclusive<i64> = 1..=10;

fn check_type(kind: VmssType) -> Result<(), ApiError> {
    if kind == VmssType::SnapshotWithQuiesce {
        let why = "the guest has no part in a snapshot";
        return Err(errors::value_not_supported("type", kind.as_str(), why));
    }
    Ok(())
}

fn check_retained(value: i64) -> Result<(), ApiError> {
    if RETAINED.contains(&value) {
        return Ok(());
    }
    Err(errors::invalid_value("retained_snapshots", value.to_string()))
}

async fn alter(
    cx: &Call,
    this: Ref<Vmss>,
    decide: impl Fn(&State, &Row, &mut Transaction) -> Served<()> + Send + Sync,
) -> Served<()> {
    persist(cx, |state, change| {
        let row = find(state, this)?;
        change.expect_row(&row);
        decide(state, &row, change)
    })
    .await
}

pub(super) async fn create(cx: &Call, record: Value) -> Served<Ref<Vmss>> {
    let Value::Record(members) = &record else { return refuse(errors::field_type_error("args")) };
    let given = |name: &str| members.iter().find(|(member, _)| member == name).map(|(_, value)| value);
    let word = |name: &str| given(name).and_then(Value::as_str).unwrap_or_default();
    if let Ok(kind) = word("type").parse() {
        check_type(kind)?;
    }
    if let Some(Value::Int(retained)) = given("retained_snapshots") {
        check_retained(*retained)?;
    }
    let mut more = Vec::new();
    if let Ok(frequency) = word("frequency").parse::<Frequency>() {
        let said: BTreeMap<String, String> = given("schedule").and_then(FieldValue::from_value).unwrap_or_default();
        let schedule = with_defaults(frequency, said);
        check_schedule(frequency, &schedule)?;
        more.push((vmss::SCHEDULE.index(), schedule.into_value()));
    }
    implicit::create(cx, Vmss::ID, record, more).await.map(Ref::from_opaque)
}

pub(super) async fn destroy(cx: &Call, this: Ref<Vmss>) -> Served<()> {
    alter(cx, this, |_, row, change| {
        let members: Vec<Ref<Vm>> = row.get(vmss::VMS);
        if !members.is_empty() {
            return refuse(errors::vmss_has_vm());
        }
        change.delete(this);
        Ok(())
    })
    .await
}

/// Takes the snapshots now, whenever they are due.
pub(super) async fn snapshot_now(cx: &Call, this: Ref<Vmss>) -> Served<String> {
    schedules::run(cx, this, None).await.map(|()| "True".to_owned())
}

pub(super) async fn set_type(cx: &Call, this: Ref<Vmss>, value: VmssType) -> Served<()> {
    alter(cx, this, |_, _, change| {
        check_type(value)?;
        change.set(this, vmss::TYPE, value);
        Ok(())
    })
    .await
}

/// What the new frequency needs to know besides is as usual.
pub(super) async fn set_frequency(cx: &Call, this: Ref<Vmss>, value: Frequency) -> Served<()> {
    alter(cx, this, |_, row, change| {
        let schedule = with_defaults(value, row.get(vmss::SCHEDULE));
        change.set(this, vmss::FREQUENCY, value).set(this, vmss::SCHEDULE, schedule);
        Ok(())
    })
    .await
}

pub(super) async fn set_schedule(cx: &Call, this: Ref<Vmss>, value: BTreeMap<String, String>) -> Served<()> {
    alter(cx, this, |_, row, change| {
        check_schedule(row.get(vmss::FREQUENCY), &value)?;
        change.set(this, vmss::SCHEDULE, value.clone());
        Ok(())
    })
    .await
}

pub(super) async fn add_to_schedule(cx: &Call, this: Ref<Vmss>, key: String, value: String) -> Served<()> {
    alter(cx, this, |_, row, change| {
        check_entry(&key, &value)?;
        if row.get(vmss::SCHEDULE).contains_key(&key) {
            return refuse(errors::map_duplicate_key("VMSS", "schedule", this, key.as_str()));
        }
        change.put(this, vmss::SCHEDULE, key.clone(), value.clone());
        Ok(())
    })
    .await
}

/// Removed to be said anew, so it may be missing for a while: nothing is due then.
pub(super) async fn remove_from_schedule(cx: &Call, this: Ref<Vmss>, key: String) -> Served<()> {
    alter(cx, this, |_, _, change| {
        change.remove_from_map(Vmss::ID, this.opaque(), vmss::SCHEDULE.index(), Key::from(key.as_str()));
        Ok(())
    })
    .await
}

pub(super) async fn set_retained_snapshots(cx: &Call, this: Ref<Vmss>, value: i64) -> Served<()> {
    alter(cx, this, |_, _, change| {
        check_retained(value)?;
        change.set(this, vmss::RETAINED_SNAPSHOTS, value);
        Ok(())
    })
    .await
}

pub(super) async fn set_last_run_time(cx: &Call, this: Ref<Vmss>, value: Timestamp) -> Served<()> {
    alter(cx, this, |_, _, change| {
        change.set(this, vmss::LAST_RUN_TIME, value);
        Ok(())
    })
    .await
}
