//! From a decoded call to its function: master or not, method, arguments, session, role.

use std::sync::Arc;

use datamodel::{ApiError, MessageDef, RbacRole, Ref, Session, Task, arguments, errors, fields, model};
use datamodel::{Input, Lifecycle, Value};
use raft_store::{Leadership, Member, Row, State};

use crate::api;
use crate::call::{ATTEMPTS, Call, Caller, Refusal, Reply, Request, Transport};
use crate::controller::Shared;
use crate::failure::Failure;
use crate::membership::emergency;
use crate::repeats::{self, Repeat};
use crate::{events, implicit, tasks};

/// Answers a call, or says who can.
pub(crate) async fn call(shared: &Arc<Shared>, request: Request) -> Result<Reply, Refusal> {
    if let Some(reply) = everywhere(&request) {
        return reply;
    }
    if let Some(answer) = emergency::serve(shared, &request).await {
        return answer;
    }
    let leading = matches!(*shared.store.leadership().borrow(), Leadership::Leader { .. });
    if !leading {
        let login = is_login(&request.method);
        return elsewhere(shared, &request.caller, login).await;
    }
    let caller = request.caller.clone();
    let login = is_login(&request.method);
    let mut begun = false;
    match serve(shared, request, &mut begun).await {
        Ok(reply) => Ok(reply),
        Err(Failure::Api(error)) => Err(Refusal::Api(error)),
        Err(Failure::NotLeader | Failure::Repeated) if begun => {
            elsewhere(shared, &caller, login).await.map_err(|refusal| Refusal::Begun(Box::new(refusal)))
        }
        Err(Failure::NotLeader | Failure::Repeated) => elsewhere(shared, &caller, login).await,
    }
}

/// What needs neither a session nor the master.
fn everywhere(request: &Request) -> Option<Result<Reply, Refusal>> {
    match request.method.as_str() {
        "system.listMethods" => Some(Ok(Reply::Methods(model().list_methods()))),
        "system.isAlive" => {
            let echo = match request.params.first() {
                Some(Input::Str(text)) => Value::str(text.as_str()),
                _ => Value::str(""),
            };
            Some(Ok(Reply::Value(echo)))
        }
        _ => None,
    }
}

fn is_login(method: &str) -> bool {
    matches!(
        method,
        "session.login_with_password" | "session_login_with_password" | "session.slave_login" | "session_slave_login"
    )
}

/// A call on a host that does not lead. Logins over the network are redirected, so that the client knows
/// its master; calls with a session are sent on, because clients that hold one never recover from a redirect.
async fn elsewhere(shared: &Arc<Shared>, caller: &Caller, login: bool) -> Result<Reply, Refusal> {
    let leader = match leader(shared).await {
        Some(Leadership::Follower { leader }) => leader,
        Some(_) => return Err(Refusal::Retry),
        None => return Err(Refusal::Api(errors::host_in_emergency_mode())),
    };
    let redirect = login || shared.config.redirect_sessions;
    if caller.forwarded || (caller.transport == Transport::Tcp && redirect) {
        return Err(Refusal::Api(slave_of(&leader)));
    }
    Err(Refusal::Forward(leader))
}

/// Who leads, once somebody does; none where that takes longer than an election.
pub(crate) async fn leader(shared: &Shared) -> Option<Leadership> {
    let mut leadership = shared.store.leadership();
    // A witness that leads is about to hand on.
    let known = leadership.wait_for(|leadership| match leadership {
        Leadership::Electing => false,
        Leadership::Follower { leader } => !leader.api_address.is_empty(),
        Leadership::Leader { .. } => true,
    });
    let known = tokio::time::timeout(shared.config.election_wait, known).await;
    known.ok()?.ok().map(|known| known.clone())
}

fn slave_of(leader: &Member) -> ApiError {
    errors::host_is_slave(leader.api_address.as_str())
}

