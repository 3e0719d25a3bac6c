//! The calling side.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use openraft::base::BoxFuture;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::v2::RaftNetworkV2;
use openraft::network::{RPCOption, RPCTypes, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError, StreamAppendResult,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{AnyError, OptionalSend};
use proto::raft as wire;
use proto::raft::raft_client::RaftClient;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tower::ServiceExt as _;
use tower::util::BoxCloneSyncService;

use super::acknowledged::Acknowledged;
use super::snapshot;
use crate::disk::OpenError;
use crate::fence::loss_of;
use crate::format::{Formats, OLDEST};
use crate::machine::StateSnapshot;
use crate::planted::Planted;
use crate::readmit::Loss;
use crate::record;
use crate::types::{Config, PeerNode, Snapshot, Vote};

/// Every member's certificate is good for this name, whatever its address.
pub(crate) const PEER_NAME: &str = "xenith-peer";
const CONNECT_LIMIT: Duration = Duration::from_millis(500);
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(1);
const CALLER_LIMIT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// A heartbeat's answer that comes later than this is not waited for: a read that needs it has given up by then.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(2);
const LARGEST_MESSAGE: usize = 64 << 20;

/// What a member shows its peers, and what it asks them to show. PEM texts.
#[derive(Clone)]
pub struct PeerTls {
    /// The pool's certificate authority.
    pub ca: String,
    /// This host's certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

impl PeerTls {
    /// The calling side's configuration.
    #[must_use]
    pub fn client(&self) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.ca))
            .identity(Identity::from_pem(&self.certificate, &self.key))
            .domain_name(PEER_NAME)
            // Connecting is only the half of it: whoever accepts and then says nothing must not be waited for either.
            .timeout(HANDSHAKE_LIMIT)
    }

    /// The answering side's: it refuses who does not show a certificate of the pool.
    #[must_use]
    pub fn server(&self) -> tonic::transport::ServerTlsConfig {
        tonic::transport::ServerTlsConfig::new()
            .identity(Identity::from_pem(&self.certificate, &self.key))
            .client_ca_root(Certificate::from_pem(&self.ca))
            .timeout(CALLER_LIMIT)
    }

    /// A channel to a member; it connects when it is first used and again whenever it must.
    ///
    /// # Errors
    /// When the address or the certificates are unusable.
    pub fn channel(&self, address: &str) -> Result<Channel, OpenError> {
        let refuse = |error: tonic::transport::Error| OpenError::Certificates(format!("{address}: {error:?}"));
        let endpoint = Endpoint::from_shared(format!("https://{address}")).map_err(refuse)?;
        Ok(endpoint
            .tls_config(self.client())
            .map_err(refuse)?
            .connect_timeout(CONNECT_LIMIT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(2))
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
            .connect_lazy())
    }
}

impl std::fmt::Debug for PeerTls {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("PeerTls")
    }
}

/// A way to one peer for its gRPC calls.
pub type PeerChannel =
    BoxCloneSyncService<http::Request<tonic::body::Body>, http::Response<tonic::body::Body>, tonic::Status>;

/// How peers are reached.
pub trait Dial: Send + Sync + 'static {
    /// A way to a member; it connects when it is first used and again whenever it must.
    ///
    /// # Errors
    /// When the address or the certificates are unusable.
    fn channel(&self, target: u64, address: &str) -> Result<PeerChannel, OpenError>;
}

impl Dial for PeerTls {
    fn channel(&self, _: u64, address: &str) -> Result<PeerChannel, OpenError> {
        Ok(BoxCloneSyncService::new(self.channel(address)?.map_err(|error| tonic::Status::from_error(error.into()))))
    }
}

/// Makes the connections.
pub(crate) struct PeerFactory {
    pub(crate) peers: Arc<dyn Dial>,
    pub(crate) losses: mpsc::Sender<Loss>,
    pub(crate) formats: Formats,
    pub(crate) acknowledged: Acknowledged,
    /// How late a heartbeat's answer may be and still be told to openraft.
    pub(crate) lease: Duration,
    pub(crate) planted: Option<Planted>,
}

