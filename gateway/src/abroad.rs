//! Calls to hosts that are not of this pool: JSON-RPC over HTTPS.
//!
//! Nothing is known of such a host but its address and an account on it, so its certificate proves nothing and is not
//! asked to: who joins a pool by address and password trusts the network between them, as clients that log in do.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use controller::{Abroad, AskError};
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use serde_json::{Value as Json, json};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
const LARGEST_ANSWER: usize = 16 << 20;

/// The calling side.
pub struct HttpsAbroad {
    /// Where an address has no port.
    port: u16,
    tls: TlsConnector,
}

impl HttpsAbroad {
    /// Calls on this port where an address names none.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(port: u16) -> Result<Self, rustls::Error> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = Arc::new(Anybody(Arc::clone(&provider)));
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        Ok(Self { port, tls: TlsConnector::from(Arc::new(config)) })
    }

    async fn exchange(&self, address: &str, body: Vec<u8>) -> Result<Bytes, AskError> {
        let broken = |error: &dyn std::fmt::Display| AskError::Connection(format!("{address}: {error}"));
        let (host, port) = split(address, self.port);
        let connect = async {
            let stream = TcpStream::connect((host, port)).await.map_err(|error| broken(&error))?;
            let name = ServerName::try_from(host.to_owned()).map_err(|error| broken(&error))?;
            self.tls.connect(name, stream).await.map_err(|error| broken(&error))
        };
        let stream = tokio::time::timeout(CONNECT_LIMIT, connect).await.map_err(|error| broken(&error))??;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
        let request = Request::post("/jsonrpc")
            .header(HOST, host)
            .header(USER_AGENT, "xenith")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| broken(&error))?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
            if !response.status().is_success() {
                return Err(AskError::Service(format!("{address}: HTTP status {}", response.status())));
            }
            let body = Limited::new(response.into_body(), LARGEST_ANSWER).collect().await;
            Ok(body.map_err(|error| AskError::Service(format!("{address}: {error}")))?.to_bytes())
        };
        let exchange = async {
            tokio::pin!(connection);
            tokio::pin!(answer);
            tokio::select! {
                answer = &mut answer => answer,
                ended = &mut connection => match ended {
                    // The last of the answer may have come with the connection's end.
                    Ok(()) => answer.await,
                    Err(error) => Err(broken(&error)),
                },
            }
        };
        tokio::time::timeout(ANSWER_LIMIT, exchange).await.map_err(|error| broken(&error))?
    }
}

/// `host`, `host:port`, `[v6]:port` or a bare IPv6 address.
fn split(address: &str, port: u16) -> (&str, u16) {
    if let Some(rest) = address.strip_prefix('[')
        && let Some((host, rest)) = rest.split_once(']')
    {
        return (host, rest.strip_prefix(':').and_then(|port| port.parse().ok()).unwrap_or(port));
    }
    match address.split_once(':') {
        Some((host, named)) if !named.contains(':') => (host, named.parse().unwrap_or(port)),
        _ => (address, port),
    }
}

#[async_trait]
impl Abroad for HttpsAbroad {
    async fn ask(&self, address: &str, method: &str, params: Vec<Json>) -> Result<Json, AskError> {
        let body = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        let bytes = self.exchange(address, body.to_string().into_bytes()).await?;
        let mut answer: Json = serde_json::from_slice(&bytes)
            .map_err(|error| AskError::Service(format!("{address}: no JSON: {error}")))?;
        if let Some(result) = answer.get_mut("result").filter(|result| !result.is_null()) {
            return Ok(result.take());
        }
        let error = answer.get("error");
        let code = error.and_then(|error| error["message"].as_str());
        let Some(code) = code else { return Err(AskError::Service(format!("{address}: no JSON-RPC answer"))) };
        let params = error.and_then(|error| error["data"].as_array()).into_iter().flatten();
        let params = params.filter_map(|param| param.as_str().map(str::to_owned));
        Err(AskError::Refused(std::iter::once(code.to_owned()).chain(params).collect()))
    }
}

/// Takes every certificate for what it says; signatures of the handshake are checked all the same.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_name_a_port() {
        assert_eq!(split("192.0.2.1", 443), ("192.0.2.1", 443));
        assert_eq!(split("192.0.2.1:8443", 443), ("192.0.2.1", 8443));
        assert_eq!(split("[2001:db8::1]:8443", 443), ("2001:db8::1", 8443));
        assert_eq!(split("2001:db8::1", 443), ("2001:db8::1", 443));
    }
}
