//! The explicit messages: a table from name to function, and the functions by class.
//!
//! A new message is its line in the class's file of the data model, one line here and one function in
//! `api/<class>.rs`.

mod console;
mod host;
mod message;
mod pbd;
mod pool;
mod session;
mod sr;
mod task;
mod vbd;
mod vdi;
mod vif;
pub(crate) mod vm;
mod vm_appliance;
mod vmss;

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};

use datamodel::enums::{DomainType, OnCrashBehaviour, VmOperations, VmssFrequency, VmssType};
use datamodel::{FieldValue, Ref, Value, errors};

use crate::call::Call;
use crate::controller::Shared;
use crate::failure::{Failure, Served};
use crate::operations;

/// What a message's function looks like to the dispatcher.
pub(crate) type Handler = for<'a> fn(&'a Call, Vec<Value>) -> Pin<Box<dyn Future<Output = Served<Value>> + Send + 'a>>;

fn take<T: FieldValue>(values: &mut std::vec::IntoIter<Value>) -> Result<T, Failure> {
    values.next().as_ref().and_then(T::from_value).ok_or_else(|| Failure::Api(errors::field_type_error("argument")))
}

macro_rules! handlers {
    ($($name:literal => $function:path, ($($ty:ty),*);)*) => {
        &[$(($name, |call, values| Box::pin(async move {
            #[allow(unused_mut, unused_variables)]
            let mut values = values.into_iter();
            $function(call $(, take::<$ty>(&mut values)?)*).await.map(FieldValue::into_value)
        }))),*]
    };
}

type Strings = Vec<String>;
type Vm = Ref<datamodel::Vm>;
type Host = Ref<datamodel::Host>;
type Task = Ref<datamodel::Task>;
type Sr = Ref<datamodel::Sr>;
type Pbd = Ref<datamodel::Pbd>;
type Vdi = Ref<datamodel::Vdi>;
type Vbd = Ref<datamodel::Vbd>;
type Vif = Ref<datamodel::Vif>;
type Texts = std::collections::BTreeMap<String, String>;
type Session = Ref<datamodel::Session>;
type Appliance = Ref<datamodel::VmAppliance>;
type Vmss = Ref<datamodel::Vmss>;

