//! What a process asks of its kernel, answered by the simulation: the time, and random bytes.
//!
//! The two functions below take the place of libc's in every program that this crate is linked into. On a simulation's
//! thread they answer from its clock and its seed, on every other thread they ask the kernel. So nothing above them
//! needs to know: not tokio's timers, not `Instant` and `SystemTime`, not the order of a `HashMap`, not `rand`, not the
//! branch that `select!` looks at first. A second run of a seed sees the same of all of them.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};

use nix::libc;

/// Wall clocks start here, in seconds since 1970.
pub const WALL: i64 = 1_800_000_000;
/// Monotonic clocks start here: a machine that has been up for a while, so that an earlier moment can be told.
const UPTIME: i64 = 1_000_000;
const NANOS: i64 = 1_000_000_000;

#[derive(Clone, Copy)]
struct Answers {
    /// Nanoseconds since the simulation began.
    now: i64,
    /// How far this machine's monotonic clock has run ahead of that, or stayed behind.
    drift: i64,
    /// How far the wall clock is off, in nanoseconds.
    wall_error: i64,
    random: u64,
}

thread_local! {
    static ANSWERS: Cell<Option<Answers>> = const { Cell::new(None) };
}

/// From here on this thread is a simulation's.
pub(crate) fn begin(seed: u64) {
    ANSWERS.set(Some(Answers { now: 0, drift: 0, wall_error: 0, random: seed }));
}

/// Sets this thread's clocks: the simulation's own, and how a machine's differ from it.
pub(crate) fn set_clock(now: i64, drift: i64, wall_error: i64) {
    if let Some(answers) = ANSWERS.get() {
        ANSWERS.set(Some(Answers { now, drift, wall_error, ..answers }));
    }
}

/// The time since this thread's simulation began, in nanoseconds, whatever any machine's clock says.
pub(crate) fn now() -> i64 {
    ANSWERS.get().map_or(0, |answers| answers.now)
}

/// The next of a row of numbers (SplitMix64).
pub(crate) fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// In libc's place.
///
/// # Safety
/// As libc's: `out` points to a `timespec`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, out: *mut libc::timespec) -> c_int {
    let simulated = ANSWERS.try_with(Cell::get).ok().flatten();
    let Some(answers) = simulated else {
        // SAFETY: the caller's pointer, for the call that it meant to make.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, out) } as c_int;
    };
    let (start, moved) = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => (WALL, answers.now + answers.drift + answers.wall_error),
        _ => (UPTIME, answers.now + answers.drift),
    };
    // SAFETY: the caller promises a place for the answer.
    unsafe {
        (*out).tv_sec = start + moved.div_euclid(NANOS);
        (*out).tv_nsec = moved.rem_euclid(NANOS);
    }
    0
}

/// In libc's place.
///
/// # Safety
/// As libc's: `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut c_void, length: usize, flags: c_uint) -> isize {
    let simulated = ANSWERS.try_with(Cell::get).ok().flatten();
    let Some(mut answers) = simulated else {
        // SAFETY: the caller's pointer and length, for the call that it meant to make.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) } as isize;
    };
    let mut place = buffer.cast::<u8>();
    for at in 0..length {
        // SAFETY: the caller promises room for `length` bytes.
        unsafe {
            place.write(next_random(&mut answers.random).to_le_bytes()[at % 8]);
            place = place.add(1);
        }
    }
    ANSWERS.set(Some(answers));
    isize::try_from(length).unwrap_or(isize::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn time_stands_still_until_it_is_moved() {
        let began = Instant::now();
        assert!(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() < WALL.unsigned_abs());
        begin(1);
        let before = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(before, Instant::now());
        set_clock(5 * NANOS, NANOS, -2 * NANOS);
        assert_eq!(now(), 5 * NANOS);
        assert_eq!(before.elapsed(), Duration::from_secs(6));
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert_eq!(wall, Duration::from_secs(WALL.unsigned_abs() + 4));
        ANSWERS.set(None);
        assert!(began.elapsed() > Duration::from_millis(2));
    }

    #[test]
    fn chance_repeats_itself_under_the_same_seed() {
        fn drawn(seed: u64) -> (Vec<u32>, uuid::Uuid) {
            let draw = move || {
                begin(seed);
                let order: std::collections::HashSet<u32> = (0..100).collect();
                (order.into_iter().collect::<Vec<_>>(), uuid::Uuid::new_v4())
            };
            std::thread::spawn(draw).join().unwrap()
        }
        assert_eq!(drawn(7), drawn(7));
        assert_ne!(drawn(7), drawn(8));
    }
}
