//! Calls that another member answers: the client's bytes go there, its answer comes back, nobody notices.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use controller::{Caller, Transport};
use futures::Stream;
use parking_lot::Mutex;
use proto::forward::forward_client::ForwardClient as Client;
use proto::forward::forward_server::{Forward, ForwardServer};
use proto::forward::{AnswerPart, ForwardedCall, forwarded_call};
use raft_store::{Member, PeerTls};
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use crate::body::Body;
use crate::calls::{Answer, BEGUN, Calls, MISDIRECTED, Protocol, Server};

/// A forwarded call may wait for events as long as a direct one; the peer's keep-alive notices a dead master. However
/// many masters die over it, no call is asked again after this long.
pub(crate) const LONGEST: Duration = Duration::from_secs(3700);
const PIECE: usize = 256 << 10;
const LARGEST_MESSAGE: usize = 16 << 20;

/// Why a forwarded call has no answer.
#[derive(Debug)]
pub(crate) enum Lost {
    /// It certainly did not run.
    NotSent(String),
    /// It may have run.
    Unknown(String),
}

/// The sending side.
#[derive(Clone)]
pub struct ForwardClient {
    tls: Option<PeerTls>,
    channels: Arc<Mutex<HashMap<String, Channel>>>,
}

impl ForwardClient {
    /// Over mutual TLS, to the members' peer listeners.
    #[must_use]
    pub fn new(tls: PeerTls) -> Self {
        Self { tls: Some(tls), channels: Arc::default() }
    }

    /// To nowhere: for a gateway without peers.
    #[must_use]
    pub fn none() -> Self {
        Self { tls: None, channels: Arc::default() }
    }

    fn channel(&self, address: &str) -> Result<Channel, Lost> {
        if let Some(channel) = self.channels.lock().get(address) {
            return Ok(channel.clone());
        }
        let tls = self.tls.as_ref().ok_or_else(|| Lost::NotSent("this host has no peers".into()))?;
        let channel = tls.channel(address).map_err(|error| Lost::NotSent(error.to_string()))?;
        self.channels.lock().insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    pub(crate) async fn send(
        &self,
        member: &Member,
        protocol: Protocol,
        body: Bytes,
        caller: &Caller,
    ) -> Result<Answer, Lost> {
        let mut client = Client::new(self.channel(&member.peer_address)?)
            .max_decoding_message_size(LARGEST_MESSAGE)
            .max_encoding_message_size(LARGEST_MESSAGE);
        let call = ForwardedCall {
            protocol: match protocol {
                Protocol::XmlRpc => forwarded_call::Protocol::XmlRpc.into(),
                Protocol::JsonRpc => forwarded_call::Protocol::JsonRpc.into(),
            },
            body,
            local_root: caller.transport == Transport::Unix,
            peer: caller.peer.map(|peer| peer.to_string()).unwrap_or_default(),
            user_agent: caller.user_agent.clone(),
            originator: caller.originator.clone(),
            traceparent: String::new(),
            idempotency_key: caller.idempotency_key.clone().unwrap_or_default(),
        };
        let send = async {
            let mut parts = client.call(call).await.map_err(|status| lost(&status))?.into_inner();
            let mut answer = Answer { status: 500, content_type: String::new(), body: Body::default() };
            let mut first = true;
            while let Some(part) = parts.message().await.map_err(|status| Lost::Unknown(status.to_string()))? {
                if first {
                    answer.status = u16::try_from(part.status).unwrap_or(500);
                    answer.content_type = part.content_type;
                    first = false;
                }
                answer.body.share(part.body);
            }
            if first { Err(Lost::Unknown("an empty answer".into())) } else { Ok(answer) }
        };
        tokio::time::timeout(LONGEST, send).await.unwrap_or_else(|_| Err(Lost::Unknown("no answer in an hour".into())))
    }
}

/// A call that found nobody, or that the other side refused to begin, did not run.
fn lost(status: &Status) -> Lost {
    if status.code() == Code::FailedPrecondition {
        return Lost::NotSent(status.message().to_owned());
    }
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
        {
            return Lost::NotSent(status.message().to_owned());
        }
        cause = error.source();
    }
    Lost::Unknown(status.to_string())
}

/// The receiving side: to be mounted on the peers' listener. Calls are answered on the runtime that this is called on,
/// whichever the listener has: they must not stand in consensus' way.
#[must_use]
pub fn forward_service(calls: Arc<dyn Calls>) -> ForwardServer<impl Forward> {
    let server = Server { calls, forward: ForwardClient::none() };
    ForwardServer::new(Receiver { server: Arc::new(server), runtime: Handle::current() })
        .max_decoding_message_size(LARGEST_MESSAGE)
        .max_encoding_message_size(LARGEST_MESSAGE)
}

struct Receiver {
    server: Arc<Server>,
    runtime: Handle,
}

#[tonic::async_trait]
impl Forward for Receiver {
    type CallStream = Pin<Box<dyn Stream<Item = Result<AnswerPart, Status>> + Send>>;

    async fn call(&self, request: Request<ForwardedCall>) -> Result<Response<Self::CallStream>, Status> {
        let call = request.into_inner();
        let protocol = match call.protocol() {
            forwarded_call::Protocol::XmlRpc => Protocol::XmlRpc,
            forwarded_call::Protocol::JsonRpc => Protocol::JsonRpc,
            forwarded_call::Protocol::Unspecified => return Err(Status::invalid_argument("unknown protocol")),
        };
        let caller = Caller {
            transport: if call.local_root { Transport::Unix } else { Transport::Tcp },
            peer: call.peer.parse().ok(),
            user_agent: call.user_agent,
            originator: call.originator,
            forwarded: true,
            idempotency_key: Some(call.idempotency_key).filter(|key| !key.is_empty()),
        };
        let server = Arc::clone(&self.server);
        let answering = self.runtime.spawn(async move { server.answer(protocol, call.body, caller).await });
        // Who asked may go away: then nobody waits for the answer.
        let answer =
            AbortOnDropHandle::new(answering).await.map_err(|_| Status::internal("the call was broken off"))?;
        match answer.status {
            MISDIRECTED => return Err(Status::failed_precondition("this member is not the master")),
            BEGUN => return Err(Status::aborted("this member is the master no more")),
            _ => {}
        }
        let head = AnswerPart { status: answer.status.into(), content_type: answer.content_type, body: Bytes::new() };
        let parts = answer.body.flat_map(|mut piece| {
            std::iter::from_fn(move || (!piece.is_empty()).then(|| piece.split_to(piece.len().min(PIECE))))
        });
        let parts = parts.map(|body| AnswerPart { status: 0, content_type: String::new(), body });
        Ok(Response::new(Box::pin(futures::stream::iter(std::iter::once(head).chain(parts).map(Ok)))))
    }
}
