//! The controller of one host: answers calls while its node leads, and does the master's chores.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use datamodel::Timestamp;
use futures::future::BoxFuture;
use raft_store::{Leadership, LogIndex, Member, Store, Transaction};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agent::Agents;
use crate::call::{Refusal, Reply, Request};
use crate::clock::{Clock, Office};
use crate::first_boot::Guest;
use crate::handlers::{self, Declined, Inquiry, Knock, Opened, Tunnel};
use crate::in_hand::InHand;
use crate::membership::emergency::LocalSessions;
use crate::membership::{Standing, Surroundings, VoterPolicy, join, rotation, stranger, voters};
use crate::{
    backup, dispatch, events, first_boot, operations, reconcile, repeats, schedules, sessions, storage, tasks,
};

/// What a controller is told when it starts.
#[derive(Clone)]
pub struct ControllerConfig {
    /// Hosts of a pool that is being founded, this one among them.
    pub initial_members: Vec<first_boot::InitialMember>,
    /// Hash of root's first password; used only while the pool has no accounts.
    pub initial_password_hash: String,
    /// The lab's guest, for the default template.
    pub guest: Guest,
    /// How long a call waits for a master to be elected.
    pub election_wait: Duration,
    /// Answer `HOST_IS_SLAVE` to session calls on a non-master over TCP instead of sending them on.
    pub redirect_sessions: bool,
    /// The pool's certificate authority, to be kept in the replicated state.
    pub ca_certificate: String,
    /// What this host shows to others of its pool.
    pub certificate: String,
    /// The authority's key, by which hosts can join; empty where the operator keeps it.
    pub ca_key: String,
    /// How the pool chooses who votes.
    pub voters: VoterPolicy,
    /// What it takes to change pools; none for a controller that cannot.
    pub surroundings: Option<Surroundings>,
}

/// A host's controller. Clones are handles of the same one.
#[derive(Clone)]
pub struct Controller {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) config: ControllerConfig,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) office: Office,
    pub(crate) agents: Agents,
    pub(crate) sessions: sessions::Activity,
    pub(crate) tasks: tasks::Running,
    pub(crate) local_sessions: LocalSessions,
    /// The host is on its way to another seat: nothing is written on this one any more.
    pub(crate) parting: AtomicBool,
    /// Members change one at a time.
    pub(crate) admissions: tokio::sync::Mutex<()>,
    pub(crate) in_hand: InHand,
    pub(crate) waiting: events::Waiting,
    /// Held while the database is being restored.
    pub(crate) restoring: tokio::sync::Mutex<()>,
    pub(crate) shutdown: CancellationToken,
    /// In tests: an operation is let go of after so many of its doings, as if the master had died; 0: never.
    #[cfg(test)]
    pub(crate) dies_after: std::sync::atomic::AtomicUsize,
}

impl Shared {
    pub(crate) fn uuid(&self) -> Uuid {
        Uuid::new_v4()
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// The present, for the question whether something is over; a clock that was set has no say in it.
    pub(crate) fn grown(&self) -> Timestamp {
        self.office.now(&*self.clock)
    }

    pub(crate) fn transaction(&self) -> Transaction {
        Transaction::new(self.uuid(), self.now())
    }

    /// The epoch of this node's leadership; none where it does not lead.
    pub(crate) fn epoch(&self) -> Option<LogIndex> {
        match *self.store.leadership().borrow() {
            Leadership::Leader { epoch } => Some(epoch),
            _ => None,
        }
    }
}

impl Controller {
    /// A controller over an open store. `run` must be running for the master's chores to be done and events to be told.
    #[must_use]
    pub fn new(
        store: Store,
        agents: Agents,
        config: ControllerConfig,
        clock: Arc<dyn Clock>,
        shutdown: CancellationToken,
    ) -> Self {
        let shared = Shared {
            store,
            config,
            clock,
            office: Office::default(),
            agents,
            sessions: sessions::Activity::default(),
            tasks: tasks::Running::default(),
            local_sessions: LocalSessions::default(),
            parting: AtomicBool::new(false),
            admissions: tokio::sync::Mutex::new(()),
            in_hand: InHand::default(),
            waiting: events::Waiting::default(),
            restoring: tokio::sync::Mutex::default(),
            shutdown,
            #[cfg(test)]
            dies_after: std::sync::atomic::AtomicUsize::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Answers a call, or says who can.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn call(&self, request: Request) -> BoxFuture<'_, Result<Reply, Refusal>> {
        Box::pin(dispatch::call(&self.shared, request))
    }

    /// Serves an HTTP request that is no call, or says who can.
    ///
    /// # Errors
    /// [`Declined`].
    pub fn open(&self, inquiry: Inquiry) -> BoxFuture<'_, Result<Opened, Declined>> {
        Box::pin(handlers::open(&self.shared, inquiry))
    }

