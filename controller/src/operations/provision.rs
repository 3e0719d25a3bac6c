//! A template becomes a VM, with the disks that its `other_config["disks"]` asks for. One step for each disk; if one
//! fails, those that were made go, and the template is a template still.

use std::collections::{BTreeMap, BTreeSet};

use datamodel::enums::{StorageOperations as SrOp, VbdMode, VbdType, VdiType, VmOperations as Op};
use datamodel::fields::{vbd, vdi, vm, vm_metrics};
use datamodel::{ClassKind, FieldValue, OpaqueRef, Ref, Sr, Value, Vbd, Vdi, Vm, errors};
use quick_xml::events::Event;
use raft_store::NewRow;

use super::{Draft, Ending, Kind, Planned, Seen, run};
use crate::call::{Call, find};
use crate::failure::{Served, refuse};
use crate::lifecycle;
use crate::storage::{choose_device, reach, vdi as store, volumes};

/// The keys by which a template says what is made when it is provisioned.
const DISKS: &str = "disks";
const POSTINSTALL: &str = "postinstall";

/// A disk that a template asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    device: String,
    size: i64,
    sr: String,
    bootable: bool,
    ty: VdiType,
}

/// `<provision><disk device="0" size="8589934592" sr="UUID" bootable="true" type="system"/></provision>`
fn parse(text: &str) -> Served<Vec<Asked>> {
    let bad = |why: String| errors::invalid_value("other_config:disks", why);
    let mut reader = quick_xml::Reader::from_str(text);
    let mut disks = Vec::new();
    loop {
        match reader.read_event() {
            Ok(Event::Eof) => return Ok(disks),
            Ok(Event::Start(element) | Event::Empty(element)) if element.name().as_ref() == "disk" => {
                let mut attributes = BTreeMap::new();
                for attribute in element.attributes() {
                    let attribute = attribute.map_err(|error| bad(error.to_string()))?;
                    let value = attribute.value.into_owned();
                    attributes.insert(attribute.key.as_ref().to_owned(), value);
                }
                let said = |name: &str| attributes.get(name).cloned().unwrap_or_default();
                let size = said("size").parse().ok().filter(|size| *size > 0);
                disks.push(Asked {
                    device: said("device"),
                    size: size.ok_or_else(|| bad(format!("the size of a disk is {:?}", said("size"))))?,
                    sr: said("sr"),
                    bootable: said("bootable") == "true",
                    ty: said("type").parse().unwrap_or(VdiType::User),
                });
            }
            Ok(_) => {}
            Err(error) => return refuse(bad(error.to_string())),
        }
    }
}

struct Provision;

pub(super) const KINDS: &[&dyn Kind] = &[&Provision];

/// `VM.provision`.
pub(crate) async fn provision(call: &Call, this: Ref<Vm>) -> Served<()> {
    let row = call.row(this)?;
    lifecycle::check(&call.state, &row, Op::Provision)?;
    let asked = parse(row.get(vm::OTHER_CONFIG).get(DISKS).map_or("", String::as_str))?;
    if asked.is_empty() {
        // Rows alone: one transaction.
        let mut change = call.transaction();
        change.expect_row(&row);
        make(call.now(), &call.state, &mut change, &row);
        super::refresh(&call.state, &mut change);
        return call.commit(change).await.map(drop);
    }
    run(call, &Provision, move |draft| begin(draft, this)).await.map(drop)
}

fn begin(draft: &mut Draft<'_>, this: Ref<Vm>) -> Served<()> {
    let row = draft.row(this)?;
    lifecycle::check(draft.state, &row, Op::Provision)?;
    draft.hold(&row, Op::Provision.as_str());
    let mut held = BTreeSet::new();
    let asked = parse(row.get(vm::OTHER_CONFIG).get(DISKS).map_or("", String::as_str))?;
    for (place, disk) in asked.iter().enumerate() {
        let Some(sr_row) = draft.state.by_uuid(Sr::ID, &disk.sr).cloned() else {
            return refuse(errors::uuid_invalid("sr", disk.sr.as_str()));
        };
        choose_device(draft.state, &row, &disk.device)?;
        let sr_ref = sr_row.typed::<Sr>();
        if held.insert(sr_ref) {
            store::hold_store(draft, sr_ref, SrOp::VdiCreate)?;
        }
        let host_ref = reach::worker(draft.state, &[sr_ref], None)?;
        let (made, uuid) = (draft.call.reference::<Vdi>(), draft.call.uuid());
        draft.note(format!("disk/{place}"), format!("{made} {uuid} {sr_ref} {host_ref}"));
    }
    draft.about(this);
    Ok(())
}

