//! The fence around a node that has lost what it had promised.
//!
//! Raft rests on memory: a vote is given once in a term, an acknowledged entry stays. A node whose database is damaged
//! begins anew with an empty one and must not act as if it had never promised anything: its second vote, or an entry
//! that it takes from a leader which it had helped to replace, could undo what the pool has acknowledged. So it is
//! fenced:
//!
//! 1. *Lost.* It answers neither votes nor entries. What it refuses carries the name of its loss; a leader that hears
//!    it commits an entry and tells the node its term and index. The node had no part in that commit, so a majority
//!    that does without it stands behind this leader, after the loss.
//! 2. *Catching up.* It takes entries and snapshots, but none of an older term.
//! 3. *Lifted*, once it has applied that entry: then it has everything that it can ever have promised, from those who
//!    had it with it. From now on it votes.
//!
//! Where there is no such majority there is no way back by itself, and that is right: two of three hosts that have lost
//! their databases may have lost what was acknowledged.

use std::io;
use std::sync::Arc;

use prost::Message;
use proto::raft as wire;
use tokio::sync::watch;
use tonic::Status;
use uuid::Uuid;

use crate::disk::Place;
use crate::planted::Planted;

/// The version of the fence's own record.
const FORMAT: u32 = 1;
/// Metadata of a refusal: the name of the loss.
const HEADER: &str = "xenith-fence";

/// How far a node has come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Nothing was lost, or all of it is there again.
    Lifted,
    /// Nothing may be promised.
    Lost(Uuid),
    /// Entries of this term and later ones may be taken, votes given when this one is applied.
    CatchingUp(Uuid, u64, u64),
}

/// The fence, and the record that remembers it.
pub(crate) struct Fence {
    place: Arc<dyn Place>,
    stage: watch::Sender<Stage>,
    planted: Option<Planted>,
}

impl Fence {
    /// The fence as it was left; the second is whether the damaged database is still in the way.
    pub(crate) fn load(place: Arc<dyn Place>) -> io::Result<(Self, bool)> {
        let (stage, in_the_way) = match place.fence()? {
            Some(bytes) => {
                let stored = wire::StoredFence::decode(bytes.as_slice()).map_err(io::Error::other)?;
                let loss = Uuid::from_slice(&stored.loss).map_err(io::Error::other)?;
                let stage = match stored.term {
                    0 => Stage::Lost(loss),
                    term => Stage::CatchingUp(loss, term, stored.index),
                };
                (stage, !stored.cleared)
            }
            None => (Stage::Lifted, false),
        };
        Ok((Self { place, stage: watch::Sender::new(stage), planted: None }, in_the_way))
    }

    /// The same with a mistake in it.
    pub(crate) fn planted(self, planted: Option<Planted>) -> Self {
        Self { planted, ..self }
    }

    /// Raises the fence around a new loss; what is damaged is still in the way.
    pub(crate) fn raise(&self, loss: Uuid) -> io::Result<()> {
        self.keep(Stage::Lost(loss), false)
    }

    /// The damaged database is out of the way.
    pub(crate) fn cleared(&self) -> io::Result<()> {
        self.keep(self.stage(), true)
    }

    fn keep(&self, stage: Stage, cleared: bool) -> io::Result<()> {
        let stored = |loss: Uuid, term, index| {
            let loss = loss.as_bytes().to_vec().into();
            wire::StoredFence { format: FORMAT, loss, term, index, cleared }.encode_to_vec()
        };
        self.place.keep_fence(match stage {
            Stage::Lifted => None,
            Stage::Lost(loss) => Some(stored(loss, 0, 0)),
            Stage::CatchingUp(loss, term, index) => Some(stored(loss, term, index)),
        })?;
        self.stage.send_replace(stage);
        Ok(())
    }

    pub(crate) fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    /// Whether a vote may be given, or the lead be taken.
    #[allow(clippy::result_large_err)]
    pub(crate) fn may_vote(&self) -> Result<(), Status> {
        match self.stage() {
            _ if self.planted == Some(Planted::VotesBehindItsFence) => Ok(()),
            Stage::Lifted => Ok(()),
            Stage::Lost(loss) => Err(refusal(loss)),
            Stage::CatchingUp(..) => Err(Status::unavailable("this node is catching up on what it lost")),
        }
    }

    /// Whether entries or a snapshot from a leader of this term may be taken.
    #[allow(clippy::result_large_err)]
    pub(crate) fn may_follow(&self, term: u64) -> Result<(), Status> {
        match self.stage() {
            Stage::Lost(loss) => Err(refusal(loss)),
            Stage::CatchingUp(_, least, _) if term < least => {
                Err(Status::unavailable("this node follows no leader from before its loss"))
            }
            Stage::Lifted | Stage::CatchingUp(..) => Ok(()),
        }
    }

    /// A leader has committed an entry since the loss.
    pub(crate) fn readmit(&self, loss: Uuid, term: u64, index: u64) -> io::Result<()> {
        match self.stage() {
            Stage::Lost(known) if known == loss => {
                tracing::info!(term, index, "a leader sends what this node has lost");
                self.keep(Stage::CatchingUp(loss, term, index), true)
            }
            // Of another loss, or told already.
            _ => Ok(()),
        }
    }

    /// The entry is applied.
    pub(crate) fn lift(&self) -> io::Result<()> {
        self.keep(Stage::Lifted, true)
    }
}

fn refusal(loss: Uuid) -> Status {
    let mut status = Status::failed_precondition("this node has lost its database and waits for a leader's word");
    if let Ok(name) = loss.to_string().parse() {
        status.metadata_mut().insert(HEADER, name);
    }
    status
}

/// The loss that a peer's refusal names.
pub(crate) fn loss_of(status: &Status) -> Option<Uuid> {
    status.metadata().get(HEADER)?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::disk::Folder;

    #[test]
    fn a_fence_outlives_the_process_and_falls_only_in_its_order() {
        let dir = tempfile::tempdir().unwrap();
        let again = || Fence::load(Arc::new(Folder::new(dir.path()))).unwrap();
        assert_eq!((again().0.stage(), again().1), (Stage::Lifted, false));
        let (loss, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        again().0.raise(loss).unwrap();
        assert_eq!((again().0.stage(), again().1), (Stage::Lost(loss), true));
        again().0.cleared().unwrap();
        assert_eq!((again().0.stage(), again().1), (Stage::Lost(loss), false));

        let fence = again().0;
        assert_eq!(loss_of(&fence.may_vote().unwrap_err()), Some(loss));
        assert_eq!(loss_of(&fence.may_follow(9).unwrap_err()), Some(loss));
        fence.readmit(other, 5, 50).unwrap();
        assert_eq!(again().0.stage(), Stage::Lost(loss), "a word about another loss");
        fence.readmit(loss, 5, 50).unwrap();
        fence.readmit(loss, 3, 30).unwrap();
        assert_eq!(again().0.stage(), Stage::CatchingUp(loss, 5, 50));

        let fence = again().0;
        fence.may_vote().unwrap_err();
        fence.may_follow(4).unwrap_err();
        fence.may_follow(5).unwrap();
        fence.lift().unwrap();
        assert_eq!(again().0.stage(), Stage::Lifted);
        fence.may_vote().unwrap();
    }
}
