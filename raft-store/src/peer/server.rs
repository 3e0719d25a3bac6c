//! The answering side.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{Stream, StreamExt};
use openraft::raft::{AppendEntriesRequest, StreamAppendError, TransferLeaderRequest, VoteRequest};
use proto::raft as wire;
use proto::raft::raft_server::Raft as Service;
use tonic::{Request, Response, Status, Streaming};

use super::snapshot::Assembly;
use crate::codec::DecodeError;
use crate::fence::Fence;
use crate::format::{Formats, admit, admit_bytes};
use crate::record;
use crate::types::{Config, Raft, Vote};

/// The Raft calls of this node. Before the node runs, every call is refused as unavailable.
#[derive(Clone)]
pub(crate) struct PeerService {
    pub(crate) raft: Arc<std::sync::OnceLock<Raft>>,
    pub(crate) heard: Heard,
    pub(crate) fence: Arc<Fence>,
    pub(crate) formats: Formats,
}

/// When a leader was last heard: what openraft knows of the leader outlives the leader.
#[derive(Clone, Debug)]
pub(crate) struct Heard {
    start: tokio::time::Instant,
    millis: Arc<AtomicU64>,
}

impl Heard {
    pub(crate) fn new() -> Self {
        Self { start: tokio::time::Instant::now(), millis: Arc::default() }
    }

    fn now(&self) {
        let millis = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.millis.store(millis, Ordering::Relaxed);
    }

    pub(crate) fn silence(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(self.millis.load(Ordering::Relaxed)))
    }
}

impl PeerService {
    #[allow(clippy::result_large_err)]
    fn raft(&self) -> Result<Raft, Status> {
        self.raft.get().cloned().ok_or_else(|| Status::unavailable("this node is starting"))
    }
}

fn malformed(error: &DecodeError) -> Status {
    tracing::error!(%error, "what a peer sends cannot be read");
    Status::invalid_argument(error.to_string())
}

#[allow(clippy::result_large_err)]
fn vote(ballot: Option<&wire::Ballot>) -> Result<Vote, Status> {
    ballot.map(record::vote).ok_or_else(|| Status::invalid_argument("no vote"))
}

#[allow(clippy::result_large_err)]
fn append_request(request: wire::AppendRequest, reads: u32) -> Result<AppendEntriesRequest<Config>, Status> {
    let entry = |record: wire::LogRecord| {
        if let Some(wire::log_record::Payload::Transactions(encoded)) = &record.payload {
            admit_bytes(encoded.clone(), reads)?;
        }
        let entry = record::entry(record)?;
        admit(&entry, reads)?;
        Ok(entry)
    };
    Ok(AppendEntriesRequest {
        vote: vote(request.vote.as_ref())?,
        prev_log_id: request.previous.as_ref().map(record::log_id),
        entries: request.entries.into_iter().map(entry).collect::<Result<_, _>>().map_err(|error| malformed(&error))?,
        leader_commit: request.leader_commit.as_ref().map(record::log_id),
    })
}

#[tonic::async_trait]
impl Service for PeerService {
    type AppendStream = Pin<Box<dyn Stream<Item = Result<wire::AppendReply, Status>> + Send>>;

