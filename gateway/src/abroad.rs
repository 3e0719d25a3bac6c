//! Calls to hosts that are not of this pool: JSON-RPC over HTTPS.
//!
//! What such a host has to show is the caller's to say ([`Trust`]): a certificate of an authority that the pool was given,
//! or, where it was given none, the one that it showed first. Whoever joins a pool by address and password, and has
//! nothing to verify the first contact by, trusts the network between them for that one moment.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use controller::{Abroad, AskError, Trust};
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
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
    provider: Arc<CryptoProvider>,
}

type Stream = tokio_rustls::client::TlsStream<TcpStream>;

fn broken(address: &str, error: impl std::fmt::Display) -> AskError {
    AskError::Connection(format!("{address}: {error}"))
}

impl HttpsAbroad {
    /// Calls on this port where an address names none.
    #[must_use]
    pub fn new(port: u16) -> Self {
        Self { port, provider: Arc::new(rustls::crypto::aws_lc_rs::default_provider()) }
    }

    /// A connection to who is at an address and has shown what it must.
    async fn connect(&self, trust: &Trust, address: &str) -> Result<Stream, AskError> {
        let failed = |error: &dyn std::fmt::Display| broken(address, error);
        let unusable = |error: &dyn std::fmt::Display| AskError::Untrusted(format!("{address}: {error}"));
        let verifier = Verifier::new(Arc::clone(&self.provider), trust, address).map_err(|error| unusable(&error))?;
        let config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        let (host, port) = split(address, self.port);
        let connect = async {
            let stream = TcpStream::connect((host, port)).await.map_err(|error| failed(&error))?;
            let name = ServerName::try_from(host.to_owned()).map_err(|error| failed(&error))?;
            let connected = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
            connected.map_err(|error| match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                Some(rustls::Error::InvalidCertificate(reason)) => unusable(&format!("{reason:?}")),
                _ => failed(&error),
            })
        };
        let stream = tokio::time::timeout(CONNECT_LIMIT, connect).await.map_err(|error| failed(&error))??;
        if let Some(shown) = first_certificate(&stream) {
            trust.first(address, shown);
        }
        Ok(stream)
    }

    async fn exchange(&self, trust: &Trust, address: &str, body: Vec<u8>) -> Result<Bytes, AskError> {
        let broken = |error: &dyn std::fmt::Display| broken(address, error);
        let stream = self.connect(trust, address).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
        let request = Request::post("/jsonrpc")
            .header(HOST, split(address, self.port).0)
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

fn first_certificate(stream: &Stream) -> Option<&CertificateDer<'static>> {
    stream.get_ref().1.peer_certificates()?.first()
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
    async fn ask(&self, trust: &Trust, address: &str, method: &str, params: Vec<Json>) -> Result<Json, AskError> {
        let body = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        let bytes = self.exchange(trust, address, body.to_string().into_bytes()).await?;
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

    async fn certificate(&self, trust: &Trust, address: &str) -> Result<String, AskError> {
        let stream = self.connect(trust, address).await?;
        let shown = first_certificate(&stream).ok_or_else(|| broken(address, "it shows no certificate"))?;
        Ok(pem(shown))
    }
}

/// As texts have it: base 64 in lines of 64 letters.
fn pem(certificate: &[u8]) -> String {
    let letters = BASE64.encode(certificate);
    let lines = letters.as_bytes().chunks(64).map(String::from_utf8_lossy);
    let lines: Vec<_> = lines.collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

/// Believes a certificate of the authorities that there are, and of nobody who showed another one before. Signatures of
/// the handshake are always checked: whoever shows a certificate has its key.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    authorities: Option<Arc<WebPkiServerVerifier>>,
    shown: Option<Vec<u8>>,
}

impl Verifier {
    fn new(provider: Arc<CryptoProvider>, trust: &Trust, address: &str) -> Result<Self, String> {
        let shown = trust.shown_by(address);
        if trust.authorities().is_empty() {
            return Ok(Self { provider, authorities: None, shown });
        }
        let mut roots = RootCertStore::empty();
        for text in trust.authorities() {
            for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
                let certificate = certificate.map_err(|error| format!("an authority's certificate: {error}"))?;
                roots.add(certificate).map_err(|error| format!("an authority's certificate: {error}"))?;
            }
        }
        let lists = trust.revoked().iter().map(|text| CertificateRevocationListDer::from_pem_slice(text.as_bytes()));
        let lists: Vec<_> = lists.collect::<Result<_, _>>().map_err(|error| format!("a revocation list: {error}"))?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .with_crls(lists)
            // Not every authority keeps a list.
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self { provider, authorities: Some(verifier), shown })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        stapled: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(authorities) = &self.authorities {
            authorities.verify_server_cert(certificate, chain, name, stapled, now)?;
        }
        if self.shown.as_deref().is_some_and(|shown| shown != certificate.as_ref()) {
            // Somebody else is there than a moment ago.
            return Err(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
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
            &self.provider.signature_verification_algorithms,
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
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
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
