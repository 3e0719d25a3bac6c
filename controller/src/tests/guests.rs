//! What guests say of themselves, as their VMs' rows show it.

use datamodel::enums::{TristateType, VmPowerState};
use datamodel::fields::{vm, vm_guest_metrics, vm_metrics};
use datamodel::{ClassKind, Ref, Vm, VmGuestMetrics};
use proto::agent::{DomainState, GuestMetrics, PowerState};

use super::Pool;

fn domain(uuid: &str, guest: Option<GuestMetrics>) -> DomainState {
    DomainState { vm: uuid.to_owned(), state: PowerState::Running.into(), domid: 7, guest, ..DomainState::default() }
}

fn says(address: &str) -> GuestMetrics {
    GuestMetrics {
        os_version: [("distro".to_owned(), "debian".to_owned())].into(),
        networks: [("0/ip".to_owned(), address.to_owned())].into(),
        agent_live: true,
        can_plug_disks: true,
        ..GuestMetrics::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_says_appears_changes_in_place_and_goes_with_its_domain() {
    let pool = Pool::start().await;
    let this: Ref<Vm> = pool.running("talkative").await;
    let uuid = pool.get(this).await.uuid().to_owned();
    let metrics = |state: &raft_store::State| state.row(this).unwrap().get(vm::GUEST_METRICS);
    assert!(pool.get(this).await.get(vm::GUEST_METRICS).is_null(), "it has not spoken yet");
    pool.agent.tell(domain(&uuid, Some(says("192.0.2.1"))));
    pool.until(|state| state.row(metrics(state)).is_some()).await;
    let first = metrics(&pool.store().state());
    let row = pool.get(first).await;
    assert_eq!(row.get(vm_guest_metrics::OS_VERSION)["distro"], "debian");
    assert_eq!(row.get(vm_guest_metrics::NETWORKS)["0/ip"], "192.0.2.1");
    assert!(row.get(vm_guest_metrics::LIVE) && row.get(vm_guest_metrics::PV_DRIVERS_DETECTED));
    assert_eq!(row.get(vm_guest_metrics::CAN_USE_HOTPLUG_VBD), TristateType::Yes);
    pool.agent.tell(domain(&uuid, Some(says("192.0.2.2"))));
    let address =
        |state: &raft_store::State| state.row(first).map(|row| row.get(vm_guest_metrics::NETWORKS)["0/ip"].clone());
    pool.until(|state| address(state).as_deref() == Some("192.0.2.2")).await;
    assert_eq!(metrics(&pool.store().state()), first, "the same object");
    let gone = DomainState { state: PowerState::Halted.into(), domid: -1, ..domain(&uuid, None) };
    pool.agent.tell(gone);
    pool.until(|state| state.row(this).unwrap().get(vm::POWER_STATE) == VmPowerState::Halted).await;
    let state = pool.store().state();
    assert!(metrics(&state).is_null());
    assert_eq!(state.count(VmGuestMetrics::ID), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_of_a_vm_are_those_of_its_domain_and_of_none() {
    let pool = Pool::start().await;
    let this = pool.running("measured").await;
    let metrics = pool.get(this).await.get(vm::METRICS);
    let row = pool.get(metrics).await;
    assert_eq!(row.get(vm_metrics::STATE), ["running"]);
    assert_eq!(row.get(vm_metrics::CURRENT_DOMAIN_TYPE).as_str(), "pv");
    assert!(!row.get(vm_metrics::HVM) && row.get(vm_metrics::VCPUS_NUMBER) == 1);
    assert!(row.get(vm_metrics::INSTALL_TIME).0 > 0, "it was installed");
    // A balloon that moved by itself.
    let uuid = pool.get(this).await.uuid().to_owned();
    pool.agent.tell(DomainState { memory_actual: 77 << 20, ..domain(&uuid, None) });
    pool.until(|state| state.row(metrics).unwrap().get(vm_metrics::MEMORY_ACTUAL) == 77 << 20).await;
    pool.ask("VM.hard_shutdown", vec![super::text(this.to_string())]).await.unwrap();
    let row = pool.get(metrics).await;
    assert_eq!((row.get(vm_metrics::MEMORY_ACTUAL), row.get(vm_metrics::VCPUS_NUMBER)), (0, 0));
    assert!(row.get(vm_metrics::STATE).is_empty());
}
