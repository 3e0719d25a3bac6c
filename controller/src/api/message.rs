//! Messages of the class message: what the pool tells people.

use datamodel::{ClassKind, Filter, Message, Ref, Value};

use crate::call::Call;
use crate::failure::Served;

pub(super) async fn get_all(cx: &Call) -> Served<Vec<Ref<Message>>> {
    Ok(cx.state.all::<Message>().map(|row| row.typed()).collect())
}

fn record(row: &raft_store::Row) -> (datamodel::Key, Value) {
    let fields = row.class.def().fields.iter().zip(row.values());
    let members = fields.map(|(field, value)| (field.name.into(), value.clone())).collect();
    (datamodel::Key::Ref(row.reference), Value::Record(members))
}

pub(super) async fn get_all_records(cx: &Call) -> Served<Value> {
    Ok(Value::Map(cx.state.all::<Message>().map(|row| record(row)).collect()))
}

pub(super) async fn get_all_records_where(cx: &Call, expression: String) -> Served<Value> {
    let filter = Filter::parse(&expression)?;
    let rows = cx.state.all::<Message>().filter(|row| filter.matches(Message::ID.def(), row.values()));
    Ok(Value::Map(rows.map(|row| record(row)).collect()))
}
