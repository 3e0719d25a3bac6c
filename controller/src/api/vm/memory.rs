//! How much memory a VM has, and may have.

use std::time::Duration;

use datamodel::enums::{VmOperations as Op, VmPowerState};
use datamodel::fields::{vm, vm_metrics};
use datamodel::{ApiError, Ref, Value, Vm, errors};
use raft_store::{Row, Transaction};

use super::alter;
use crate::call::{Call, find};
use crate::failure::{Served, refuse};
use crate::operations::Limits;
use crate::{lifecycle, operations, placement};

/// A guest that was asked for memory has this long to give it.
const TARGET_LIMIT: Duration = Duration::from_secs(256);
/// Memory that differs by less is what was asked for: balloons move in steps.
const NEARLY: i64 = 4 << 20;

/// Halves of `memory_limits`, by the names of the API.
impl Limits {
    /// In the documented order, and for VMs that have one size only, of one size.
    fn check(&self, row: &Row) -> Result<(), ApiError> {
        let order = [self.static_min, self.dynamic_min, self.dynamic_max, self.static_max];
        if order[0] < 0 || order.windows(2).any(|pair| pair[0] > pair[1]) {
            return Err(errors::memory_constraint_violation_order());
        }
        let pinned = self.dynamic_min == self.dynamic_max && self.dynamic_max == self.static_max;
        let nested = row.get(vm::PLATFORM).get("nested-virt").is_some_and(|value| value == "true" || value == "1");
        if nested && !pinned {
            return Err(errors::memory_constraint_violation_maxpin("nested virtualisation"));
        }
        Ok(())
    }

    fn write(&self, change: &mut Transaction, row: &Row) {
        let this = row.typed::<Vm>();
        let overhead =
            placement::overhead(&row.with_values(&[(vm::MEMORY_STATIC_MAX.index(), Value::Int(self.static_max))]));
        change
            .set(this, vm::MEMORY_STATIC_MIN, self.static_min)
            .set(this, vm::MEMORY_STATIC_MAX, self.static_max)
            .set(this, vm::MEMORY_DYNAMIC_MIN, self.dynamic_min)
            .set(this, vm::MEMORY_DYNAMIC_MAX, self.dynamic_max)
            .set(this, vm::MEMORY_TARGET, self.dynamic_min)
            .set(this, vm::MEMORY_OVERHEAD, overhead);
    }
}

/// A control domain has what its host keeps for itself.
fn expect_guest(row: &Row) -> Result<(), ApiError> {
    if row.get(vm::IS_CONTROL_DOMAIN) {
        return Err(errors::operation_not_allowed("a host's own memory is not set through its control domain"));
    }
    Ok(())
}

async fn set_limits(
    cx: &Call,
    this: Ref<Vm>,
    operation: Op,
    wanted: impl Fn(&Row) -> Limits + Send + Sync + 'static,
) -> Served<()> {
    let live = cx.row(this)?.get(vm::POWER_STATE) == VmPowerState::Running;
    if live && operation == Op::ChangingDynamicRange {
        return operations::set_memory(cx, this, operation, move |row| {
            expect_guest(row)?;
            let limits = wanted(row);
            limits.check(row).map(|()| limits)
        })
        .await;
    }
    alter(cx, this, move |state, row, change| {
        lifecycle::check(state, row, operation)?;
        expect_guest(row)?;
        let limits = wanted(row);
        limits.check(row)?;
        limits.write(change, row);
        Ok(())
    })
    .await
}

/// Static minimum, static maximum, dynamic minimum, dynamic maximum, in bytes.
pub(in crate::api) async fn set_memory_limits(
    cx: &Call,
    this: Ref<Vm>,
    static_min: i64,
    static_max: i64,
    dynamic_min: i64,
    dynamic_max: i64,
) -> Served<()> {
    let limits = Limits { static_min, static_max, dynamic_min, dynamic_max };
    set_limits(cx, this, Op::ChangingMemoryLimits, move |_| limits).await
}

pub(in crate::api) async fn set_memory(cx: &Call, this: Ref<Vm>, value: i64) -> Served<()> {
    set_limits(cx, this, Op::ChangingMemoryLimits, move |row| Limits {
        static_min: row.get(vm::MEMORY_STATIC_MIN).min(value),
        static_max: value,
        dynamic_min: value,
        dynamic_max: value,
    })
    .await
}

pub(in crate::api) async fn set_memory_static_range(cx: &Call, this: Ref<Vm>, min: i64, max: i64) -> Served<()> {
    let wanted = move |row: &Row| Limits { static_min: min, static_max: max, ..Limits::of(row) };
    set_limits(cx, this, Op::ChangingStaticRange, wanted).await
}

pub(in crate::api) async fn set_memory_static_min(cx: &Call, this: Ref<Vm>, value: i64) -> Served<()> {
    let wanted = move |row: &Row| Limits { static_min: value, ..Limits::of(row) };
    set_limits(cx, this, Op::ChangingStaticRange, wanted).await
}

pub(in crate::api) async fn set_memory_static_max(cx: &Call, this: Ref<Vm>, value: i64) -> Served<()> {
    let wanted = move |row: &Row| Limits { static_max: value, ..Limits::of(row) };
    set_limits(cx, this, Op::ChangingStaticRange, wanted).await
}

