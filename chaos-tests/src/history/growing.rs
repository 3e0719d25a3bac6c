//! A set that only grows: keys of `other_config`, each added once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Outcome, Span, Violation};

/// What was done to one such set.
#[derive(Clone, Debug, Default)]
pub struct Growing {
    /// Each key is added once.
    pub adds: Vec<(String, Span, Outcome)>,
    /// All the keys that a reader saw.
    pub reads: Vec<(BTreeSet<String>, Span)>,
}

impl Growing {
    /// Every broken promise about this set.
    pub fn check(&self, object: &str) -> Vec<Violation> {
        let object = || object.to_owned();
        let mut found = Vec::new();
        let adds: BTreeMap<&str, (Span, Outcome)> =
            self.adds.iter().map(|(key, span, outcome)| (key.as_str(), (*span, *outcome))).collect();
        // From when on a key must be seen by everybody: since it was acknowledged, or somebody had seen it.
        let mut settled: BTreeMap<&str, Duration> = BTreeMap::new();
        for (key, (span, outcome)) in &adds {
            if *outcome == Outcome::Done {
                settled.insert(key, span.ended);
            }
        }
        let mut reported = BTreeSet::new();
        for (keys, span) in &self.reads {
            for key in keys {
                let wrong = match adds.get(key.as_str()) {
                    None => Some(Violation::NeverWritten { object: object(), value: key.clone() }),
                    Some((_, Outcome::Refused)) => Some(Violation::Refused { object: object(), value: key.clone() }),
                    Some((add, _)) if span.ended < add.begun => {
                        Some(Violation::TooEarly { object: object(), value: key.clone() })
                    }
                    Some(_) => {
                        let seen = settled.entry(key.as_str()).or_insert(span.ended);
                        *seen = span.ended.min(*seen);
                        None
                    }
                };
                found.extend(wrong.filter(|_| reported.insert(key.as_str())));
            }
        }
        for (key, since) in &settled {
            if self.reads.iter().any(|(keys, span)| span.begun > *since && !keys.contains(*key)) {
                found.push(Violation::Lost { object: object(), value: (*key).to_owned() });
            }
        }
        let mut by_size: Vec<&BTreeSet<String>> = self.reads.iter().map(|(keys, _)| keys).collect();
        by_size.sort_by_key(|keys| keys.len());
        for pair in by_size.windows(2) {
            if let [smaller, greater] = pair
                && let Some(one) = smaller.difference(greater).next()
            {
                let other = greater.difference(smaller).next().cloned().unwrap_or_default();
                found.push(Violation::Order { object: object(), one: one.clone(), other });
                break;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(begun: u64, ended: u64) -> Span {
        Span { begun: Duration::from_millis(begun), ended: Duration::from_millis(ended) }
    }

    fn growing(adds: &[(&str, Span, Outcome)], reads: &[(&[&str], Span)]) -> Vec<Violation> {
        let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect();
        Growing {
            adds: adds.iter().map(|(key, span, outcome)| ((*key).to_owned(), *span, *outcome)).collect(),
            reads: reads.iter().map(|(seen, span)| (keys(seen), *span)).collect(),
        }
        .check("x")
    }

    use Outcome::{Done, Refused, Unknown};

    #[test]
    fn an_acknowledged_key_that_is_missing_is_found() {
        let lost = [Violation::Lost { object: "x".into(), value: "a".into() }];
        assert_eq!(growing(&[("a", span(1, 2), Done)], &[(&[], span(3, 4))]), lost);
        assert_eq!(growing(&[("a", span(1, 2), Done)], &[(&[], span(2, 4))]), [], "asked in time");
        // Nobody was told, but somebody saw it.
        assert_eq!(growing(&[("a", span(1, 2), Unknown)], &[(&["a"], span(3, 4)), (&[], span(5, 6))]), lost);
        assert_eq!(growing(&[("a", span(1, 2), Unknown)], &[(&[], span(3, 4)), (&["a"], span(5, 6))]), []);
    }

    #[test]
    fn keys_that_were_refused_made_up_or_not_yet_added_are_found() {
        let refused = Violation::Refused { object: "x".into(), value: "a".into() };
        assert_eq!(growing(&[("a", span(1, 2), Refused)], &[(&["a"], span(3, 4))]), [refused]);
        let made_up = Violation::NeverWritten { object: "x".into(), value: "a".into() };
        assert_eq!(growing(&[], &[(&["a"], span(3, 4))]), [made_up]);
        let early = Violation::TooEarly { object: "x".into(), value: "a".into() };
        assert_eq!(growing(&[("a", span(5, 6), Done)], &[(&["a"], span(3, 4))]), [early]);
    }

    #[test]
    fn two_readers_never_see_two_keys_in_different_orders() {
        let adds = [("a", span(1, 9), Done), ("b", span(1, 9), Done)];
        let seen: [(&[&str], Span); 2] = [(&["a"], span(2, 3)), (&["b"], span(2, 3))];
        assert_eq!(
            growing(&adds, &seen),
            [Violation::Order { object: "x".into(), one: "a".into(), other: "b".into() }]
        );
    }
}
