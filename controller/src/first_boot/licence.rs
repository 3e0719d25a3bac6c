//! Licence flags: nothing is restricted, and some clients must be told so flag by flag.

use std::collections::BTreeMap;

/// Flags whose absence clients read as a restriction.
const RESTRICTIONS: &[&str] = &[
    "ad",
    "cbt",
    "certificate_verification",
    "checkpoint",
    "cluster_address",
    "connection",
    "corosync",
    "cpu_masking",
    "dmc",
    "dr",
    "email_alerting",
    "equalogic",
    "export_resource_data",
    "gpu",
    "guest_agent_auto_update",
    "guest_ip_setting",
    "historical_performance",
    "hotfix_apply",
    "igmp_snooping",
    "integrated_gpu_passthrough",
    "intellicache",
    "internal_repo_access",
    "lab",
    "live_patching",
    "marathon",
    "nested_virt",
    "netapp",
    "network_sriov",
    "pci_device_for_auto_update",
    "pool_attached_storage",
    "pool_secret_rotation",
    "pool_size",
    "pooling",
    "pvs_proxy",
    "qos",
    "rbac",
    "rpu",
    "set_vcpus_number_live",
    "ssl_legacy_switch",
    "stage",
    "storage_xen_motion",
    "trial",
    "updates",
    "usb_passthrough",
    "vgpu",
    "vif_locking",
    "vlan",
    "vm_appliance_start",
    "vm_groups",
    "vm_start",
    "vmpr",
    "vmss",
    "vss",
    "vswitch_controller",
    "vtpm",
    "wlb",
    "xcm",
    "xen_motion",
    "zstd_export",
];

/// The flags of a pool or host that is allowed everything.
pub(super) fn flags() -> BTreeMap<String, String> {
    let mut flags: BTreeMap<String, String> =
        RESTRICTIONS.iter().map(|flag| (format!("restrict_{flag}"), "false".to_owned())).collect();
    for (flag, value) in [("enable_xha", "true"), ("regular_nag_dialog", "false"), ("platform_filter", "false")] {
        flags.insert(flag.to_owned(), value.to_owned());
    }
    flags
}

/// A host's licence: the flags, and an end that never comes.
pub(super) fn params() -> BTreeMap<String, String> {
    let mut params = flags();
    params.insert("expiry".to_owned(), "20991231T23:59:59Z".to_owned());
    params.insert("sku_type".to_owned(), "free".to_owned());
    params
}
