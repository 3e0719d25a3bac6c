//! What the pool tells people: rows of the class message.

use datamodel::Message;
use datamodel::Ref;
use datamodel::enums::Cls;
use datamodel::fields::message;
use raft_store::{NewRow, Transaction};

use crate::controller::Shared;

/// Adds a message about an object to a transaction. Priority 1 is the most urgent, 5 is for the record.
pub(crate) fn tell(
    shared: &Shared,
    change: &mut Transaction,
    name: &str,
    priority: i64,
    cls: Cls,
    obj_uuid: &str,
    body: String,
) {
    change.insert(
        NewRow::new(Ref::<Message>::new(shared.uuid()), shared.uuid())
            .with(message::NAME, name.to_owned())
            .with(message::PRIORITY, priority)
            .with(message::CLS, cls)
            .with(message::OBJ_UUID, obj_uuid.to_owned())
            .with(message::TIMESTAMP, shared.now())
            .with(message::BODY, body),
    );
}
