//! Who the agent is and whom it believes, read anew for every connection: a host that changes its pool changes its
//! certificates, and its agent, which holds the domains, does not have to end for that.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use parking_lot::Mutex;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agent::StartError;
use crate::config::Config;

const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Connections that have shaken hands and wait to be served.
const WAITING: usize = 16;

/// The three files, as they were when the configuration was made of them.
#[derive(PartialEq, Eq)]
struct Texts {
    ca: Vec<u8>,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

/// The agent's certificates.
pub(crate) struct Identity {
    /// Where to look: the first of these places that has a certificate.
    places: Vec<[PathBuf; 3]>,
    made: Mutex<Option<(Texts, Arc<ServerConfig>)>>,
}

impl Identity {
    /// Reads the files once, so that a start without them fails.
    pub(crate) fn open(config: &Config) -> Result<Self, StartError> {
        let own = config.identity.iter().map(|dir| ["ca.pem", "host.pem", "host.key"].map(|name| dir.join(name)));
        let files = [config.tls.ca.clone(), config.tls.certificate.clone(), config.tls.key.clone()];
        let this = Self { places: own.chain([files]).collect(), made: Mutex::new(None) };
        this.acceptor()?;
        Ok(this)
    }

    /// What to answer the next connection with.
    fn acceptor(&self) -> Result<TlsAcceptor, StartError> {
        let texts = self.read()?;
        let mut made = self.made.lock();
        if let Some((known, config)) = &*made
            && *known == texts
        {
            return Ok(TlsAcceptor::from(Arc::clone(config)));
        }
        let config = Arc::new(config(&texts).map_err(StartError::Identity)?);
        if made.is_some() {
            tracing::info!("the host's certificates are others now");
        }
        *made = Some((texts, Arc::clone(&config)));
        Ok(TlsAcceptor::from(config))
    }

    /// What it shows, and whom it believes, as PEM texts.
    pub(crate) fn shown(&self) -> (String, String) {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        self.read().map_or_else(|_| Default::default(), |texts| (text(texts.certificate), text(texts.ca)))
    }

    fn read(&self) -> Result<Texts, StartError> {
        let place = self.places.iter().find(|[_, certificate, _]| certificate.exists()).or(self.places.last());
        let Some(paths) = place else { return Err(StartError::Identity("no certificate is configured".into())) };
        let read =
            |path: &PathBuf| std::fs::read(path).map_err(|source| StartError::Tls { path: path.clone(), source });
        Ok(Texts { ca: read(&paths[0])?, certificate: read(&paths[1])?, key: read(&paths[2])? })
    }
}

/// Both sides show a certificate of the pool's authority.
fn config(texts: &Texts) -> Result<ServerConfig, String> {
    let told = |error: &dyn std::fmt::Display| error.to_string();
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(&texts.ca) {
        roots.add(root.map_err(|error| told(&error))?).map_err(|error| told(&error))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let clients = clients.build().map_err(|error| told(&error))?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&texts.certificate).collect();
    let key = PrivateKeyDer::from_pem_slice(&texts.key).map_err(|error| told(&error))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| told(&error))?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain.map_err(|error| told(&error))?, key)
        .map_err(|error| told(&error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Connections that have shaken hands.
pub(crate) fn incoming(
    listener: TcpListener,
    identity: Arc<Identity>,
    tasks: &TaskTracker,
    shutdown: CancellationToken,
) -> impl Stream<Item = io::Result<TlsStream<TcpStream>>> + use<> {
    let (ready, connections) = mpsc::channel(WAITING);
    let shaking = tasks.clone();
    tasks.spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = shutdown.cancelled() => return,
            };
            let acceptor = identity.acceptor();
            let (stream, acceptor) = match (accepted, acceptor) {
                (Ok((stream, _)), Ok(acceptor)) => (stream, acceptor),
                (Err(error), _) => {
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
                (_, Err(error)) => {
                    tracing::error!(%error, "the host's certificates cannot be used");
                    continue;
                }
            };
            let ready = ready.clone();
            shaking.spawn(async move {
                let _ = stream.set_nodelay(true);
                match tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await {
                    // Nobody serves any more: then nobody needs it.
                    Ok(Ok(stream)) => drop(ready.send(Ok(stream)).await),
                    Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                    Err(_) => tracing::debug!("a TLS handshake took too long"),
                }
            });
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(connections)
}
