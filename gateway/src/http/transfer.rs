//! What is fetched from the pool and what is sent to it, over hyper.

use std::sync::Arc;

use bytes::Bytes;
use controller::{ByteStream, Handler, Opened};
use datamodel::ApiError;
use futures::future::Either;
use futures::{FutureExt, StreamExt};
use hyper::body::Incoming;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use tokio::sync::oneshot;

use super::body::{Outgoing, incoming};
use super::request::{Plain, declined, inquiry};
use super::{Origin, Site};

/// Answers a request for a handler.
pub(super) async fn transfer(
    site: &Arc<Site>,
    origin: &Origin,
    handler: &'static Handler,
    request: Request<Incoming>,
) -> Response<Outgoing> {
    let (head, body) = request.into_parts();
    let waits =
        head.headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let (body, begun) = noticed(incoming(body));
    match site.server.calls.open(inquiry(handler, origin, &head, body)).await {
        Err(why) => plain(declined(why, site, origin, &head)),
        Ok(Opened::Download { content_type, body }) => {
            let mut response = Response::new(Outgoing::Stream(body));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
            uncached(response)
        }
        Ok(Opened::Upload(mut outcome)) => {
            // Most clients send nothing before they see the 200. One that says that it waits for a 100 gets that when
            // its body is first read, and would take a 200 before it for the end.
            let outcome = if waits {
                tokio::select! {
                    biased;
                    outcome = &mut outcome => match outcome {
                        Err(error) => return plain(Plain::page(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string())),
                        Ok(()) => Either::Left(std::future::ready(Ok(()))),
                    },
                    _ = begun => Either::Right(outcome),
                }
            } else {
                Either::Right(outcome)
            };
            // The body of the answer stays open until all is read: its end would be the end of the connection.
            let told = outcome.map(|outcome| Ok(verdict(outcome)));
            let told = futures::stream::once(told)
                .filter(|piece| futures::future::ready(!matches!(piece, Ok(piece) if Bytes::is_empty(piece))));
            uncached(Response::new(Outgoing::Stream(told.boxed())))
        }
    }
}

/// What stands in the answer to an upload, whose status went out before anything was known: nothing where it went well.
pub(super) fn verdict(outcome: Result<(), ApiError>) -> Bytes {
    match outcome {
        Ok(()) => Bytes::new(),
        Err(error) => Bytes::from(format!("{error}\n")),
    }
}

/// The body, and word of the first piece that was read of it.
fn noticed(body: ByteStream) -> (ByteStream, oneshot::Receiver<()>) {
    let (tell, begun) = oneshot::channel();
    let mut tell = Some(tell);
    let body = body.inspect(move |_| {
        if let Some(tell) = tell.take() {
            let _ = tell.send(());
        }
    });
    (body.boxed(), begun)
}

/// An answer that is not served from the pool.
pub(super) fn plain(answer: Plain) -> Response<Outgoing> {
    let mut response = Response::new(Outgoing::new(answer.body));
    *response.status_mut() = answer.status;
    for (name, value) in answer.headers {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(HeaderName::from_static(name), value);
        }
    }
    uncached(response)
}

fn uncached(mut response: Response<Outgoing>) -> Response<Outgoing> {
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, no-store"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    response
}
