//! What is changed in a domain while it lives: its memory, its processors, and the keys that it is sent. One step each.

use datamodel::enums::VmOperations;
use datamodel::fields::{vm, vm_metrics};
use datamodel::{ApiError, ClassKind, Host, Ref, Value, Vm, errors};
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::{Refusal, SendKeys, SetMemoryTarget, SetVcpus};
use raft_store::Row;

use super::{Draft, Ending, Kind, Planned, Seen, refusals, run};
use crate::call::{Call, find};
use crate::failure::{Served, refuse};
use crate::{lifecycle, placement};

const TARGET: &str = "target";
const BEFORE: &str = "before";
const DYNAMIC_MIN: &str = "dynamic_min";
const DYNAMIC_MAX: &str = "dynamic_max";
const NUMBER: &str = "number";
const KEY: &str = "key";

pub(super) const KINDS: &[&dyn Kind] = &[&Live::Memory, &Live::Processors, &Live::Keys];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Live {
    Memory,
    Processors,
    Keys,
}

/// Between what a VM's memory may be: statically while it is halted, dynamically while it runs. Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) static_min: i64,
    pub(crate) static_max: i64,
    pub(crate) dynamic_min: i64,
    pub(crate) dynamic_max: i64,
}

impl Limits {
    pub(crate) fn of(row: &Row) -> Self {
        Self {
            static_min: row.get(vm::MEMORY_STATIC_MIN),
            static_max: row.get(vm::MEMORY_STATIC_MAX),
            dynamic_min: row.get(vm::MEMORY_DYNAMIC_MIN),
            dynamic_max: row.get(vm::MEMORY_DYNAMIC_MAX),
        }
    }
}

fn begin(draft: &mut Draft<'_>, this: Ref<Vm>, what: VmOperations) -> Served<std::sync::Arc<Row>> {
    let row = draft.row(this)?;
    lifecycle::check(draft.state, &row, what)?;
    draft.hold(&row, what.as_str());
    draft.about(this).on(row.get(vm::RESIDENT_ON));
    Ok(row)
}

/// Moves a VM's dynamic bounds, and its memory to the upper one, as far as its host has room.
pub(crate) async fn set_memory(
    call: &Call,
    this: Ref<Vm>,
    what: VmOperations,
    wanted: impl Fn(&Row) -> Result<Limits, ApiError> + Send + Sync + 'static,
) -> Served<()> {
    run(call, &Live::Memory, move |draft| {
        let row = begin(draft, this, what)?;
        let limits = wanted(&row)?;
        let host_row = draft.row(row.get(vm::RESIDENT_ON))?;
        let (held, free) = (placement::held(&row), placement::free_memory(draft.state, &host_row).max(0));
        let target = limits.dynamic_max.min(held.saturating_add(free));
        if target < limits.dynamic_min {
            let needed = limits.dynamic_min - held;
            return refuse(errors::host_not_enough_free_memory(needed.to_string(), free.to_string()));
        }
        // What others start there is decided against this; memory that is given back is free when it has been given.
        draft.change.expect_row(&host_row).touch(Host::ID, host_row.reference);
        draft.change.set(this, vm::MEMORY_TARGET, held.max(target));
        draft.note(TARGET, target).note(BEFORE, held);
        draft.note(DYNAMIC_MIN, limits.dynamic_min).note(DYNAMIC_MAX, limits.dynamic_max);
        Ok(())
    })
    .await
    .map(drop)
}

/// Plugs virtual processors in or out.
pub(crate) async fn set_vcpus(call: &Call, this: Ref<Vm>, number: i64) -> Served<()> {
    run(call, &Live::Processors, move |draft| {
        let row = begin(draft, this, VmOperations::ChangingVCPUsLive)?;
        if number < 1 || number > row.get(vm::VCPUS_MAX) {
            return refuse(errors::invalid_value("VCPUs_number", number.to_string()));
        }
        draft.note(NUMBER, number);
        Ok(())
    })
    .await
    .map(drop)
}

/// Sends a magic key to a guest's kernel.
pub(crate) async fn send_sysrq(call: &Call, this: Ref<Vm>, key: String) -> Served<()> {
    run(call, &Live::Keys, move |draft| {
        begin(draft, this, VmOperations::SendSysrq)?;
        let [letter] = key.as_bytes() else { return refuse(errors::invalid_value("key", key.as_str())) };
        if !letter.is_ascii_alphanumeric() {
            return refuse(errors::invalid_value("key", key.as_str()));
        }
        draft.note(KEY, &key);
        Ok(())
    })
    .await
    .map(drop)
}

impl Kind for Live {
    fn verb(&self) -> &'static str {
        match self {
            Self::Memory => "set_memory_target",
            Self::Processors => "set_vcpus",
            Self::Keys => "send_keys",
        }
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let journal = seen.journal;
        let row = find(seen.state, journal.vm)?;
        let action = match self {
            Self::Memory => {
                Action::MemoryTarget(SetMemoryTarget { bytes: u64::try_from(journal.number(TARGET)).unwrap_or(0) })
            }
            Self::Processors => Action::Vcpus(SetVcpus { number: u32::try_from(journal.number(NUMBER)).unwrap_or(1) }),
            Self::Keys => Action::Keys(SendKeys { sysrq: journal.parameter(KEY).to_owned() }),
        };
        Ok(vec![Planned::new(journal.host, row.uuid(), action)])
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let (journal, this) = (end.journal, end.journal.vm);
        let Some(row) = end.state.row(this) else { return Ok(Value::Void) };
        let metrics = row.get(vm::METRICS);
        let has_metrics = end.state.row(metrics).is_some();
        match self {
            Self::Memory => {
                end.change
                    .set(this, vm::MEMORY_DYNAMIC_MIN, journal.number(DYNAMIC_MIN))
                    .set(this, vm::MEMORY_DYNAMIC_MAX, journal.number(DYNAMIC_MAX))
                    .set(this, vm::MEMORY_TARGET, journal.number(TARGET));
                let actual = i64::try_from(journal.domain(0)?.memory_actual).unwrap_or(i64::MAX);
                if has_metrics {
                    end.change.set(metrics, vm_metrics::MEMORY_ACTUAL, actual).set(
                        metrics,
                        vm_metrics::LAST_UPDATED,
                        end.shared.now(),
                    );
                }
            }
            Self::Processors => {
                let number = journal.number(NUMBER);
                end.change.set(this, vm::VCPUS_AT_STARTUP, number);
                if has_metrics {
                    end.change.set(metrics, vm_metrics::VCPUS_NUMBER, number).set(
                        metrics,
                        vm_metrics::LAST_UPDATED,
                        end.shared.now(),
                    );
                }
            }
            Self::Keys => {}
        }
        Ok(Value::Void)
    }

    fn fail(&self, end: &mut Ending<'_>, _error: &ApiError) {
        if *self == Self::Memory && end.state.row(end.journal.vm).is_some() {
            end.change.set(end.journal.vm, vm::MEMORY_TARGET, end.journal.number(BEFORE));
        }
    }

    fn refused(&self, seen: &Seen<'_>, step: &Planned, refusal: &Refusal) -> ApiError {
        match refusal.reason() {
            Reason::NoGuestSupport => errors::vm_lacks_feature(seen.journal.vm),
            _ => refusals::error(seen.state, step, refusal),
        }
    }
}
