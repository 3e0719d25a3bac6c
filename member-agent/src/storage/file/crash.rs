//! Places at which tests let the agent die. Outside of tests there is nothing here.

/// The agent dies here if the test that started it says so.
#[cfg(not(test))]
pub(super) fn point(_name: &str) {}

/// `XENITH_DIE_AT` is the number of points that are passed alive; the next one is the last.
#[cfg(test)]
pub(super) fn point(name: &str) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static PASSED: AtomicUsize = AtomicUsize::new(0);
    let Some(last): Option<usize> = std::env::var("XENITH_DIE_AT").ok().and_then(|text| text.parse().ok()) else {
        return;
    };
    if PASSED.fetch_add(1, Ordering::Relaxed) == last {
        // The test reads it from the process's standard error.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("dies at {name}\n").as_bytes());
        std::process::abort();
    }
}
