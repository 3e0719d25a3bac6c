//! Why a call did not end well: an error of the API, or a lead that went away before anything was done.

use crate::operations::OF_STORES;
use datamodel::{Answer, ApiError, ClassKind, errors};
use raft_store::{CommitError, Conflict, NotLeader};

/// Inside the controller, what a client cannot see is kept apart from what it can.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// To be told to the client.
    Api(ApiError),
    /// This node does not lead any more, and nothing was done: the new master can be asked.
    NotLeader,
    /// The same call, under the same key, was faster: its answer is this one's.
    Repeated,
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

impl From<NotLeader> for Failure {
    fn from(_: NotLeader) -> Self {
        Self::NotLeader
    }
}

impl From<CommitError> for Failure {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::NotLeader(_) => Self::NotLeader,
            CommitError::Conflict(Conflict::Exists(class, _)) if class == Answer::NAME => Self::Repeated,
            CommitError::Conflict(conflict) => Self::Api(conflict_error(&conflict)),
            CommitError::Unknown => Self::Api(errors::internal_error(
                "the master changed while the call was being committed: it was applied wholly or not at all; look before repeating it",
            )),
            CommitError::NotYet(_) => Self::Api(errors::not_supported_during_upgrade()),
            CommitError::Overloaded => Self::Api(errors::too_many_pending_tasks()),
        }
    }
}

impl Failure {
    /// What a client is told when the answer can no longer be given elsewhere.
    pub(crate) fn into_api(self) -> ApiError {
        match self {
            Self::Api(error) => error,
            Self::NotLeader | Self::Repeated => errors::internal_error("the master changed during the call"),
        }
    }
}

fn conflict_error(conflict: &Conflict) -> ApiError {
    match conflict {
        Conflict::Missing(class, reference) => errors::handle_invalid(*class, *reference),
        other => errors::internal_error(format!("somebody else was faster: {other}")),
    }
}

/// The result of everything that serves a call.
pub(crate) type Served<T> = Result<T, Failure>;

/// Shorthand for an API error as a result.
pub(crate) fn refuse<T>(error: ApiError) -> Served<T> {
    Err(Failure::Api(error))
}

/// An error from its code and parameters, as they were recorded.
pub(crate) fn described(description: Vec<String>) -> ApiError {
    let codes = errors::ALL.iter().map(|(code, _)| *code).chain(OF_STORES.iter().map(|(code, _)| *code));
    let known = codes.into_iter().find(|known| description.first().is_some_and(|code| code == known));
    match known {
        Some(known) => ApiError::new(known, description.into_iter().skip(1).collect()),
        None => errors::internal_error(description.join(", ")),
    }
}