impl RaftNetworkFactory<Config> for PeerFactory {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &PeerNode) -> Peer {
        let channel = self.peers.channel(target, &node.peer_address);
        if let Err(error) = &channel {
            tracing::error!(target, address = node.peer_address, %error, "this peer cannot be called");
        }
        let client = channel.ok().map(|channel| {
            RaftClient::new(channel)
                .max_decoding_message_size(LARGEST_MESSAGE)
                .max_encoding_message_size(LARGEST_MESSAGE)
        });
        Peer {
            client,
            formats: self.formats.clone(),
            failures: 0,
            limits: Limits { target, losses: self.losses.clone() },
            acknowledged: self.acknowledged.clone(),
            lease: self.lease,
            heartbeats: JoinSet::new(),
            planted: self.planted,
        }
    }
}

/// A connection to one peer.
pub(crate) struct Peer {
    client: Option<RaftClient<PeerChannel>>,
    formats: Formats,
    /// Streams that did not come about, in a row.
    failures: u32,
    limits: Limits,
    acknowledged: Acknowledged,
    lease: Duration,
    /// When those were sent whose answers may still come.
    heartbeats: JoinSet<(Instant, Reply)>,
    planted: Option<Planted>,
}

/// How calls of one peer end.
#[derive(Clone)]
struct Limits {
    target: u64,
    /// Where it is told that the peer has lost its database.
    losses: mpsc::Sender<Loss>,
}

type Rpc = RPCError<Config>;

fn unreachable(text: &str) -> Rpc {
    RPCError::Unreachable(Unreachable::new(&AnyError::error(text)))
}

fn failed(status: &tonic::Status) -> Rpc {
    match status.code() {
        tonic::Code::Unavailable | tonic::Code::DeadlineExceeded => unreachable(status.message()),
        _ => RPCError::Network(NetworkError::new(&AnyError::error(status.to_string()))),
    }
}

impl Peer {
    fn client(&self) -> Result<RaftClient<PeerChannel>, Rpc> {
        self.client.clone().ok_or_else(|| unreachable("no channel"))
    }

    /// Asks what the member reads. It gets nothing that it does not read.
    async fn agree(&self, client: &mut RaftClient<PeerChannel>) -> Result<(), Rpc> {
        let question = wire::FormatsRequest { writes: self.formats.level() };
        let asked = async {
            match client.formats(question).await {
                Ok(reply) => Ok(reply.into_inner().reads),
                Err(status) if status.code() == tonic::Code::Unimplemented => Ok(OLDEST),
                Err(status) => Err(status),
            }
        };
        let reads = self.limits.keep(RPCTypes::AppendEntries, CONNECT_LIMIT, asked).await?;
        if self.formats.heard(self.limits.target, reads) {
            return Ok(());
        }
        Err(unreachable("it does not read the pool's format"))
    }

    /// Sends a heartbeat: a request that comes alone and brings no entries. What the peer reads does not matter, for nothing
    /// of the pool is in it.
    ///
    /// openraft waits until the next one is due, and takes no answer for silence; whose peers are silent may append
    /// nothing. On a busy machine, or over a long line, answers are only late: each is waited for, the lease counts it for
    /// when its heartbeat was sent, and openraft takes it for the next one's. Not what conflicts: that is about the entry
    /// that the heartbeat named.
    async fn beat(&mut self, request: &AppendEntriesRequest<Config>) -> Reply {
        let (client, limits) = (self.client()?, self.limits.clone());
        let asked = self.acknowledged.stream(limits.target, self.planted);
        let sent = Instant::now();
        asked.asked(request.vote.leader_id().term, sent);
        let call = append_alone(client, append_to_wire(request));
        self.heartbeats.spawn(async move {
            let reply = limits.keep(RPCTypes::AppendEntries, HEARTBEAT_LIMIT, call).await.and_then(append_reply);
            if let Ok(reply) = &reply {
                asked.answered(follows(reply));
            }
            (sent, reply)
        });
        while let Some(ended) = self.heartbeats.join_next().await {
            let Ok((asked, reply)) = ended else { continue };
            let tells_of_it = !matches!(reply, Err(_) | Ok(Err(StreamAppendError::Conflict(_))));
            if asked == sent || (tells_of_it && asked.elapsed() < self.lease) {
                return reply;
            }
        }
        Err(unreachable("no answer"))
    }