    /// How a host of that node id and uuid stands to the pool, where this host is the master.
    pub async fn standing(&self, node_id: u64, host: Uuid) -> Standing {
        stranger::standing(&self.shared, node_id, host).await
    }

    /// Opens a console, whoever is the master.
    ///
    /// # Errors
    /// [`Declined`].
    pub fn connect(&self, knock: Knock) -> BoxFuture<'_, Result<Tunnel, Declined>> {
        Box::pin(handlers::connect(&self.shared, knock))
    }

    /// Waits until this host knows of another master than that member, itself included, or of none for so long that
    /// its callers are told.
    pub async fn replaced(&self, member: &Member) {
        let mut leadership = self.shared.store.leadership();
        loop {
            let electing = match &*leadership.borrow_and_update() {
                Leadership::Leader { .. } => return,
                Leadership::Follower { leader } if leader.node_id != member.node_id => return,
                Leadership::Follower { .. } => false,
                Leadership::Electing => true,
            };
            let changed = leadership.changed();
            let known = if electing {
                match tokio::time::timeout(self.shared.config.election_wait, changed).await {
                    Ok(known) => known,
                    Err(_) => return,
                }
            } else {
                changed.await
            };
            if known.is_err() {
                // The store has ended, and this process with it.
                return;
            }
        }
    }

    /// Does the master's chores whenever this node leads, wakes who waits for events, and hears when this host is to go,
    /// until shutdown.
    pub fn run(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.serve())
    }

    async fn serve(&self) {
        tokio::join!(self.lead(), events::follow(&self.shared), async {
            tokio::select! {
                () = join::attend(&self.shared) => {}
                () = self.shared.shutdown.cancelled() => {}
            }
        });
    }

    async fn lead(&self) {
        let shared = &self.shared;
        let mut leadership = shared.store.leadership();
        loop {
            let now = leadership.borrow_and_update().clone();
            let changed = async { leadership.changed().await.is_ok() };
            if let Leadership::Leader { epoch } = now {
                let term = CancellationToken::new();
                let chores = lead(shared, epoch, term.clone());
                tokio::pin!(chores);
                let goes_on = tokio::select! {
                    () = &mut chores => true,
                    goes_on = changed => goes_on,
                    () = shared.shutdown.cancelled() => false,
                };
                term.cancel();
                if !goes_on {
                    return;
                }
            } else {
                let goes_on = tokio::select! {
                    goes_on = changed => goes_on,
                    () = shared.shutdown.cancelled() => false,
                };
                if !goes_on {
                    return;
                }
            }
        }
    }
}

/// A term of office: found the pool if there is none, take office in the rows, adopt what the last master
/// left, then watch hosts and collect what is over. Ends when dropped or cancelled.
async fn lead(shared: &Arc<Shared>, epoch: LogIndex, term: CancellationToken) {
    tracing::info!(%epoch, "taking office");
    // Before this master's own clock is in any entry.
    shared.office.take(&*shared.clock, shared.store.state().clock());
    while let Err(error) = first_boot::found(shared).await {
        tracing::warn!(?error, "the pool is not founded yet");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    while let Err(error) = first_boot::take_office(shared).await {
        tracing::warn!(?error, "the pool does not show its master yet");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    shared.sessions.forget();
    tokio::join!(
        backup::forget_stages(shared),
        reconcile::run(shared, epoch, term.clone()),
        operations::adopt(shared),
        schedules::keep(shared),
        sessions::collect(shared),
        tasks::collect(shared),
        repeats::collect(shared),
        voters::keep(shared),
        rotation::keep(shared, epoch),
        storage::keep(shared),
    );
}
