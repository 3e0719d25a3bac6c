//! `/pool/xmldbdump`: the pool's database, out and in.

use super::{ByteStream, Opened, Transfer};
use crate::backup;
use crate::failure::Served;

/// `xe pool-dump-database`.
pub(super) async fn dump(transfer: Transfer) -> Served<Opened> {
    Ok(transfer.download("application/octet-stream", backup::write))
}

/// `xe pool-restore-database`; with `dry_run=true` everything but the change itself.
pub(super) async fn restore(transfer: Transfer, body: ByteStream) -> Served<Opened> {
    Ok(transfer.upload(move |transfer| async move { backup::restore(&transfer, body).await }))
}
