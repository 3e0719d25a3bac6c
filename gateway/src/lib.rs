//! Bytes to calls and back; knows protocols, knows no pool.
//!
//! XML-RPC and JSON-RPC over TLS, plain HTTP where it is allowed, and the host's Unix socket; calls that
//! this host cannot answer go to the member that can, as they came.

mod abroad;
mod body;
mod calls;
mod forward;
mod http;
mod jsonrpc;
mod listen;
mod members;
mod tls;
mod xmlrpc;

pub use abroad::HttpsAbroad;
pub use calls::Calls;
pub use forward::{ForwardClient, forward_service};
pub use listen::{Gateway, GatewayConfig, GatewayError};
pub use members::{PeersByGrpc, members_service};
pub use tls::{ApiCertificate, TlsError, TlsFiles};
