//! What one watcher was told by `event.from`, call after call.
//!
//! That it misses nothing is for the other modules to say: what a watcher knows after a call is a read like any other,
//! and goes into their histories.

use std::collections::BTreeMap;

use super::{Span, Violation};

/// The answer of one call.
#[derive(Clone, Debug)]
pub struct Batch {
    /// When the call was under way.
    pub span: Span,
    /// The log index in the token that was sent.
    pub from: u64,
    /// The log index in the token that came back.
    pub to: u64,
    /// In the order they came.
    pub events: Vec<Told>,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The log index of the change.
    pub id: u64,
    /// `add`, `mod` or `del`.
    pub operation: String,
    /// The object.
    pub reference: String,
}

/// Every broken promise about what this watcher was told.
pub fn check(watcher: &str, batches: &[Batch]) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut wrong = |what: String| found.push(Violation::Watch { watcher: watcher.to_owned(), what });
    let mut known: BTreeMap<&str, u64> = BTreeMap::new();
    for batch in batches {
        if batch.to < batch.from {
            wrong(format!("the token went back from {} to {}", batch.from, batch.to));
        }
        let mut last = batch.from;
        for event in &batch.events {
            let Told { id, operation, reference } = event;
            if *id <= batch.from {
                wrong(format!("{operation} of {reference} at {id} was told again after {}", batch.from));
            }
            if *id < last || *id > batch.to {
                wrong(format!("{operation} of {reference} at {id} came between {last} and {}", batch.to));
            }
            last = *id;
            let before = match operation.as_str() {
                "del" => known.remove(reference.as_str()),
                _ => known.insert(reference, *id),
            };
            match (operation.as_str(), before) {
                ("add", Some(_)) => wrong(format!("{reference} was added twice, the second time at {id}")),
                ("mod" | "del", None) => wrong(format!("{operation} at {id} of {reference}, which was not there")),
                (_, Some(before)) if before >= *id => wrong(format!("{reference} went back from {before} to {id}")),
                _ => {}
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn batch(from: u64, to: u64, events: &[(u64, &str, &str)]) -> Batch {
        let told = |(id, operation, reference): &(u64, &str, &str)| Told {
            id: *id,
            operation: (*operation).to_owned(),
            reference: (*reference).to_owned(),
        };
        let span = Span { begun: Duration::ZERO, ended: Duration::ZERO };
        Batch { span, from, to, events: events.iter().map(told).collect() }
    }

    #[test]
    fn a_feed_in_order_and_without_repeats_is_good() {
        let feed = [
            batch(0, 5, &[(2, "add", "a"), (2, "add", "b"), (4, "add", "c")]),
            batch(5, 5, &[]),
            batch(5, 9, &[(6, "mod", "a"), (9, "del", "b")]),
            batch(9, 12, &[(11, "add", "b")]),
        ];
        assert_eq!(check("w", &feed), []);
    }

    #[test]
    fn repeats_disorder_and_events_of_the_unknown_are_found() {
        let begin = batch(0, 5, &[(2, "add", "a"), (4, "add", "c")]);
        for bad in [
            batch(5, 4, &[]),
            batch(5, 9, &[(4, "mod", "c")]),
            batch(5, 9, &[(8, "mod", "c"), (7, "mod", "a")]),
            batch(5, 9, &[(10, "mod", "a")]),
            batch(5, 9, &[(6, "add", "a")]),
            batch(5, 9, &[(6, "mod", "z")]),
            batch(5, 9, &[(6, "del", "a"), (7, "mod", "a")]),
            batch(5, 9, &[(6, "mod", "a"), (6, "mod", "a")]),
        ] {
            assert_ne!(check("w", &[begin.clone(), bad.clone()]), [], "{bad:?}");
        }
    }
}
