//! What a VM is, where setting it takes more than writing it down.

use std::collections::BTreeMap;

use datamodel::enums::{DomainType, OnCrashBehaviour, VdiType, VmOperations as Op, VmPowerState};
use datamodel::fields::{host, vdi, vm};
use datamodel::{ApiError, ClassKind, Host, Ref, Vdi, Vm, VmAppliance, Vmss, errors};
use raft_store::Row;

use super::alter;
use crate::call::{Call, find};
use crate::failure::{Served, refuse};
use crate::{appliances, lifecycle, placement};

const BIOS_ORDER: &str = "BIOS order";
/// The strings that somebody may set; the others follow the host.
const BIOS_KEYS: &[&str] = &[
    "bios-vendor",
    "bios-version",
    "system-manufacturer",
    "system-product-name",
    "system-version",
    "system-serial-number",
    "baseboard-manufacturer",
    "baseboard-product-name",
    "baseboard-version",
    "baseboard-serial-number",
    "baseboard-asset-tag",
    "baseboard-location-in-chassis",
    "enclosure-asset-tag",
];
/// What a VM shows where nobody has said anything else.
const BIOS_DEFAULTS: &[(&str, &str)] = &[
    ("bios-vendor", "Xen"),
    ("bios-version", ""),
    ("system-manufacturer", "Xen"),
    ("system-product-name", "HVM domU"),
    ("system-version", ""),
    ("system-serial-number", ""),
    ("baseboard-manufacturer", ""),
    ("baseboard-product-name", ""),
    ("baseboard-version", ""),
    ("baseboard-serial-number", ""),
    ("baseboard-asset-tag", ""),
    ("baseboard-location-in-chassis", ""),
    ("enclosure-asset-tag", ""),
    ("hp-rombios", ""),
    ("oem-1", "Xen"),
    ("oem-2", "MS_VM_CERT/SHA1/bdbeb6e0a816d43fa6d3fe8aaef04c2bad9d3e3d"),
];
const BIOS_LONGEST: usize = 512;
const PRIORITIES: &[&str] = &["", "best-effort", "restart"];

fn expect_halted(row: &Row) -> Result<(), ApiError> {
    let power = row.get(vm::POWER_STATE);
    if power == VmPowerState::Halted {
        return Ok(());
    }
    Err(errors::vm_bad_power_state(row.typed::<Vm>(), "halted", power.as_str().to_ascii_lowercase()))
}

async fn set_kind(cx: &Call, this: Ref<Vm>, kind: DomainType) -> Served<()> {
    alter(cx, this, move |_, row, change| {
        expect_halted(row)?;
        let policy = if kind == DomainType::Hvm { BIOS_ORDER } else { "" };
        let after = row.with_values(&[(vm::DOMAIN_TYPE.index(), datamodel::FieldValue::into_value(kind))]);
        change.set(this, vm::DOMAIN_TYPE, kind).set(this, vm::HVM_BOOT_POLICY, policy.to_owned()).set(
            this,
            vm::MEMORY_OVERHEAD,
            placement::overhead(&after),
        );
        Ok(())
    })
    .await
}

pub(in crate::api) async fn set_domain_type(cx: &Call, this: Ref<Vm>, value: DomainType) -> Served<()> {
    set_kind(cx, this, value).await
}

/// The older pair of `domain_type`: a policy makes a machine with a BIOS, none a guest that knows where it is.
pub(in crate::api) async fn set_hvm_boot_policy(cx: &Call, this: Ref<Vm>, value: String) -> Served<()> {
    match value.as_str() {
        "" => set_kind(cx, this, DomainType::Pv).await,
        BIOS_ORDER => set_kind(cx, this, DomainType::Hvm).await,
        _ => {
            cx.row(this)?;
            refuse(errors::invalid_value("HVM_boot_policy", value))
        }
    }
}

pub(in crate::api) async fn set_actions_after_crash(cx: &Call, this: Ref<Vm>, value: OnCrashBehaviour) -> Served<()> {
    alter(cx, this, move |_, row, change| {
        let unsupported = |why: &str| errors::value_not_supported("actions_after_crash", value.as_str(), why);
        match value {
            OnCrashBehaviour::RenameRestart => return refuse(unsupported("a domain is not renamed")),
            OnCrashBehaviour::CoredumpAndDestroy | OnCrashBehaviour::CoredumpAndRestart
                if row.get(vm::DOMAIN_TYPE) == DomainType::Hvm =>
            {
                return refuse(unsupported("core dumps are of paravirtualised guests only"));
            }
            _ => {}
        }
        change.set(this, vm::ACTIONS_AFTER_CRASH, value);
        Ok(())
    })
    .await
}

