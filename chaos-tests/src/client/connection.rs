//! One keep-alive connection to one host, and one request over it at a time.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::failure::{CallError, Failure};
use super::trust::trust_anyone;

/// Where a host takes calls.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// TLS over TCP.
    Https(SocketAddr),
    /// TCP alone.
    Http(SocketAddr),
    /// The local socket, where every caller is root.
    Unix(PathBuf),
}

impl Endpoint {
    /// The same door at another host, as a client finds it that was told an address: ports stay.
    pub fn at(&self, address: &str) -> Option<Self> {
        let address = address.parse().ok()?;
        match self {
            Self::Https(old) => Some(Self::Https(SocketAddr::new(address, old.port()))),
            Self::Http(old) => Some(Self::Http(SocketAddr::new(address, old.port()))),
            Self::Unix(_) => None,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Https(address) => write!(f, "https://{address}"),
            Self::Http(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// An HTTP answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    /// 200 for XenAPI failures too.
    pub status: StatusCode,
    /// As they came.
    pub headers: HeaderMap,
    /// As it came.
    pub body: Bytes,
}

/// A connection that is used until it breaks.
pub struct Connection {
    endpoint: Endpoint,
    sender: SendRequest<Full<Bytes>>,
    /// Drives the connection, and ends with it.
    _driver: JoinSet<()>,
}

impl Connection {
    /// Connects, within the limit.
    pub async fn open(endpoint: &Endpoint, limit: Duration) -> Result<Self, CallError> {
        let lost =
            |cause: &dyn fmt::Display| CallError::Unreached { at: endpoint.to_string(), cause: cause.to_string() };
        let opened = timeout(limit, async {
            match endpoint {
                Endpoint::Http(address) => {
                    let stream = TcpStream::connect(address).await.map_err(|error| lost(&error))?;
                    stream.set_nodelay(true).map_err(|error| lost(&error))?;
                    Self::over(endpoint, stream).await
                }
                Endpoint::Https(address) => {
                    let stream = TcpStream::connect(address).await.map_err(|error| lost(&error))?;
                    stream.set_nodelay(true).map_err(|error| lost(&error))?;
                    let config = trust_anyone().map_err(|error| lost(&error))?;
                    let name = ServerName::from(address.ip());
                    let stream =
                        TlsConnector::from(config).connect(name, stream).await.map_err(|error| lost(&error))?;
                    Self::over(endpoint, stream).await
                }
                Endpoint::Unix(path) => {
                    let stream = UnixStream::connect(path).await.map_err(|error| lost(&error))?;
                    Self::over(endpoint, stream).await
                }
            }
        });
        let late = |_| Err(lost(&format_args!("no connection within {} ms", limit.as_millis())));
        opened.await.unwrap_or_else(late)
    }

    async fn over(
        endpoint: &Endpoint,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<Self, CallError> {
        let lost = |error: hyper::Error| CallError::Unreached { at: endpoint.to_string(), cause: error.to_string() };
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(lost)?;
        let mut driver = JoinSet::new();
        // How it ends is seen by the requests on it.
        driver.spawn(async move { drop(connection.await) });
        Ok(Self { endpoint: endpoint.clone(), sender, _driver: driver })
    }

    /// Whether the other side has closed it already, so that nothing can be sent.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Whom it leads to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Any request; the answer's body is read to its end within the same limit.
    pub async fn request(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
        limit: Duration,
    ) -> Result<Answer, CallError> {
        let at = self.endpoint.to_string();
        let lost = |cause: String| CallError::Lost { at: at.clone(), cause };
        let host = match &self.endpoint {
            Endpoint::Https(address) | Endpoint::Http(address) => address.to_string(),
            Endpoint::Unix(_) => "localhost".to_owned(),
        };
        let mut request = Request::builder().method(method).uri(path).header("host", host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).map_err(|error| lost(error.to_string()))?;
        let answered = timeout(limit, async {
            self.sender.ready().await?;
            let (head, body) = self.sender.send_request(request).await?.into_parts();
            Ok(Answer { status: head.status, headers: head.headers, body: body.collect().await?.to_bytes() })
        });
        match answered.await {
            Ok(answer) => answer.map_err(|error: hyper::Error| lost(format!("{error:?}"))),
            Err(_) => Err(CallError::Late { at, limit }),
        }
    }

    /// A POST of this body.
    pub async fn post(
        &mut self,
        path: &str,
        content_type: &str,
        body: impl Into<Bytes>,
        limit: Duration,
    ) -> Result<Answer, CallError> {
        self.request(Method::POST, path, &[("content-type", content_type)], body, limit).await
    }

    /// One JSON-RPC 2.0 call, exactly as it stands: no session is added.
    pub async fn call(&mut self, method: &str, params: &Value, limit: Duration) -> Result<Value, CallError> {
        self.call_with_key(method, params, None, limit).await
    }

    /// The same, with an `Idempotency-Key`.
    pub async fn call_with_key(
        &mut self,
        method: &str,
        params: &Value,
        key: Option<&str>,
        limit: Duration,
    ) -> Result<Value, CallError> {
        let body = json!({"jsonrpc": "2.0", "id": 7, "method": method, "params": params}).to_string();
        let mut headers = vec![("content-type", "application/json")];
        headers.extend(key.map(|key| ("idempotency-key", key)));
        let answer = self.request(Method::POST, "/jsonrpc", &headers, body, limit).await?;
        let malformed = |what: String| CallError::Malformed { at: self.endpoint.to_string(), what };
        let shown = || String::from_utf8_lossy(&answer.body).chars().take(400).collect::<String>();
        if answer.status != StatusCode::OK {
            return Err(malformed(format!("HTTP status {}: {}", answer.status, shown())));
        }
        let mut value: Value = serde_json::from_slice(&answer.body).map_err(|error| malformed(error.to_string()))?;
        if value["jsonrpc"] != "2.0" || value["id"] != 7 {
            return Err(malformed(shown()));
        }
        match (value.get_mut("result").map(Value::take), value.get("error")) {
            (Some(result), None) => Ok(result),
            (None, Some(error)) => match Failure::of(error) {
                Some(failure) => Err(CallError::Refused(failure)),
                None => Err(malformed(shown())),
            },
            // Clients take a null error beside a result for a broken server.
            _ => Err(malformed(shown())),
        }
    }
}