    async fn append(
        &self,
        request: Request<Streaming<wire::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        use wire::append_reply::Result as Reply;
        let raft = self.raft()?;
        self.fence.may_follow(u64::MAX)?;
        // A request that cannot be read ends the stream: the leader starts another one.
        let (heard, fence, reads) = (self.heard.clone(), Arc::clone(&self.fence), self.formats.reads);
        let requests = request.into_inner().map(move |request| {
            let request = append_request(request?, reads)?;
            fence.may_follow(request.vote.leader_id().term)?;
            heard.now();
            Ok::<_, Status>(request)
        });
        let requests = requests.take_while(|request| {
            if let Err(status) = request {
                tracing::debug!(%status, "a peer's stream of entries ends");
            }
            futures::future::ready(request.is_ok())
        });
        let requests = requests.filter_map(|request| futures::future::ready(request.ok()));
        let replies = raft.stream_append(requests).map(|reply| {
            let result = match reply {
                Ok(Ok(last)) => Reply::Accepted(wire::Accepted { last: last.as_ref().map(record::log_id_to_wire) }),
                Ok(Err(StreamAppendError::Conflict(id))) => Reply::Conflict(record::log_id_to_wire(&id)),
                Ok(Err(StreamAppendError::HigherVote(vote))) => Reply::HigherVote(record::vote_to_wire(&vote)),
                Err(fatal) => Reply::Fatal(fatal.to_string()),
            };
            Ok(wire::AppendReply { result: Some(result) })
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn formats(&self, request: Request<wire::FormatsRequest>) -> Result<Response<wire::FormatsReply>, Status> {
        let (writes, reads) = (request.into_inner().writes, self.formats.reads);
        if writes > reads {
            tracing::error!(
                writes,
                reads,
                "the pool writes a newer format than this version reads: it gets nothing until this host is upgraded"
            );
        }
        Ok(Response::new(wire::FormatsReply { reads }))
    }

    async fn vote(&self, request: Request<wire::VoteRequest>) -> Result<Response<wire::VoteReply>, Status> {
        let request = request.into_inner();
        let raft = self.raft()?;
        self.fence.may_vote()?;
        let rpc = VoteRequest {
            vote: vote(request.vote.as_ref())?,
            last_log_id: request.last.as_ref().map(record::log_id),
            leadership_transfer: request.leadership_transfer,
        };
        let answer = if request.pre_vote { raft.pre_vote(rpc).await } else { raft.vote(rpc).await };
        let reply = answer.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(wire::VoteReply {
            vote: Some(record::vote_to_wire(&reply.vote)),
            granted: reply.vote_granted,
            last: reply.last_log_id.as_ref().map(record::log_id_to_wire),
        }))
    }

    async fn transfer_leader(
        &self,
        request: Request<wire::TransferRequest>,
    ) -> Result<Response<wire::TransferReply>, Status> {
        let request = request.into_inner();
        self.fence.may_vote()?;
        let from = vote(request.from.as_ref())?;
        let rpc = TransferLeaderRequest::new(from, request.to, request.last.as_ref().map(record::log_id));
        let answer =
            self.raft()?.handle_transfer_leader(rpc).await.map_err(|error| Status::unavailable(error.to_string()))?;
        let refusal = answer.err().map(|error| error.to_string()).unwrap_or_default();
        Ok(Response::new(wire::TransferReply { refusal }))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<wire::SnapshotFrame>>,
    ) -> Result<Response<wire::SnapshotReply>, Status> {
        let raft = self.raft()?;
        self.fence.may_follow(u64::MAX)?;
        let mut frames = request.into_inner();
        let mut assembly = Assembly::new(self.formats.reads);
        while let Some(frame) = frames.message().await? {
            assembly.add(frame).map_err(|error| malformed(&error))?;
        }
        let (vote, snapshot) = assembly.finish().map_err(|error| malformed(&error))?;
        self.fence.may_follow(vote.leader_id().term)?;
        tracing::info!(index = snapshot.snapshot.0.applied.0, "installing a snapshot");
        let reply =
            raft.install_full_snapshot(vote, snapshot).await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(wire::SnapshotReply { vote: Some(record::vote_to_wire(&reply.vote)) }))
    }

    async fn readmit(&self, request: Request<wire::ReadmitRequest>) -> Result<Response<wire::ReadmitReply>, Status> {
        let request = request.into_inner();
        let loss =
            uuid::Uuid::from_slice(&request.loss).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let committed = request.committed.ok_or_else(|| Status::invalid_argument("no entry"))?;
        let kept = self.fence.readmit(loss, committed.term, committed.index);
        kept.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(wire::ReadmitReply {}))
    }
}
