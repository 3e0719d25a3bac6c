//! All of each table of what may be done to storage, on rows of a pool.

use std::collections::BTreeMap;

use datamodel::enums::{StorageOperations, VbdMode, VbdOperations, VbdType, VdiOperations, VmPowerState};
use datamodel::fields::{pbd, sm, sr, vbd, vdi, vm};
use datamodel::{ClassKind, Ref, Sm, Sr, Task, Vbd, Vdi, Vm, errors};
use raft_store::NewRow;
use uuid::Uuid;

use super::Pool;
use crate::storage::rules::{self, Company, Connected, Use};

const POWERS: [(VmPowerState, u8); 4] =
    [(VmPowerState::Halted, 1), (VmPowerState::Paused, 2), (VmPowerState::Suspended, 4), (VmPowerState::Running, 8)];

/// A pool whose drivers can do everything, so that the tables alone decide.
async fn able() -> (Pool, Ref<Sr>) {
    let pool = Pool::start().await;
    let features: BTreeMap<String, i64> = rules::DISKS
        .iter()
        .map(|row| row.1)
        .chain(rules::STORES.iter().map(|row| row.1))
        .map(|name| (name.to_owned(), 1))
        .collect();
    let drivers: Vec<Ref<Sm>> = pool.store().state().all::<Sm>().map(|row| row.typed()).collect();
    pool.commit(|change| {
        for driver in &drivers {
            change.set(*driver, sm::FEATURES, features.clone());
        }
    })
    .await;
    let store = pool.local();
    (pool, store)
}

