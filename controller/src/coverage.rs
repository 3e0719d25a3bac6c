//! How much of the API has a function, as the coverage document says it.

use std::fmt::Write as _;

use datamodel::{Lifecycle, MessageDef, model};

use crate::membership::emergency;
use crate::{api, events};

fn implemented(message: &MessageDef) -> bool {
    message.implicit.is_some()
        || api::handler(message.full_name).is_some()
        || events::serves(message)
        || emergency::serves(message.full_name)
}

/// The text of `docs/api-coverage.md`.
#[must_use]
pub fn document() -> String {
    let mut rows = String::new();
    let mut totals = [0_usize; 4];
    let mut missing = String::new();
    for class in model().classes().iter().filter(|class| !class.internal) {
        let messages = || model().messages().iter().filter(|message| message.class == class.id && !message.hidden);
        let generic = messages().filter(|message| message.implicit.is_some()).count();
        let written = messages().filter(|message| message.implicit.is_none());
        let (removed, explicit): (Vec<_>, Vec<_>) =
            written.partition(|message| message.state == Lifecycle::Removed && !implemented(message));
        let served = explicit.iter().filter(|message| implemented(message)).count();
        for (total, count) in totals.iter_mut().zip([generic, explicit.len(), served, removed.len()]) {
            *total += count;
        }
        // Writing to a String cannot fail.
        let (name, functions, gone) = (class.name, explicit.len(), removed.len());
        let _ = writeln!(rows, "| {name} | {generic} | {functions} | {served} | {gone} |");
        let absent: Vec<_> =
            explicit.iter().filter(|message| !implemented(message)).map(|message| message.name).collect();
        if !absent.is_empty() {
            let _ = writeln!(missing, "- **{}**: {}", class.name, absent.join(", "));
        }
    }
    let [generic, explicit, served, removed] = totals;
    format!(
        "# API coverage\n\n\
         Written by `make coverage` from the data model and the table of functions; a test fails when it is stale.\n\n\
         *Generic* messages follow from the fields and are all served by one handler. *Explicit* ones have a function each,\n\
         or answer `NOT_IMPLEMENTED(method)`. *Removed* ones answer `MESSAGE_REMOVED`, as the model says,\n\
         unless they have a function here.\n\n\
         | class | generic | explicit | of these served | removed |\n|---|---|---|---|---|\n{rows}\
         | **all** | {generic} | {explicit} | {served} | {removed} |\n\n## Explicit messages without a function\n\n{missing}"
    )
}
