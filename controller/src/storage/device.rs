//! Names of a VM's drives: a number, `xvda`, `hda` and `sda` name the same place.

use std::collections::BTreeSet;

use datamodel::enums::{DomainType, VbdType};
use datamodel::fields::{vbd, vm};
use datamodel::{ApiError, Ref, Vbd, errors};
use raft_store::{Row, State};

/// The last place.
pub(crate) const LAST: u32 = 254;
/// Places that the old names of IDE disks reach.
const IDE: u32 = 4;

/// Lets the pool choose.
const AUTODETECT: &str = "autodetect";

/// `0` → `a`, `25` → `z`, `26` → `aa`.
fn letters(place: u32) -> String {
    let mut rest = place;
    let mut out = Vec::new();
    loop {
        out.push(char::from(b'a' + u8::try_from(rest % 26).unwrap_or(0)));
        if rest < 26 {
            break;
        }
        rest = rest / 26 - 1;
    }
    out.into_iter().rev().collect()
}

fn place_of_letters(text: &str) -> Option<u32> {
    if text.is_empty() || text.len() > 3 || !text.bytes().all(|letter| letter.is_ascii_lowercase()) {
        return None;
    }
    text.bytes()
        .try_fold(0_u32, |place, letter| place.checked_mul(26)?.checked_add(u32::from(letter - b'a') + 1))?
        .checked_sub(1)
}

/// The place that a name stands for.
pub(crate) fn place(name: &str) -> Option<u32> {
    let named = || ["xvd", "hd", "sd"].iter().find_map(|prefix| place_of_letters(name.strip_prefix(prefix)?));
    name.parse().ok().or_else(named).filter(|place| *place <= LAST)
}

/// The name of a drive inside its guest.
pub(crate) fn name(vm_row: &Row, drive: &Row) -> String {
    let Some(place) = place(&drive.get(vbd::USERDEVICE)) else { return drive.get(vbd::USERDEVICE) };
    let emulated = vm_row.get(vm::DOMAIN_TYPE) == DomainType::Hvm && drive.get(vbd::TYPE) == VbdType::Cd;
    format!("{}{}", if emulated && place < IDE { "hd" } else { "xvd" }, letters(place))
}

/// Places of a VM that are taken.
pub(crate) fn taken(state: &State, vm_row: &Row) -> BTreeSet<u32> {
    let drives = vm_row.get(vm::VBDS).into_iter().filter_map(|reference: Ref<Vbd>| state.row(reference));
    drives.flat_map(|row| [row.get(vbd::USERDEVICE), row.get(vbd::DEVICE)]).filter_map(|name| place(&name)).collect()
}

/// Places of a VM that are free, as clients name them.
pub(crate) fn free(state: &State, vm_row: &Row) -> Vec<String> {
    let taken = taken(state, vm_row);
    (0..=LAST).filter(|place| !taken.contains(place)).map(|place| place.to_string()).collect()
}

/// The `userdevice` of a new drive.
///
/// # Errors
/// `INVALID_DEVICE` for a name that is none, `DEVICE_ALREADY_EXISTS` for one that is taken.
pub(crate) fn choose(state: &State, vm_row: &Row, asked: &str) -> Result<String, ApiError> {
    if asked == AUTODETECT {
        return free(state, vm_row).into_iter().next().ok_or_else(|| errors::invalid_device(asked));
    }
    let place = place(asked).ok_or_else(|| errors::invalid_device(asked))?;
    if taken(state, vm_row).contains(&place) {
        return Err(errors::device_already_exists(asked));
    }
    Ok(asked.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_and_the_names_of_its_place_are_one() {
        for (number, xvd) in [(0, "xvda"), (3, "xvdd"), (25, "xvdz"), (26, "xvdaa"), (254, "xvdiu")] {
            assert_eq!(format!("xvd{}", letters(number)), xvd);
            assert_eq!((place(xvd), place(&number.to_string())), (Some(number), Some(number)));
        }
        assert_eq!((place("hdb"), place("sdc")), (Some(1), Some(2)));
        for none in ["", "255", "xvd", "xvdiv", "nvme0", "xvdA", "-1"] {
            assert_eq!(place(none), None, "{none}");
        }
    }
}
