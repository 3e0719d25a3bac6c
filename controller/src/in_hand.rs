//! What this process has in hand: operations and answers that somebody here is going to settle. The master settles
//! whatever nobody has in hand, no matter who let go of it, or when.

use std::collections::HashMap;
use std::sync::Arc;

use datamodel::OpaqueRef;
use parking_lot::Mutex;

/// What is in hand, and how often.
#[derive(Debug, Clone, Default)]
pub(crate) struct InHand(Arc<Mutex<HashMap<OpaqueRef, usize>>>);

impl InHand {
    /// Takes an object in hand, until what is returned is dropped. To be done before the object is there to be found.
    pub(crate) fn hold(&self, reference: OpaqueRef) -> Hold {
        *self.0.lock().entry(reference).or_default() += 1;
        Hold { of: self.clone(), reference }
    }

    /// Whether somebody has it in hand.
    pub(crate) fn has(&self, reference: OpaqueRef) -> bool {
        self.0.lock().contains_key(&reference)
    }
}

/// An object in hand.
#[derive(Debug)]
pub(crate) struct Hold {
    of: InHand,
    reference: OpaqueRef,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.of.0.lock();
        if let Some(count) = held.get_mut(&self.reference) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.reference);
            }
        }
    }
}
