//! Objects that are made under a key, and asked for again under it until somebody answers.

use std::collections::BTreeMap;

use super::{Outcome, Violation};

/// One call, or its repetition.
#[derive(Clone, Debug)]
pub struct Making {
    /// The new object's name, one for each key.
    pub name: String,
    /// What became of this try.
    pub outcome: Outcome,
    /// The reference that was answered.
    pub reference: Option<String>,
}

/// Every broken promise about these calls, given the objects that are there in the end: reference and name of each.
pub fn check(calls: &[Making], objects: &BTreeMap<String, String>) -> Vec<Violation> {
    let mut by_name: BTreeMap<&str, Vec<&Making>> = BTreeMap::new();
    for call in calls {
        by_name.entry(&call.name).or_default().push(call);
    }
    let mut found = Vec::new();
    for (name, tries) in by_name {
        let there: Vec<&String> = objects.iter().filter(|(_, label)| *label == name).map(|(at, _)| at).collect();
        let mut answered: Vec<&String> = tries.iter().filter_map(|call| call.reference.as_ref()).collect();
        answered.sort_unstable();
        answered.dedup();
        let times = there.len().max(answered.len());
        if times > 1 {
            found.push(Violation::Twice { object: name.to_owned(), times });
        }
        if answered.iter().any(|reference| !there.contains(reference)) {
            found.push(Violation::Lost { object: "what was made".to_owned(), value: name.to_owned() });
        }
        if !there.is_empty() && tries.iter().all(|call| call.outcome == Outcome::Refused) {
            found.push(Violation::Refused { object: "what was made".to_owned(), value: name.to_owned() });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn making(outcome: Outcome, reference: Option<&str>) -> Making {
        Making { name: "copy".into(), outcome, reference: reference.map(str::to_owned) }
    }

    fn judged(calls: &[Making], there: &[&str]) -> Vec<Violation> {
        check(calls, &there.iter().map(|reference| ((*reference).to_owned(), "copy".to_owned())).collect())
    }

    #[test]
    fn done_once_answered_alike_and_there_is_what_is_promised() {
        let (unknown, done) = (making(Outcome::Unknown, None), making(Outcome::Done, Some("r1")));
        assert_eq!(judged(&[unknown.clone(), done.clone(), done.clone()], &["r1"]), []);
        assert_eq!(judged(std::slice::from_ref(&unknown), &[]), []);
        assert_eq!(judged(&[unknown], &["r1"]), []);
    }

    #[test]
    fn what_was_made_twice_lost_or_refused_is_found() {
        let done = making(Outcome::Done, Some("r1"));
        let twice = |times| Violation::Twice { object: "copy".into(), times };
        assert_eq!(judged(std::slice::from_ref(&done), &["r1", "r2"]), [twice(2)]);
        let other = making(Outcome::Done, Some("r2"));
        assert_eq!(judged(&[done.clone(), other], &["r1", "r2"]), [twice(2)]);
        let lost = Violation::Lost { object: "what was made".into(), value: "copy".into() };
        assert_eq!(judged(&[done], &[]), [lost]);
        let refused = Violation::Refused { object: "what was made".into(), value: "copy".into() };
        assert_eq!(judged(&[making(Outcome::Refused, None)], &["r1"]), [refused]);
    }
}
