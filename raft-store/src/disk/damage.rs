//! A database is opened whole or not at all.
//!
//! What is found damaged is moved aside, once and for all, and the node begins anew behind a [fence](crate::fence).

use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::open::{Disk, OpenError, Stored};
use super::place::{FENCE, Place};
use super::promises;
use crate::codec::DecodeError;
use crate::fence::Fence;

/// Whether a file of that name, in the folder of a database, is the database's: the folder may hold other things, too.
#[must_use]
pub fn is_of_a_database(name: &str) -> bool {
    matches!(name, "CURRENT" | "IDENTITY" | "LOCK" | "LOG" | promises::FILE | FENCE)
        || ["MANIFEST-", "OPTIONS-", "LOG.old"].iter().any(|start| name.starts_with(start))
        || [".sst", ".log", ".dbtmp", ".blob"].iter().any(|end| name.ends_with(end))
}

/// A database that was opened, and the fence around it.
pub(crate) struct Opened {
    pub(crate) disk: Disk,
    pub(crate) stored: Stored,
    pub(crate) fence: Fence,
}

/// Opens the database in a place, or, if it is damaged, an empty one in its stead.
pub(crate) fn open(place: &Arc<dyn Place>, reads: u32) -> Result<Opened, OpenError> {
    let failed = |error: io::Error| OpenError::Consensus(format!("{}: {error}", place.name()));
    let (fence, in_the_way) = Fence::load(Arc::clone(place)).map_err(failed)?;
    if in_the_way {
        place.put_aside().and_then(|()| fence.cleared()).map_err(failed)?;
    }
    let damage = match whole(&**place, reads) {
        Ok((disk, stored)) => return Ok(Opened { disk, stored, fence }),
        Err(error) if error.is_damage() => error,
        Err(error) => return Err(error),
    };
    tracing::error!(%damage, place = place.name(), "this database is not used any more: it is put aside, and this node \
        promises nothing until its peers have sent it what it lost");
    fence.raise(Uuid::new_v4()).map_err(failed)?;
    place.put_aside().and_then(|()| fence.cleared()).map_err(failed)?;
    let (disk, stored) = whole(&**place, reads)?;
    Ok(Opened { disk, stored, fence })
}

/// Opens a database and looks at all of it: each row, each entry, and whether that is all there was.
fn whole(place: &dyn Place, reads: u32) -> Result<(Disk, Stored), OpenError> {
    let (engine, promise) = place.open()?;
    let disk = Disk::new(engine);
    let stored = disk.load(reads)?;
    let damaged =
        |what: &'static str, found: String| OpenError::Damaged { what, source: DecodeError::Malformed(found) };
    let read = |error: io::Error| damaged("log", error.to_string());
    let purged = disk.purged().map_err(read)?.map(|id| id.index());
    let applied = stored.last_applied.map(|id| id.index());
    if purged > applied {
        return Err(damaged("rows", format!("they reach to {applied:?}, and the log begins after {purged:?}")));
    }
    let last = disk.check_log(purged.map_or(0, |purged| purged + 1), applied.unwrap_or(0))?;
    let reach = last.max(purged).max(applied).unwrap_or(0);
    if reach < promise.last {
        return Err(damaged("log", format!("it ends at {reach}, and {} was acknowledged", promise.last)));
    }
    let vote = disk.vote().map_err(|error| damaged("vote", error.to_string()))?;
    let term = vote.map_or(0, |vote| vote.leader_id().term);
    if term < promise.term {
        return Err(damaged("vote", format!("it is of term {term}, and one was given in term {}", promise.term)));
    }
    Ok((disk, stored))
}
