//! What happened, in order: as a number that two runs of a seed share, and as text for who wants to read it.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Once};

use parking_lot::Mutex;

use crate::kernel;

/// So much of the story is told with a failure.
const REMEMBERED: usize = 60;

/// The story of a run.
#[derive(Clone, Default)]
pub struct Trace {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    hash: Hash,
    print: bool,
    last: VecDeque<String>,
    broken: Vec<String>,
}

struct Hash(u64);

impl Default for Hash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl fmt::Write for Hash {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.add(text.as_bytes());
        Ok(())
    }
}

impl Hash {
    /// FNV-1a.
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

fn millis() -> f64 {
    #[allow(clippy::cast_precision_loss)]
    let nanos = kernel::now() as f64;
    nanos / 1e6
}

impl Trace {
    /// A story that is printed while it happens.
    #[must_use]
    pub fn printed() -> Self {
        let trace = Self::default();
        trace.inner.lock().print = true;
        trace
    }

    /// Something happened that is worth telling.
    pub fn tell(&self, what: fmt::Arguments<'_>) {
        let line = format!("{:>10.3} {what}", millis());
        let mut inner = self.inner.lock();
        inner.hash.add(line.as_bytes());
        if inner.print {
            #[allow(clippy::print_stdout)]
            {
                println!("{line}");
            }
        }
        if inner.last.len() == REMEMBERED {
            inner.last.pop_front();
        }
        inner.last.push_back(line);
    }

    /// Something happened that is only counted among what must repeat itself.
    pub fn count(&self, kind: &str, bytes: &[u8]) {
        let now = kernel::now().to_le_bytes();
        let mut inner = self.inner.lock();
        inner.hash.add(kind.as_bytes());
        inner.hash.add(&now);
        inner.hash.add(bytes);
    }

    /// A promise is broken.
    pub fn broken(&self, what: fmt::Arguments<'_>) {
        self.tell(format_args!("BROKEN: {what}"));
        self.inner.lock().broken.push(what.to_string());
    }

    /// What was broken so far.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        self.inner.lock().broken.clone()
    }

    /// The number of all that has happened.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.inner.lock().hash.0
    }

    /// What happened last.
    #[must_use]
    pub fn last(&self) -> Vec<String> {
        self.inner.lock().last.iter().cloned().collect()
    }
}

thread_local! {
    static PANICS: Cell<Option<Trace>> = const { Cell::new(None) };
}

impl Trace {
    /// A panic of any task on this thread breaks a promise.
    pub(crate) fn hear_panics(&self) {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let otherwise = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| match PANICS.take() {
                Some(trace) => {
                    trace.broken(format_args!("panic: {panic}"));
                    PANICS.set(Some(trace));
                }
                None => otherwise(panic),
            }));
        });
        PANICS.set(Some(self.clone()));
    }
}

/// Tells the story: `tell!(trace, "node {id} starts")`.
#[macro_export]
macro_rules! tell {
    ($trace:expr, $($what:tt)*) => { $trace.tell(format_args!($($what)*)) };
}

/// Says that a promise is broken.
#[macro_export]
macro_rules! broken {
    ($trace:expr, $($what:tt)*) => { $trace.broken(format_args!($($what)*)) };
}
