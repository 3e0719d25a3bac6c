//! Whether reads and writes of one object can be explained by an order in which each took effect at one moment between
//! its beginning and its end.
//!
//! Every write has a value of its own, so that each read names its write. The operations of one value then have to come
//! in one piece, and a history has such an order exactly if no two pieces must each begin before the other
//! (Gibbons and Korach, "Testing shared memories", 1997).

use std::collections::BTreeMap;

use crate::kernel;
use crate::trace::Trace;
use crate::{broken, tell};

/// A read or a write of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// When it was asked for.
    pub began: i64,
    /// When it was answered; none where nobody knows whether it was done.
    pub ended: Option<i64>,
    /// What was written or read.
    pub value: String,
    /// Whether it wrote.
    pub write: bool,
}

/// What was read and written of many objects.
#[derive(Debug, Default)]
pub struct Registers(BTreeMap<String, Vec<Operation>>);

impl Registers {
    /// An operation that began then and is over now, or of which nobody knows whether it was done.
    pub fn remember(&mut self, object: &str, began: i64, known: bool, value: String, write: bool) {
        let ended = known.then(kernel::now);
        self.0.entry(object.to_owned()).or_default().push(Operation { began, ended, value, write });
    }

    /// Compares all with what each object is in the end.
    pub fn judge(&self, trace: &Trace, initial: &str, end: impl Fn(&str) -> Option<String>) {
        for (object, history) in &self.0 {
            let Some(value) = end(object) else {
                broken!(trace, "{object} is gone");
                continue;
            };
            let now = kernel::now();
            let mut history = history.clone();
            history.push(Operation { began: now, ended: Some(now), value, write: false });
            if let Err(why) = linearizable(initial, &history) {
                broken!(trace, "{object} is not linearizable: {why}");
                for operation in &history {
                    tell!(trace, "  {operation:?}");
                }
            }
        }
    }
}

/// What contradicts every order.
///
/// # Errors
/// A sentence about the operations that do.
pub fn linearizable(initial: &str, history: &[Operation]) -> Result<(), String> {
    let mut clusters: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    let first = Operation { began: i64::MIN, ended: Some(i64::MIN), value: initial.to_owned(), write: true };
    clusters.entry(initial).or_default().push(&first);
    for operation in history {
        clusters.entry(&operation.value).or_default().push(operation);
    }
    let mut pieces = Vec::new();
    for (value, operations) in &clusters {
        let Some(write) = operations.iter().find(|operation| operation.write) else {
            return Err(format!("{value:?} was read and never written"));
        };
        if operations.len() == 1 && write.ended.is_none() {
            // Nobody saw it: it need not have been done.
            continue;
        }
        let first_end =
            operations.iter().map(|operation| operation.ended.unwrap_or(i64::MAX)).min().unwrap_or(i64::MAX);
        let last_beginning = operations.iter().map(|operation| operation.began).max().unwrap_or(i64::MIN);
        if first_end < write.began {
            return Err(format!("{value:?} was read before it was written"));
        }
        pieces.push((first_end, last_beginning, value));
    }
    for (at, (one_end, one_beginning, one)) in pieces.iter().enumerate() {
        for (other_end, other_beginning, other) in &pieces[at + 1..] {
            if one_end < other_beginning && other_end < one_beginning {
                return Err(format!("{one:?} and {other:?} each come before the other"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(write: bool, value: &str, began: i64, ended: i64) -> Operation {
        Operation { began, ended: (ended > 0).then_some(ended), value: value.into(), write }
    }

    #[test]
    fn concurrent_writes_may_take_effect_in_either_order() {
        let history = [op(true, "a", 1, 10), op(true, "b", 2, 9), op(false, "a", 11, 12)];
        assert_eq!(linearizable("0", &history), Ok(()));
        let history = [op(true, "a", 1, 10), op(true, "b", 2, 9), op(false, "b", 11, 12)];
        assert_eq!(linearizable("0", &history), Ok(()));
    }

    #[test]
    fn a_stale_read_is_found() {
        assert!(linearizable("0", &[op(true, "a", 1, 2), op(false, "0", 3, 4)]).is_err());
        let history = [op(true, "a", 1, 2), op(true, "b", 3, 4), op(false, "a", 5, 6)];
        assert!(linearizable("0", &history).is_err());
    }

    #[test]
    fn reads_that_go_back_in_time_are_found() {
        let history = [op(true, "a", 1, 20), op(false, "a", 2, 3), op(false, "0", 4, 5)];
        assert!(linearizable("0", &history).is_err());
    }

    #[test]
    fn a_write_of_unknown_outcome_may_be_seen_or_not() {
        assert_eq!(linearizable("0", &[op(true, "a", 1, 0), op(false, "0", 5, 6)]), Ok(()));
        assert_eq!(linearizable("0", &[op(true, "a", 1, 0), op(false, "a", 5, 6)]), Ok(()));
        assert!(linearizable("0", &[op(true, "a", 7, 0), op(false, "a", 5, 6)]).is_err());
        let history = [op(true, "a", 1, 0), op(false, "a", 5, 6), op(false, "0", 7, 8)];
        assert!(linearizable("0", &history).is_err());
    }

    #[test]
    fn a_value_from_nowhere_is_found() {
        assert!(linearizable("0", &[op(false, "x", 5, 6)]).is_err());
    }
}
