//! When something is due that comes every hour, every day, or on some days of the week. UTC.

use std::collections::BTreeMap;

use datamodel::enums::VmssFrequency as Frequency;
use datamodel::fields::vmss;
use datamodel::{ApiError, Timestamp, errors};
use raft_store::Row;

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;
/// The first day of all was a Thursday.
const DAYS: [&str; 7] = ["thursday", "friday", "saturday", "sunday", "monday", "tuesday", "wednesday"];
const MINUTES: [i64; 4] = [0, 15, 30, 45];
const DEFAULTS: [(&str, &str); 3] = [("min", "0"), ("hour", "0"), ("days", "monday")];

/// How often, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rhythm {
    frequency: Frequency,
    schedule: BTreeMap<String, String>,
}

impl Rhythm {
    pub(crate) fn of(row: &Row) -> Self {
        Self { frequency: row.get(vmss::FREQUENCY), schedule: row.get(vmss::SCHEDULE) }
    }

    fn number(&self, key: &str) -> Option<i64> {
        self.schedule.get(key)?.parse().ok()
    }

    /// When it was last due, `now` included; none for a schedule that does not say.
    pub(crate) fn last(&self, now: Timestamp) -> Option<Timestamp> {
        let minute = self.number("min")? * 60;
        let before = |every: i64, at: i64| Timestamp((now.0 - at).div_euclid(every) * every + at);
        match self.frequency {
            Frequency::Hourly => Some(before(HOUR, minute)),
            Frequency::Daily => Some(before(DAY, self.number("hour")? * HOUR + minute)),
            Frequency::Weekly => {
                let days = days(self.schedule.get("days")?).ok()?;
                let last = before(DAY, self.number("hour")? * HOUR + minute);
                let back = (0..7).map(|days| Timestamp(last.0 - days * DAY));
                back.into_iter().find(|moment| days.contains(&weekday(*moment)))
            }
        }
    }
}

fn weekday(moment: Timestamp) -> &'static str {
    let day = usize::try_from(moment.0.div_euclid(DAY).rem_euclid(7)).unwrap_or(0);
    DAYS.get(day).copied().unwrap_or("thursday")
}

fn days(text: &str) -> Result<Vec<&'static str>, ApiError> {
    let day = |word: &str| {
        let word = word.trim().to_ascii_lowercase();
        DAYS.into_iter().find(|day| *day == word).ok_or_else(|| errors::invalid_value("schedule:days", text))
    };
    text.split(',').map(day).collect()
}

fn keys(frequency: Frequency) -> &'static [&'static str] {
    match frequency {
        Frequency::Hourly => &["min"],
        Frequency::Daily => &["min", "hour"],
        Frequency::Weekly => &["min", "hour", "days"],
    }
}

/// One entry of a schedule.
pub(crate) fn check_entry(key: &str, value: &str) -> Result<(), ApiError> {
    let good = match key {
        "min" => value.parse().is_ok_and(|minute: i64| MINUTES.contains(&minute)),
        "hour" => value.parse().is_ok_and(|hour: i64| (0..24).contains(&hour)),
        "days" => return days(value).map(drop),
        _ => return Err(errors::invalid_value("schedule", key)),
    };
    if good { Ok(()) } else { Err(errors::invalid_value(format!("schedule:{key}"), value)) }
}

/// A schedule that says all that its frequency needs to know, and nothing else.
pub(crate) fn check_schedule(frequency: Frequency, schedule: &BTreeMap<String, String>) -> Result<(), ApiError> {
    for (key, value) in schedule {
        check_entry(key, value)?;
    }
    match keys(frequency).iter().find(|key| !schedule.contains_key(**key)) {
        Some(missing) => Err(errors::invalid_value(format!("schedule:{missing}"), "")),
        None => Ok(()),
    }
}

/// What a schedule does not say is as usual.
pub(crate) fn with_defaults(frequency: Frequency, mut schedule: BTreeMap<String, String>) -> BTreeMap<String, String> {
    for (key, value) in DEFAULTS.into_iter().filter(|(key, _)| keys(frequency).contains(key)) {
        schedule.entry(key.to_owned()).or_insert_with(|| value.to_owned());
    }
    schedule
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn rhythm(frequency: Frequency, entries: &[(&str, &str)]) -> Rhythm {
        let schedule = entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Rhythm { frequency, schedule }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_due_is_the_last_moment_of_the_schedule_that_is_not_to_come() {
        let hourly = rhythm(Frequency::Hourly, &[("min", "15")]);
        assert_eq!(hourly.last(at("20260301T10:15:00Z")), Some(at("20260301T10:15:00Z")));
        assert_eq!(hourly.last(at("20260301T10:14:59Z")), Some(at("20260301T09:15:00Z")));
        let daily = rhythm(Frequency::Daily, &[("hour", "22"), ("min", "30")]);
        assert_eq!(daily.last(at("20260301T10:00:00Z")), Some(at("20260228T22:30:00Z")));
        // The 1st of March 2026 is a Sunday.
        let weekly = rhythm(Frequency::Weekly, &[("hour", "1"), ("min", "0"), ("days", "Monday, friday")]);
        assert_eq!(weekly.last(at("20260301T10:00:00Z")), Some(at("20260227T01:00:00Z")));
        assert_eq!(weekly.last(at("20260302T01:00:00Z")), Some(at("20260302T01:00:00Z")));
        assert_eq!(weekly.last(at("20260302T00:59:59Z")), Some(at("20260227T01:00:00Z")));
        assert_eq!(rhythm(Frequency::Daily, &[("min", "0")]).last(at("20260301T10:00:00Z")), None);
    }

    #[test]
    fn a_schedule_says_what_its_frequency_needs_and_nothing_else() {
        let check =
            |frequency, entries: &[(&str, &str)]| check_schedule(frequency, &rhythm(frequency, entries).schedule);
        assert_eq!(check(Frequency::Hourly, &[("min", "45")]), Ok(()));
        for (key, value) in [("min", "10"), ("min", "x"), ("hour", "24"), ("days", "monday,someday"), ("year", "1")] {
            assert_eq!(check_entry(key, value).unwrap_err().code, errors::INVALID_VALUE, "{key}={value}");
        }
        let error = check(Frequency::Daily, &[("min", "0")]).unwrap_err();
        assert_eq!(error.params, ["schedule:hour", ""]);
        let filled = with_defaults(Frequency::Weekly, BTreeMap::new());
        assert_eq!(check_schedule(Frequency::Weekly, &filled), Ok(()));
    }
}
