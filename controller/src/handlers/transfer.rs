//! One request of a handler: its parameters, its task, and the way its bytes take.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use datamodel::{Ref, Task, errors};
use futures::{FutureExt, StreamExt};
use raft_store::State;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{Opened, Principal};
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::tasks;

/// A piece of a download.
const PIECE: usize = 64 << 10;
/// Pieces that wait for the client.
const WAITING_PIECES: usize = 8;
/// A client that takes nothing for this long is given up.
const STALLED: Duration = Duration::from_secs(60);
const NOT_TAKEN: &str = "the client takes no more";

/// A request that may be served: who asks, for what, and under which task.
pub(crate) struct Transfer {
    pub(crate) shared: Arc<Shared>,
    /// The pool as of the request's start.
    pub(crate) state: Arc<State>,
    pub(crate) who: Principal,
    query: Vec<(String, String)>,
    /// Null where the client asked for none.
    pub(crate) task: Ref<Task>,
    pub(crate) cancel: CancellationToken,
    /// Dropped, nobody runs the task any more.
    running: Option<tasks::Run>,
}

impl Transfer {
    /// Takes over the task that the client made (`task_id`), or makes one below another (`subtask_of`).
    pub(super) async fn begin(
        shared: &Arc<Shared>,
        state: Arc<State>,
        who: Principal,
        label: &str,
        query: Vec<(String, String)>,
    ) -> Served<Self> {
        let cancel = CancellationToken::new();
        let (task, running) = tasks::adopt(shared, &state, &query, label, cancel.clone()).await?;
        Ok(Self { shared: Arc::clone(shared), state, who, query, task, cancel, running })
    }

    /// Whether a parameter of the query is `true`.
    pub(crate) fn flag(&self, name: &str) -> bool {
        parameter(&self.query, name).is_some_and(|value| value == "true")
    }

    /// Sends what `write` writes, as it is written, and ends the task with it. `write` may block.
    pub(crate) fn download(
        self,
        content_type: &'static str,
        write: impl FnOnce(&State, &mut Outlet) -> io::Result<()> + Send + 'static,
    ) -> Opened {
        let (pieces, receiver) = mpsc::channel(WAITING_PIECES);
        let mut outlet = Outlet {
            pieces: pieces.clone(),
            open: Vec::with_capacity(PIECE),
            cancel: self.cancel.clone(),
            runtime: tokio::runtime::Handle::current(),
        };
        let Self { shared, state, task, cancel, running, .. } = self;
        // Ends with its client, which takes the pieces or is given up; the task ends with it.
        let work = async move {
            let writing = tokio::task::spawn_blocking(move || {
                write(&state, &mut outlet)?;
                outlet.flush_open()
            });
            let written = writing.await.unwrap_or_else(|_| Err(io::Error::other("a defect of the server")));
            let written = match written {
                Ok(()) => all_taken(&pieces).await,
                failed => failed,
            };
            let outcome = written.map_err(|error| {
                tracing::info!(%error, "a download did not come to its end");
                if cancel.is_cancelled() {
                    errors::task_cancelled(task)
                } else {
                    errors::internal_error(format!("the download did not come to its end: {error}"))
                }
            });
            if outcome.is_err() {
                // Without it the client would take what it has for the whole.
                let _ = pieces.try_send(Err(io::Error::other("cut off")));
            }
            drop(pieces);
            tasks::end_transfer(&shared, task, outcome.as_ref().copied()).await;
            drop(running);
        };
        tokio::spawn(work.in_current_span());
        Opened::Download { content_type, body: tokio_stream::wrappers::ReceiverStream::new(receiver).boxed() }
    }

    /// Takes what the client sends: `work` reads it, and its outcome ends the task. Goes on without the client, which
    /// may hang up as soon as it has sent all.
    pub(crate) fn upload<F, W>(mut self, work: F) -> Opened
    where
        F: FnOnce(Arc<Self>) -> W + Send + 'static,
        W: Future<Output = Served<()>> + Send + 'static,
    {
        let outcome = async move {
            let running = self.running.take();
            let transfer = Arc::new(self);
            let (shared, task) = (Arc::clone(&transfer.shared), transfer.task);
            let cancel = transfer.cancel.clone();
            let whole = async move {
                let outcome = tokio::select! {
                    outcome = std::panic::AssertUnwindSafe(work(transfer)).catch_unwind() => {
                        outcome.unwrap_or_else(|_| refuse(errors::internal_error("a defect of the server; its log says more")))
                    }
                    () = cancel.cancelled() => refuse(errors::task_cancelled(task)),
                    () = shared.shutdown.cancelled() => Err(Failure::NotLeader),
                };
                if let Err(failure) = &outcome {
                    tracing::info!(?failure, %task, "an upload failed");
                }
                let outcome = outcome.map_err(Failure::into_api);
                tasks::end_transfer(&shared, task, outcome.as_ref().copied()).await;
                drop(running);
                outcome
            };
            let ended = tokio::spawn(whole.in_current_span()).await;
            ended.unwrap_or_else(|_| Err(errors::internal_error("the server ends")))
        };
        Opened::Upload(outcome.boxed())
    }
}

/// Waits until the client has taken every piece: one that hangs up before has not got what it asked for, however small
/// it was.
async fn all_taken(pieces: &mpsc::Sender<io::Result<Bytes>>) -> io::Result<()> {
    for free in 1..=pieces.max_capacity() {
        match tokio::time::timeout(STALLED, pieces.reserve_many(free)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return Err(io::Error::other(NOT_TAKEN)),
        }
    }
    Ok(())
}

/// The first value of a parameter.
pub(crate) fn parameter<'q>(query: &'q [(String, String)], name: &str) -> Option<&'q str> {
    query.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

/// Where a download's bytes are written. It holds the writer back while the client is slow.
pub(crate) struct Outlet {
    pieces: mpsc::Sender<io::Result<Bytes>>,
    open: Vec<u8>,
    cancel: CancellationToken,
    runtime: tokio::runtime::Handle,
}

impl Outlet {
    fn flush_open(&mut self) -> io::Result<()> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        let piece = Bytes::from(std::mem::replace(&mut self.open, Vec::with_capacity(PIECE)));
        if piece.is_empty() {
            return Ok(());
        }
        let sent = self.runtime.block_on(self.pieces.send_timeout(Ok(piece), STALLED));
        sent.map_err(|_| io::Error::other(NOT_TAKEN))
    }
}

impl io::Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.open.extend_from_slice(bytes);
        if self.open.len() >= PIECE {
            self.flush_open()?;
        }
        Ok(bytes.len())
    }

    /// Small pieces are not worth sending.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
