//! The agents of the hosts, as the master sees them.
//!
//! A trait, so that what the master decides can be tested without a host; one implementation, over gRPC.

mod grpc;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use parking_lot::Mutex;
use proto::agent::{
    AgentEvent, DomainState, HelloReply, HelloRequest, Outcome, Refusal, Step, StoreState, VolumeState, WatchRequest,
    outcome,
};
use raft_store::PeerTls;

use crate::handlers::Tunnel;

/// Why an agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It said no, and why.
    #[error("refused: {}", .0.detail)]
    Refused(Refusal),
    /// It was not reached: the step was certainly not done.
    #[error("not reached: {0}")]
    Unreachable(String),
    /// It was reached and the answer was lost: the step may have been done.
    #[error("no answer: {0}")]
    Unknown(String),
}

/// What a step that was done came to.
#[allow(clippy::large_enum_variant, reason = "one at a time, on its way from an agent into a transaction")]
#[derive(Debug, Clone, PartialEq)]
pub enum Performed {
    /// The domain as it is after the step.
    Domain(DomainState),
    /// The store.
    Store(StoreState),
    /// The volume.
    Volume(VolumeState),
    /// The step failed, and might.
    Nothing,
}

impl From<Performed> for Outcome {
    fn from(performed: Performed) -> Self {
        let result = match performed {
            Performed::Domain(state) => Some(outcome::Result::Domain(state)),
            Performed::Store(state) => Some(outcome::Result::Store(state)),
            Performed::Volume(state) => Some(outcome::Result::Volume(state)),
            Performed::Nothing => None,
        };
        Self { result }
    }
}

impl TryFrom<Outcome> for Performed {
    type Error = Refusal;

    fn try_from(outcome: Outcome) -> Result<Self, Refusal> {
        match outcome.result {
            Some(outcome::Result::Domain(state)) => Ok(Self::Domain(state)),
            Some(outcome::Result::Store(state)) => Ok(Self::Store(state)),
            Some(outcome::Result::Volume(state)) => Ok(Self::Volume(state)),
            Some(outcome::Result::Refusal(refusal)) => Err(refusal),
            None => Ok(Self::Nothing),
        }
    }
}

/// What an agent can be asked.
#[async_trait]
pub trait Agent: Send + Sync + 'static {
    /// Versions, features and the host's facts.
    async fn hello(&self, request: HelloRequest) -> Result<HelloReply, AgentError>;
    /// Does one step, at most once; waits no longer than `limit`.
    async fn perform(&self, step: Step, limit: Duration) -> Result<Performed, AgentError>;
    /// Every domain, then every change.
    async fn watch(
        &self,
        request: WatchRequest,
    ) -> Result<BoxStream<'static, Result<AgentEvent, AgentError>>, AgentError>;
    /// Opens the console of a domain. An agent without domains has none.
    async fn console(&self, _pool: &str, vm: &str, _protocol: &str) -> Result<Tunnel, AgentError> {
        Err(AgentError::Unreachable(format!("{vm} has no console here")))
    }
}

type Connect = dyn Fn(&str) -> Result<Arc<dyn Agent>, AgentError> + Send + Sync;

/// The agents by their addresses; a connection is made once and kept.
pub struct Agents {
    connect: Box<Connect>,
    known: Mutex<HashMap<String, Arc<dyn Agent>>>,
}

impl Agents {
    /// Agents reached over gRPC with mutual TLS.
    #[must_use]
    pub fn grpc(tls: PeerTls) -> Self {
        Self::with(move |address| Ok(Arc::new(grpc::GrpcAgent::new(&tls, address)?)))
    }

    /// Agents made by a function of their address.
    pub fn with(connect: impl Fn(&str) -> Result<Arc<dyn Agent>, AgentError> + Send + Sync + 'static) -> Self {
        Self { connect: Box::new(connect), known: Mutex::new(HashMap::new()) }
    }

    /// The next who asks for that address connects anew, and so learns who is there now.
    pub(crate) fn forget(&self, address: &str) {
        self.known.lock().remove(address);
    }

    /// The agent at an address.
    ///
    /// # Errors
    /// [`AgentError::Unreachable`] for an address that cannot be one.
    pub fn at(&self, address: &str) -> Result<Arc<dyn Agent>, AgentError> {
        if let Some(agent) = self.known.lock().get(address) {
            return Ok(Arc::clone(agent));
        }
        let agent = (self.connect)(address)?;
        self.known.lock().insert(address.to_owned(), Arc::clone(&agent));
        Ok(agent)
    }
}
