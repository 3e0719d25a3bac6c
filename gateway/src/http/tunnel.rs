//! Connections that become the console of a VM.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use controller::{CONSOLE, Tunnel};
use futures::StreamExt;
use http::request::Parts;
use hyper::StatusCode;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::raw::start;
use super::request::{Plain, declined, knock};
use super::{Origin, Site};

const PIECE: usize = 16 << 10;

/// Opens a console, and is it until one of both ends.
pub(crate) async fn serve<S>(site: &Arc<Site>, origin: &Origin, head: &Parts, begun: Bytes, stream: S)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let connected = if head.uri.path() == CONSOLE {
        let opened = site.server.calls.connect(knock(origin, head)).await;
        opened.map_err(|why| declined(why, site, origin, head))
    } else {
        Err(Plain::page(StatusCode::NOT_FOUND, "Nothing can be connected to there."))
    };
    let served: io::Result<()> = async {
        match connected {
            Ok(tunnel) => {
                writer.write_all(b"HTTP/1.0 200 OK\r\ncache-control: no-cache, no-store\r\n\r\n").await?;
                writer.flush().await?;
                through(tunnel, begun, &mut reader, &mut writer).await?;
            }
            Err(plain) => {
                writer.write_all(&start(plain.status, &plain.headers)).await?;
                writer.write_all(&plain.body).await?;
            }
        }
        writer.shutdown().await
    }
    .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a console ended");
    }
}

async fn through(
    tunnel: Tunnel,
    begun: Bytes,
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let Tunnel { mut from, to } = tunnel;
    let inwards = async {
        let mut piece = begun;
        loop {
            if !piece.is_empty() && to.send(piece).await.is_err() {
                return Ok(());
            }
            let mut next = BytesMut::with_capacity(PIECE);
            if reader.read_buf(&mut next).await? == 0 {
                return Ok(());
            }
            piece = next.freeze();
        }
    };
    let outwards = async {
        while let Some(piece) = from.next().await {
            writer.write_all(&piece?).await?;
            writer.flush().await?;
        }
        Ok(())
    };
    tokio::select! {
        ended = inwards => ended,
        ended = outwards => ended,
    }
}
