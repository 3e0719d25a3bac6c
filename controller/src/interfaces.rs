//! A VM's interfaces (VIFs): their places and addresses, what an agent is told of them, and when they are attached.
//!
//! An interface comes to its guest with the domain and goes with it.

use std::collections::BTreeSet;
use std::sync::Arc;

use datamodel::fields::{network, vif, vm};
use datamodel::{ApiError, Ref, Vif, errors};
use raft_store::{Row, State, Transaction};
use uuid::Uuid;

use crate::lifecycle;

/// The last place.
const LAST: u32 = 15;

fn of<'a>(state: &'a State, vm_row: &Row) -> impl Iterator<Item = &'a Arc<Row>> {
    vm_row.get(vm::VIFS).into_iter().filter_map(|reference: Ref<Vif>| state.row(reference))
}

/// Places of a VM that are free, as clients name them.
pub(crate) fn free(state: &State, vm_row: &Row) -> Vec<String> {
    let taken: BTreeSet<u32> = of(state, vm_row).filter_map(|row| row.get(vif::DEVICE).parse().ok()).collect();
    (0..=LAST).filter(|place| !taken.contains(place)).map(|place| place.to_string()).collect()
}

/// The place of a new interface, a decimal number.
///
/// # Errors
/// `INVALID_DEVICE`, `DEVICE_ALREADY_EXISTS`.
pub(crate) fn checked_place(state: &State, vm_row: &Row, asked: &str) -> Result<String, ApiError> {
    let place: u32 = asked.parse().ok().filter(|place| *place <= LAST).ok_or_else(|| errors::invalid_device(asked))?;
    let taken = |row: &Arc<Row>| row.get(vif::DEVICE).parse() == Ok(place);
    if of(state, vm_row).any(taken) { Err(errors::device_already_exists(asked)) } else { Ok(place.to_string()) }
}

/// A locally administered address.
pub(crate) fn address(chance: Uuid) -> String {
    let mut bytes = [0; 6];
    bytes.copy_from_slice(&chance.as_bytes()[..6]);
    bytes[0] = (bytes[0] & 0xfc) | 2;
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

/// An address that a client wants: six pairs of hexadecimal digits, of one card and not of a group.
///
/// # Errors
/// `MAC_INVALID`.
pub(crate) fn checked_address(asked: &str) -> Result<String, ApiError> {
    let pair = |pair: &str| {
        let plain = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
        plain.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = asked.split(':').map(pair).collect();
    let single = bytes.is_some_and(|bytes| bytes.len() == 6 && bytes.first().is_some_and(|first| first & 1 == 0));
    if single { Ok(asked.to_ascii_lowercase()) } else { Err(errors::mac_invalid(asked)) }
}

/// What an agent is told of those that a VM's domain is made with.
pub(crate) fn of_domain(state: &State, vm_row: &Row) -> Vec<proto::agent::Vif> {
    let wanted = of(state, vm_row).filter(|row| lifecycle::is_made_with(vm_row, row.get(vif::CURRENTLY_ATTACHED)));
    let told = wanted.map(|row| {
        let network = state.row(row.get(vif::NETWORK));
        let mtu = [Some(row.get(vif::MTU)), network.map(|network| network.get(network::MTU))];
        let mtu = mtu.into_iter().flatten().find_map(|mtu| u32::try_from(mtu).ok().filter(|mtu| *mtu > 0));
        proto::agent::Vif {
            vif: row.uuid().to_owned(),
            device: row.get(vif::DEVICE),
            mac: row.get(vif::MAC),
            bridge: network.map(|network| network.get(network::BRIDGE)).unwrap_or_default(),
            mtu: mtu.unwrap_or_default(),
        }
    });
    told.collect()
}

/// Every interface of a VM is part of its domain.
pub(crate) fn attached(state: &State, change: &mut Transaction, vm_row: &Row) {
    for row in of(state, vm_row) {
        change.set(row.typed::<Vif>(), vif::CURRENTLY_ATTACHED, true);
    }
}

/// A VM that is halted is on no network.
pub(crate) fn detached(state: &State, change: &mut Transaction, vm_row: &Row) {
    for row in of(state, vm_row).filter(|row| row.get(vif::CURRENTLY_ATTACHED)) {
        change.set(row.typed::<Vif>(), vif::CURRENTLY_ATTACHED, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_of_one_card_or_refused() {
        assert_eq!(checked_address("02:AB:00:00:00:01").as_deref(), Ok("02:ab:00:00:00:01"));
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:0g",
            "01:00:00:00:00:01",
            "2:0:0:0:0:1",
            "02-00-00-00-00-01",
            "02:00:00:00:00:+1",
        ] {
            assert_eq!(checked_address(bad), Err(errors::mac_invalid(bad)));
        }
        for _ in 0..100 {
            let made = address(Uuid::new_v4());
            assert_eq!(checked_address(&made).as_deref(), Ok(made.as_str()));
        }
    }
}