struct Noted {
    asked: Asked,
    made: Ref<Vdi>,
    uuid: String,
    sr: Ref<Sr>,
    host: Ref<datamodel::Host>,
}

fn noted(seen: &Seen<'_>) -> Served<Vec<Noted>> {
    let row = find(seen.state, seen.journal.vm)?;
    let asked = parse(row.get(vm::OTHER_CONFIG).get(DISKS).map_or("", String::as_str))?;
    let read = |(place, asked): (usize, Asked)| {
        let note = seen.journal.parameter(&format!("disk/{place}"));
        let words: Vec<&str> = note.split(' ').collect();
        let [made, uuid, sr, host] = words.as_slice() else { return None };
        let object = |text: &&str| text.parse::<OpaqueRef>().ok();
        Some(Noted {
            asked,
            made: Ref::from_opaque(object(made)?),
            uuid: (*uuid).to_owned(),
            sr: Ref::from_opaque(object(sr)?),
            host: Ref::from_opaque(object(host)?),
        })
    };
    Ok(asked.into_iter().enumerate().map_while(read).collect())
}

impl Kind for Provision {
    fn verb(&self) -> &'static str {
        "vm_provision"
    }

    fn plan(&self, seen: &Seen<'_>) -> Served<Vec<Planned>> {
        let step = |disk: Noted| {
            let wanted = (disk.asked.size, disk.asked.ty, BTreeMap::new());
            volumes::create(seen.state, disk.sr, &disk.uuid, wanted, disk.host)
        };
        noted(seen)?.into_iter().map(step).collect()
    }

    fn record(&self, end: &mut Ending<'_>) -> Served<Value> {
        let row = find(end.state, end.journal.vm)?;
        for (place, disk) in noted(&end.seen())?.into_iter().enumerate() {
            let fields = vec![
                (vdi::NAME_LABEL.index(), format!("{} {}", row.name_label(), disk.asked.device).into_value()),
                (vdi::NAME_DESCRIPTION.index(), "Made when its VM was provisioned".to_owned().into_value()),
                (vdi::TYPE.index(), disk.asked.ty.into_value()),
            ];
            let volume = end.journal.volume(place)?;
            let new = volumes::Made { uuid: &disk.uuid, sr: disk.sr, volume, fields };
            volumes::insert(end.state, end.change, disk.made, new);
            end.change.insert(
                NewRow::new(Ref::<Vbd>::new(end.shared.uuid()), end.shared.uuid())
                    .with(vbd::VM, end.journal.vm)
                    .with(vbd::VDI, disk.made)
                    .with(vbd::USERDEVICE, disk.asked.device)
                    .with(vbd::BOOTABLE, disk.asked.bootable)
                    .with(vbd::MODE, VbdMode::Rw)
                    .with(vbd::TYPE, VbdType::Disk)
                    .with(vbd::UNPLUGGABLE, true)
                    .with(vbd::OTHER_CONFIG, BTreeMap::from([("owner".to_owned(), String::new())])),
            );
        }
        make(end.shared.now(), end.state, end.change, &row);
        Ok(Value::Void)
    }

    fn cancellable(&self) -> bool {
        true
    }
}

/// A template is a VM from now on.
fn make(
    now: datamodel::Timestamp,
    state: &raft_store::State,
    change: &mut raft_store::Transaction,
    row: &raft_store::Row,
) {
    let this = row.typed::<Vm>();
    change.set(this, vm::IS_A_TEMPLATE, false);
    for key in [DISKS, POSTINSTALL] {
        change.take(this, vm::OTHER_CONFIG, key.to_owned());
    }
    let metrics = row.get(vm::METRICS);
    if state.row(metrics).is_some() {
        change.set(metrics, vm_metrics::INSTALL_TIME, now);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_a_template_asks_for_is_read_as_the_documents_write_it() {
        let text = r#"<provision><disk device="0" size="8589934592" sr="abc" bootable="true" type="system"/>
                      <disk device="1" size="1024" sr="" bootable="false" type="user"></disk></provision>"#;
        let disks = parse(text).unwrap();
        let first =
            Asked { device: "0".into(), size: 8_589_934_592, sr: "abc".into(), bootable: true, ty: VdiType::System };
        assert_eq!((disks.len(), &disks[0]), (2, &first));
        assert_eq!((disks[1].sr.as_str(), disks[1].bootable, disks[1].ty), ("", false, VdiType::User));
        assert_eq!(parse("").unwrap(), []);
        for bad in [r#"<provision><disk size="0"/></provision>"#, r#"<provision><disk size="x"/></provision>"#] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