    async fn ask(
        &self,
        rpc: VoteRequest<Config>,
        pre_vote: bool,
        limit: Duration,
    ) -> Result<VoteResponse<Config>, Rpc> {
        let request = wire::VoteRequest {
            vote: Some(record::vote_to_wire(&rpc.vote)),
            last: rpc.last_log_id.as_ref().map(record::log_id_to_wire),
            leadership_transfer: rpc.leadership_transfer,
            pre_vote,
        };
        let mut client = self.client()?;
        let reply = self.limits.keep(RPCTypes::Vote, limit, client.vote(request)).await?.into_inner();
        let vote = reply.vote.as_ref().map(record::vote).ok_or_else(|| unreachable("a reply without a vote"))?;
        Ok(VoteResponse::new(vote, reply.last.as_ref().map(record::log_id), reply.granted))
    }
}

impl Limits {
    /// Makes a call end in time, and tells what is behind its failure.
    async fn keep<T>(
        &self,
        action: RPCTypes,
        limit: Duration,
        call: impl Future<Output = Result<T, tonic::Status>>,
    ) -> Result<T, Rpc> {
        match tokio::time::timeout(limit, call).await {
            Ok(answer) => answer.map_err(|status| {
                if let Some(name) = loss_of(&status) {
                    // It says so again where there is no room.
                    let _ = self.losses.try_send(Loss { node_id: self.target, name });
                }
                failed(&status)
            }),
            Err(_) => Err(RPCError::Timeout(Timeout { action, id: 0, target: self.target, timeout: limit })),
        }
    }
}

type Reply = Result<StreamAppendResult<Config>, Rpc>;

/// Whether a peer that answers so takes the sender for the leader.
fn follows(reply: &StreamAppendResult<Config>) -> bool {
    !matches!(reply, Err(StreamAppendError::HigherVote(_)))
}

fn append_to_wire(request: &AppendEntriesRequest<Config>) -> wire::AppendRequest {
    wire::AppendRequest {
        vote: Some(record::vote_to_wire(&request.vote)),
        previous: request.prev_log_id.as_ref().map(record::log_id_to_wire),
        entries: request.entries.iter().map(record::entry_to_wire).collect(),
        leader_commit: request.leader_commit.as_ref().map(record::log_id_to_wire),
    }
}

/// Sends one request by itself.
async fn append_alone(
    mut client: RaftClient<PeerChannel>,
    request: wire::AppendRequest,
) -> Result<wire::AppendReply, tonic::Status> {
    let mut replies = client.append(futures::stream::iter([request])).await?.into_inner();
    replies.message().await?.ok_or_else(|| tonic::Status::unavailable("no reply"))
}

fn append_reply(reply: wire::AppendReply) -> Reply {
    use wire::append_reply::Result as Told;
    match reply.result {
        Some(Told::Accepted(accepted)) => Ok(Ok(accepted.last.as_ref().map(record::log_id))),
        Some(Told::Conflict(id)) => Ok(Err(StreamAppendError::Conflict(record::log_id(&id)))),
        Some(Told::HigherVote(vote)) => Ok(Err(StreamAppendError::HigherVote(record::vote(&vote)))),
        Some(Told::Fatal(text)) => Err(unreachable(&text)),
        None => Err(unreachable("an empty reply")),
    }
}

