//! A simulated process: a runtime of one thread that runs until nothing is left to do, and ends without a goodbye.
//!
//! Its tasks are moved one poll at a time, so that it can be ended between any two of them: whatever a task waits for,
//! there is a seed that kills it there.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

/// A process that is running.
pub struct Process {
    runtime: Option<tokio::runtime::Runtime>,
    watch: Watch,
}

/// What a process's tasks and its simulation know of each other.
#[derive(Clone, Default)]
pub struct Watch(Arc<Mutex<Watched>>);

#[derive(Default)]
struct Watched {
    idle: u32,
    doomed: bool,
    waker: Option<Waker>,
}

impl Watch {
    /// The process dies before another of its tasks moves.
    pub fn kill(&self) {
        let mut watched = self.0.lock();
        watched.doomed = true;
        if let Some(waker) = watched.waker.take() {
            waker.wake();
        }
    }

    /// Whether it has to die.
    #[must_use]
    pub fn is_doomed(&self) -> bool {
        self.0.lock().doomed
    }

    fn idle(&self) {
        let mut watched = self.0.lock();
        watched.idle += 1;
        if let Some(waker) = watched.waker.take() {
            waker.wake();
        }
    }
}

impl Process {
    /// Starts a process with nothing to do yet.
    ///
    /// # Panics
    /// Where the runtime cannot be made.
    #[must_use]
    #[allow(clippy::expect_used)]
    pub fn start() -> Self {
        let watch = Watch::default();
        let parked = watch.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .event_interval(1)
            .global_queue_interval(31)
            .on_thread_park(move || parked.idle())
            .build()
            .expect("a runtime without IO needs nothing that could be missing");
        Self { runtime: Some(runtime), watch }
    }

    /// Gives it something to do.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(runtime) = &self.runtime {
            drop(runtime.spawn(task));
        }
    }

    /// How its tasks may end it.
    #[must_use]
    pub fn watch(&self) -> Watch {
        self.watch.clone()
    }

    /// Moves its tasks until none can move without time going on, or at most so many times.
    pub fn run(&self, at_most: Option<u32>) {
        if let Some(runtime) = &self.runtime {
            self.watch.0.lock().idle = 0;
            runtime.block_on(Moves { watch: &self.watch, left: at_most });
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Ready when the process is idle, doomed, or has moved often enough. It is polled between any two moves.
struct Moves<'a> {
    watch: &'a Watch,
    left: Option<u32>,
}

impl Future for Moves<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut watched = self.watch.0.lock();
        // Timers are looked at when the runtime is about to wait: idle once may mean that some are due.
        if watched.doomed || watched.idle >= 2 {
            return Poll::Ready(());
        }
        watched.waker = Some(context.waker().clone());
        drop(watched);
        if let Some(left) = &mut self.left {
            if *left == 0 {
                return Poll::Ready(());
            }
            *left -= 1;
            context.waker().wake_by_ref();
        }
        Poll::Pending
    }
}
