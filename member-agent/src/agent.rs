//! The agent as a whole: how it comes up, and how it ends without harm to a domain.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use proto::agent::agent_server::AgentServer;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;

use crate::config::Config;
use crate::facts::Host;
use crate::hypervisor::sim::Faults;
use crate::hypervisor::{self, OpenError, Site};
use crate::identity::{self, Identity};
use crate::ledger::{Ledger, REMEMBERED};
use crate::service::Service;
use crate::steps::{Domains, Steps};
use crate::storage::{self, Programs, Stores};

/// A master that is gone without a word is noticed after this long.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// How long the agent's tasks may take to end.
const FAREWELL: Duration = Duration::from_secs(5);

/// The agent could not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// A file of the TLS settings.
    #[error("cannot read {path}")]
    Tls {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is in those files.
    #[error("the TLS files do not make an identity: {0}")]
    Identity(String),
    /// The state directory.
    #[error("cannot use the state directory {path}")]
    State {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Two agents would tread on each other's domains.
    #[error("another agent runs in {path}")]
    Taken {
        /// The state directory.
        path: PathBuf,
    },
    /// The address.
    #[error("cannot listen at {address}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The hypervisor.
    #[error(transparent)]
    Hypervisor(#[from] OpenError),
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    address: SocketAddr,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    /// Holds the state directory.
    _lock: File,
}

impl Agent {
    /// Finds the domains that are there, then serves until `shutdown`.
    pub fn start(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, Result<Self, StartError>> {
        Box::pin(Self::begin(config, shutdown))
    }

    async fn begin(config: Config, shutdown: CancellationToken) -> Result<Self, StartError> {
        let lock = take(&config.state_dir)?;
        let identity = Arc::new(Identity::open(&config)?);
        let host = Host::read(&config);
        // The agent's own token: whatever ends it, ends its tasks.
        let shutdown = shutdown.child_token();
        let guard = shutdown.clone().drop_guard();
        let tasks = TaskTracker::new();
        let state = |source| StartError::State { path: config.state_dir.clone(), source };
        let ledger = Ledger::open(&config.state_dir, REMEMBERED, &tasks).map_err(state)?;
        let hypervisor = hypervisor::open(Site {
            config: config.clone(),
            boot_id: host.boot_id.clone(),
            capacity: host.capacity(),
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
        })
        .await?;

        let listen = |source| StartError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let incoming = identity::incoming(listener, Arc::clone(&identity), &tasks, shutdown.clone());
        let features = hypervisor.features();
        let stores = Stores::open(storage::Site {
            state_dir: config.state_dir.clone(),
            storage_dir: config.stores_below(),
            boot_id: host.boot_id.clone(),
            simulated: config.stores_simulated(features.name),
            faults: Arc::new(Faults::open(&config.state_dir, "sim-stores")),
            programs: Programs::new(config.programs.clone()),
            users: Arc::new(Domains(Arc::clone(&hypervisor))),
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
        })
        .map_err(state)?;
        let attached = stores.count();
        let steps = Steps::new(hypervisor.clone(), stores, ledger, config.pool, tasks.clone(), shutdown.clone());
        tracing::info!(%address, driver = features.name, version = features.version, accelerator = features.accelerator,
            domains = hypervisor.roster().list().len(), stores = attached, "the agent serves");
        let service =
            Service { config, host, identity, hypervisor, steps, tasks: tasks.clone(), shutdown: shutdown.clone() };
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEP_ALIVE))
            .http2_keepalive_timeout(Some(KEEP_ALIVE))
            .add_service(AgentServer::new(service));
        let ended = shutdown.clone();
        tasks.spawn(async move {
            let served = server.serve_with_incoming_shutdown(incoming, ended.clone().cancelled_owned()).await;
            if let Err(error) = served {
                tracing::error!(%error, "the agent no longer serves");
            }
            ended.cancel();
        });
        tasks.close();
        let shutdown = guard.disarm();
        Ok(Self { address, tasks, shutdown, _lock: lock })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until the agent has been told to end and has ended. Domains stay as they are.
    pub async fn ended(self) {
        self.shutdown.cancelled().await;
        if timeout(FAREWELL, self.tasks.wait()).await.is_err() {
            tracing::warn!(left = self.tasks.len(), "some of the agent's tasks have not ended in time");
        }
    }
}

/// Makes the state directory this agent's own.
fn take(state_dir: &Path) -> Result<File, StartError> {
    let path = || state_dir.to_owned();
    let state = |source| StartError::State { path: path(), source };
    fs::create_dir_all(state_dir).map_err(state)?;
    let lock = File::create(state_dir.join("lock")).map_err(state)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => Err(StartError::Taken { path: path() }),
        Err(fs::TryLockError::Error(source)) => Err(state(source)),
    }
}