impl RaftNetworkV2<Config> for Peer {
    type SnapshotData = StateSnapshot;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Config>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Config>, Rpc> {
        let last = rpc.entries.last().map(|entry| entry.log_id).or(rpc.prev_log_id);
        let mut client = self.client()?;
        if !self.formats.suits(self.limits.target) {
            self.agree(&mut client).await?;
        }
        let call = append_alone(client, append_to_wire(&rpc));
        let reply = self.limits.keep(RPCTypes::AppendEntries, option.hard_ttl(), call).await?;
        Ok(match append_reply(reply)? {
            Ok(accepted) if accepted == last => AppendEntriesResponse::Success,
            Ok(accepted) => AppendEntriesResponse::PartialSuccess(accepted),
            Err(StreamAppendError::Conflict(_)) => AppendEntriesResponse::Conflict,
            Err(StreamAppendError::HigherVote(vote)) => AppendEntriesResponse::HigherVote(vote),
        })
    }

    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<Config>, Rpc>>, Rpc>>
    where
        S: Stream<Item = AppendEntriesRequest<Config>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            let Some(first) = input.next().await else { return Ok(futures::stream::empty().boxed()) };
            // A stream of entries does not know its end.
            if first.entries.is_empty() && input.size_hint().1 == Some(0) {
                let reply = self.beat(&first).await;
                return Ok(futures::stream::iter([reply]).boxed());
            }
            let input = futures::stream::iter([first]).chain(input);
            let mut client = self.client()?;
            let asked = self.acknowledged.stream(self.limits.target, self.planted);
            let answered = asked.clone();
            let requests = input.map(move |request| {
                asked.asked(request.vote.leader_id().term, Instant::now());
                append_to_wire(&request)
            });
            // The head of the answer comes at once; how long each reply takes is openraft's to judge.
            let limit = option.hard_ttl().max(CONNECT_LIMIT);
            let begun = async {
                self.agree(&mut client.clone()).await?;
                self.limits.keep(RPCTypes::AppendEntries, limit, client.append(requests)).await
            };
            let replies = match begun.await {
                Ok(replies) => replies.into_inner(),
                Err(error) => {
                    // openraft waits only where it is asked for entries, and a connection that is refused never
                    // gets there: without this a dead peer would be called as fast as the machine can.
                    let pause = LONGEST_PAUSE.min(FIRST_PAUSE * 2_u32.pow(self.failures.min(8)));
                    self.failures = self.failures.saturating_add(1);
                    tokio::time::sleep(pause).await;
                    return Err(error);
                }
            };
            self.failures = 0;
            let results = replies.map(move |reply| {
                let reply = reply.map_err(|status| failed(&status)).and_then(append_reply)?;
                answered.answered(follows(&reply));
                Ok(reply)
            });
            Ok(results.boxed())
        })
    }

    async fn vote(&mut self, rpc: VoteRequest<Config>, option: RPCOption) -> Result<VoteResponse<Config>, Rpc> {
        self.ask(rpc, false, option.hard_ttl()).await
    }

    async fn pre_vote(&mut self, rpc: VoteRequest<Config>, option: RPCOption) -> Result<VoteResponse<Config>, Rpc> {
        self.ask(rpc, true, option.hard_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<Config>, StreamingError<Config>> {
        let mut client = self.client()?;
        self.agree(&mut client).await?;
        tracing::info!(target = self.limits.target, index = snapshot.snapshot.0.applied.0, "sending a snapshot");
        let frames = snapshot::frames(vote, snapshot);
        let limit = option.hard_ttl().max(Duration::from_secs(120));
        let send = self.limits.keep(RPCTypes::InstallSnapshot, limit, client.install_snapshot(frames));
        let reply = tokio::select! {
            closed = cancel => return Err(StreamingError::Closed(closed)),
            reply = send => reply?.into_inner(),
        };
        let vote = reply.vote.as_ref().map(record::vote).ok_or_else(|| unreachable("a reply without a vote"))?;
        Ok(SnapshotResponse::new(vote))
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Config>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Config>, Rpc> {
        let mut client = self.client()?;
        let message = wire::TransferRequest {
            from: Some(record::vote_to_wire(request.from_leader())),
            to: *request.to_node_id(),
            last: request.last_log_id().map(record::log_id_to_wire),
        };
        let call = client.transfer_leader(message);
        let reply =
            self.limits.keep(RPCTypes::TransferLeader, option.hard_ttl().max(CONNECT_LIMIT), call).await?.into_inner();
        if reply.refusal.is_empty() {
            return Ok(Ok(()));
        }
        tracing::warn!(target = self.limits.target, refusal = reply.refusal, "the peer does not take the lead");
        Err(unreachable(&reply.refusal))
    }
}
