//! Bodies: pieces whose whole length is known, kept encodings as they are; streams; and what a client sends.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use controller::ByteStream;
use futures::StreamExt;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};

/// A client that sends nothing for this long has gone.
pub(super) const BODY_IDLE: Duration = Duration::from_secs(60);
/// Clients that do not know the length of what they send declare this one, and close when they are done.
const OPEN_ENDED: u64 = 1 << 50;

/// What is answered.
pub(crate) enum Outgoing {
    /// Its length is stated.
    Pieces { pieces: VecDeque<Bytes>, left: u64 },
    /// Its end is the connection's, or that of a chunked body.
    Stream(ByteStream),
}

impl Outgoing {
    pub(crate) fn new(pieces: Vec<Bytes>) -> Self {
        let left = pieces.iter().map(|piece| piece.len() as u64).sum();
        Self::Pieces { pieces: pieces.into(), left }
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut *self {
            Self::Pieces { pieces, left } => Poll::Ready(pieces.pop_front().map(|piece| {
                *left -= piece.len() as u64;
                Ok(Frame::data(piece))
            })),
            Self::Stream(stream) => stream.poll_next_unpin(cx).map_ok(Frame::data),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Pieces { pieces, .. } if pieces.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Pieces { left, .. } => SizeHint::with_exact(*left),
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
