//! Consoles: the screen and the serial line of a VM, through any host, as long as its client wants.
//!
//! Clients go where `console.location` says, which is the host that runs the VM, whoever is the master. So every host
//! serves them, by its own copy of the pool, which may not have yet what the master has just written: a session that it
//! does not know is waited for.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use datamodel::enums::ConsoleProtocol;
use datamodel::fields::{console, member, vm};
use datamodel::{ClassKind, Console, Member, OpaqueRef, Pool, RbacRole, Ref, Vm, errors};
use raft_store::{Row, State};
use tokio::sync::mpsc;

use super::{ByteStream, Credentials, Declined, identify, parameter};
use crate::agent::AgentError;
use crate::call::Caller;
use crate::controller::Shared;
use crate::dispatch;

/// Where consoles are.
pub const CONSOLE: &str = "/console";
/// What the master has written is here within this, or was not written.
const CATCH_UP: Duration = Duration::from_secs(2);

/// A request for a console, as the gateway decoded it.
pub struct Knock {
    /// Who asks.
    pub caller: Caller,
    /// Names and values of the query, decoded, in their order.
    pub query: Vec<(String, String)>,
    /// Who it says that it comes from.
    pub credentials: Credentials,
}

/// A console that is open. It closes when either end is dropped.
pub struct Tunnel {
    /// What the VM shows.
    pub from: ByteStream,
    /// What is typed.
    pub to: mpsc::Sender<Bytes>,
}

/// Opens a console.
pub(crate) async fn connect(shared: &Arc<Shared>, knock: Knock) -> Result<Tunnel, Declined> {
    let (state, vm_row, console_row) = wait_for(shared, &knock).await?;
    let role = if vm_row.get(vm::IS_CONTROL_DOMAIN) { RbacRole::PoolAdmin } else { RbacRole::VmOperator };
    let who = identify(shared, &state, &knock.caller, &knock.credentials).await.ok_or(Declined::Unauthorized)?;
    dispatch::permit(&who.rights, role, || "http/connect_console".to_owned()).map_err(Declined::Forbidden)?;
    let host_ref = vm_row.get(vm::RESIDENT_ON);
    let offline = || Declined::Unavailable(errors::host_offline(host_ref));
    let member_row = state.all::<Member>().find(|row| row.get(member::HOST) == host_ref).ok_or_else(offline)?;
    let agent = shared.agents.at(&member_row.get(member::AGENT_ADDRESS)).map_err(|_| offline())?;
    let pool = state.all::<Pool>().next().map(|row| row.uuid().to_owned()).unwrap_or_default();
    let protocol = console_row.get(console::PROTOCOL).as_str();
    match agent.console(&pool, vm_row.uuid(), protocol).await {
        Ok(tunnel) => Ok(tunnel),
        Err(AgentError::Refused(refusal)) => Err(Declined::Absent(errors::internal_error(refusal.detail))),
        Err(error) => {
            tracing::info!(vm = vm_row.uuid(), %error, "a console is not reached");
            Err(offline())
        }
    }
}

type Found = (Arc<State>, Arc<Row>, Arc<Row>);

/// The console that is meant, once this host knows of it and of the session.
async fn wait_for(shared: &Arc<Shared>, knock: &Knock) -> Result<Found, Declined> {
    let mut applied = shared.store.applied();
    let give_up = tokio::time::Instant::now() + CATCH_UP;
    loop {
        applied.borrow_and_update();
        let state = shared.store.state();
        let known = match &knock.credentials {
            Credentials::Session(text) => dispatch::check_session(shared, &state, text).is_ok(),
            _ => true,
        };
        let found = find(&state, &knock.query);
        match (known, found) {
            (true, Some((vm_row, console_row))) => return Ok((state, vm_row, console_row)),
            (known, _) => tokio::select! {
                changed = applied.changed(), if tokio::time::Instant::now() < give_up => {
                    if changed.is_err() {
                        return Err(Declined::Unavailable(errors::host_in_emergency_mode()));
                    }
                }
                () = tokio::time::sleep_until(give_up) => {
                    // Who is nobody is not told what is there.
                    let named = named(&knock.query);
                    return Err(if known {
                        Declined::Absent(errors::handle_invalid(Console::NAME, named))
                    } else {
                        Declined::Unauthorized
                    });
                }
            },
        }
    }
}

fn named(query: &[(String, String)]) -> &str {
    parameter(query, "uuid").or_else(|| parameter(query, "ref")).unwrap_or_default()
}

/// By the uuid or the reference of a console, or of a VM, whose screen is meant then.
fn find(state: &State, query: &[(String, String)]) -> Option<(Arc<Row>, Arc<Row>)> {
    let row = |class| match (parameter(query, "uuid"), parameter(query, "ref")) {
        (Some(uuid), _) => state.by_uuid(class, uuid),
        (None, Some(text)) => state.row_of(class, text.parse::<OpaqueRef>().ok()?),
        (None, None) => None,
    };
    if let Some(console_row) = row(Console::ID) {
        let vm_row = state.row(console_row.get(console::VM))?;
        return Some((Arc::clone(vm_row), Arc::clone(console_row)));
    }
    let vm_row = row(Vm::ID)?;
    let all: Vec<Ref<Console>> = vm_row.get(vm::CONSOLES);
    let all = || all.iter().filter_map(|this| state.row(*this));
    let screen = all().find(|row| row.get(console::PROTOCOL) == ConsoleProtocol::Rfb).or_else(|| all().next())?;
    Some((Arc::clone(vm_row), Arc::clone(screen)))
}
