//! HTTP: which body is whose, within which limits.

mod body;
pub(crate) mod raw;
mod request;
mod routes;
mod transfer;
pub(crate) mod tunnel;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use body::Outgoing;
use bytes::Bytes;
use controller::{Caller, Transport};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Version};

use request::Plain;
use routes::Target;
use transfer::{plain, transfer};

use crate::body::Body;
use crate::calls::{Answer, Protocol, Server};

/// A body takes no longer than this to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(60);

/// What every connection shares.
pub(crate) struct Site {
    pub(crate) server: Server,
    pub(crate) largest_body: usize,
    /// Where HTTPS is served, if it is.
    pub(crate) https_port: Option<u16>,
}

/// Where a connection comes from.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) transport: Transport,
    pub(crate) peer: Option<std::net::IpAddr>,
    /// Whether it is TLS.
    pub(crate) secure: bool,
    /// The port it came to.
    pub(crate) port: Option<u16>,
}

fn text(headers: &HeaderMap, name: &str) -> String {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("").to_owned()
}

fn caller(origin: &Origin, headers: &HeaderMap) -> Caller {
    Caller {
        transport: origin.transport,
        peer: origin.peer,
        user_agent: text(headers, "user-agent"),
        originator: text(headers, "originator"),
        forwarded: false,
        // The host's own keys are nobody else's.
        idempotency_key: headers
            .get("idempotency-key")
            .and_then(|value| value.to_str().ok())
            .filter(|key| !key.is_empty() && !key.starts_with(controller::OWN_KEY))
            .map(str::to_owned),
    }
}

/// Answers one request.
pub(crate) async fn serve(
    site: Arc<Site>,
    origin: Origin,
    request: Request<Incoming>,
) -> Result<Response<Outgoing>, Infallible> {
    let (method, path) = (request.method(), request.uri().path());
    Ok(match routes::find(method, path) {
        Some(Target::Call(protocol)) => call(&site, &origin, request, protocol).await,
        Some(Target::Handler(handler)) => transfer(&site, &origin, handler, request).await,
        Some(Target::Page) => page(),
        None if method == Method::OPTIONS => preflight(request.headers()),
        None if (method == Method::GET || method == Method::HEAD) && !routes::known(path) => {
            plain(Plain::page(StatusCode::NOT_FOUND, &format!("Nothing is served at {path}.")))
        }
        None => {
            let text = format!("{method} is not for {path}. Calls are POSTed to / or /jsonrpc.");
            plain(Plain::page(StatusCode::METHOD_NOT_ALLOWED, &text))
        }
    })
}

async fn call(site: &Site, origin: &Origin, request: Request<Incoming>, protocol: Protocol) -> Response<Outgoing> {
    let (head, body) = request.into_parts();
    let collected = tokio::time::timeout(BODY_LIMIT, Limited::new(body, site.largest_body).collect()).await;
    let bytes = match collected {
        Ok(Ok(collected)) => collected.to_bytes(),
        Ok(Err(error)) => return respond(Answer::malformed(&format!("the body cannot be read: {error}")), true),
        Err(_) => return respond(Answer::malformed("the body did not arrive in time"), true),
    };
    let answer = site.server.answer(protocol, bytes, caller(origin, &head.headers)).await;
    let close = answer.status != 200;
    let mut response = respond(answer, close);
    if head.version == Version::HTTP_10
        && !close
        && text(&head.headers, "connection").eq_ignore_ascii_case("keep-alive")
    {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("keep-alive"));
    }
    response
}

fn respond(answer: Answer, close: bool) -> Response<Outgoing> {
    let mut response = Response::new(Outgoing::new(answer.body));
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    let content_type = HeaderValue::from_str(&answer.content_type).unwrap_or(HeaderValue::from_static("text/plain"));
    headers.insert(header::CONTENT_TYPE, content_type);
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("X-Requested-With"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, no-store"));
    if close {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn preflight(asked: &HeaderMap) -> Response<Outgoing> {
    let mut response = Response::new(Outgoing::new(Body::default()));
    let wanted = text(asked, "access-control-request-headers");
    let allowed = if wanted.is_empty() { "X-Requested-With".to_owned() } else { format!("{wanted}, X-Requested-With") };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("POST, PUT, GET, OPTIONS"));
    if let Ok(value) = HeaderValue::from_str(&allowed) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, value);
    }
    response
}

/// What this is, for whoever looks with a browser.
fn page() -> Response<Outgoing> {
    let text = "<!doctype html><html><head><title>Xenith</title></head><body><h1>Xenith</h1>\
                <p>This host is a member of a Xenith pool. It speaks XenAPI: XML-RPC at <code>/</code>, JSON-RPC at \
                <code>/jsonrpc</code>. Connect to it with any XenAPI client.</p></body></html>\n";
    let mut response = Response::new(Outgoing::new(Bytes::from_static(text.as_bytes())));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html"));
    response
}
