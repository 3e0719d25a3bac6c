//! The agent's calls, as the master makes them.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use proto::agent as wire;
use proto::agent::agent_event::Event;
use proto::agent::agent_server::Agent as AgentCalls;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use crate::config::Config;
use crate::console;
use crate::facts::Host;
use crate::hypervisor::Hypervisor;
use crate::hypervisor::domain::Refusal;
use crate::hypervisor::roster::Feed;
use crate::identity::Identity;
use crate::steps::{Authority, StepError, Steps};
use crate::storage::Stores;
use crate::wire as words;

/// The version of the protocol this agent speaks.
const VERSION: u32 = 1;
/// Who wants a console says which within this.
const FIRST_LIMIT: Duration = Duration::from_secs(3);
/// A watcher hears at least this often.
const BEAT: Duration = Duration::from_millis(500);

/// Serves the master.
pub(crate) struct Service {
    pub config: Config,
    pub host: Host,
    pub identity: Arc<Identity>,
    pub hypervisor: Arc<dyn Hypervisor>,
    pub steps: Arc<Steps>,
    pub tasks: TaskTracker,
    pub shutdown: CancellationToken,
}

impl Service {
    async fn admit(&self, pool: String, epoch: u64) -> Result<(), Status> {
        let admitted = self.steps.admit(&Authority { pool, epoch }).await.map_err(unavailable)?;
        // These calls have no place for a refusal: the status says it, and names the epoch that is held.
        admitted.map_err(|Refusal { reason, detail, .. }| {
            let mut status = Status::failed_precondition(format!("{reason:?}: {detail}"));
            if let (Ok(reason), Ok(detail)) = (format!("{reason:?}").parse(), detail.parse()) {
                status.metadata_mut().insert("refusal", reason);
                status.metadata_mut().insert("detail", detail);
            }
            status
        })
    }
}

#[tonic::async_trait]
impl AgentCalls for Service {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<wire::AgentEvent, Status>> + Send>>;

    type OpenConsoleStream = Pin<Box<dyn Stream<Item = Result<wire::ConsoleBytes, Status>> + Send>>;

    async fn open_console(
        &self,
        request: Request<Streaming<wire::ConsoleBytes>>,
    ) -> Result<Response<Self::OpenConsoleStream>, Status> {
        self.identity.check(&request)?;
        let mut typed = request.into_inner();
        let first = tokio::time::timeout(FIRST_LIMIT, typed.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("which console?"))??;
        let name = first.and_then(|first| first.console);
        let name = name.ok_or_else(|| Status::invalid_argument("the first message says which console"))?;
        let vm = words::subject(&name.vm)?;
        let domain = self.hypervisor.roster().get(vm).ok_or_else(|| Status::not_found("no such domain"))?;
        let stream = console::connect(&domain, &name.protocol).await?;
        let (shown, told) = mpsc::channel(console::WAITING_PIECES);
        self.tasks.spawn(console::through(stream, typed, shown, self.shutdown.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(told))))
    }

    async fn hello(&self, request: Request<wire::HelloRequest>) -> Result<Response<wire::HelloReply>, Status> {
        self.identity.check(&request)?;
        let hello = request.into_inner();
        self.admit(hello.pool, hello.epoch).await?;
        let features = self.hypervisor.features();
        let mut names = vec![format!("hypervisor:{}", features.name)];
        names.extend(features.abilities.iter().map(|ability| (*ability).to_owned()));
        names.extend(Stores::drivers().map(|driver| format!("storage:{driver}")));
        let (certificate, authorities) = self.identity.shown();
        Ok(Response::new(wire::HelloReply {
            version: VERSION,
            host: self.config.host_uuid.to_string(),
            facts: Some(self.host.facts(&self.config, &features, self.hypervisor.roster().memory())),
            features: names,
            certificate,
            authorities,
        }))
    }

    async fn perform(&self, request: Request<wire::Step>) -> Result<Response<wire::Outcome>, Status> {
        self.identity.check(&request)?;
        let step = request.into_inner();
        if step.operation.is_empty() {
            return Err(Status::invalid_argument("a step needs the id of its operation"));
        }
        let subject = words::subject(&step.vm)?;
        let deed = words::deed(subject, step.action)?;
        let authority = Authority { pool: step.pool, epoch: step.epoch };
        let span = tracing::info_span!("step", operation = step.operation, %subject, traceparent = step.traceparent);
        let performed = self.steps.perform(&authority, step.operation, subject, step.number, deed).instrument(span);
        let outcome = performed.await.map_err(unavailable)?;
        Ok(Response::new(words::outcome(outcome)))
    }

    async fn watch(&self, request: Request<wire::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.identity.check(&request)?;
        let watch = request.into_inner();
        self.admit(watch.pool, watch.epoch).await?;
        let (events, stream) = mpsc::channel(64);
        self.tasks.spawn(tell(Arc::clone(&self.hypervisor), events, self.shutdown.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// Tells one watcher everything, then what changes. One that cannot keep up is told everything anew.
async fn tell(
    hypervisor: Arc<dyn Hypervisor>,
    events: mpsc::Sender<Result<wire::AgentEvent, Status>>,
    shutdown: CancellationToken,
) {
    let mut beat = interval(BEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let Feed { all, mut changes } = hypervisor.roster().feed();
        let domains = all.into_iter().map(words::state_of).collect();
        let mut event = Event::All(wire::DomainList { domains });
        loop {
            let sent = events.send(Ok(wire::AgentEvent { event: Some(event) }));
            tokio::select! {
                () = shutdown.cancelled() => return,
                sent = sent => if sent.is_err() { return },
            }
            event = tokio::select! {
                () = shutdown.cancelled() => return,
                () = events.closed() => return,
                change = changes.recv() => match change {
                    Ok(state) => Event::Domain(words::state_of(state)),
                    Err(RecvError::Lagged(missed)) => {
                        tracing::debug!(missed, "a watcher is told everything anew");
                        break;
                    }
                    Err(RecvError::Closed) => return,
                },
                _ = beat.tick() => {
                    let memory = hypervisor.roster().memory();
                    Event::Beat(wire::Beat { memory_free: memory.free, memory_total: memory.capacity })
                }
            };
        }
    }
}

fn unavailable(error: StepError) -> Status {
    Status::unavailable(error.to_string())
}
