//! The explicit messages: a table from name to function, and the functions by class.
//!
//! A new message is its line in the class's file of the data model, one line here and one function in
//! `api/<class>.rs`.

mod host;
mod message;
mod pool;
mod session;
mod task;
mod vm;

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::LazyLock;

use datamodel::{FieldValue, Ref, Value, errors};

use crate::call::Call;
use crate::failure::{Failure, Served};

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
    "VM.get_allowed_VBD_devices" => vm::get_allowed_vbd_devices, (Vm);
    "VM.get_allowed_VIF_devices" => vm::get_allowed_vif_devices, (Vm);
    "VM.set_is_a_template" => vm::set_is_a_template, (Vm, bool);
    "VM.set_memory_limits" => vm::set_memory_limits, (Vm, i64, i64, i64, i64);
    "VM.set_memory" => vm::set_memory, (Vm, i64);
    "VM.set_VCPUs_max" => vm::set_vcpus_max, (Vm, i64);
    "VM.set_VCPUs_at_startup" => vm::set_vcpus_at_startup, (Vm, i64);
    "VM.get_data_sources" => vm::get_data_sources, (Vm);
};

static TABLE: LazyLock<HashMap<&'static str, Handler>> = LazyLock::new(|| HANDLERS.iter().copied().collect());

/// The function of a message, if it has one.
pub(crate) fn handler(name: &str) -> Option<Handler> {
    TABLE.get(name).copied()
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