const HANDLERS: &[(&str, Handler)] = handlers! {
    "session.login_with_password" => session::login_with_password, (String, String, String, String);
    "session.slave_login" => session::slave_login, (Host, String);
    "session.logout" => session::logout, ();
    "session.local_logout" => session::logout, ();
    "session.change_password" => session::change_password, (String, String);
    "session.get_all_subject_identifiers" => session::get_all_subject_identifiers, ();
    "task.create" => task::create, (String, String);
    "task.destroy" => task::destroy, (Task);
    "task.cancel" => task::cancel, (Task);
    "task.set_status" => task::set_status, (Task, datamodel::enums::TaskStatusType);
    "task.set_progress" => task::set_progress, (Task, f64);
    "task.set_result" => task::set_result, (Task, String);
    "task.set_error_info" => task::set_error_info, (Task, Strings);
    "host.get_servertime" => host::get_servertime, (Host);
    "host.get_server_localtime" => host::get_servertime, (Host);
    "host.enable" => host::enable, (Host);
    "host.disable" => host::disable, (Host);
    "host.declare_dead" => host::declare_dead, (Host);
    "host.refresh_server_certificate" => host::refresh_server_certificate, (Host);
    "host.install_server_certificate" => host::install_server_certificate, (Host, String, String, String);
    "host.reset_server_certificate" => host::reset_server_certificate, (Host);
    "host.destroy" => host::destroy, (Host);
    "host.compute_free_memory" => host::compute_free_memory, (Host);
    "host.compute_memory_overhead" => host::compute_memory_overhead, (Host);
    "host.get_data_sources" => host::get_data_sources, (Host);
    "host.get_vms_which_prevent_evacuation" => host::get_vms_which_prevent_evacuation, (Host);
    "host.list_methods" => host::list_methods, ();
    "host.call_plugin" => host::call_plugin, (Host, String, String, Value);
    "pool.designate_new_master" => pool::designate_new_master, (Host);
    "pool.join" => pool::join, (String, String, String);
    "pool.join_force" => pool::join_force, (String, String, String);
    "pool.eject" => pool::eject, (Host);
    "pool.admit" => pool::admit, (String);
    "pool.install_ca_certificate" => pool::install_ca_certificate, (String, String);
    "pool.uninstall_ca_certificate" => pool::uninstall_ca_certificate, (String);
    "pool.certificate_install" => pool::install_ca_certificate, (String, String);
    "pool.certificate_uninstall" => pool::uninstall_ca_certificate, (String);
    "pool.certificate_list" => pool::certificate_list, ();
    "pool.certificate_sync" => pool::certificate_sync, ();
    "pool.crl_install" => pool::crl_install, (String, String);
    "pool.crl_uninstall" => pool::crl_uninstall, (String);
    "pool.crl_list" => pool::crl_list, ();
    "pool.enable_tls_verification" => pool::enable_tls_verification, ();
    "host.get_server_certificate" => host::get_server_certificate, (Host);
    "pool.rotate_secret" => pool::rotate_secret, ();
    "pool.recover_slaves" => pool::recover_slaves, ();
    "pool.initial_auth" => pool::initial_auth, ();
    "pool.is_slave" => pool::is_slave, (Host);
    "pool.sync_database" => pool::sync_database, ();
    "message.get_all" => message::get_all, ();
    "message.get_all_records" => message::get_all_records, ();
    "message.get_all_records_where" => message::get_all_records_where, (String);
    "VM.clone" => vm::clone, (Vm, String);
    "VM.copy" => vm::copy, (Vm, String, Ref<datamodel::Sr>);
    "VM.snapshot" => vm::snapshot, (Vm, String, Vec<Vdi>);
    "VM.create" => vm::create, (Value);
    "VM.destroy" => vm::destroy, (Vm);
    "VM.provision" => vm::provision, (Vm);
    "VM.start" => vm::start, (Vm, bool, bool);
    "VM.start_on" => vm::start_on, (Vm, Host, bool, bool);
    "VM.pause" => vm::pause, (Vm);
    "VM.unpause" => vm::unpause, (Vm);
    "VM.clean_shutdown" => vm::clean_shutdown, (Vm);
    "VM.hard_shutdown" => vm::hard_shutdown, (Vm);
    "VM.shutdown" => vm::shutdown, (Vm);
    "VM.clean_reboot" => vm::clean_reboot, (Vm);
    "VM.hard_reboot" => vm::hard_reboot, (Vm);
    "VM.power_state_reset" => vm::power_state_reset, (Vm);
    "VM.get_possible_hosts" => vm::get_possible_hosts, (Vm);
    "VM.assert_can_boot_here" => vm::assert_can_boot_here, (Vm, Host);
    "VM.update_allowed_operations" => vm::update_allowed_operations, (Vm);
    "VM.set_is_a_template" => vm::set_is_a_template, (Vm, bool);
    "VM.get_allowed_VBD_devices" => vm::queries::get_allowed_vbd_devices, (Vm);
    "VM.get_allowed_VIF_devices" => vm::queries::get_allowed_vif_devices, (Vm);
    "VM.suspend" => operations::suspend, (Vm);
    "VM.resume" => vm::resume, (Vm, bool, bool);
    "VM.resume_on" => vm::resume_on, (Vm, Host, bool, bool);
    "VM.checkpoint" => operations::checkpoint, (Vm, String);
    "VM.revert" => operations::revert, (Vm);
    "VM.get_boot_record" => vm::queries::get_boot_record, (Vm);
    "VM.assert_operation_valid" => vm::queries::assert_operation_valid, (Vm, VmOperations);
    "VM.get_data_sources" => vm::queries::get_data_sources, (Vm);
    "VM.record_data_source" => vm::queries::record_data_source, (Vm, String);
    "VM.query_data_source" => vm::queries::query_data_source, (Vm, String);
    "VM.forget_data_source_archives" => vm::queries::forget_data_source_archives, (Vm, String);
    "VM.call_plugin" => vm::queries::call_plugin, (Vm, String, String, Texts);
    "VM.query_services" => vm::queries::query_services, (Vm);
    "VM.send_trigger" => vm::queries::send_trigger, (Vm, String);
    "VM.retrieve_wlb_recommendations" => vm::queries::retrieve_wlb_recommendations, (Vm);
    "VM.get_SRs_required_for_recovery" => vm::queries::get_srs_required_for_recovery, (Vm, Session);
    "VM.assert_can_be_recovered" => vm::queries::assert_can_be_recovered, (Vm, Session);
    "VM.assert_agile" => vm::queries::assert_agile, (Vm);
    "VM.set_memory_limits" => vm::memory::set_memory_limits, (Vm, i64, i64, i64, i64);
    "VM.set_memory" => vm::memory::set_memory, (Vm, i64);
    "VM.set_memory_static_range" => vm::memory::set_memory_static_range, (Vm, i64, i64);
    "VM.set_memory_static_min" => vm::memory::set_memory_static_min, (Vm, i64);
    "VM.set_memory_static_max" => vm::memory::set_memory_static_max, (Vm, i64);
    "VM.set_memory_dynamic_range" => vm::memory::set_memory_dynamic_range, (Vm, i64, i64);
    "VM.set_memory_dynamic_min" => vm::memory::set_memory_dynamic_min, (Vm, i64);
    "VM.set_memory_dynamic_max" => vm::memory::set_memory_dynamic_max, (Vm, i64);
    "VM.set_memory_target_live" => vm::memory::set_memory_target_live, (Vm, i64);
    "VM.wait_memory_target_live" => vm::memory::wait_memory_target_live, (Vm);
    "VM.compute_memory_overhead" => vm::memory::compute_memory_overhead, (Vm);
    "VM.maximise_memory" => vm::memory::maximise_memory, (Vm, i64, bool);
    "VM.get_cooperative" => vm::memory::get_cooperative, (Vm);
    "VM.set_HVM_shadow_multiplier" => vm::memory::set_hvm_shadow_multiplier, (Vm, f64);
    "VM.set_shadow_multiplier_live" => vm::memory::set_shadow_multiplier_live, (Vm, f64);
    "VM.set_VCPUs_max" => vm::processors::set_vcpus_max, (Vm, i64);
    "VM.set_VCPUs_at_startup" => vm::processors::set_vcpus_at_startup, (Vm, i64);
    "VM.set_VCPUs_number_live" => vm::processors::set_vcpus_number_live, (Vm, i64);
    "VM.add_to_VCPUs_params_live" => vm::processors::add_to_vcpus_params_live, (Vm, String, String);
    "VM.send_sysrq" => operations::send_sysrq, (Vm, String);
    "VM.set_domain_type" => vm::settings::set_domain_type, (Vm, DomainType);
    "VM.set_HVM_boot_policy" => vm::settings::set_hvm_boot_policy, (Vm, String);
    "VM.set_actions_after_crash" => vm::settings::set_actions_after_crash, (Vm, OnCrashBehaviour);
    "VM.set_order" => vm::settings::set_order, (Vm, i64);
    "VM.set_start_delay" => vm::settings::set_start_delay, (Vm, i64);
    "VM.set_shutdown_delay" => vm::settings::set_shutdown_delay, (Vm, i64);
    "VM.set_bios_strings" => vm::settings::set_bios_strings, (Vm, Texts);
    "VM.copy_bios_strings" => vm::settings::copy_bios_strings, (Vm, Host);
    "VM.set_has_vendor_device" => vm::settings::set_has_vendor_device, (Vm, bool);
    "VM.set_NVRAM" => vm::settings::set_nvram, (Vm, Texts);
    "VM.add_to_NVRAM" => vm::settings::add_to_nvram, (Vm, String, String);
    "VM.remove_from_NVRAM" => vm::settings::remove_from_nvram, (Vm, String);
    "VM.set_suspend_VDI" => vm::settings::set_suspend_vdi, (Vm, Vdi);
    "VM.set_appliance" => vm::settings::set_appliance, (Vm, Appliance);
    "VM.set_snapshot_schedule" => vm::settings::set_snapshot_schedule, (Vm, Vmss);
    "VM.set_ha_restart_priority" => vm::settings::set_ha_restart_priority, (Vm, String);
    "VM.set_ha_always_run" => vm::settings::set_ha_always_run, (Vm, bool);
    "console.create" => console::create, (Value);
    "console.destroy" => console::destroy, (Ref<datamodel::Console>);
    "VM_appliance.create" => vm_appliance::create, (Value);
    "VM_appliance.destroy" => vm_appliance::destroy, (Appliance);
    "VM_appliance.start" => vm_appliance::start, (Appliance, bool);
    "VM_appliance.clean_shutdown" => vm_appliance::clean_shutdown, (Appliance);
    "VM_appliance.hard_shutdown" => vm_appliance::hard_shutdown, (Appliance);
    "VM_appliance.shutdown" => vm_appliance::shutdown, (Appliance);
    "VM_appliance.assert_can_be_recovered" => vm_appliance::assert_can_be_recovered, (Appliance, Session);
    "VM_appliance.get_SRs_required_for_recovery" => vm_appliance::get_srs_required_for_recovery, (Appliance, Session);
    "VMSS.create" => vmss::create, (Value);
    "VMSS.destroy" => vmss::destroy, (Vmss);
    "VMSS.snapshot_now" => vmss::snapshot_now, (Vmss);
    "VMSS.set_type" => vmss::set_type, (Vmss, VmssType);
    "VMSS.set_frequency" => vmss::set_frequency, (Vmss, VmssFrequency);
    "VMSS.set_schedule" => vmss::set_schedule, (Vmss, Texts);
    "VMSS.add_to_schedule" => vmss::add_to_schedule, (Vmss, String, String);
    "VMSS.remove_from_schedule" => vmss::remove_from_schedule, (Vmss, String);
    "VMSS.set_retained_snapshots" => vmss::set_retained_snapshots, (Vmss, i64);
    "VMSS.set_last_run_time" => vmss::set_last_run_time, (Vmss, datamodel::Timestamp);
    "SR.create" => sr::create, (Host, Texts, i64, String, String, String, String, bool, Texts);
    "SR.introduce" => sr::introduce, (String, String, String, String, String, bool, Texts);
    "SR.make" => sr::make, (Host, Texts, i64);
    "SR.destroy" => sr::destroy, (Sr);
    "SR.forget" => sr::forget, (Sr);
    "SR.scan" => sr::scan, (Sr);
    "SR.update" => sr::update, (Sr);
    "SR.assert_can_host_ha_statefile" => sr::assert_can_host_ha_statefile, (Sr);
    "SR.assert_supports_database_replication" => sr::assert_supports_database_replication, (Sr);
    "SR.enable_database_replication" => sr::enable_database_replication, (Sr);
    "SR.disable_database_replication" => sr::disable_database_replication, (Sr);
    "SR.get_data_sources" => sr::get_data_sources, (Sr);
    "SR.probe" => sr::probe, (Host, Texts, String, Texts);
    "SR.probe_ext" => sr::probe_ext, (Host, Texts, String, Texts);
    "SR.get_supported_types" => sr::get_supported_types, ();
    "SR.set_shared" => sr::set_shared, (Sr, bool);
    "SR.set_physical_size" => sr::set_physical_size, (Sr, i64);
    "SR.set_name_label" => sr::set_name_label, (Sr, String);
    "SR.set_name_description" => sr::set_name_description, (Sr, String);
    "SR.query_data_source" => sr::query_data_source, (Sr, String);
    "SR.record_data_source" => sr::record_data_source, (Sr, String);
    "SR.forget_data_source_archives" => sr::forget_data_source_archives, (Sr, String);
    "SR.create_new_blob" => sr::create_new_blob, (Sr, String, String, bool);
    "PBD.create" => pbd::create, (Value);
    "PBD.destroy" => pbd::destroy, (Pbd);
    "PBD.plug" => pbd::plug, (Pbd);
    "PBD.unplug" => pbd::unplug, (Pbd);
    "PBD.set_device_config" => pbd::set_device_config, (Pbd, Texts);
    "VDI.create" => vdi::create, (Value);
    "VDI.destroy" => vdi::destroy, (Vdi);
    "VDI.update" => vdi::update, (Vdi);
    "VDI.forget" => vdi::forget, (Vdi);
    "VDI.enable_cbt" => vdi::enable_cbt, (Vdi);
    "VDI.disable_cbt" => vdi::disable_cbt, (Vdi);
    "VDI.data_destroy" => vdi::data_destroy, (Vdi);
    "VDI.get_nbd_info" => vdi::get_nbd_info, (Vdi);
    "VDI.open_database" => vdi::open_database, (Vdi);
    "VDI.read_database_pool_uuid" => vdi::read_database_pool_uuid, (Vdi);
    "VDI.snapshot" => vdi::snapshot, (Vdi, Texts);
    "VDI.clone" => vdi::clone, (Vdi, Texts);
    "VDI.copy" => vdi::copy, (Vdi, Sr, Vdi, Vdi);
    "VDI.resize" => vdi::resize, (Vdi, i64);
    "VDI.resize_online" => vdi::resize_online, (Vdi, i64);
    "VDI.introduce" => vdi::introduce, (String, String, String, Sr, datamodel::enums::VdiType, bool, bool, Texts, String, Texts, Texts, bool, i64, i64, Ref<datamodel::Pool>, bool, datamodel::Timestamp, Vdi);
    "VDI.pool_migrate" => vdi::pool_migrate, (Vdi, Sr, Texts);
    "VDI.set_name_label" => vdi::set_name_label, (Vdi, String);
    "VDI.set_name_description" => vdi::set_name_description, (Vdi, String);
    "VDI.set_read_only" => vdi::set_read_only, (Vdi, bool);
    "VDI.set_sharable" => vdi::set_sharable, (Vdi, bool);
    "VDI.set_allow_caching" => vdi::set_allow_caching, (Vdi, bool);
    "VDI.set_on_boot" => vdi::set_on_boot, (Vdi, datamodel::enums::OnBoot);
    "VDI.list_changed_blocks" => vdi::list_changed_blocks, (Vdi, Vdi);
    "VIF.create" => vif::create, (Value);
    "VIF.destroy" => vif::destroy, (Vif);
    "VBD.create" => vbd::create, (Value);
    "VBD.destroy" => vbd::destroy, (Vbd);
    "VBD.plug" => vbd::plug, (Vbd);
    "VBD.unplug" => vbd::unplug, (Vbd);
    "VBD.unplug_force" => vbd::unplug_force, (Vbd);
    "VBD.eject" => vbd::eject, (Vbd);
    "VBD.assert_attachable" => vbd::assert_attachable, (Vbd);
    "VBD.insert" => vbd::insert, (Vbd, Vdi);
    "VBD.set_mode" => vbd::set_mode, (Vbd, datamodel::enums::VbdMode);
};

static TABLE: LazyLock<HashMap<&'static str, Handler>> = LazyLock::new(|| HANDLERS.iter().copied().collect());

/// The function of a message, if it has one.
pub(crate) fn handler(name: &str) -> Option<Handler> {
    TABLE.get(name).copied()
}

/// A message that the pool sends to itself, as whoever may do everything.
pub(crate) async fn ask(shared: &Arc<Shared>, name: &str, values: Vec<Value>) -> Served<Value> {
    let call = Call::of_the_pool(shared, shared.store.read().await?, name)?;
    match handler(name) {
        Some(handler) => handler(&call, values).await,
        None => Err(errors::not_implemented(name).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_serves_a_message_of_the_model_once_and_with_its_parameters() {
        for (name, _) in HANDLERS {
            assert!(datamodel::model().message(name).is_some(), "{name} is not in the model");
        }
        assert_eq!(TABLE.len(), HANDLERS.len());
    }
}