pub(in crate::api) async fn set_memory_dynamic_range(cx: &Call, this: Ref<Vm>, min: i64, max: i64) -> Served<()> {
    let wanted = move |row: &Row| Limits { dynamic_min: min, dynamic_max: max, ..Limits::of(row) };
    set_limits(cx, this, Op::ChangingDynamicRange, wanted).await
}

pub(in crate::api) async fn set_memory_dynamic_min(cx: &Call, this: Ref<Vm>, value: i64) -> Served<()> {
    let wanted = move |row: &Row| Limits { dynamic_min: value, ..Limits::of(row) };
    set_limits(cx, this, Op::ChangingDynamicRange, wanted).await
}

pub(in crate::api) async fn set_memory_dynamic_max(cx: &Call, this: Ref<Vm>, value: i64) -> Served<()> {
    let wanted = move |row: &Row| Limits { dynamic_max: value, ..Limits::of(row) };
    set_limits(cx, this, Op::ChangingDynamicRange, wanted).await
}

/// The target itself: what lies between the dynamic bounds is moved to one of them, so that nothing moves it away again.
pub(in crate::api) async fn set_memory_target_live(cx: &Call, this: Ref<Vm>, target: i64) -> Served<()> {
    operations::set_memory(cx, this, Op::ChangingMemoryLive, move |row| {
        expect_guest(row)?;
        let limits = Limits { dynamic_min: target, dynamic_max: target, ..Limits::of(row) };
        limits.check(row).map(|()| limits)
    })
    .await
}

/// Waits until the guest has given or taken what it was asked to.
pub(in crate::api) async fn wait_memory_target_live(cx: &Call, this: Ref<Vm>) -> Served<()> {
    let give_up = tokio::time::Instant::now() + TARGET_LIMIT;
    let mut applied = cx.shared.store.applied();
    loop {
        applied.borrow_and_update();
        let state = cx.latest().await?;
        let row = find(&state, this)?;
        lifecycle::check(&state, &row, Op::AwaitingMemoryLive)?;
        let actual = state.row(row.get(vm::METRICS)).map_or(0, |row| row.get(vm_metrics::MEMORY_ACTUAL));
        if (actual - row.get(vm::MEMORY_TARGET)).abs() <= NEARLY {
            return Ok(());
        }
        tokio::select! {
            changed = applied.changed() => if changed.is_err() { return Err(crate::failure::Failure::NotLeader) },
            () = tokio::time::sleep_until(give_up) => {
                return refuse(ApiError::new("VM_MEMORY_TARGET_WAIT_TIMEOUT", vec![cx.task.to_string()]));
            }
            () = cx.cancel.cancelled() => return refuse(errors::task_cancelled(cx.task)),
        }
    }
}

pub(in crate::api) async fn compute_memory_overhead(cx: &Call, this: Ref<Vm>) -> Served<i64> {
    Ok(placement::overhead(&*cx.row(this)?))
}

/// The largest `memory_static_max` that, with what it costs besides, fits into a total. Approximately: as it would be for
/// the most virtual processors that the VM could be given.
pub(in crate::api) async fn maximise_memory(cx: &Call, this: Ref<Vm>, total: i64, approximate: bool) -> Served<i64> {
    let row = cx.row(this)?;
    let vcpus = if approximate { row.get(vm::VCPUS_MAX).max(64) } else { row.get(vm::VCPUS_MAX) };
    let fits = |size: i64| {
        let of_that_size =
            [(vm::MEMORY_STATIC_MAX.index(), Value::Int(size)), (vm::VCPUS_MAX.index(), Value::Int(vcpus))];
        size.saturating_add(placement::overhead(&row.with_values(&of_that_size))) <= total
    };
    // What costs more the larger it is, is found by halves.
    let (mut least, mut most) = (0, total.max(0));
    while least < most {
        let middle = least + (most - least + 1) / 2;
        if fits(middle) { least = middle } else { most = middle - 1 }
    }
    Ok(least)
}

pub(in crate::api) async fn get_cooperative(cx: &Call, this: Ref<Vm>) -> Served<bool> {
    // Every guest of today's is: the question is kept for clients that still ask it.
    cx.row(this).map(|_| true)
}

fn check_multiplier(value: f64) -> Result<(), ApiError> {
    if value.is_finite() && value >= 1.0 {
        return Ok(());
    }
    Err(errors::invalid_value("HVM_shadow_multiplier", value.to_string()))
}

async fn set_multiplier(cx: &Call, this: Ref<Vm>, operation: Op, value: f64) -> Served<()> {
    alter(cx, this, move |state, row, change| {
        lifecycle::check(state, row, operation)?;
        check_multiplier(value)?;
        let after = row.with_values(&[(vm::HVM_SHADOW_MULTIPLIER.index(), Value::Float(value))]);
        change.set(this, vm::HVM_SHADOW_MULTIPLIER, value).set(this, vm::MEMORY_OVERHEAD, placement::overhead(&after));
        Ok(())
    })
    .await
}

pub(in crate::api) async fn set_hvm_shadow_multiplier(cx: &Call, this: Ref<Vm>, value: f64) -> Served<()> {
    set_multiplier(cx, this, Op::ChangingShadowMemory, value).await
}

/// The processors of today keep no shadow: what is set counts, and nothing has to be moved.
pub(in crate::api) async fn set_shadow_multiplier_live(cx: &Call, this: Ref<Vm>, multiplier: f64) -> Served<()> {
    set_multiplier(cx, this, Op::ChangingShadowMemoryLive, multiplier).await
}
