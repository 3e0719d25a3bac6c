//! What the published model does not say and we had to decide: parameters that may be left out, values of new rows,
//! relations.
#![allow(clippy::unwrap_used, missing_docs)]

use datamodel::{ClassId, MessageDef, Relation, Type, Value, model};

fn message(name: &str) -> &'static MessageDef {
    model().message(name).unwrap_or_else(|| panic!("no {name}"))
}

fn required(message: &MessageDef) -> usize {
    message.params.iter().filter(|param| param.default.is_none()).count()
}

#[test]
fn only_a_tail_of_the_parameters_may_be_left_out() {
    for message in model().messages() {
        let mut tail = message.params.iter().skip_while(|param| param.default.is_none());
        assert!(tail.all(|param| param.default.is_some()), "{}", message.full_name);
    }
}

#[test]
fn calls_of_clients_older_than_a_parameter_are_complete() {
    for (name, enough) in [
        ("session.login_with_password", 2),
        ("VM.snapshot", 2),
        ("VM.migrate_send", 6),
        ("VM.assert_can_migrate", 6),
        ("VDI.snapshot", 1),
        ("VDI.clone", 1),
        ("VDI.copy", 1),
        ("VDI.introduce", 9),
        ("SR.create", 8),
        ("SR.probe", 3),
        ("SR.introduce", 6),
        ("host.evacuate", 1),
        ("host.apply_edition", 2),
        ("pool.enable_ha", 1),
        ("pool.sync_updates", 2),
        ("Bond.create", 3),
        ("tunnel.create", 2),
        ("VGPU.create", 2),
        ("VUSB.create", 2),
        ("VIF.configure_ipv4", 2),
        ("PIF.introduce", 3),
        ("PIF.db_introduce", 15),
        ("Cluster.create", 3),
        ("blob.create", 1),
        ("VM.create_new_blob", 3),
        // Nothing came later to these: all of it is wanted.
        ("VM.start", 3),
        ("VM.clone", 2),
        ("VM.copy", 3),
        ("event.from", 3),
        ("task.create", 2),
    ] {
        assert_eq!(required(message(name)), enough, "{name}");
    }
}

#[test]
fn a_new_row_holds_what_a_person_would_have_chosen() {
    for (class, field, word) in [
        ("VM", "power_state", Value::Enum("Halted")),
        ("VM", "actions_after_shutdown", Value::Enum("destroy")),
        ("VM", "actions_after_reboot", Value::Enum("restart")),
        ("VM", "actions_after_crash", Value::Enum("restart")),
        ("VM", "domid", Value::Int(-1)),
        ("VM", "HVM_shadow_multiplier", Value::Float(1.0)),
        ("VBD", "type", Value::Enum("Disk")),
        ("VBD", "mode", Value::Enum("RW")),
        ("VDI", "type", Value::Enum("user")),
        ("console", "protocol", Value::Enum("rfb")),
        ("task", "status", Value::Enum("pending")),
        ("network", "MTU", Value::Int(1500)),
    ] {
        let class = ClassId::named(class).unwrap().def();
        let field = class.field_def(class.field(field).unwrap()).unwrap();
        assert_eq!(field.default, word, "{}.{}", class.name, field.name);
    }
}

#[test]
fn a_set_of_references_is_kept_by_its_other_end_or_has_none() {
    // What one object says of others; those say nothing of it.
    let one_way = [
        "subject.roles",
        "role.subroles",
        "pool.repositories",
        "host.updates_requiring_reboot",
        "PCI.dependencies",
        "VGPU_type.compatible_types_in_vm",
        "Observer.hosts",
    ];
    let alone: Vec<String> = model()
        .classes()
        .iter()
        .flat_map(|class| class.fields.iter().map(move |field| (class, field)))
        .filter(|(_, field)| matches!(&field.ty, Type::Set(inner) if matches!(**inner, Type::Ref(_))))
        .filter(|(_, field)| !matches!(field.relation, Some(Relation::Follower { .. } | Relation::Pair { .. })))
        .map(|(class, field)| format!("{}.{}", class.name, field.name))
        .collect();
    assert_eq!(alone, one_way);
}
