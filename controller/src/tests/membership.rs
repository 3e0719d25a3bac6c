//! What a host that joins must be, and what is left of one that goes.

use std::collections::BTreeMap;

use datamodel::enums::{VmOperations, VmPowerState};
use datamodel::fields::{bond, host, host_metrics, member, pool, sm, sr, vdi, vm};
use datamodel::{
    Bond, ClassKind, Host, HostMetrics, Member, OpaqueRef, Pbd, Pool as PoolRow, Ref, Sm, Sr, Tunnel, Vdi, Vm,
};
use raft_store::{NewRow, State, Transaction, decode_rows};
use uuid::Uuid;

use super::{Pool, text};
use crate::membership::{admission, precondition};

/// The two pools of a join, seen by who decides.
async fn verdict(ours: &Pool, theirs: &Pool, force: bool) -> String {
    let (ours, theirs) = (ours.store().read().await.unwrap(), theirs.store().read().await.unwrap());
    precondition::check(&ours, &theirs, force).err().map_or_else(|| "may join".to_owned(), |error| error.to_string())
}

fn only<C: ClassKind>(state: &State) -> Ref<C> {
    state.all::<C>().next().unwrap().typed()
}

/// A change of the joining host, undone again when it has been looked at.
async fn with(
    ours: &Pool,
    theirs: &Pool,
    change: impl Fn(&State, &mut Transaction),
    undo: impl Fn(&State, &mut Transaction),
) -> String {
    let state = theirs.store().read().await.unwrap();
    theirs.commit(|transaction| change(&state, transaction)).await;
    let verdict = verdict(ours, theirs, false).await;
    theirs.commit(|transaction| undo(&state, transaction)).await;
    verdict
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_may_join_unless_one_of_the_documented_conditions_speaks_against_it() {
    let (ours, theirs) = (Pool::start().await, Pool::start().await);
    assert_eq!(verdict(&ours, &theirs, false).await, "may join");
    assert_eq!(verdict(&ours, &ours, false).await, "OPERATION_NOT_ALLOWED(Host cannot become slave of itself)");

    let guest = theirs.vm("a guest").await;
    let power = |state| {
        move |_: &State, change: &mut Transaction| {
            change.set(guest, vm::POWER_STATE, state);
        }
    };
    let halted = power(VmPowerState::Halted);
    assert_eq!(
        with(&ours, &theirs, power(VmPowerState::Running), halted).await,
        "JOINING_HOST_CANNOT_HAVE_RUNNING_VMS()"
    );
    let halted = power(VmPowerState::Halted);
    assert_eq!(with(&ours, &theirs, power(VmPowerState::Suspended), halted).await, "may join");
    let busy = |_: &State, change: &mut Transaction| {
        change.put(guest, vm::CURRENT_OPERATIONS, "OpaqueRef:task".to_owned(), VmOperations::Start);
    };
    let idle = |_: &State, change: &mut Transaction| {
        change.take(guest, vm::CURRENT_OPERATIONS, "OpaqueRef:task".to_owned());
    };
    assert_eq!(with(&ours, &theirs, busy, idle).await, "JOINING_HOST_CANNOT_HAVE_VMS_WITH_CURRENT_OPERATIONS()");

    let ha = |on| {
        move |state: &State, change: &mut Transaction| {
            change.set(only::<PoolRow>(state), pool::HA_ENABLED, on);
        }
    };
    assert_eq!(with(&ours, &theirs, ha(true), ha(false)).await, "HA_IS_ENABLED()");
    let another: Ref<Host> = Ref::new(Uuid::new_v4());
    let more = |_: &State, change: &mut Transaction| {
        change.insert(NewRow::new(another, Uuid::new_v4()));
    };
    let fewer = |_: &State, change: &mut Transaction| {
        change.delete(another);
    };
    assert_eq!(with(&ours, &theirs, more, fewer).await, "JOINING_HOST_CANNOT_BE_MASTER_OF_OTHER_HOSTS()");

    let bonded: Ref<Bond> = Ref::new(Uuid::new_v4());
    let more = |_: &State, change: &mut Transaction| {
        change.insert(NewRow::new(bonded, Uuid::new_v4()).with(bond::LINKS_UP, 2));
    };
    let fewer = |_: &State, change: &mut Transaction| {
        change.delete(bonded);
    };
    assert_eq!(with(&ours, &theirs, more, fewer).await, "POOL_JOINING_HOST_HAS_BONDS()");
    let tunnel: Ref<Tunnel> = Ref::new(Uuid::new_v4());
    let more = |_: &State, change: &mut Transaction| {
        change.insert(NewRow::new(tunnel, Uuid::new_v4()));
    };
    let fewer = |_: &State, change: &mut Transaction| {
        change.delete(tunnel);
    };
    assert_eq!(with(&ours, &theirs, more, fewer).await, "POOL_JOINING_HOST_HAS_TUNNELS()");

    let shared = |state: &State| state.all::<Sr>().find(|row| row.get(sr::SHARED)).unwrap().typed::<Sr>();
    let disk: Ref<Vdi> = Ref::new(Uuid::new_v4());
    let more = |state: &State, change: &mut Transaction| {
        change.insert(NewRow::new(disk, Uuid::new_v4()).with(vdi::SR, shared(state)));
    };
    let fewer = |_: &State, change: &mut Transaction| {
        change.delete(disk);
    };
    assert_eq!(with(&ours, &theirs, more, fewer).await, "JOINING_HOST_CANNOT_CONTAIN_SHARED_SRS()");
}

#[tokio::test(flavor = "multi_thread")]
async fn differences_of_software_stop_a_join_and_only_some_of_them_can_be_forced() {
    let (ours, theirs) = (Pool::start().await, Pool::start().await);
    let version = |key: &'static str, value: &'static str| {
        move |state: &State, change: &mut Transaction| {
            change.put(only::<Host>(state), host::SOFTWARE_VERSION, key.to_owned(), value.to_owned());
        }
    };
    let state = theirs.store().read().await.unwrap();
    theirs.commit(|change| version("build_number", "another")(&state, change)).await;
    assert_eq!(verdict(&ours, &theirs, false).await, "HOSTS_NOT_HOMOGENEOUS(Software version differs)");
    assert_eq!(verdict(&ours, &theirs, true).await, "may join");
    theirs
        .commit(|change| {
            change.put(only::<Host>(&state), host::CPU_INFO, "vendor".to_owned(), "X".to_owned());
        })
        .await;
    assert_eq!(verdict(&ours, &theirs, true).await, "may join");
    theirs.commit(|change| version("db_schema", "0")(&state, change)).await;
    assert_eq!(verdict(&ours, &theirs, true).await, "POOL_JOINING_HOST_MUST_HAVE_SAME_DB_SCHEMA(0, 5.900)");
    theirs.commit(|change| version("platform_version", "0")(&state, change)).await;
    assert_eq!(verdict(&ours, &theirs, true).await, "HOSTS_NOT_COMPATIBLE()");
    theirs.commit(|change| version("platform_version", "3.2.1")(&state, change)).await;
    theirs.commit(|change| version("db_schema", "5.900")(&state, change)).await;

    let weaker = state.all::<Sm>().find(|row| row.get(sm::TYPE) == "file").unwrap().typed::<Sm>();
    theirs
        .commit(|change| {
            change.set(weaker, sm::FEATURES, BTreeMap::new());
        })
        .await;
    assert!(verdict(&ours, &theirs, true).await.starts_with("POOL_JOINING_SM_FEATURES_INCOMPATIBLE("));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_host_brings_can_be_read_again_and_is_none_of_its_pools_secrets() {
    let theirs = Pool::start().await;
    let guest = theirs.vm("brought along").await;
    let state = theirs.store().read().await.unwrap();
    let rows = admission::bring(&state);
    let bytes = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, rows).unwrap();
    let brought = decode_rows(&bytes).unwrap();
    assert_eq!(brought.row(guest).unwrap().get(vm::NAME_LABEL), "brought along");
    for class in ["session", "local_user", "pool_secret", "member", "answer", "task"] {
        let class = datamodel::ClassId::named(class).unwrap();
        assert_eq!(brought.count(class), 0, "{}", class.def().name);
    }
    let defaults = brought.all::<Vm>().filter(|row| row.get(vm::IS_DEFAULT_TEMPLATE)).count();
    assert_eq!(defaults, 0, "every pool has the templates");
    assert_eq!(theirs.refusal("pool.admit", vec![text("{}")]).await, ["HOSTS_NOT_COMPATIBLE"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_comes_in_ties_its_rows_to_the_pools_and_keeps_its_references() {
    let (ours, theirs) = (Pool::start().await, Pool::start().await);
    let guest = theirs.vm("brought along").await;
    let brought = theirs.store().read().await.unwrap();
    let newcomer = brought.all::<Host>().next().unwrap();
    let member_ref: Ref<Member> = Ref::new(Uuid::new_v4());
    ours.commit(|change| {
        let row = NewRow::new(member_ref, Uuid::new_v4())
            .with(member::HOST_UUID, newcomer.uuid().to_owned())
            .with(member::STANDING, "joining".to_owned())
            .with(member::REPLICA, false)
            .with(member::API_ADDRESS, "127.0.0.9".to_owned())
            .with(member::APPLICATION, admission::bring(&brought));
        change.insert(row);
    })
    .await;
    let state = ours.store().read().await.unwrap();
    let before = state.all::<datamodel::Network>().count();
    ours.commit(|change| {
        let row = state.row(member_ref).unwrap();
        admission::bring_in(&ours.controller.shared, &state, change, row).unwrap().unwrap();
    })
    .await;
    let state = ours.store().read().await.unwrap();
    let row = state.row(newcomer.typed::<Host>()).expect("references survive");
    assert_eq!((row.uuid(), row.get(host::ADDRESS).as_str()), (newcomer.uuid(), "127.0.0.9"));
    assert_eq!(state.row(guest).unwrap().get(vm::POWER_STATE), VmPowerState::Halted);
    assert_eq!(state.all::<datamodel::Network>().count(), before, "networks on the same bridge are one");
    // Every reference that came along leads somewhere, and both ends know one another.
    let of_ours: Vec<OpaqueRef> = state.all::<Pbd>().map(|row| row.reference).collect();
    let connected: Vec<Ref<Pbd>> = row.get(host::PBDS);
    assert_eq!(connected.len(), 2);
    assert!(connected.iter().all(|pbd| of_ours.contains(&pbd.opaque())));
    let metrics = state.all::<HostMetrics>().find(|metrics| metrics.typed::<HostMetrics>() == row.get(host::METRICS));
    assert!(!metrics.expect("metrics").get(host_metrics::LIVE));
    let control = state.row(row.get(host::CONTROL_DOMAIN)).expect("its control domain");
    assert_eq!(control.get(vm::RESIDENT_ON), row.typed::<Host>());
    assert!(row.get(host::RESIDENT_VMS).contains(&control.typed::<Vm>()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_master_is_neither_ejected_nor_declared_dead_and_only_a_pools_host_has_its_secret() {
    let pool = Pool::start().await;
    let host = pool.store().state().all::<Host>().next().unwrap().reference.to_string();
    assert_eq!(pool.refusal("pool.eject", vec![text(&host)]).await, ["INTERNAL_ERROR", "Cannot eject master"]);
    for message in ["host.declare_dead", "host.destroy"] {
        assert_eq!(pool.refusal(message, vec![text(&host)]).await, ["HOST_IS_LIVE", host.as_str()]);
    }
    let secret = match pool.ask("pool.initial_auth", Vec::new()).await.unwrap() {
        datamodel::Value::Str(secret) => secret.to_string(),
        other => panic!("{other:?}"),
    };
    let login = |secret: &str| vec![text("OpaqueRef:NULL"), text(secret)];
    let session = pool.call("session.slave_login", login(&secret)).await.unwrap();
    let session = super::reference(&super::value(session)).to_string();
    pool.call_in(&session, "VM.get_all", Vec::new()).await.unwrap();
    let refused = pool.call("session.slave_login", login("guessed")).await.unwrap_err();
    assert_eq!(refused.code, datamodel::errors::SESSION_AUTHENTICATION_FAILED);
    let reader = pool.session_as("pool-operator").await;
    let refused = pool.call_in(&reader, "pool.initial_auth", Vec::new()).await.unwrap_err();
    assert_eq!(refused.code, datamodel::errors::RBAC_PERMISSION_DENIED);
}
