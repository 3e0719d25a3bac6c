//! What hyper does not know. `PUT` in HTTP/1.0 without a length, where the body ends with the connection: old clients and
//! pipes into `xe` send so. And `CONNECT` with a path, after which the connection belongs to a console.
//!
//! The first request's head is looked at before hyper gets the connection, and only as far as it takes to see that it
//! is something else, which for a call is its first byte or two.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use controller::{ByteStream, Opened};
use futures::StreamExt;
use http::request::Parts;
use hyper::StatusCode;
use hyper::header::{CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf};

use super::body::BODY_IDLE;
use super::request::{Plain, declined, inquiry};
use super::routes::{self, Target};
use super::transfer::verdict;
use super::{Origin, Site};

const MOST_HEADERS: usize = 100;
const PIECE: usize = 64 << 10;

/// What a connection begins with.
pub(crate) enum Opening {
    /// Something for hyper, which has to see these bytes first.
    Usual(Bytes),
    /// A body without a length: its head, and what of it has come already.
    Endless(Box<Parts>, Bytes),
    /// A connection that becomes something else: its head, and what has come after it.
    Tunnel(Box<Parts>, Bytes),
}

/// Looks at how a connection begins. None where it ends before it says anything, or says nothing in time.
pub(crate) async fn look(
    stream: &mut (impl AsyncRead + Unpin),
    largest_head: usize,
    limit: Duration,
) -> Option<Opening> {
    let looking = async {
        let mut seen = BytesMut::new();
        loop {
            if stream.read_buf(&mut seen).await.ok()? == 0 {
                return (!seen.is_empty()).then(|| Opening::Usual(seen.freeze()));
            }
            match judge(&seen) {
                Judged::Usual => return Some(Opening::Usual(seen.freeze())),
                Judged::Endless(head, length) => return Some(Opening::Endless(head, seen.freeze().slice(length..))),
                Judged::Tunnel(head, length) => return Some(Opening::Tunnel(head, seen.freeze().slice(length..))),
                Judged::Open if seen.len() > largest_head => return Some(Opening::Usual(seen.freeze())),
                Judged::Open => {}
            }
        }
    };
    tokio::time::timeout(limit, looking).await.ok().flatten()
}

/// What a connection turns out to begin with.
enum Judged {
    /// Not known yet.
    Open,
    Usual,
    /// With the length of the head.
    Endless(Box<Parts>, usize),
    Tunnel(Box<Parts>, usize),
}

fn judge(seen: &[u8]) -> Judged {
    const METHODS: [&[u8]; 2] = [b"PUT ", b"CONNECT "];
    let begins = |method: &[u8]| {
        let common = seen.len().min(method.len());
        seen[..common] == method[..common]
    };
    if !METHODS.into_iter().any(begins) {
        return Judged::Usual;
    }
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(seen) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Judged::Open,
        // What is wrong with it is hyper's to say.
        Err(_) => return Judged::Usual,
    };
    let tunnel = request.method == Some("CONNECT");
    if !tunnel && request.version != Some(0) {
        return Judged::Usual;
    }
    let Some(path) = request.path else { return Judged::Usual };
    // The method is one that has a path; which it was is known.
    let Ok(head) = http::Request::put(path).body(()) else { return Judged::Usual };
    let mut head = head.into_parts().0;
    for header in request.headers.iter() {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(header.name), HeaderValue::from_bytes(header.value)) {
            head.headers.append(name, value);
        }
    }
    if tunnel {
        return Judged::Tunnel(Box::new(head), length);
    }
    let stated = head.headers.contains_key(CONTENT_LENGTH) || head.headers.contains_key(TRANSFER_ENCODING);
    if stated { Judged::Usual } else { Judged::Endless(Box::new(head), length) }
}

