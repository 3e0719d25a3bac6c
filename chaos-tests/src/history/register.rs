//! One field that is written and read: is there an order of its calls that explains what everybody saw?
//!
//! Every write has a value of its own, which makes the question cheap (Gibbons and Korach): the calls of one value, its
//! write and its reads, must stand together in such an order. A value whose first call ended before its last one began
//! certainly was the field's value in between; two such stretches may not overlap. A value whose calls all overlap needs
//! one instant only, and may not lie wholly within another value's stretch.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Outcome, Span, Violation};

/// What was done to one field.
#[derive(Clone, Debug, Default)]
pub struct Register {
    /// The value at the beginning.
    pub initial: String,
    /// Each with a value of its own.
    pub writes: Vec<(String, Span, Outcome)>,
    /// What was read, when.
    pub reads: Vec<(String, Span)>,
}

/// The calls of one value.
struct Cluster<'a> {
    value: &'a str,
    /// The earliest end of any of them; none while only a write of unknown outcome is known.
    first_end: Option<Duration>,
    /// The latest begin of any.
    last_begin: Duration,
    written: Duration,
    outcome: Outcome,
    read: bool,
}

impl Cluster<'_> {
    fn take(&mut self, span: Span) {
        self.first_end = Some(self.first_end.map_or(span.ended, |end| end.min(span.ended)));
        self.last_begin = self.last_begin.max(span.begun);
    }

    /// From when until when it certainly was the value.
    fn stretch(&self) -> Option<(Duration, Duration)> {
        self.first_end.filter(|end| *end < self.last_begin).map(|end| (end, self.last_begin))
    }
}

impl Register {
    /// Every broken promise about this field.
    pub fn check(&self, object: &str) -> Vec<Violation> {
        let object = || object.to_owned();
        let mut found = Vec::new();
        let mut clusters: BTreeMap<&str, Cluster<'_>> = BTreeMap::new();
        let beginning = (self.initial.clone(), Span { begun: Duration::ZERO, ended: Duration::ZERO }, Outcome::Done);
        for (value, span, outcome) in std::iter::once(&beginning).chain(&self.writes) {
            let known = (*outcome == Outcome::Done).then_some(span.ended);
            let cluster = Cluster {
                value,
                first_end: known,
                last_begin: span.begun,
                written: span.begun,
                outcome: *outcome,
                read: false,
            };
            clusters.insert(value, cluster);
        }
        for (value, span) in &self.reads {
            let value = value.as_str();
            match clusters.get_mut(value) {
                None => found.push(Violation::NeverWritten { object: object(), value: value.to_owned() }),
                Some(cluster) if span.ended < cluster.written => {
                    found.push(Violation::TooEarly { object: object(), value: value.to_owned() });
                }
                Some(cluster) => {
                    cluster.read = true;
                    cluster.take(*span);
                }
            }
        }
        for cluster in clusters.values().filter(|cluster| cluster.outcome == Outcome::Refused && cluster.read) {
            found.push(Violation::Refused { object: object(), value: cluster.value.to_owned() });
        }
        // What was not acknowledged and not seen need not have happened.
        let seen: Vec<&Cluster<'_>> =
            clusters.values().filter(|cluster| cluster.read || cluster.outcome == Outcome::Done).collect();
        found.extend(in_each_others_way(&seen).map(|(old, new)| Violation::Stale {
            object: object(),
            old: old.to_owned(),
            new: new.to_owned(),
        }));
        found
    }
}