/// A number that is not below zero.
async fn set_natural(
    cx: &Call,
    this: Ref<Vm>,
    field: datamodel::Field<Vm, i64>,
    name: &'static str,
    value: i64,
) -> Served<()> {
    alter(cx, this, move |_, _, change| {
        if value < 0 {
            return refuse(errors::invalid_value(name, value.to_string()));
        }
        change.set(this, field, value);
        Ok(())
    })
    .await
}

pub(in crate::api) async fn set_order(cx: &Call, this: Ref<Vm>, value: i64) -> Served<()> {
    set_natural(cx, this, vm::ORDER, "order", value).await
}

pub(in crate::api) async fn set_start_delay(cx: &Call, this: Ref<Vm>, value: i64) -> Served<()> {
    set_natural(cx, this, vm::START_DELAY, "start_delay", value).await
}

pub(in crate::api) async fn set_shutdown_delay(cx: &Call, this: Ref<Vm>, value: i64) -> Served<()> {
    set_natural(cx, this, vm::SHUTDOWN_DELAY, "shutdown_delay", value).await
}

fn check_bios(strings: &BTreeMap<String, String>) -> Result<(), ApiError> {
    for (key, value) in strings {
        if !BIOS_KEYS.contains(&key.as_str()) {
            return Err(errors::invalid_value(key.as_str(), "Unknown key"));
        }
        if value.is_empty() {
            return Err(errors::invalid_value(key.as_str(), "Value provided is empty"));
        }
        if value.len() > BIOS_LONGEST {
            return Err(errors::invalid_value(key.as_str(), format!("Value is longer than {BIOS_LONGEST} characters")));
        }
        if !value.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
            return Err(errors::invalid_value(key.as_str(), "Value contains characters that are not printable ASCII"));
        }
    }
    Ok(())
}

/// Once said, a machine's identity stays.
fn expect_no_bios_strings(row: &Row) -> Result<(), ApiError> {
    if row.get(vm::BIOS_STRINGS).is_empty() { Ok(()) } else { Err(errors::vm_bios_strings_already_set()) }
}

pub(in crate::api) async fn set_bios_strings(cx: &Call, this: Ref<Vm>, value: BTreeMap<String, String>) -> Served<()> {
    alter(cx, this, move |_, row, change| {
        expect_no_bios_strings(row)?;
        check_bios(&value)?;
        let defaults = BIOS_DEFAULTS.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let mut strings: BTreeMap<String, String> = defaults.collect();
        strings.extend(value.clone());
        change.set(this, vm::BIOS_STRINGS, strings);
        Ok(())
    })
    .await
}

pub(in crate::api) async fn copy_bios_strings(cx: &Call, this: Ref<Vm>, from: Ref<Host>) -> Served<()> {
    alter(cx, this, move |state, row, change| {
        let strings = find(state, from)?.get(host::BIOS_STRINGS);
        expect_no_bios_strings(row)?;
        change.set(this, vm::BIOS_STRINGS, strings);
        Ok(())
    })
    .await
}

pub(in crate::api) async fn set_has_vendor_device(cx: &Call, this: Ref<Vm>, value: bool) -> Served<()> {
    alter(cx, this, move |_, row, change| {
        expect_halted(row)?;
        change.set(this, vm::HAS_VENDOR_DEVICE, value);
        if value {
            let version = row.get(vm::HARDWARE_PLATFORM_VERSION).max(2);
            change.set(this, vm::HARDWARE_PLATFORM_VERSION, version);
        }
        Ok(())
    })
    .await
}

pub(in crate::api) async fn set_nvram(cx: &Call, this: Ref<Vm>, value: BTreeMap<String, String>) -> Served<()> {
    alter(cx, this, move |state, row, change| {
        lifecycle::check(state, row, Op::ChangingNvram)?;
        change.set(this, vm::NVRAM, value.clone());
        Ok(())
    })
    .await
}

