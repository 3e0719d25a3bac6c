//! The messages that follow from the fields: nobody types them, everybody may call them.

use crate::load::{ClassFile, leak, lifecycle, role};
use crate::model::{ClassDef, FieldDef, Implicit, Lifecycle, MessageDef, Param, Qualifier, RbacRole};
use crate::{Type, Value};

/// Appends every derived message of a class.
pub(crate) fn implicit(file: &ClassFile, class: &ClassDef, out: &mut Vec<MessageDef>) {
    if !class.stored || class.internal {
        return;
    }
    let this = || Type::Ref(class.id);
    let record = || Type::Record(class.id);
    let class_role = file.role.as_deref().map_or(RbacRole::PoolAdmin, role);
    let reading_role = file.reading_role.as_deref().map_or(RbacRole::ReadOnly, role);
    let state = lifecycle(file.state.as_deref());
    for name in &file.generated {
        let (what, params, result) = match name.as_str() {
            "get_all" => (Implicit::GetAll, vec![], set(this())),
            "get_all_records" => (Implicit::GetAllRecords, vec![], map(this(), record())),
            "get_by_uuid" => (Implicit::GetByUuid, vec![param("uuid", Type::String)], this()),
            "get_by_name_label" => (Implicit::GetByNameLabel, vec![param("label", Type::String)], set(this())),
            "get_record" => (Implicit::GetRecord, vec![param("self", this())], record()),
            "create" => (Implicit::Create, vec![param("args", record())], this()),
            "destroy" => (Implicit::Destroy, vec![param("self", this())], Type::Void),
            other => unreachable_name(class, other),
        };
        let reads = !matches!(what, Implicit::Create | Implicit::Destroy);
        let lowest =
            file.generated_roles.get(name).map_or(if reads { reading_role } else { class_role }, |name| role(name));
        let since = leak(file.generated_since.get(name).unwrap_or(&file.since).clone());
        out.push(message(class, name, what, params, result, lowest, (since, state), false));
        if what == Implicit::GetAll {
            let expression = || vec![param("expr", Type::String)];
            let when = (since, state);
            out.push(message(
                class,
                "get_all_where",
                Implicit::GetAllWhere,
                expression(),
                set(this()),
                lowest,
                when,
                true,
            ));
            let records = map(this(), record());
            out.push(message(
                class,
                "get_all_records_where",
                Implicit::GetAllRecordsWhere,
                expression(),
                records,
                lowest,
                when,
                true,
            ));
        }
    }
    for (field, index) in class.fields.iter().zip(0_u16..).filter(|(field, _)| !field.hidden) {
        accessors(class, field, index, out);
    }
}

fn accessors(class: &ClassDef, field: &FieldDef, index: u16, out: &mut Vec<MessageDef>) {
    let mut push = |prefix: &str, what: Implicit, values: Vec<Param>, result: Type, role: RbacRole| {
        let name = format!("{prefix}{}", field.name);
        let mut params = vec![param("self", Type::Ref(class.id))];
        params.extend(values);
        out.push(message(class, &name, what, params, result, role, (field.since, field.state), false));
    };
    if field.getter {
        push("get_", Implicit::Get(index), vec![], field.ty.clone(), field.reading_role);
    }
    if field.qualifier != Qualifier::ReadWrite {
        return;
    }
    push("set_", Implicit::Set(index), vec![param("value", field.ty.clone())], Type::Void, field.role);
    match &field.ty {
        Type::Set(element) => {
            let value = || vec![param("value", element.as_ref().clone())];
            push("add_", Implicit::AddToSet(index), value(), Type::Void, field.role);
            push("remove_", Implicit::RemoveFromSet(index), value(), Type::Void, field.role);
        }
        Type::Map(key, value) => {
            let key = || param("key", key.as_ref().clone());
            let entry = vec![key(), param("value", value.as_ref().clone())];
            push("add_to_", Implicit::AddToMap(index), entry, Type::Void, field.role);
            push("remove_from_", Implicit::RemoveFromMap(index), vec![key()], Type::Void, field.role);
        }
        _ => {}
    }
}

#[allow(clippy::too_many_arguments)]
fn message(
    class: &ClassDef,
    name: &str,
    what: Implicit,
    params: Vec<Param>,
    result: Type,
    min_role: RbacRole,
    (since, state): (&'static str, Lifecycle),
    hidden: bool,
) -> MessageDef {
    MessageDef {
        class: class.id,
        name: leak(name.to_owned()),
        full_name: leak(format!("{}.{name}", class.name)),
        params,
        takes_session: true,
        result,
        errors: Vec::new(),
        min_role: Some(min_role),
        implicit: Some(what),
        asynchronous: matches!(what, Implicit::Create | Implicit::Destroy),
        since,
        state,
        hidden,
    }
}

fn param(name: &'static str, ty: Type) -> Param {
    Param { name, ty, default: None::<Value> }
}

fn set(element: Type) -> Type {
    Type::Set(Box::new(element))
}

fn map(key: Type, value: Type) -> Type {
    Type::Map(Box::new(key), Box::new(value))
}

/// A class file asks for a message that no rule makes: a defect of the build, caught by the test that loads the model.
#[allow(clippy::panic)]
fn unreachable_name(class: &ClassDef, name: &str) -> ! {
    panic!("class file {}: nothing generates {name}", class.name)
}
