//! Failures as the API states them: a code and its parameters.

use std::fmt;

/// A documented error code with its parameters, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The code, such as `VM_BAD_POWER_STATE`.
    pub code: &'static str,
    /// Its parameters, in the documented order.
    pub params: Vec<String>,
}

impl ApiError {
    /// A code with parameters. Prefer the constructors of [`errors`](crate::errors).
    #[must_use]
    pub const fn new(code: &'static str, params: Vec<String>) -> Self {
        Self { code, params }
    }

    /// Code, then parameters: the form of `ErrorDescription` and of `task.error_info`.
    #[must_use]
    pub fn description(&self) -> Vec<String> {
        std::iter::once(self.code.to_owned()).chain(self.params.iter().cloned()).collect()
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}({})", self.code, self.params.join(", "))
    }
}

impl std::error::Error for ApiError {}
