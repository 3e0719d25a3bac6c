//! Storage, as the pool means it: what SRs, PBDs, VDIs and VBDs are, and what may be done to them.

pub(crate) mod rules;

use crate::operations::Kind;

/// What is done to storage, for the journal.
pub(crate) const KINDS: &[&dyn Kind] = &[];
