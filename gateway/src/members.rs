//! What members ask one another about their membership, over the peers' connections.

use std::time::Duration;

use async_trait::async_trait;
use controller::{Controller, Peers, Standing};
use proto::members::has_answer::Verdict;
use proto::members::members_client::MembersClient;
use proto::members::members_server::{Members, MembersServer};
use proto::members::{HasAnswer, HasQuestion, ShowAnswer, ShowQuestion};
use raft_store::PeerTls;
use tonic::{Request, Response, Status};
use uuid::Uuid;

/// Whoever has not answered by then is not there, or does not know.
const LIMIT: Duration = Duration::from_secs(3);

/// The asking side.
pub struct PeersByGrpc(pub PeerTls);

impl PeersByGrpc {
    fn client(&self, address: &str) -> Option<MembersClient<tonic::transport::Channel>> {
        self.0.channel(address).ok().map(MembersClient::new)
    }
}

#[async_trait]
impl Peers for PeersByGrpc {
    async fn standing(&self, address: &str, node_id: u64, host: Uuid) -> Standing {
        let Some(mut client) = self.client(address) else { return Standing::Unknown };
        let question = HasQuestion { node_id, host: host.to_string() };
        match tokio::time::timeout(LIMIT, client.has(question)).await {
            Ok(Ok(answer)) => match answer.into_inner().verdict() {
                Verdict::Member => Standing::Member,
                Verdict::Stranger => Standing::Stranger,
                Verdict::CannotSay | Verdict::Unspecified => Standing::Unknown,
            },
            Ok(Err(_)) | Err(_) => Standing::Unknown,
        }
    }

    async fn certificates(&self, address: &str) -> Option<(String, String)> {
        let mut client = self.client(address)?;
        let answer = tokio::time::timeout(LIMIT, client.show(ShowQuestion {})).await.ok()?.ok()?.into_inner();
        Some((answer.certificate, answer.authorities))
    }
}

/// The answering side: to be mounted on the peers' listener. A witness has no controller, and cannot say who is a member.
#[must_use]
pub fn members_service(controller: Option<Controller>, tls: PeerTls) -> MembersServer<impl Members> {
    MembersServer::new(Answerer { controller, tls })
}

struct Answerer {
    controller: Option<Controller>,
    tls: PeerTls,
}

#[tonic::async_trait]
impl Members for Answerer {
    async fn has(&self, request: Request<HasQuestion>) -> Result<Response<HasAnswer>, Status> {
        let question = request.into_inner();
        let host = question.host.parse().map_err(|_| Status::invalid_argument("no uuid"))?;
        let standing = match &self.controller {
            Some(controller) => controller.standing(question.node_id, host).await,
            None => Standing::Unknown,
        };
        let verdict = match standing {
            Standing::Member => Verdict::Member,
            Standing::Stranger => Verdict::Stranger,
            Standing::Unknown => Verdict::CannotSay,
        };
        Ok(Response::new(HasAnswer { verdict: verdict.into() }))
    }

    async fn show(&self, _: Request<ShowQuestion>) -> Result<Response<ShowAnswer>, Status> {
        let (certificate, authorities) = (self.tls.certificate.clone(), self.tls.ca.clone());
        Ok(Response::new(ShowAnswer { certificate, authorities }))
    }
}
