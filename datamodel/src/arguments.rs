//! The arguments of a call, checked for number and type before anything else happens.

use crate::errors;
use crate::input::{Input, Misfit, convert};
use crate::{ApiError, MessageDef, Value};

/// Arguments of the right number and types.
#[derive(Debug, Clone, PartialEq)]
pub struct Arguments {
    /// The session as the client spelled it; empty where the message takes none.
    pub session: String,
    /// One value for each parameter.
    pub values: Vec<Value>,
    /// An argument that is no reference: to be answered once the session has been checked.
    pub deferred: Option<ApiError>,
}

/// Checks number and types of a call's arguments.
///
/// # Errors
/// `MESSAGE_PARAMETER_COUNT_MISMATCH(method, expected, received)`, counted without the session, and what [`convert`] raises.
pub fn arguments(message: &MessageDef, inputs: Vec<Input>) -> Result<Arguments, ApiError> {
    let mut inputs = inputs.into_iter();
    let mut session = String::new();
    let required = message.params.iter().filter(|param| param.default.is_none()).count();
    let mismatch = |received: usize| {
        errors::message_parameter_count_mismatch(message.full_name, required.to_string(), received.to_string())
    };
    if message.takes_session {
        session = match inputs.next() {
            Some(Input::Str(text)) => text,
            Some(_) => return Err(errors::field_type_error("session_id")),
            None => return Err(mismatch(0)),
        };
    }
    let received = inputs.len();
    // A message that has optional parameters ignores surplus values; one that has none does not.
    if received < required || (received > message.params.len() && required == message.params.len()) {
        return Err(mismatch(received));
    }
    let mut values = Vec::with_capacity(message.params.len());
    let mut deferred = None;
    for param in &message.params {
        let value = match (inputs.next(), &param.default) {
            (Some(input), _) => match convert(&param.ty, input, param.name) {
                Ok(value) => value,
                Err(Misfit::Refused(error)) => return Err(error),
                Err(Misfit::NoSuchHandle(error)) => {
                    deferred.get_or_insert(error);
                    param.ty.zero()
                }
            },
            (None, Some(default)) => default.clone(),
            (None, None) => return Err(mismatch(received)),
        };
        values.push(value);
    }
    Ok(Arguments { session, values, deferred })
}
