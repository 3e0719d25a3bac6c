//! What members ask one another about their membership, over the peers' connections.

use std::time::Duration;

use async_trait::async_trait;
use controller::certificates::Issued;
use controller::{Controller, ExchangeError, Peers, Standing};
use proto::members::has_answer::Verdict;
use proto::members::members_client::MembersClient;
use proto::members::members_server::{Members, MembersServer};
use proto::members::{ExchangeOrder, Exchanged, HasAnswer, HasQuestion, ShowAnswer, ShowQuestion};
use raft_store::PeerTls;
use tonic::{Code, Request, Response, Status};
use uuid::Uuid;

use crate::tls::ApiCertificate;

/// Whoever has not answered by then is not there, or does not know.
const LIMIT: Duration = Duration::from_secs(3);
/// A key may have to be made, on a machine that has other things to do.
const EXCHANGE_LIMIT: Duration = Duration::from_secs(20);

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

    async fn exchange(&self, address: &str, shown: Option<Issued>) -> Result<String, ExchangeError> {
        let silent = || ExchangeError::Silent;
        let mut client = self.client(address).ok_or_else(silent)?;
        let (certificate, key) = shown.map(|shown| (shown.certificate, shown.key)).unwrap_or_default();
        let order = client.exchange(ExchangeOrder { certificate, key });
        match tokio::time::timeout(EXCHANGE_LIMIT, order).await.map_err(|_| silent())? {
            Ok(exchanged) => Ok(exchanged.into_inner().certificate),
            Err(status) if status.code() == Code::Unavailable => Err(silent()),
            Err(status) => Err(ExchangeError::Refused(status.message().to_owned())),
        }
    }
}

/// The answering side: to be mounted on the peers' listener. A witness has no controller, and cannot say who is a
/// member; nor has it clients, to whom it would show anything.
#[must_use]
pub fn members_service(
    controller: Option<Controller>,
    tls: PeerTls,
    shown: Option<ApiCertificate>,
) -> MembersServer<impl Members> {
    MembersServer::new(Answerer { controller, tls, shown })
}

struct Answerer {
    controller: Option<Controller>,
    tls: PeerTls,
    shown: Option<ApiCertificate>,
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

    async fn exchange(&self, request: Request<ExchangeOrder>) -> Result<Response<Exchanged>, Status> {
        let shown = self.shown.clone().ok_or_else(|| Status::unimplemented("this member has no clients"))?;
        let ExchangeOrder { certificate, key } = request.into_inner();
        let given = (!certificate.is_empty()).then_some((certificate, key));
        let exchanged = tokio::task::spawn_blocking(move || shown.exchange(given)).await;
        match exchanged.map_err(|error| Status::internal(error.to_string()))? {
            Ok(certificate) => Ok(Response::new(Exchanged { certificate })),
            Err(error) => {
                tracing::warn!(%error, "the certificate that clients see stays as it is");
                Err(Status::failed_precondition(error.to_string()))
            }
        }
    }
}
