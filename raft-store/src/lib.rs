//! A replicated table of typed rows whose log index is time: transactions in, an ordered change feed out.

mod apply;
mod codec;
mod disk;
mod export;
mod fence;
mod format;
mod indexes;
mod leadership;
mod log;
mod machine;
mod membership;
mod offload;
mod peer;
mod planted;
mod proposer;
mod readmit;
mod record;
mod remembered;
mod replace;
mod row;
mod stand_down;
mod state;
mod store;
mod transaction;
mod types;

pub use codec::DecodeError;
pub use disk::{
    Column, DiskChange, Engine, Folder, KeyValue, Memory, OpenError, Place, Promise, Scan, is_of_a_database,
};
pub use export::{decode_rows, encode_rows};
pub use format::FORMATS;
pub use leadership::Leadership;
pub use membership::Progress;
pub use peer::{Dial, PeerChannel, PeerTls};
pub use planted::Planted;
pub use replace::{Replacement, StagedRow};
pub use row::{LogIndex, Row};
pub use state::{Change, ChangeKind, History, State};
pub use store::{CommitError, Member, NotLeader, Store, StoreConfig};
pub use transaction::{Conflict, NewRow, Transaction};
