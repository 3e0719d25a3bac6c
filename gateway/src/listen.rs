//! The listeners: TLS, plain HTTP where it is allowed, and the Unix socket.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use controller::Transport;
use futures::future::BoxFuture;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::calls::{Calls, Server};
use crate::forward::ForwardClient;
use crate::http::raw::{self, Opening, Rewound};
use crate::http::{self, Origin, Site};
use crate::tls::{ApiCertificate, TlsError};

/// Where and within which limits to listen.
#[derive(Clone)]
pub struct GatewayConfig {
    /// HTTPS.
    pub tls: Vec<SocketAddr>,
    /// HTTP without TLS.
    pub plain: Vec<SocketAddr>,
    /// The Unix socket; made anew at each start, mode 0600.
    pub socket: Option<PathBuf>,
    /// What is shown over HTTPS.
    pub certificate: ApiCertificate,
    /// Bytes that a call's body may have.
    pub largest_body: usize,
    /// Connections at once, over all listeners; more wait to be accepted.
    pub connections: usize,
}

/// The gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which one.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A running gateway.
pub struct Gateway {
    /// What HTTPS listens on.
    pub tls: Vec<SocketAddr>,
    /// What plain HTTP listens on.
    pub plain: Vec<SocketAddr>,
    tasks: TaskTracker,
    socket: Option<PathBuf>,
}

const HEADER_LIMIT: Duration = Duration::from_secs(60);
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
const LARGEST_HEAD: usize = 64 << 10;
/// A client that has been silent for so long is asked whether it is there …
const SILENCE: Duration = Duration::from_secs(30);
/// … and this often from then on.
const PROBE: Duration = Duration::from_secs(5);
/// What was sent must be acknowledged within this, and taken.
const STUCK: Duration = Duration::from_secs(60);
/// Calls that are under way when the end comes have this long.
const GRACE: Duration = Duration::from_secs(3);

impl Gateway {
    /// Listens until `shutdown`.
    ///
    /// # Errors
    /// [`GatewayError`].
    pub fn start(
        config: GatewayConfig,
        calls: Arc<dyn Calls>,
        forward: ForwardClient,
        shutdown: CancellationToken,
    ) -> BoxFuture<'static, Result<Self, GatewayError>> {
        Box::pin(Self::begin(config, calls, forward, shutdown))
    }

    async fn begin(
        config: GatewayConfig,
        calls: Arc<dyn Calls>,
        forward: ForwardClient,
        shutdown: CancellationToken,
    ) -> Result<Self, GatewayError> {
        let mut tls_listeners = Vec::new();
        for address in &config.tls {
            tls_listeners.push(bind(*address).await?);
        }
        let tls: Vec<SocketAddr> = tls_listeners
            .iter()
            .zip(&config.tls)
            .map(|(listener, asked)| listener.local_addr().unwrap_or(*asked))
            .collect();
        let site = Arc::new(Site {
            server: Server { calls, forward },
            largest_body: config.largest_body,
            https_port: tls.first().map(SocketAddr::port),
        });
        let tasks = TaskTracker::new();
        let shared =
            Shared { site, tasks: tasks.clone(), room: Arc::new(Semaphore::new(config.connections)), shutdown };
        for listener in tls_listeners {
            config.certificate.server()?;
            tasks.spawn(accept_tcp(shared.clone(), listener, Some(config.certificate.clone())));
        }
        let mut plain = Vec::new();
        for address in &config.plain {
            let listener = bind(*address).await?;
            plain.push(listener.local_addr().unwrap_or(*address));
            tasks.spawn(accept_tcp(shared.clone(), listener, None));
        }
        if let Some(path) = &config.socket {
            let failed = |source| GatewayError::Listen { address: path.display().to_string(), source };
            match std::fs::remove_file(path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
            let listener = UnixListener::bind(path).map_err(failed)?;
            let only_owner = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            std::fs::set_permissions(path, only_owner).map_err(failed)?;
            tasks.spawn(accept_unix(shared.clone(), listener));
        }
        tasks.close();
        Ok(Self { tls, plain, tasks, socket: config.socket })
    }

    /// Waits until every connection has ended; to be called after `shutdown` was cancelled.
    pub async fn ended(self) {
        if tokio::time::timeout(GRACE + Duration::from_secs(2), self.tasks.wait()).await.is_err() {
            tracing::warn!("connections were cut off");
        }
        if let Some(path) = self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, GatewayError> {
    TcpListener::bind(address).await.map_err(|source| GatewayError::Listen { address: address.to_string(), source })
}

#[derive(Clone)]
struct Shared {
    site: Arc<Site>,
    tasks: TaskTracker,
    room: Arc<Semaphore>,
    shutdown: CancellationToken,
}

async fn accept_tcp(shared: Shared, listener: TcpListener, tls: Option<ApiCertificate>) {
    loop {
        let Ok(room) = Arc::clone(&shared.room).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.shutdown.cancelled() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // Without it small answers wait for acknowledgements.
        let _ = stream.set_nodelay(true);
        if let Err(error) = notice_the_dead(&stream) {
            tracing::debug!(%error, ?peer, "this connection is not watched");
        }
        let port = stream.local_addr().ok().map(|address| address.port());
        let origin = Origin { transport: Transport::Tcp, peer: Some(peer.ip()), secure: tls.is_some(), port };
        let shared_by = shared.clone();
        let tls = match tls.as_ref().map(ApiCertificate::server).transpose() {
            Ok(server) => server.map(TlsAcceptor::from),
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                continue;
            }
        };
        shared.tasks.spawn(async move {
            match tls {
                None => connection(shared_by, stream, origin).await,
                Some(tls) => match tokio::time::timeout(HANDSHAKE_LIMIT, tls.accept(stream)).await {
                    Ok(Ok(stream)) => connection(shared_by, stream, origin).await,
                    Ok(Err(error)) => tracing::debug!(%error, ?peer, "TLS handshake failed"),
                    Err(_) => tracing::debug!(?peer, "TLS handshake took too long"),
                },
            }
            drop(room);
        });
    }
}

/// A client whose machine is gone, or that takes no more of its answer, does not keep its connection for ever: neither
/// while it waits for events, when nothing is sent, nor while an answer is on its way.
fn notice_the_dead(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(SILENCE).with_interval(PROBE))?;
    socket.set_tcp_user_timeout(Some(STUCK))
}

