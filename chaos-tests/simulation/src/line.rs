//! A client's line to the pool: it asks one host after the other, and goes where it is sent.

use std::time::Duration;

use tokio::sync::watch;

use crate::chance::Chance;
use crate::network::{Network, Place};
use crate::node::{Ask, Doors, Told};
use crate::trace::Trace;

/// Where the clients are on the network.
pub(crate) const PLACE: Place = 1_000;

/// A leader that the other voters do not hear, and until when.
#[derive(Debug, Clone, Default)]
pub struct Seclusion {
    /// It, if it is still one.
    pub leader: Place,
    /// Who may follow it in office.
    pub others: Vec<Place>,
    /// From then on it may have been followed…
    pub from: i64,
    /// …and by then it knows.
    pub until: i64,
    /// Until then nobody else writes, so that a follower that heard nothing for a while is not behind.
    pub quiet_until: i64,
}

/// What all clients of a run share.
#[derive(Clone)]
pub struct Surroundings {
    /// Between them and the nodes.
    pub network: Network,
    /// Where they knock.
    pub doors: Doors,
    /// The story.
    pub trace: Trace,
    /// The last time that a leader was left alone.
    pub seclusion: watch::Receiver<Seclusion>,
    /// They begin nothing new after this moment.
    pub ends: i64,
    /// So many entries, at least, every deletion is remembered for.
    pub history: u64,
}

/// One client's line.
pub struct Line {
    /// What the client shares with all others.
    pub all: Surroundings,
    /// What it is called.
    pub name: u64,
    /// Its own chance.
    pub chance: Chance,
    /// Whom it asks first.
    node: Place,
    serial: u64,
}

impl Line {
    /// Of a client that is called so.
    #[must_use]
    pub fn new(all: &Surroundings, name: u64, mut chance: Chance) -> Self {
        let node = all.doors.any(&mut chance);
        Self { all: all.clone(), name, chance, node, serial: 0 }
    }

    /// Something that nobody else says.
    pub fn unique(&mut self, what: &str) -> String {
        self.serial += 1;
        format!("{what} {}.{}", self.name, self.serial)
    }

    /// Asks; whoever gives no answer in time is not asked next time.
    pub async fn ask(&mut self, ask: Ask, limit: Duration) -> Option<Told> {
        let told = self.all.doors.ask(&self.all.network, PLACE, self.node, ask, limit).await;
        if told.is_none() {
            self.turn(None);
        }
        told
    }

    /// Asks that node, whatever it has answered before.
    pub async fn ask_of(&self, node: Place, ask: Ask, limit: Duration) -> Option<Told> {
        self.all.doors.ask(&self.all.network, PLACE, node, ask, limit).await
    }

    /// Whom to ask next: who is said to know, or anybody.
    pub fn turn(&mut self, to: Option<Place>) {
        self.node = to.unwrap_or_else(|| self.all.doors.any(&mut self.chance));
    }
}
