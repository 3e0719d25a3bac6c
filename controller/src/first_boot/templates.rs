//! The templates that a new pool has.

use std::collections::BTreeMap;

use datamodel::enums::{DomainType, OnCrashBehaviour, OnNormalExit, VmOperations};
use datamodel::fields::{vm, vm_metrics};
use datamodel::{Ref, Vm, VmMetrics};
use raft_store::{NewRow, Transaction};

use crate::controller::Shared;

const MIB: i64 = 1 << 20;

struct Template<'a> {
    name: &'a str,
    description: &'a str,
    memory: i64,
    kernel: &'a str,
    ramdisk: &'a str,
    args: &'a str,
    recommendations: &'a str,
}

pub(super) fn insert(shared: &Shared, change: &mut Transaction) {
    let limits = "<restrictions><restriction field=\"memory-static-max\" max=\"137438953472\"/>\
                  <restriction field=\"vcpus-max\" max=\"32\"/>\
                  <restriction property=\"number-of-vbds\" max=\"255\"/>\
                  <restriction property=\"number-of-vifs\" max=\"7\"/></restrictions>";
    let guest = &shared.config.guest;
    let blank = Template {
        name: "Other install media",
        description: "Template which allows VM installation from install media",
        memory: 1024 * MIB,
        kernel: "",
        ramdisk: "",
        args: "",
        recommendations: limits,
    };
    let tiny = Template {
        name: "Xenith guest",
        description: "A small Linux that boots in seconds, for trying things out",
        memory: 128 * MIB,
        kernel: &guest.kernel,
        ramdisk: &guest.ramdisk,
        args: &guest.args,
        recommendations: limits,
    };
    for template in [blank, tiny] {
        insert_one(shared, change, &template);
    }
}

fn insert_one(shared: &Shared, change: &mut Transaction, template: &Template<'_>) {
    let direct = !template.kernel.is_empty() || template.name == "Xenith guest";
    let other_config = [("default_template", "true"), ("install-methods", ""), ("linux_template", "true")];
    let platform = [
        ("acpi", "1"),
        ("apic", "true"),
        ("pae", "true"),
        ("nx", "true"),
        ("viridian", "false"),
        ("cores-per-socket", "1"),
    ];
    let owned = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let metrics: Ref<VmMetrics> = Ref::new(shared.uuid());
    change.insert(NewRow::new(metrics, shared.uuid()).with(vm_metrics::LAST_UPDATED, shared.now()));
    let boot = if direct { BTreeMap::new() } else { owned(&[("order", "dc"), ("firmware", "bios")]) };
    change.insert(
        NewRow::new(Ref::<Vm>::new(shared.uuid()), shared.uuid())
            .with(vm::NAME_LABEL, template.name.to_owned())
            .with(vm::NAME_DESCRIPTION, template.description.to_owned())
            .with(vm::REFERENCE_LABEL, template.name.to_ascii_lowercase().replace(' ', "-"))
            .with(vm::IS_A_TEMPLATE, true)
            .with(vm::IS_DEFAULT_TEMPLATE, true)
            .with(vm::ALLOWED_OPERATIONS, vec![VmOperations::Clone, VmOperations::Copy, VmOperations::Provision])
            .with(vm::METRICS, metrics)
            .with(vm::DOMID, -1)
            .with(vm::USER_VERSION, 1)
            .with(vm::VCPUS_MAX, 1)
            .with(vm::VCPUS_AT_STARTUP, 1)
            .with(vm::MEMORY_STATIC_MIN, template.memory)
            .with(vm::MEMORY_DYNAMIC_MIN, template.memory)
            .with(vm::MEMORY_DYNAMIC_MAX, template.memory)
            .with(vm::MEMORY_STATIC_MAX, template.memory)
            .with(vm::MEMORY_TARGET, template.memory)
            .with(vm::ACTIONS_AFTER_SHUTDOWN, OnNormalExit::Destroy)
            .with(vm::ACTIONS_AFTER_REBOOT, OnNormalExit::Restart)
            .with(vm::ACTIONS_AFTER_CRASH, OnCrashBehaviour::Restart)
            .with(vm::PV_KERNEL, template.kernel.to_owned())
            .with(vm::PV_RAMDISK, template.ramdisk.to_owned())
            .with(vm::PV_ARGS, template.args.to_owned())
            .with(vm::HVM_BOOT_POLICY, if direct { String::new() } else { "BIOS order".to_owned() })
            .with(vm::HVM_BOOT_PARAMS, boot)
            .with(vm::DOMAIN_TYPE, if direct { DomainType::Pv } else { DomainType::Hvm })
            .with(vm::HVM_SHADOW_MULTIPLIER, 1.0)
            .with(vm::PLATFORM, owned(&platform))
            .with(vm::RECOMMENDATIONS, template.recommendations.to_owned())
            .with(vm::OTHER_CONFIG, owned(&other_config)),
    );
}
