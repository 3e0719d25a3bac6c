//! What every storage driver promises, put to each of them through the agent's own calls; and what those with bytes
//! promise about the bytes. Drivers that this machine's kernel is not enough for run in a machine of their own.
#![allow(clippy::expect_used, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod domains;
mod drivers;
mod images;
mod machine;
mod promises;

/// Promises of a driver that this machine's kernel is enough for.
macro_rules! here {
    ($driver:ident $file:ident: $($promise:ident)+) => {
        mod $driver {
            use crate::$file::{self as promises, place};

            $(#[tokio::test] async fn $promise() { promises::$promise(place(stringify!($driver)).await).await; })+
        }
    };
}

/// Those of a driver that needs an NFS server or LVM.
macro_rules! in_the_machine {
    ($driver:ident $file:ident: $($promise:ident)+) => {
        mod $driver {
            use crate::$file::{self as promises, place};

            $(
                #[tokio::test]
                #[ignore = "run in a machine of its own: every_promise_holds_on_…"]
                async fn $promise() { promises::$promise(place(stringify!($driver)).await).await; }
            )+
        }
    };
}

/// What every store promises.
macro_rules! a_store {
    ($where:ident $driver:ident) => {
        $where! { $driver promises:
            a_volume_is_made_grown_and_removed
            a_snapshot_is_read_only_and_a_clone_is_not
            a_repeated_step_is_done_once_and_numbers_tell_steps_apart
            an_agent_that_begins_anew_has_its_stores_and_volumes
            what_is_not_there_is_refused_by_its_name
            a_volume_is_copied_and_goes_back_to_a_snapshot
            a_store_goes_with_all_its_volumes
            a_deposed_master_changes_no_volume
        }
    };
}

a_store!(here file);
a_store!(here ext);
a_store!(here sim);
a_store!(in_the_machine nfs);
a_store!(in_the_machine lvm);

/// What a store with bytes in it promises of them.
mod bytes {
    macro_rules! bytes {
        ($where:ident $driver:ident) => {
            $where! { $driver images: what_is_written_after_a_snapshot_is_in_the_volume_alone }
        };
    }
    bytes!(here file);
    bytes!(in_the_machine nfs);
    bytes!(in_the_machine lvm);
}

/// What a directory of images promises of them.
mod of_images {
    macro_rules! images {
        ($where:ident $driver:ident) => {
            $where! { $driver images:
                a_base_with_one_image_left_is_joined_with_it
                an_image_that_somebody_has_open_is_in_use_for_everybody_else
                an_image_that_is_none_is_damaged_and_one_that_is_gone_is_not_there
                images_that_came_without_the_pool_are_volumes_under_their_own_names
                memory_of_a_guest_goes_into_an_image_without_a_format
            }
        };
    }
    images!(here file);
    images!(in_the_machine nfs);
}

/// What a store promises of the volumes that domains have.
mod of_domains {
    macro_rules! domains {
        ($where:ident $driver:ident: $($more:ident)*) => {
            $where! { $driver domains: a_guest_writes_to_its_volume_and_not_to_its_snapshot $($more)* }
        };
    }
    domains!(here file: a_volume_of_a_domain_is_in_use_on_every_host);
    domains!(in_the_machine nfs: a_volume_of_a_domain_is_in_use_on_every_host);
    domains!(in_the_machine lvm:);
}
