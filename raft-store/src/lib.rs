//! A replicated table of typed rows whose log index is time: transactions in, an ordered change feed out.

mod apply;
mod codec;
mod row;
mod state;
mod transaction;

pub use codec::DecodeError;
pub use row::{LogIndex, Row};
pub use state::{Change, ChangeKind, State};
pub use transaction::{Conflict, NewRow, Transaction};
