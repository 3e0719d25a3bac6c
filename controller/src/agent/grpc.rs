//! Agents over gRPC.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use proto::agent::agent_client::AgentClient;
use proto::agent::{AgentEvent, ConsoleBytes, ConsoleName, HelloReply, HelloRequest, Step, WatchRequest};
use raft_store::PeerTls;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::handlers::Tunnel;

use super::{Agent, AgentError, Performed};

/// Pieces that wait on their way to a console.
const WAITING_PIECES: usize = 16;
const HELLO_LIMIT: Duration = Duration::from_secs(3);

pub(super) struct GrpcAgent {
    client: AgentClient<Channel>,
}

impl GrpcAgent {
    pub(super) fn new(tls: &PeerTls, address: &str) -> Result<Self, AgentError> {
        let channel = tls.channel(address).map_err(|error| AgentError::Unreachable(error.to_string()))?;
        Ok(Self { client: AgentClient::new(channel) })
    }
}

/// A call that found nobody was not made; any other failure leaves it open.
fn failed(status: &Status) -> AgentError {
    let refused = std::error::Error::source(status).is_some_and(|source| {
        let mut cause: Option<&dyn std::error::Error> = Some(source);
        std::iter::from_fn(|| {
            let this = cause?;
            cause = this.source();
            Some(this)
        })
        .any(|cause| {
            cause
                .downcast_ref::<std::io::Error>()
                .is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
        })
    });
    match status.code() {
        Code::Unavailable if refused => AgentError::Unreachable(status.message().to_owned()),
        _ => AgentError::Unknown(status.to_string()),
    }
}

async fn limited<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, AgentError> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(failed(&status)),
        Err(_) => Err(AgentError::Unknown(format!("no answer within {limit:?}"))),
    }
}

#[async_trait]
impl Agent for GrpcAgent {
    async fn hello(&self, request: HelloRequest) -> Result<HelloReply, AgentError> {
        limited(HELLO_LIMIT, self.client.clone().hello(request)).await
    }

    async fn perform(&self, step: Step, limit: Duration) -> Result<Performed, AgentError> {
        let outcome = limited(limit, self.client.clone().perform(step)).await?;
        if outcome.result.is_none() {
            return Err(AgentError::Unknown("an empty outcome".into()));
        }
        Performed::try_from(outcome).map_err(AgentError::Refused)
    }

    async fn watch(
        &self,
        request: WatchRequest,
    ) -> Result<BoxStream<'static, Result<AgentEvent, AgentError>>, AgentError> {
        let events = limited(HELLO_LIMIT, self.client.clone().watch(request)).await?;
        Ok(events.map(|event| event.map_err(|status| failed(&status))).boxed())
    }

    async fn console(&self, pool: &str, vm: &str, protocol: &str) -> Result<Tunnel, AgentError> {
        let name = ConsoleName { pool: pool.to_owned(), vm: vm.to_owned(), protocol: protocol.to_owned() };
        let (to, typed) = mpsc::channel::<Bytes>(WAITING_PIECES);
        let first = futures::stream::once(async { ConsoleBytes { console: Some(name), data: Vec::new() } });
        let typed = ReceiverStream::new(typed).map(|piece| ConsoleBytes { console: None, data: piece.into() });
        let shown = limited(HELLO_LIMIT, self.client.clone().open_console(first.chain(typed))).await?;
        let from = shown.map(|piece| match piece {
            Ok(piece) => Ok(Bytes::from(piece.data)),
            Err(status) => Err(std::io::Error::other(status.message().to_owned())),
        });
        Ok(Tunnel { from: from.boxed(), to })
    }
}
