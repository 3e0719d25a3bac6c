//! A VM's virtual processors.

use datamodel::enums::VmOperations as Op;
use datamodel::fields::vm;
use datamodel::{ApiError, Ref, Value, Vm, errors};
use raft_store::Row;

use super::alter;
use crate::call::Call;
use crate::failure::{Served, refuse};
use crate::{lifecycle, operations, placement};

fn check_numbers(row: &Row, at_startup: i64, most: i64) -> Result<(), ApiError> {
    if at_startup < 1 || at_startup > most {
        let text = "VCPU values must satisfy: 0 < VCPUs_at_startup ≤ VCPUs_max";
        return Err(errors::invalid_value(text, format!("{at_startup} of {most}")));
    }
    let cores = row.get(vm::PLATFORM).get("cores-per-socket").and_then(|text| text.parse::<i64>().ok()).unwrap_or(1);
    if cores < 1 || most % cores != 0 {
        return Err(errors::vcpu_max_not_cores_per_socket_multiple(most.to_string(), cores.to_string()));
    }
    Ok(())
}

async fn set_numbers(cx: &Call, this: Ref<Vm>, at_startup: Option<i64>, most: Option<i64>) -> Served<()> {
    alter(cx, this, move |state, row, change| {
        lifecycle::check(state, row, Op::ChangingVCPUs)?;
        if row.get(vm::IS_CONTROL_DOMAIN) {
            return refuse(errors::operation_not_allowed("a host's own processors are not set"));
        }
        let at_startup = at_startup.unwrap_or_else(|| row.get(vm::VCPUS_AT_STARTUP));
        let most = most.unwrap_or_else(|| row.get(vm::VCPUS_MAX));
        check_numbers(row, at_startup, most)?;
        let after = row.with_values(&[(vm::VCPUS_MAX.index(), Value::Int(most))]);
        change.set(this, vm::VCPUS_AT_STARTUP, at_startup).set(this, vm::VCPUS_MAX, most).set(
            this,
            vm::MEMORY_OVERHEAD,
            placement::overhead(&after),
        );
        Ok(())
    })
    .await
}

pub(in crate::api) async fn set_vcpus_max(cx: &Call, this: Ref<Vm>, value: i64) -> Served<()> {
    set_numbers(cx, this, None, Some(value)).await
}

pub(in crate::api) async fn set_vcpus_at_startup(cx: &Call, this: Ref<Vm>, value: i64) -> Served<()> {
    set_numbers(cx, this, Some(value), None).await
}

/// Plugs processors into a VM that runs, or takes them out.
pub(in crate::api) async fn set_vcpus_number_live(cx: &Call, this: Ref<Vm>, number: i64) -> Served<()> {
    operations::set_vcpus(cx, this, number).await
}

/// A scheduler that could be told is not there: the parameter counts from the next start.
pub(in crate::api) async fn add_to_vcpus_params_live(
    cx: &Call,
    this: Ref<Vm>,
    key: String,
    value: String,
) -> Served<()> {
    alter(cx, this, move |state, row, change| {
        lifecycle::check(state, row, Op::ChangingVCPUsLive)?;
        if row.get(vm::VCPUS_PARAMS).contains_key(&key) {
            return refuse(errors::map_duplicate_key("VM", "VCPUs_params", this, key.as_str()));
        }
        change.put(this, vm::VCPUS_PARAMS, key.clone(), value.clone());
        Ok(())
    })
    .await
}
