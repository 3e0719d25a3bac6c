//! Bodies: answers, with their length where that is known; streams; and what a client sends.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use controller::ByteStream;
use futures::StreamExt;
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};

use crate::body::Body;

/// A client that sends nothing for this long has gone.
pub(super) const BODY_IDLE: Duration = Duration::from_secs(60);
/// Clients that do not know the length of what they send declare this one, and close when they are done.
const OPEN_ENDED: u64 = 1 << 50;

/// What is answered.
pub(crate) enum Outgoing {
    /// Its length is stated where it is known.
    Answer(Body),
    /// Its end is the connection's, or that of a chunked body.
    Stream(ByteStream),
}

impl Outgoing {
    pub(crate) fn new(body: impl Into<Body>) -> Self {
        Self::Answer(body.into())
    }
}

impl hyper::body::Body for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut *self {
            Self::Answer(body) => Poll::Ready(body.next().map(|piece| Ok(Frame::data(piece)))),
            Self::Stream(stream) => stream.poll_next_unpin(cx).map_ok(Frame::data),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Answer(body) if body.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Answer(body) => body.length().map_or_else(SizeHint::default, SizeHint::with_exact),
            Self::Stream(_) => SizeHint::default(),
        }
    }
}

/// What a client sends, piece by piece, for as long as it sends.
pub(super) fn incoming(body: Incoming) -> ByteStream {
    let open_ended = body.size_hint().exact().is_some_and(|length| length >= OPEN_ENDED);
    let next = move |body: Option<Incoming>| async move {
        let mut body = body?;
        loop {
            match tokio::time::timeout(BODY_IDLE, body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        return Some((Ok(data), Some(body)));
                    }
                }
                Ok(None) => return None,
                Ok(Some(Err(_))) if open_ended => return None,
                Ok(Some(Err(error))) => return Some((Err(io::Error::other(error)), None)),
                Err(_) => return Some((Err(io::ErrorKind::TimedOut.into()), None)),
            }
        }
    };
    futures::stream::unfold(Some(body), next).boxed()
}
