//! Points in time as the API knows them: whole seconds, UTC.

use std::fmt;
use std::str::FromStr;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::Offset;

/// Whole seconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// 1970-01-01T00:00:00Z: the API's "never".
    pub const EPOCH: Self = Self(0);

    /// Appends `YYYYMMDDTHH:MM:SSZ`.
    pub fn write_to(self, out: &mut Vec<u8>) {
        let moment = jiff::Timestamp::from_second(self.0).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        let civil = Offset::UTC.to_datetime(moment);
        digits(i64::from(civil.year()), 4, out);
        digits(civil.month().into(), 2, out);
        digits(civil.day().into(), 2, out);
        out.push(b'T');
        digits(civil.hour().into(), 2, out);
        out.push(b':');
        digits(civil.minute().into(), 2, out);
        out.push(b':');
        digits(civil.second().into(), 2, out);
        out.push(b'Z');
    }
}

fn digits(number: i64, width: u32, out: &mut Vec<u8>) {
    for place in (0..width).rev() {
        out.push(b'0' + u8::try_from(number / 10_i64.pow(place) % 10).unwrap_or(0));
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Vec::with_capacity(18);
        self.write_to(&mut text);
        formatter.write_str(&String::from_utf8_lossy(&text))
    }
}

/// The text is no date of the forms the API takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a date")]
pub struct NotADate;

impl FromStr for Timestamp {
    type Err = NotADate;

    /// `20240101T00:00:00Z`, `2024-01-01T00:00:00Z`, with `Z`, `±hh:mm`, `±hhmm`, or no zone at all (UTC).
    fn from_str(text: &str) -> Result<Self, NotADate> {
        let (date, rest) = text.trim().split_once('T').ok_or(NotADate)?;
        let (year, month, day) = match (date.len(), date.as_bytes()) {
            (8, _) if date.is_ascii() => (&date[..4], &date[4..6], &date[6..]),
            (10, [_, _, _, _, b'-', _, _, b'-', _, _]) if date.is_ascii() => (&date[..4], &date[5..7], &date[8..]),
            _ => return Err(NotADate),
        };
        let (time, offset) = match rest.find(['Z', '+', '-']) {
            Some(at) => (&rest[..at], zone(&rest[at..])?),
            None => (rest, 0),
        };
        let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
        let mut clock = time.split(':');
        let mut next = || clock.next().and_then(|part| number::<i8>(part, 2)).ok_or(NotADate);
        let (hour, minute, second) = (next()?, next()?, next()?);
        if clock.next().is_some() || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(NotADate);
        }
        let date = Date::new(
            number(year, 4).ok_or(NotADate)?,
            number(month, 2).ok_or(NotADate)?,
            number(day, 2).ok_or(NotADate)?,
        )
        .map_err(|_| NotADate)?;
        let time = Time::new(hour, minute, second, 0).map_err(|_| NotADate)?;
        let moment = Offset::UTC.to_timestamp(DateTime::from_parts(date, time)).map_err(|_| NotADate)?;
        let moment = jiff::Timestamp::from_second(moment.as_second() - offset).map_err(|_| NotADate)?;
        Ok(Self(moment.as_second()))
    }
}

fn number<T: FromStr>(text: &str, width: usize) -> Option<T> {
    (text.len() == width && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

/// Seconds east of UTC.
fn zone(text: &str) -> Result<i64, NotADate> {
    let sign = match text.as_bytes().first() {
        Some(b'Z') if text.len() == 1 => return Ok(0),
        Some(b'+') => 1,
        Some(b'-') => -1,
        _ => return Err(NotADate),
    };
    let digits: String = text[1..].chars().filter(|symbol| *symbol != ':').collect();
    let value: i64 = number(&digits, 4).ok_or(NotADate)?;
    let (hours, minutes) = (value / 100, value % 100);
    if hours > 23 || minutes > 59 {
        return Err(NotADate);
    }
    Ok(sign * (hours * 3600 + minutes * 60))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forms_that_clients_send_are_understood() {
        for text in ["20240102T03:04:05Z", "2024-01-02T03:04:05Z", "20240102T03:04:05", "20240102T04:04:05+01:00"] {
            assert_eq!(text.parse(), Ok(Timestamp(1_704_164_645)), "{text}");
        }
        for text in
            ["", "T", "20241301T00:00:00Z", "2024", "20240101T00:00", "20240101T0é:00:00Z", "２0240101T00:00:00Z"]
        {
            assert_eq!(text.parse::<Timestamp>(), Err(NotADate), "{text}");
        }
        assert_eq!(Timestamp::EPOCH.to_string(), "19700101T00:00:00Z");
    }
}
