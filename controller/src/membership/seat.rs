//! What a change of pools needs of the process around the controller: a place for the next seat, and a voice that
//! reaches hosts which are not of this pool.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use datamodel::{ApiError, errors};
use serde_json::Value as Json;
use uuid::Uuid;

use crate::certificates::Issued;
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::first_boot::InitialMember;
use crate::membership::trust::Trust;

/// A host's place in a pool: what it is there, and who it is to the others.
#[derive(Clone)]
pub struct Seat {
    /// Its number in the Raft group.
    pub node_id: u64,
    /// The pool's authority, a certificate.
    pub ca: String,
    /// The host's certificate and key.
    pub identity: Issued,
    /// Where the host is a pool of its own, what that is founded with.
    pub alone: Option<Alone>,
}

/// What a pool of one is founded with.
#[derive(Clone)]
pub struct Alone {
    /// The authority's key.
    pub ca_key: String,
    /// Hash of root's password.
    pub password_hash: String,
}

/// Where seats are kept.
#[async_trait]
pub trait Home: Send + Sync + 'static {
    /// An empty place for another seat; its database goes into `db` in it.
    async fn begin(&self) -> io::Result<PathBuf>;
    /// Furnishes the place and makes it the host's only seat from the next start on, in one step that a crash can
    /// only come before or after.
    async fn take(&self, place: &Path, seat: &Seat) -> io::Result<()>;
    /// Replaces the certificates of the seat that the host has: the authorities it trusts, and its own.
    async fn renew(&self, ca: &str, certificate: &str) -> io::Result<()>;
    /// Ends this life of the controller; the next one begins at once, on the seat that is taken.
    fn restart(&self);
}

/// Why another pool's host did not answer with a result.
#[derive(Debug)]
pub enum AskError {
    /// Nobody was reached, or the connection broke.
    Connection(String),
    /// Whoever was reached did not show a certificate that is believed; nothing was said.
    Untrusted(String),
    /// Somebody was reached that does not speak the API.
    Service(String),
    /// An error of the API: its code and parameters.
    Refused(Vec<String>),
}

/// Calls hosts that are not of this pool.
#[async_trait]
pub trait Abroad: Send + Sync + 'static {
    /// One call at that address (`host` or `host:port`), if who is there can be trusted; the session, where it takes
    /// one, among the parameters.
    async fn ask(&self, trust: &Trust, address: &str, method: &str, params: Vec<Json>) -> Result<Json, AskError>;

    /// The certificate, in PEM, that is shown at that address.
    async fn certificate(&self, trust: &Trust, address: &str) -> Result<String, AskError>;
}

/// How a host stands to a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is of the pool, or is about to be.
    Member,
    /// It is not, and under that node id will never be again.
    Stranger,
    /// Whoever was asked cannot say.
    Unknown,
}

/// Asks members of this pool, over the peers' connections.
#[async_trait]
pub trait Peers: Send + Sync + 'static {
    /// How a host stands to the pool, if whoever is at that address is its master.
    async fn standing(&self, address: &str, node_id: u64, host: Uuid) -> Standing;

    /// The certificate that a member has, and those of the authorities that it believes; none where it does not answer.
    async fn certificates(&self, address: &str) -> Option<(String, String)>;

    /// Has a member show its clients this certificate, or one that it signs itself. What it shows then, a PEM text.
    async fn exchange(&self, address: &str, shown: Option<Issued>) -> Result<String, ExchangeError>;
}

/// Why a member's clients see the certificate that they saw before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExchangeError {
    /// It does not answer: perhaps it has done it, perhaps not.
    Silent,
    /// It cannot, and says why.
    Refused(String),
}

/// The process around the controller.
#[derive(Clone)]
pub struct Surroundings {
    /// This host as others reach it.
    pub this: InitialMember,
    /// Where its seats are kept.
    pub home: Arc<dyn Home>,
    /// How it reaches other pools.
    pub abroad: Arc<dyn Abroad>,
    /// How it reaches members of its own, master or not.
    pub peers: Arc<dyn Peers>,
}

/// While a host is on its way to another seat nothing is written on this one: it would be left behind.
pub(crate) struct Parting<'a>(&'a AtomicBool);

impl<'a> Parting<'a> {
    pub(crate) fn begin(shared: &'a Shared) -> Served<Self> {
        if shared.parting.swap(true, Ordering::AcqRel) {
            return refuse(errors::operation_not_allowed("The host is changing its pool already"));
        }
        Ok(Self(&shared.parting))
    }

    /// The seat is taken: there is no way back.
    pub(crate) fn for_good(self) {
        std::mem::forget(self);
    }
}

impl Drop for Parting<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Shared {
    pub(crate) fn surroundings(&self) -> Served<&Surroundings> {
        let missing = || Failure::Api(errors::internal_error("this controller cannot change its pool"));
        self.config.surroundings.as_ref().ok_or_else(missing)
    }
}

/// Takes a seat whose database is there or empty, and starts anew on it.
pub(crate) async fn take(surroundings: &Surroundings, place: &Path, seat: &Seat) -> Served<()> {
    surroundings.home.take(place, seat).await.map_err(unwritten)?;
    tracing::info!(node = seat.node_id, place = %place.display(), "another seat is taken");
    surroundings.home.restart();
    Ok(())
}

pub(crate) fn unwritten(error: io::Error) -> Failure {
    Failure::Api(errors::internal_error(format!("the host's new seat cannot be written: {error}")))
}

/// What another pool's refusal is to the client of this one.
pub(crate) fn told_by(error: AskError) -> ApiError {
    match error {
        AskError::Connection(reason) => {
            tracing::warn!(reason, "the other pool is not reached");
            errors::joining_host_connection_failed()
        }
        AskError::Untrusted(reason) => {
            tracing::warn!(reason, "the other pool's certificate is not believed");
            errors::ssl_verify_error(reason)
        }
        AskError::Service(reason) => {
            tracing::warn!(reason, "what was reached is no pool");
            errors::joining_host_service_failed()
        }
        AskError::Refused(mut description) => {
            let code = if description.is_empty() { String::new() } else { description.remove(0) };
            match errors::ALL.iter().find(|(known, _)| *known == code) {
                Some((known, _)) => ApiError::new(known, description),
                None => errors::internal_error(format!("{code}({})", description.join(", "))),
            }
        }
    }
}