async fn disk_and_drive(pool: &Pool, store: Ref<Sr>) -> (Ref<Vdi>, Ref<Vbd>, Ref<Vm>) {
    let this = pool.vm("owner").await;
    let (disk, drive) = (Ref::new(Uuid::new_v4()), Ref::new(Uuid::new_v4()));
    pool.commit(|change| {
        change.insert(
            NewRow::new(disk, Uuid::new_v4())
                .with(vdi::SR, store)
                .with(vdi::MANAGED, true)
                .with(vdi::IS_A_SNAPSHOT, true)
                .with(vdi::CBT_ENABLED, true),
        );
        change.insert(
            NewRow::new(drive, Uuid::new_v4())
                .with(vbd::VM, this)
                .with(vbd::VDI, disk)
                .with(vbd::USERDEVICE, "0".to_owned())
                .with(vbd::UNPLUGGABLE, true),
        );
    })
    .await;
    (disk, drive, this)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_on_a_disk_is_possible_for_exactly_the_users_of_the_table() {
    let (pool, store) = able().await;
    let (disk, drive, _) = disk_and_drive(&pool, store).await;
    let uses =
        [(false, VbdMode::Rw, Use::Nobody), (true, VbdMode::Ro, Use::Readers), (true, VbdMode::Rw, Use::Anybody)];
    for (attached, mode, needs) in uses {
        pool.commit(|change| {
            change.set(drive, vbd::CURRENTLY_ATTACHED, attached).set(drive, vbd::MODE, mode);
        })
        .await;
        let state = pool.store().read().await.unwrap();
        let row = state.row(disk).unwrap();
        let allowed = rules::vdi_allowed(&state, row);
        for operation in VdiOperations::ALL {
            let told = rules::check_vdi(&state, row, *operation);
            let rule = rules::DISKS.iter().find(|row| row.0 == *operation);
            let expected = rule.is_some_and(|(_, _, may)| match needs {
                Use::Nobody => true,
                Use::Readers => *may != Use::Nobody,
                Use::Anybody => *may == Use::Anybody,
            });
            assert_eq!(told.is_ok(), expected, "{operation} with {attached} {mode}: {told:?}");
            assert_eq!(allowed.contains(operation), expected);
            if let (Some(_), Err(error)) = (rule, told) {
                assert_eq!((error.code, error.params[1].as_str()), (errors::VDI_IN_USE, operation.as_str()));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_on_a_drive_is_possible_in_exactly_the_states_of_the_table() {
    let (pool, store) = able().await;
    let (disk, drive, this) = disk_and_drive(&pool, store).await;
    for (power, bit) in POWERS {
        for attached in [false, true] {
            for (ty, empty) in [(VbdType::Disk, false), (VbdType::Cd, false), (VbdType::Cd, true)] {
                pool.commit(|change| {
                    change.set(this, vm::POWER_STATE, power).set(drive, vbd::CURRENTLY_ATTACHED, attached);
                    change.set(drive, vbd::TYPE, ty).set(drive, vbd::EMPTY, empty);
                    change.set(drive, vbd::VDI, if empty { Ref::NULL } else { disk });
                })
                .await;
                let state = pool.store().read().await.unwrap();
                let row = state.row(drive).unwrap();
                for operation in VbdOperations::ALL {
                    let rule = rules::DRIVES.iter().find(|row| row.0 == *operation);
                    let cd = ty == VbdType::Cd;
                    let expected = rule.is_some_and(|(operation, states, wanted, emptiness)| {
                        states & bit != 0
                            && wanted.is_none_or(|wanted| wanted == attached)
                            && emptiness.is_none_or(|wanted| cd && wanted == empty)
                            && !(cd && *operation == VbdOperations::Plug)
                    });
                    let told = rules::check_vbd(&state, row, *operation);
                    let what = format!("{operation} while {power}, attached {attached}, {ty}, empty {empty}: {told:?}");
                    assert_eq!(told.is_ok(), expected, "{what}");
                    assert_eq!(rules::vbd_allowed(&state, row).contains(operation), expected, "{what}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_on_a_store_is_possible_for_exactly_the_connections_and_company_of_the_table() {
    let (pool, store) = able().await;
    let connection = pool.of(store).await.get(sr::PBDS)[0];
    let company: Vec<Option<StorageOperations>> =
        std::iter::once(None).chain(StorageOperations::ALL.iter().copied().map(Some)).collect();
    for attached in [true, false] {
        for under_way in &company {
            pool.commit(|change| {
                change.set(connection, pbd::CURRENTLY_ATTACHED, attached);
                let current = under_way.iter().map(|op| (Ref::<Task>::NULL.to_string(), *op)).collect();
                change.set(store, sr::CURRENT_OPERATIONS, current);
            })
            .await;
            let state = pool.store().read().await.unwrap();
            let row = state.row(store).unwrap();
            let company_of = |op| rules::STORES.iter().find(|row| row.0 == op).map(|row| row.3);
            for operation in StorageOperations::ALL {
                let rule = rules::STORES.iter().find(|row| row.0 == *operation);
                let expected = rule.is_some_and(|(_, _, connected, company)| {
                    let together = |company| company == Company::Together;
                    let alone = under_way.is_none_or(|op| together(*company) && company_of(op).is_some_and(together));
                    let reached = match connected {
                        Connected::Some => attached,
                        Connected::NoneOfThem => !attached,
                        Connected::Any => true,
                    };
                    alone && reached
                });
                let told = rules::check_sr(&state, row, *operation);
                assert_eq!(told.is_ok(), expected, "{operation} beside {under_way:?}, plugged {attached}: {told:?}");
                assert_eq!(rules::sr_allowed(&state, row).contains(operation), expected);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_on_a_disk_or_its_drives_keeps_others_out() {
    let (pool, store) = able().await;
    let (disk, drive, _) = disk_and_drive(&pool, store).await;
    let task = Ref::<Task>::NULL.to_string();
    for under_way in VdiOperations::ALL {
        pool.commit(|change| {
            change.set(disk, vdi::CURRENT_OPERATIONS, BTreeMap::from([(task.clone(), *under_way)]));
        })
        .await;
        let state = pool.store().read().await.unwrap();
        for (operation, ..) in rules::DISKS {
            let goes =
                *under_way == VdiOperations::Copy && matches!(operation, VdiOperations::Copy | VdiOperations::Clone);
            let told = rules::check_vdi(&state, state.row(disk).unwrap(), *operation);
            assert_eq!(told.is_ok(), goes, "{operation} beside {under_way}");
            if let Err(error) = told {
                let params = ["VDI".to_owned(), disk.to_string(), under_way.to_string(), task.clone()];
                assert_eq!((error.code, error.params), (errors::OTHER_OPERATION_IN_PROGRESS, params.to_vec()));
            }
        }
    }
    pool.commit(|change| {
        change.set(disk, vdi::CURRENT_OPERATIONS, BTreeMap::new());
        change.set(drive, vbd::CURRENT_OPERATIONS, BTreeMap::from([(task.clone(), VbdOperations::Attach)]));
    })
    .await;
    let state = pool.store().read().await.unwrap();
    let told = rules::check_vdi(&state, state.row(disk).unwrap(), VdiOperations::Destroy).unwrap_err();
    assert_eq!((told.code, told.params[0].as_str()), (errors::OTHER_OPERATION_IN_PROGRESS, "VBD"));
    assert!(rules::check_vdi(&state, state.row(disk).unwrap(), VdiOperations::Snapshot).is_ok());
    assert_eq!((Vdi::NAME, Vbd::NAME, Vm::NAME), ("VDI", "VBD", "VM"));
}