/// Pairs of values for which there is no order: the second was there while the first must have been.
fn in_each_others_way<'a>(clusters: &'a [&Cluster<'a>]) -> impl Iterator<Item = (&'a str, &'a str)> {
    let mut stretches: Vec<(Duration, Duration, &str)> =
        clusters.iter().filter_map(|cluster| cluster.stretch().map(|(from, to)| (from, to, cluster.value))).collect();
    stretches.sort_unstable();
    let mut pairs = Vec::new();
    let mut reach: Option<(Duration, &str)> = None;
    for (from, to, value) in &stretches {
        if let Some((end, before)) = reach
            && *from < end
        {
            pairs.push((before, *value));
        }
        if reach.is_none_or(|(end, _)| *to > end) {
            reach = Some((*to, value));
        }
    }
    for cluster in clusters {
        let Some(end) = cluster.first_end.filter(|end| *end >= cluster.last_begin) else { continue };
        let before = stretches.partition_point(|(from, ..)| *from < cluster.last_begin);
        let around = stretches[..before].iter().rev().find(|(_, to, _)| end < *to);
        if let Some((_, _, value)) = around {
            pairs.push((*value, cluster.value));
        }
    }
    pairs.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(begun: u64, ended: u64) -> Span {
        Span { begun: Duration::from_millis(begun), ended: Duration::from_millis(ended) }
    }

    fn register(writes: &[(&str, Span, Outcome)], reads: &[(&str, Span)]) -> Register {
        Register {
            initial: String::new(),
            writes: writes.iter().map(|(value, span, outcome)| ((*value).to_owned(), *span, *outcome)).collect(),
            reads: reads.iter().map(|(value, span)| ((*value).to_owned(), *span)).collect(),
        }
    }

    use Outcome::{Done, Refused, Unknown};

    #[test]
    fn calls_that_overlap_may_be_seen_in_either_order() {
        let both = [("a", span(1, 10), Done), ("b", span(2, 9), Done)];
        for (first, second) in [("a", "b"), ("b", "a")] {
            let seen = register(&both, &[(first, span(11, 12)), (first, span(13, 14))]);
            assert_eq!(seen.check("x"), []);
            let torn = register(&both, &[(first, span(11, 12)), (second, span(13, 14)), (first, span(15, 16))]);
            assert_ne!(torn.check("x"), [], "{first} came back");
        }
    }

    #[test]
    fn a_read_from_old_state_is_found() {
        let stale = register(&[("a", span(1, 2), Done)], &[("", span(3, 4))]);
        assert_eq!(stale.check("x"), [Violation::Stale { object: "x".into(), old: "".into(), new: "a".into() }]);
        let asked_before = register(&[("a", span(1, 2), Done)], &[("", span(1, 4))]);
        assert_eq!(asked_before.check("x"), []);
    }

    #[test]
    fn an_acknowledged_write_that_is_undone_is_found() {
        let lost =
            register(&[("a", span(1, 2), Done), ("b", span(5, 6), Done)], &[("b", span(7, 8)), ("a", span(9, 10))]);
        assert_ne!(lost.check("x"), []);
    }

    #[test]
    fn a_write_of_unknown_outcome_may_come_late_or_never_but_once() {
        let unknown = [("a", span(1, 2), Unknown), ("b", span(5, 6), Done)];
        assert_eq!(register(&unknown, &[("b", span(7, 8))]).check("x"), []);
        assert_eq!(register(&unknown, &[("b", span(7, 8)), ("a", span(9, 10)), ("a", span(11, 12))]).check("x"), []);
        let twice = [("b", span(7, 8)), ("a", span(9, 10)), ("b", span(11, 12))];
        assert_ne!(register(&unknown, &twice).check("x"), []);
    }

    #[test]
    fn what_was_refused_made_up_or_not_yet_asked_for_is_not_read() {
        let refused = register(&[("a", span(1, 2), Refused)], &[("a", span(3, 4))]);
        assert_eq!(refused.check("x"), [Violation::Refused { object: "x".into(), value: "a".into() }]);
        let made_up = register(&[], &[("a", span(3, 4))]);
        assert_eq!(made_up.check("x"), [Violation::NeverWritten { object: "x".into(), value: "a".into() }]);
        let early = register(&[("a", span(5, 6), Done)], &[("a", span(3, 4))]);
        assert_eq!(early.check("x"), [Violation::TooEarly { object: "x".into(), value: "a".into() }]);
    }

    /// Tries every order: slow, and right by its very form.
    fn has_an_order(register: &Register) -> bool {
        #[derive(Clone, Copy)]
        struct Act<'a> {
            value: &'a str,
            span: Span,
            writes: bool,
            must: bool,
        }
        fn search(left: &mut Vec<Act<'_>>, value: &str) -> bool {
            if left.iter().all(|act| !act.must) {
                return true;
            }
            (0..left.len()).any(|next| {
                let act = left[next];
                let late = left.iter().any(|other| other.must && other.span.ended < act.span.begun);
                if late || (!act.writes && act.value != value) {
                    return false;
                }
                left.swap_remove(next);
                let found = search(left, act.value);
                left.push(act);
                let last = left.len() - 1;
                left.swap(next, last);
                found
            })
        }
        let writes = register.writes.iter().filter(|(_, _, outcome)| *outcome != Refused);
        let mut all: Vec<Act<'_>> = writes
            .map(|(value, span, outcome)| Act {
                value,
                span: Span { ended: if *outcome == Done { span.ended } else { Duration::MAX }, ..*span },
                writes: true,
                must: *outcome == Done,
            })
            .collect();
        all.extend(register.reads.iter().map(|(value, span)| Act { value, span: *span, writes: false, must: true }));
        search(&mut all, &register.initial)
    }

    #[test]
    fn it_judges_small_histories_as_a_search_of_all_orders_does() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut draw = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        let (mut good, mut bad) = (0, 0);
        for _ in 0..20_000 {
            let mut register = Register::default();
            // All times differ, as they do on a clock of nanoseconds.
            let mut times: Vec<u64> = (1..=12).collect();
            for place in (1..times.len()).rev() {
                times.swap(place, draw(place as u64 + 1) as usize);
            }
            for call in 0..6 {
                let (one, other) = (times[2 * call], times[2 * call + 1]);
                let span = span(one.min(other), one.max(other));
                if call < 3 {
                    let outcome = [Done, Done, Unknown][draw(3) as usize];
                    register.writes.push((call.to_string(), span, outcome));
                } else {
                    let value = draw(4);
                    let value = if value == 3 { String::new() } else { value.to_string() };
                    register.reads.push((value, span));
                }
            }
            let judged = register.check("x").is_empty();
            assert_eq!(judged, has_an_order(&register), "{register:?}");
            if judged { good += 1 } else { bad += 1 }
        }
        assert!(good > 500 && bad > 500, "{good} good and {bad} bad ones");
    }
}
