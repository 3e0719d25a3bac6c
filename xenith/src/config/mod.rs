//! What an operator may say in `controller.toml` and `agent.toml`.
//!
//! Each file is one typed tree. A key that is not known is an error that names the line and the keys that are; so is a
//! combination that cannot work. Durations carry their unit in their name. Passwords are never in a configuration file,
//! only in a file of their own or in the environment.

mod agent;
mod controller;
mod secret;
mod witness;

use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use agent::AgentConfig;
pub use controller::{Api, ControllerConfig, Founding, Guest, Member, Membership, Peers, Raft, Store};
pub use secret::root_password;
pub use witness::WitnessConfig;

use crate::telemetry::LogFormat;

/// A configuration that cannot be used, with what to do about it.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, a key that is not known, or a value of the wrong type.
    #[error("{}: {source}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
    /// Each value is well formed, but they cannot work together.
    #[error("{}: {key}: {reason}", path.display())]
    Unworkable {
        /// The file.
        path: PathBuf,
        /// The key to change.
        key: String,
        /// Why it cannot work.
        reason: String,
    },
}

/// The key to change, and why.
pub type Fault = (String, String);

pub(crate) fn fault<T>(key: impl Display, reason: impl Display) -> Result<T, Fault> {
    Err((key.to_string(), reason.to_string()))
}

/// A configuration that can judge itself.
pub trait Check {
    /// Finds the first combination that cannot work.
    fn check(&self) -> Result<(), Fault>;
}

/// Reads and checks a configuration file.
pub fn load<T: DeserializeOwned + Check>(path: &Path) -> Result<T, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    let config: T = toml::from_str(&text)
        .map_err(|source| ConfigError::Malformed { path: path.to_owned(), source: Box::new(source) })?;
    config.check().map_err(|(key, reason)| ConfigError::Unworkable { path: path.to_owned(), key, reason })?;
    Ok(config)
}

/// `[tls]`: who this host is among the hosts of its pool. All three files are PEM.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Certificate of the pool's CA: only what it signed may talk to peers and agents.
    pub ca: PathBuf,
    /// This host's certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Tls {
    fn check(&self) -> Result<(), Fault> {
        tls_files("tls", &self.ca, &self.certificate, &self.key)
    }
}

fn tls_files(section: &str, ca: &Path, certificate: &Path, key: &Path) -> Result<(), Fault> {
    for (name, path) in [("ca", ca), ("certificate", certificate), ("key", key)] {
        if !path.is_file() {
            return fault(format_args!("{section}.{name}"), format_args!("there is no file {}", path.display()));
        }
    }
    Ok(())
}

/// `[log]`: what is written to standard error.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `text` or `json`.
    pub format: LogFormat,
    /// Levels by target, such as `info,raft_store=debug`. The environment (XENITH_LOG, RUST_LOG) wins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
}

/// `[traces]`: where spans go. Without an address they stay.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Traces {
    /// An OpenTelemetry collector (OTLP over gRPC), such as `http://127.0.0.1:4317`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp: Option<String>,
}

#[cfg(test)]
mod tests;
