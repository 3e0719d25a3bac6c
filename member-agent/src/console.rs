//! The consoles of domains, for whoever of the pool wants to see them: bytes from and to a socket of the host.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use proto::agent as wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::hypervisor::domain::DomainState;

/// Pieces that wait for the other side.
pub(crate) const WAITING_PIECES: usize = 16;
const PIECE: usize = 16 << 10;
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Connects to a domain's console.
pub(crate) async fn connect(domain: &DomainState, protocol: &str) -> Result<UnixStream, Status> {
    let known = domain.consoles.iter().find(|console| console.protocol == protocol);
    let location = known.map(|console| console.location.as_str()).and_then(|location| location.strip_prefix("unix:"));
    let path = PathBuf::from(location.ok_or_else(|| Status::not_found("the domain has no such console"))?);
    match tokio::time::timeout(CONNECT_LIMIT, UnixStream::connect(&path)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(Status::not_found(format!("{}: {error}", path.display()))),
        Err(_) => Err(Status::not_found("the console does not answer")),
    }
}

/// Is a console until one of both ends, or the agent.
pub(crate) async fn through(
    stream: UnixStream,
    mut typed: Streaming<wire::ConsoleBytes>,
    shown: mpsc::Sender<Result<wire::ConsoleBytes, Status>>,
    shutdown: CancellationToken,
) {
    let (mut reader, mut writer) = stream.into_split();
    let outwards = async {
        loop {
            let mut data = Vec::with_capacity(PIECE);
            if reader.read_buf(&mut data).await? == 0 {
                return io::Result::Ok(());
            }
            if shown.send(Ok(wire::ConsoleBytes { console: None, data })).await.is_err() {
                return Ok(());
            }
        }
    };
    let inwards = async {
        while let Ok(Some(piece)) = typed.message().await {
            writer.write_all(&piece.data).await?;
        }
        io::Result::Ok(())
    };
    tokio::select! {
        ended = outwards => log(ended),
        ended = inwards => log(ended),
        () = shutdown.cancelled() => {}
    }
}

fn log(ended: io::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a console ended");
    }
}
