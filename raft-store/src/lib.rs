//! A replicated table of typed rows whose log index is time: transactions in, an ordered change feed out.

mod apply;
mod codec;
mod disk;
mod format;
mod leadership;
mod log;
mod machine;
mod peer;
mod proposer;
mod record;
mod replace;
mod row;
mod state;
mod store;
mod transaction;
mod types;

pub use codec::DecodeError;
pub use disk::OpenError;
pub use leadership::Leadership;
pub use peer::PeerTls;
pub use replace::{Replacement, StagedRow};
pub use row::{LogIndex, Row};
pub use state::{Change, ChangeKind, State};
pub use store::{CommitError, Member, NotLeader, Store, StoreConfig};
pub use transaction::{Conflict, NewRow, Transaction};