pub(in crate::api) async fn add_to_nvram(cx: &Call, this: Ref<Vm>, key: String, value: String) -> Served<()> {
    alter(cx, this, move |state, row, change| {
        lifecycle::check(state, row, Op::ChangingNvram)?;
        if row.get(vm::NVRAM).contains_key(&key) {
            return refuse(errors::map_duplicate_key("VM", "NVRAM", this, key.as_str()));
        }
        change.put(this, vm::NVRAM, key.clone(), value.clone());
        Ok(())
    })
    .await
}

pub(in crate::api) async fn remove_from_nvram(cx: &Call, this: Ref<Vm>, key: String) -> Served<()> {
    alter(cx, this, move |state, row, change| {
        lifecycle::check(state, row, Op::ChangingNvram)?;
        change.take(this, vm::NVRAM, key.clone());
        Ok(())
    })
    .await
}

/// Another image of a suspended VM's memory; what becomes of the last one is the caller's.
pub(in crate::api) async fn set_suspend_vdi(cx: &Call, this: Ref<Vm>, value: Ref<Vdi>) -> Served<()> {
    alter(cx, this, move |state, row, change| {
        let power = row.get(vm::POWER_STATE);
        if power != VmPowerState::Suspended {
            return refuse(errors::vm_bad_power_state(this, "suspended", power.as_str().to_ascii_lowercase()));
        }
        let disk = find(state, value)?;
        if disk.get(vdi::TYPE) != VdiType::Suspend {
            return refuse(errors::operation_not_allowed("The VDI is not of type suspend"));
        }
        if row.get(vm::SUSPEND_VDI) != value {
            change.expect_exists(Vdi::ID, value.opaque()).set(this, vm::SUSPEND_VDI, value);
        }
        Ok(())
    })
    .await
}

fn expect_ordinary(row: &Row, operation: &str) -> Result<(), ApiError> {
    let this = row.typed::<Vm>();
    if row.get(vm::IS_CONTROL_DOMAIN) {
        return Err(errors::operation_not_allowed(format!("{operation} is not for control domains")));
    }
    if row.get(vm::IS_A_SNAPSHOT) {
        return Err(ApiError::new("VM_IS_SNAPSHOT", vec![this.to_string(), operation.to_owned()]));
    }
    if row.get(vm::IS_A_TEMPLATE) {
        return Err(ApiError::new(errors::VM_IS_TEMPLATE, vec![this.to_string(), operation.to_owned()]));
    }
    Ok(())
}

pub(in crate::api) async fn set_appliance(cx: &Call, this: Ref<Vm>, value: Ref<VmAppliance>) -> Served<()> {
    alter(cx, this, move |state, row, change| {
        let before = row.get(vm::APPLIANCE);
        if !value.is_null() {
            expect_ordinary(row, "set_appliance")?;
            find(state, value)?;
            change.expect_exists(VmAppliance::ID, value.opaque());
        }
        for appliance in [before, value] {
            appliances::expect_idle(state, appliance)?;
        }
        change.set(this, vm::APPLIANCE, value);
        Ok(())
    })
    .await
}

pub(in crate::api) async fn set_snapshot_schedule(cx: &Call, this: Ref<Vm>, value: Ref<Vmss>) -> Served<()> {
    alter(cx, this, move |state, row, change| {
        if !value.is_null() {
            expect_ordinary(row, "set_snapshot_schedule")?;
            find(state, value)?;
            change.expect_exists(Vmss::ID, value.opaque());
        }
        change.set(this, vm::SNAPSHOT_SCHEDULE, value);
        Ok(())
    })
    .await
}

pub(in crate::api) async fn set_ha_restart_priority(cx: &Call, this: Ref<Vm>, value: String) -> Served<()> {
    alter(cx, this, move |_, row, change| {
        if !PRIORITIES.contains(&value.as_str()) {
            return refuse(errors::invalid_value("ha_restart_priority", value.as_str()));
        }
        if !value.is_empty() {
            expect_ordinary(row, "set_ha_restart_priority")?;
        }
        change.set(this, vm::HA_RESTART_PRIORITY, value.clone()).set(this, vm::HA_ALWAYS_RUN, value == "restart");
        Ok(())
    })
    .await
}

/// The older form: protected, or not at all.
pub(in crate::api) async fn set_ha_always_run(cx: &Call, this: Ref<Vm>, value: bool) -> Served<()> {
    let priority = if value { "restart" } else { "" };
    set_ha_restart_priority(cx, this, priority.to_owned()).await
}
