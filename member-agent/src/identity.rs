//! Who the agent is and whom it believes, read anew for every connection: a host that changes its pool changes its
//! certificates, and its agent, which holds the domains, does not have to end for that. Connections from before end
//! with the certificates they were made under: what was believed of them may be true no more.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use parking_lot::Mutex;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected;
use tonic::{Request, Status};

use crate::agent::StartError;
use crate::config::Config;

const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Connections that have shaken hands and wait to be served.
const WAITING: usize = 16;
const LOOK_AGAIN: Duration = Duration::from_millis(250);

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
    made: Mutex<Option<Made>>,
}

/// A configuration, what it was made of, and whether it still counts.
struct Made {
    texts: Texts,
    config: Arc<ServerConfig>,
    over: CancellationToken,
}

/// The certificates that a connection was made under, for as long as they count.
#[derive(Clone)]
pub(crate) struct Under(CancellationToken);

impl Identity {
    /// Reads the files once, so that a start without them fails.
    pub(crate) fn open(config: &Config) -> Result<Self, StartError> {
        let own = config.identity.iter().map(|dir| ["ca.pem", "host.pem", "host.key"].map(|name| dir.join(name)));
        let files = [config.tls.ca.clone(), config.tls.certificate.clone(), config.tls.key.clone()];
        let this = Self { places: own.chain([files]).collect(), made: Mutex::new(None) };
        this.acceptor()?;
        Ok(this)
    }

    /// What to answer the next connection with, and until when.
    fn acceptor(&self) -> Result<(TlsAcceptor, Under), StartError> {
        let texts = self.read()?;
        let mut made = self.made.lock();
        if let Some(known) = made.as_ref().filter(|known| known.texts == texts) {
            return Ok((TlsAcceptor::from(Arc::clone(&known.config)), Under(known.over.clone())));
        }
        let config = Arc::new(config(&texts).map_err(StartError::Identity)?);
        let over = CancellationToken::new();
        let old = made.replace(Made { texts, config: Arc::clone(&config), over: over.clone() });
        if let Some(old) = old {
            tracing::info!("the host's certificates are others now");
            old.over.cancel();
        }
        Ok((TlsAcceptor::from(config), Under(over)))
    }

    /// Refuses a call of a connection from before the certificates changed.
    #[allow(clippy::result_large_err)]
    pub(crate) fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        // Files that cannot be read now were read before.
        let _ = self.acceptor();
        match request.extensions().get::<Under>() {
            Some(Under(over)) if !over.is_cancelled() => Ok(()),
            _ => Err(Status::unauthenticated("the host's certificates are others now")),
        }
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

/// A connection that has shaken hands, and ends with the certificates it was made under.
pub(crate) struct Connection {
    stream: TlsStream<TcpStream>,
    under: Under,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Connection {
    fn ended(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.over.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionAborted.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Under;

    fn connect_info(&self) -> Under {
        self.under.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.ended(context)?;
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Connections that have shaken hands.
pub(crate) fn incoming(
    listener: TcpListener,
    identity: Arc<Identity>,
    tasks: &TaskTracker,
    shutdown: CancellationToken,
) -> impl Stream<Item = io::Result<Connection>> + use<> {
    let (ready, connections) = mpsc::channel(WAITING);
    let shaking = tasks.clone();
    tasks.spawn(async move {
        let mut look = tokio::time::interval(LOOK_AGAIN);
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = look.tick() => {
                    // Whoever is connected and says nothing is let go, too.
                    drop(identity.acceptor());
                    continue;
                }
                () = shutdown.cancelled() => return,
            };
            let acceptor = identity.acceptor();
            let (stream, (acceptor, under)) = match (accepted, acceptor) {
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
                    Ok(Ok(stream)) => {
                        let over = Box::pin(under.0.clone().cancelled_owned());
                        // Nobody serves any more: then nobody needs it.
                        drop(ready.send(Ok(Connection { stream, under, over })).await);
                    }
                    Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                    Err(_) => tracing::debug!("a TLS handshake took too long"),
                }
            });
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(connections)
}
