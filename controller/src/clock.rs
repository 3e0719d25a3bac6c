//! Time, as far as the pool's rows know it: passed in, so that a simulation has its own.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use datamodel::Timestamp;
use parking_lot::Mutex;

/// A source of time.
pub trait Clock: Send + Sync + 'static {
    /// What the machine's clock on the wall shows, in whole seconds, UTC. It may be set, and then it jumps.
    fn now(&self) -> Timestamp;

    /// Time since some moment in the past. It never jumps.
    fn steady(&self) -> Duration;
}

/// The machine's clocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Timestamp(i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX))
    }

    fn steady(&self) -> Duration {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed()
    }
}

/// The file of a wrong clock is looked at no more often.
const READ_AGAIN: Duration = Duration::from_millis(20);

/// A clock that is wrong on order, for tests of what depends on none: the machine's, and a number of seconds that a file
/// says. No file, no seconds.
pub struct WrongClock {
    path: PathBuf,
    read: Mutex<Option<(Instant, i64)>>,
}

impl WrongClock {
    /// As wrong as that file says.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, read: Mutex::new(None) }
    }

    fn offset(&self) -> i64 {
        let mut read = self.read.lock();
        match *read {
            Some((when, offset)) if when.elapsed() < READ_AGAIN => offset,
            _ => {
                let text = std::fs::read_to_string(&self.path).unwrap_or_default();
                let offset = text.trim().parse().unwrap_or(0);
                *read = Some((Instant::now(), offset));
                offset
            }
        }
    }
}

impl Clock for WrongClock {
    fn now(&self) -> Timestamp {
        Timestamp(SystemClock.now().0.saturating_add(self.offset()))
    }

    fn steady(&self) -> Duration {
        SystemClock.steady()
    }
}

/// The time by which sessions, tasks and answers grow old in one term of office.
///
/// It starts where the pool's last entry was, as far as the wall does not say less, and goes on steadily. So neither a
/// clock that is set forward, nor a new master whose clock is ahead of the last one's, ends anything before its time;
/// what grows old while nobody leads is only kept for longer.
#[derive(Debug, Default)]
pub(crate) struct Office {
    taken: Mutex<Option<(Timestamp, Duration)>>,
}

impl Office {
    /// A term begins; `last` is the time of the newest entry that an earlier master made, if there was one.
    pub(crate) fn take(&self, clock: &dyn Clock, last: Timestamp) {
        let wall = clock.now();
        let began = if last == Timestamp::EPOCH { wall } else { wall.min(last) };
        *self.taken.lock() = Some((began, clock.steady()));
    }

    /// The present, for the question whether something is over.
    pub(crate) fn now(&self, clock: &dyn Clock) -> Timestamp {
        let wall = clock.now();
        match *self.taken.lock() {
            Some((began, steady)) => {
                let passed = clock.steady().saturating_sub(steady).as_secs();
                wall.min(Timestamp(began.0.saturating_add(i64::try_from(passed).unwrap_or(i64::MAX))))
            }
            None => wall,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the wall shows, and what has passed.
    struct At(i64, u64);

    impl Clock for At {
        fn now(&self) -> Timestamp {
            Timestamp(self.0)
        }

        fn steady(&self) -> Duration {
            Duration::from_secs(self.1)
        }
    }

    #[test]
    fn a_term_grows_old_steadily_from_where_the_pool_was() {
        const DAY: i64 = 86_400;
        let office = Office::default();
        assert_eq!(office.now(&At(DAY, 5)), Timestamp(DAY), "nobody leads");
        // This master's clock is ten days ahead of the pool.
        office.take(&At(11 * DAY, 5), Timestamp(DAY));
        assert_eq!(office.now(&At(11 * DAY, 5)), Timestamp(DAY));
        assert_eq!(office.now(&At(99 * DAY, 5 + 60)), Timestamp(DAY + 60), "set forward");
        assert_eq!(office.now(&At(DAY / 2, 5 + 60)), Timestamp(DAY / 2), "set back: kept for longer");
        // The pool was down for ten days: what was kept then has its time still.
        office.take(&At(11 * DAY, 0), Timestamp(DAY));
        assert_eq!(office.now(&At(12 * DAY, 86_400)), Timestamp(2 * DAY));
        // The first master of all.
        office.take(&At(DAY, 0), Timestamp::EPOCH);
        assert_eq!(office.now(&At(DAY + 7, 7)), Timestamp(DAY + 7));
    }
}