async fn accept_unix(shared: Shared, listener: UnixListener) {
    loop {
        let Ok(room) = Arc::clone(&shared.room).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.shutdown.cancelled() => return,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let shared_by = shared.clone();
        shared.tasks.spawn(async move {
            let origin = Origin { transport: Transport::Unix, peer: None, secure: true, port: None };
            connection(shared_by, stream, origin).await;
            drop(room);
        });
    }
}

async fn connection(shared: Shared, mut stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, origin: Origin) {
    let site = Arc::clone(&shared.site);
    let opening = tokio::select! {
        opening = raw::look(&mut stream, LARGEST_HEAD, HEADER_LIMIT) => opening,
        () = shared.shutdown.cancelled() => return,
    };
    let seen = match opening {
        None => return,
        Some(Opening::Usual(seen)) => seen,
        Some(Opening::Tunnel(head, begun)) => {
            tokio::select! {
                () = http::tunnel::serve(&site, &origin, &head, begun, stream) => {}
                () = shared.shutdown.cancelled() => tracing::debug!("a console was cut off"),
            }
            return;
        }
        Some(Opening::Endless(head, begun)) => {
            tokio::select! {
                () = raw::serve(&site, &origin, &head, begun, stream) => {}
                () = shared.shutdown.cancelled() => tracing::debug!("a connection was cut off"),
            }
            return;
        }
    };
    let stream = Rewound::new(seen, stream);
    let service = service_fn(move |request| http::serve(Arc::clone(&site), origin.clone(), request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .max_buf_size(LARGEST_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection ended");
            }
            return;
        }
        () = shared.shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    if tokio::time::timeout(GRACE, connection).await.is_err() {
        tracing::debug!("a connection was cut off");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn a_connection_is_given_up_when_its_client_is_gone_or_takes_no_more() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (stream, _) = accepted.unwrap();
        notice_the_dead(&stream).unwrap();
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), SILENCE);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), PROBE);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(STUCK));
        drop(client);
    }
}