async fn serve(shared: &Arc<Shared>, request: Request, begun: &mut bool) -> Result<Reply, Failure> {
    let (name, asynchronous) =
        match request.method.strip_prefix("Async.").or_else(|| request.method.strip_prefix("InternalAsync.")) {
            Some(name) => (name, true),
            None => (request.method.as_str(), false),
        };
    let Some(message) = model().message(name).filter(|message| !message.class.def().internal) else {
        return Err(errors::message_method_unknown(request.method).into());
    };
    let arguments = arguments(message, request.params)?;
    let state = shared.store.read().await?;
    let session = if message.takes_session { Some(check_session(shared, &state, &arguments.session)?) } else { None };
    if let Some(error) = arguments.deferred {
        return Err(error.into());
    }
    let handler = api::handler(message.full_name);
    // What others gave up, and what is here all the same, is served.
    if message.state == Lifecycle::Removed && handler.is_none() {
        return Err(errors::message_removed().into());
    }
    if let Some(session) = &session {
        check_role(session, message)?;
    }
    let session_row = session;
    let session_ref: Ref<Session> = session_row.as_ref().map_or(Ref::NULL, |row| row.typed());
    if handler.is_none() && message.implicit.is_none() && !events::serves(message) {
        return Err(errors::not_implemented(message.full_name).into());
    }
    let caller = Arc::new(request.caller);
    let repeat = Repeat::of(&caller, session_row.as_deref(), message, &arguments.values);
    if let Some(repeat) = &repeat
        && let Some(reply) = repeats::answered(shared, repeat, message).await?
    {
        return Ok(reply);
    }
    let mut call = Call::new(Arc::clone(shared), state, caller, message, session_ref, Ref::<Task>::NULL);
    call.repeat = repeat.map(Arc::new);
    if asynchronous {
        if !message.asynchronous {
            let reason = format!("No async mode for this operation (rpc: {})", message.full_name);
            return Err(ApiError::new("Fault", vec![reason]).into());
        }
        let repeat = call.repeat.clone();
        return match tasks::start(call, handler, arguments.values).await {
            Ok(task) => Ok(Reply::Value(Value::Ref(task.opaque()))),
            Err(failure) => first_answer(shared, repeat.as_deref(), message, failure).await,
        };
    }
    let outcome = answer(&mut call, handler, arguments.values).await;
    *begun = call.wrote();
    match &outcome {
        Ok(Reply::Value(value)) => repeats::end(&call, call.stage(), Ok(value)).await,
        Err(Failure::Api(error)) => repeats::end(&call, call.stage(), Err(error)).await,
        _ => {}
    }
    match outcome {
        Ok(reply) => Ok(reply),
        Err(failure) => first_answer(shared, call.repeat.as_deref(), message, settle(&call, failure)).await,
    }
}

/// A call that met itself, under the same key, answers what the other one does.
async fn first_answer(
    shared: &Arc<Shared>,
    repeat: Option<&Repeat>,
    message: &MessageDef,
    failure: Failure,
) -> Result<Reply, Failure> {
    match (failure, repeat) {
        (Failure::Repeated, Some(repeat)) => match repeats::answered(shared, repeat, message).await? {
            Some(reply) => Ok(reply),
            // Collected in between: ask from the beginning.
            None => Err(Failure::NotLeader),
        },
        // Refused because of what the other one has begun?
        (Failure::Api(error), Some(repeat)) if !repeat.is_recorded() => {
            repeats::answered(shared, repeat, message).await?.ok_or(Failure::Api(error))
        }
        (failure, _) => Err(failure),
    }
}

/// Runs a message's function, whatever kind it is: anew, on the newest state, where somebody else was faster.
pub(crate) async fn answer(
    call: &mut Call,
    handler: Option<api::Handler>,
    values: Vec<Value>,
) -> Result<Reply, Failure> {
    if let Some(handler) = handler {
        for _ in 1..ATTEMPTS {
            let outcome = handler(call, values.clone()).await;
            if outcome.is_ok() || !call.take_overtaken() {
                return outcome.map(Reply::Value);
            }
            call.state = call.latest().await?;
        }
        return handler(call, values).await.map(Reply::Value);
    }
    if events::serves(call.message) {
        return events::serve(call, values).await;
    }
    match call.message.implicit {
        Some(what) => implicit::serve(call, what, values).await,
        None => Err(errors::not_implemented(call.message.full_name).into()),
    }
}

/// A lead lost after something was committed cannot be made good by asking elsewhere.
fn settle(call: &Call, failure: Failure) -> Failure {
    match failure {
        // With a key it can: the answer is found there.
        Failure::NotLeader if call.wrote() && call.repeat.is_none() => Failure::Api(Failure::NotLeader.into_api()),
        other => other,
    }
}

pub(crate) fn check_session(shared: &Shared, state: &State, text: &str) -> Result<Arc<Row>, Failure> {
    let invalid = || Failure::Api(errors::session_invalid(text));
    let reference: Ref<Session> = Ref::from_opaque(text.parse().map_err(|_| invalid())?);
    let row = state.row(reference).cloned().ok_or_else(invalid)?;
    shared.sessions.touch(reference, shared.now());
    Ok(row)
}

pub(crate) fn check_role(session: &Row, message: &MessageDef) -> Result<(), Failure> {
    let Some(needed) = message.min_role else { return Ok(()) };
    Ok(permit(&Rights::of(session), needed, || message.full_name.to_ascii_lowercase())?)
}

/// What somebody may do.
pub(crate) struct Rights {
    superuser: bool,
    role: RbacRole,
}

impl Rights {
    pub(crate) fn of(session: &Row) -> Self {
        Self {
            superuser: session.get(fields::session::IS_LOCAL_SUPERUSER),
            role: RbacRole::named(&session.get(fields::session::ROLE)).unwrap_or(RbacRole::ReadOnly),
        }
    }

    /// Those of a local account.
    pub(crate) fn of_user(name: &str) -> Self {
        Self { superuser: name == "root", role: RbacRole::PoolAdmin }
    }
}

/// Whether somebody may do what takes a role.
pub(crate) fn permit(rights: &Rights, needed: RbacRole, permission: impl FnOnce() -> String) -> Result<(), ApiError> {
    if rights.superuser || rights.role >= needed {
        return Ok(());
    }
    let able: Vec<&str> = RbacRole::ALL.into_iter().filter(|role| *role >= needed).map(RbacRole::name).collect();
    let explanation = format!("No permission in user session. (Roles with this permission: {})", able.join(", "));
    Err(errors::rbac_permission_denied(permission(), explanation))
}