/// Serves such a request, and closes.
pub(crate) async fn serve<S>(site: &Arc<Site>, origin: &Origin, head: &Parts, begun: Bytes, stream: S)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (reader, mut writer) = tokio::io::split(stream);
    let answered = async {
        let opened = match routes::find(&head.method, head.uri.path()) {
            Some(Target::Handler(handler)) => {
                let inquiry = inquiry(handler, origin, head, until_end(begun, reader));
                site.server.calls.open(inquiry).await.map_err(|why| declined(why, site, origin, head))
            }
            _ => Err(Plain::page(StatusCode::NOT_FOUND, "Nothing can be sent there.")),
        };
        match opened {
            Ok(Opened::Upload(outcome)) => {
                writer.write_all(&start(StatusCode::OK, &[])).await?;
                writer.flush().await?;
                let verdict = verdict(outcome.await);
                writer.write_all(&verdict).await?;
            }
            Ok(Opened::Download { .. }) => {
                writer.write_all(&start(StatusCode::METHOD_NOT_ALLOWED, &[])).await?;
            }
            Err(plain) => {
                writer.write_all(&start(plain.status, &plain.headers)).await?;
                writer.write_all(&plain.body).await?;
            }
        }
        writer.shutdown().await
    };
    let answered: io::Result<()> = answered.await;
    if let Err(error) = answered {
        tracing::debug!(%error, "a connection ended");
    }
}

pub(super) fn start(status: StatusCode, headers: &[(&str, String)]) -> Vec<u8> {
    let reason = status.canonical_reason().unwrap_or_default();
    let mut head =
        format!("HTTP/1.0 {} {reason}\r\nconnection: close\r\ncache-control: no-cache, no-store\r\n", status.as_u16());
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    head.into_bytes()
}

/// Everything up to the connection's end.
fn until_end<S: AsyncRead + Send + 'static>(begun: Bytes, reader: ReadHalf<S>) -> ByteStream {
    let first = futures::stream::iter((!begun.is_empty()).then_some(Ok(begun)));
    let next = |reader: Option<ReadHalf<S>>| async move {
        let mut reader = reader?;
        let mut piece = BytesMut::with_capacity(PIECE);
        match tokio::time::timeout(BODY_IDLE, reader.read_buf(&mut piece)).await {
            Ok(Ok(0)) => None,
            // Not everybody takes leave of TLS.
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Ok(Ok(_)) => Some((Ok(piece.freeze()), Some(reader))),
            Ok(Err(error)) => Some((Err(error), None)),
            Err(_) => Some((Err(io::ErrorKind::TimedOut.into()), None)),
        }
    };
    first.chain(futures::stream::unfold(Some(reader), next)).boxed()
}

/// A connection of which something has been read already.
pub(crate) struct Rewound<S> {
    seen: Bytes,
    stream: S,
}

impl<S> Rewound<S> {
    pub(crate) const fn new(seen: Bytes, stream: S) -> Self {
        Self { seen, stream }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.seen.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, out);
        }
        let length = self.seen.len().min(out.remaining());
        out.put_slice(&self.seen[..length]);
        self.seen.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_a_put_of_1_0_without_a_length_is_unusual() {
        for usual in [
            "POST / HTTP/1.0\r\n\r\n",
            "PATCH / HTTP/1.0\r\n\r\n",
            "PUT / HTTP/1.1\r\n\r\n",
            "PUT / HTTP/1.0\r\nContent-Length: 0\r\n\r\n",
            "PUT / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            "PUT nonsense\r\n\r\n",
        ] {
            assert!(matches!(judge(usual.as_bytes()), Judged::Usual), "{usual}");
        }
        for open in ["P", "PUT", "PUT /import?a=b HTTP/1.0\r\nHost: x\r\n", "CONNECT /console HTTP/1.0\r\n"] {
            assert!(matches!(judge(open.as_bytes()), Judged::Open), "{open}");
        }
        let Judged::Tunnel(head, length) = judge(b"CONNECT /console?uuid=1 HTTP/1.0\r\nHost: x\r\n\r\n") else {
            panic!("a console is not known")
        };
        assert_eq!((head.uri.query(), length), (Some("uuid=1"), 45));
        let Judged::Endless(head, length) = judge(b"PUT /import?a=b HTTP/1.0\r\nHost: x\r\n\r\nbody") else {
            panic!("a body without a length is not known")
        };
        assert_eq!(
            (head.uri.to_string().as_str(), head.headers["host"].as_bytes(), length),
            ("/import?a=b", &b"x"[..], 37)
        );
    }
}
