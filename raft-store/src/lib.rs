//! A replicated table of typed rows whose log index is time: transactions in, an ordered change feed out.

mod apply;
mod codec;
mod disk;
mod export;
mod leadership;
mod log;
mod machine;
mod membership;
mod peer;
mod proposer;
mod record;
mod row;
mod state;
mod store;
mod transaction;
mod types;

pub use codec::DecodeError;
pub use disk::OpenError;
pub use export::{decode_rows, encode_rows};
pub use leadership::Leadership;
pub use membership::Progress;
pub use peer::PeerTls;
pub use row::{LogIndex, Row};
pub use state::{Change, ChangeKind, State};
pub use store::{CommitError, Member, NotLeader, Store, StoreConfig};
pub use transaction::{Conflict, NewRow, Transaction};
