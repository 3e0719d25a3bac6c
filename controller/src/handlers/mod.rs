//! HTTP requests that are no calls: what is fetched from the pool, and what is sent to it.
//!
//! The gateway knows HTTP: it finds the handler in [`HANDLERS`] by method and longest prefix, says where session and
//! query are, and moves bytes. What a handler means is decided here: who may ask, whether this is the host to ask, and
//! what the bytes are. A new handler is one line in the table and one function that makes a [`Transfer`] into a
//! [`download`](Transfer::download) or an [`upload`](Transfer::upload).
//!
//! A transfer that was given a task ends it, whatever becomes of the connection, the caller or this host.

mod console;
mod database;
mod transfer;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use datamodel::{ApiError, RbacRole, Ref, Session, errors};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use raft_store::{Leadership, Member, State};

use crate::call::{Caller, Transport};
use crate::controller::Shared;
use crate::dispatch::{self, Rights, check_session};
use crate::failure::{Failure, Served};
use crate::{sessions, tasks};

pub(crate) use console::connect;
pub use console::{CONSOLE, Knock, Tunnel};
pub(crate) use transfer::{Transfer, parameter};

/// Bytes as they come and go; an error ends them before their end.
pub type ByteStream = BoxStream<'static, std::io::Result<Bytes>>;

const LOOK_AGAIN: Duration = Duration::from_millis(25);

/// How a handler is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Something is fetched.
    Get,
    /// Something is sent.
    Put,
}

/// A line of the table.
pub struct Handler {
    /// How it is asked.
    pub verb: Verb,
    /// What its paths begin with; the longest one that fits is taken.
    pub path: &'static str,
    /// The name of the right to use it.
    pub permission: &'static str,
    role: RbacRole,
    /// What its tasks are called.
    label: &'static str,
    open: Open,
}

type Open = fn(Transfer, ByteStream) -> Pin<Box<dyn Future<Output = Served<Opened>> + Send>>;

/// Every handler there is.
pub const HANDLERS: &[Handler] = &[
    Handler {
        verb: Verb::Get,
        path: "/pool/xmldbdump",
        permission: "http/get_pool_xml_db_sync",
        role: RbacRole::PoolAdmin,
        label: "Dumping database as XML",
        open: |transfer, _| Box::pin(database::dump(transfer)),
    },
    Handler {
        verb: Verb::Put,
        path: "/pool/xmldbdump",
        permission: "http/put_pool_xml_db_sync",
        role: RbacRole::PoolAdmin,
        label: "Reading database as XML",
        open: |transfer, body| Box::pin(database::restore(transfer, body)),
    },
];

/// Who a request says that it comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// It does not say.
    None,
    /// A session, from the query or a cookie.
    Session(String),
    /// A name and a password.
    Password(String, String),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never what is in them.
        out.write_str(match self {
            Self::None => "None",
            Self::Session(_) => "Session",
            Self::Password(..) => "Password",
        })
    }
}

/// A request for a handler, as the gateway decoded it.
pub struct Inquiry {
    /// Who asks.
    pub caller: Caller,
    /// The line of the table.
    pub handler: &'static Handler,
    /// Names and values of the query, decoded, in their order.
    pub query: Vec<(String, String)>,
    /// Who it says that it comes from.
    pub credentials: Credentials,
    /// What it sends. Nothing of it is read before the answer says so.
    pub body: ByteStream,
}

/// A request that is served.
pub enum Opened {
    /// What is fetched.
    Download {
        /// Its media type.
        content_type: &'static str,
        /// The bytes; an error among them means that the rest is missing.
        body: ByteStream,
    },
    /// What is sent is taken: say so at once, then wait for the outcome.
    Upload(BoxFuture<'static, Result<(), ApiError>>),
}

/// A request that is not served here.
#[derive(Debug, Clone, PartialEq)]
pub enum Declined {
    /// The session or the password is not good, or there is none.
    Unauthorized,
    /// Whoever it is may not do that.
    Forbidden(ApiError),
    /// Ask that host.
    Redirect(Member),
    /// Nobody can be asked now.
    Unavailable(ApiError),
    /// What is asked for is not there.
    Absent(ApiError),
    /// An error of the API.
    Refused(ApiError),
}

/// Whoever asks, once it is known.
pub(crate) struct Principal {
    /// Null where it came with a password, or over the host's own socket.
    pub(crate) session: Ref<Session>,
    rights: Rights,
}

/// Serves a request, or says who can.
pub(crate) async fn open(shared: &Arc<Shared>, inquiry: Inquiry) -> Result<Opened, Declined> {
    let state = state_or_leader(shared).await?;
    let Inquiry { caller, handler, query, credentials, body } = inquiry;
    let known = match identify(shared, &state, &caller, &credentials).await {
        None => Err((errors::session_authentication_failed(), Declined::Unauthorized)),
        Some(who) => match dispatch::permit(&who.rights, handler.role, || handler.permission.to_owned()) {
            Ok(()) => Ok(who),
            Err(error) => Err((error.clone(), Declined::Forbidden(error))),
        },
    };
    let who = match known {
        Ok(who) => who,
        Err((error, declined)) => {
            tasks::refuse_transfer(shared, &state, &query, &error).await;
            return Err(declined);
        }
    };
    let begun = Transfer::begin(shared, state, who, handler.label, query).await;
    let transfer = match begun {
        Ok(transfer) => transfer,
        Err(failure) => return Err(declined(shared, failure).await),
    };
    let task = transfer.task;
    match (handler.open)(transfer, body).await {
        Ok(opened) => Ok(opened),
        Err(failure) => {
            tasks::end_transfer(shared, task, Err(&failure.clone().into_api())).await;
            Err(declined(shared, failure).await)
        }
    }
}

async fn declined(shared: &Arc<Shared>, failure: Failure) -> Declined {
    match failure {
        Failure::Api(error) => Declined::Refused(error),
        Failure::NotLeader | Failure::Repeated => elsewhere(shared).await,
    }
}

async fn elsewhere(shared: &Arc<Shared>) -> Declined {
    state_or_leader(shared).await.err().unwrap_or_else(|| Declined::Unavailable(errors::host_in_emergency_mode()))
}

/// The pool as this host has it, if it is the master. A host that is about to be is asked again.
async fn state_or_leader(shared: &Shared) -> Result<Arc<State>, Declined> {
    let give_up = tokio::time::Instant::now() + shared.config.election_wait;
    loop {
        if let Ok(state) = shared.store.read().await {
            return Ok(state);
        }
        match dispatch::leader(shared).await {
            Some(Leadership::Follower { leader }) => return Err(Declined::Redirect(leader)),
            Some(_) if tokio::time::Instant::now() < give_up => tokio::time::sleep(LOOK_AGAIN).await,
            _ => return Err(Declined::Unavailable(errors::host_in_emergency_mode())),
        }
    }
}

/// Over the host's own socket everybody is root, whatever is said.
async fn identify(shared: &Shared, state: &State, caller: &Caller, credentials: &Credentials) -> Option<Principal> {
    let root = |name: &str| Principal { session: Ref::NULL, rights: Rights::of_user(name) };
    match credentials {
        Credentials::Session(text) => {
            let row = check_session(shared, state, text).ok()?;
            Some(Principal { session: row.typed(), rights: Rights::of(&row) })
        }
        _ if caller.transport == Transport::Unix => Some(root("root")),
        Credentials::Password(user, secret) => {
            sessions::verify(state, caller, user, secret).await.ok().map(|()| root(user))
        }
        Credentials::None => None,
    }
}
