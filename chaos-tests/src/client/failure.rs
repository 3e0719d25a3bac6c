//! How a call can end otherwise than with a value.

use std::fmt;
use std::time::Duration;

use serde_json::Value;

/// What the pool answered instead of a value: one of XenAPI's codes and its parameters.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Failure {
    /// `HANDLE_INVALID` and the like.
    pub code: String,
    /// In the documented order.
    pub params: Vec<String>,
}

impl Failure {
    /// The failure in a JSON-RPC 2.0 error object; None when the object is not one.
    pub fn of(error: &Value) -> Option<Self> {
        let params = error["data"].as_array()?.iter().map(|param| param.as_str().map(str::to_owned));
        Some(Self { code: error["message"].as_str()?.to_owned(), params: params.collect::<Option<_>>()? })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.code, self.params.join(", "))
    }
}

/// Why a call gave no value.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The pool refused.
    #[error(transparent)]
    Refused(#[from] Failure),
    /// No connection could be made: the call was certainly not done.
    #[error("{at} is not reached: {cause}")]
    Unreached {
        /// Whom the call was for.
        at: String,
        /// What happened.
        cause: String,
    },
    /// The connection was lost: whether the call was done is not known.
    #[error("no answer from {at}: {cause}")]
    Lost {
        /// Whom the call was for.
        at: String,
        /// What happened.
        cause: String,
    },
    /// No answer within the limit: whether the call was done is not known.
    #[error("no answer from {at} within {} ms", limit.as_millis())]
    Late {
        /// Whom the call was for.
        at: String,
        /// How long was waited.
        limit: Duration,
    },
    /// An answer that JSON-RPC 2.0 does not know.
    #[error("{at} answered what is no JSON-RPC 2.0: {what}")]
    Malformed {
        /// Who answered.
        at: String,
        /// The answer, or what is wrong with it.
        what: String,
    },
}

impl CallError {
    /// The pool's refusal, when it is one.
    pub fn refusal(&self) -> Option<&Failure> {
        match self {
            Self::Refused(failure) => Some(failure),
            _ => None,
        }
    }

    /// Whether the pool refused with this code.
    pub fn is(&self, code: &str) -> bool {
        self.refusal().is_some_and(|failure| failure.code == code)
    }
}
