//! Waits for buffers to be mapped, and wakes the task that reads them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
#[cfg(not(target_arch = "wasm32"))]
use std::time::Duration;

/// The pause between two polls: the first one, and the longest.
#[cfg(not(target_arch = "wasm32"))]
pub(super) const PAUSES: [Duration; 2] = [Duration::from_micros(50), Duration::from_millis(1)];

/// The state of the mappings.
#[derive(Debug, Default)]
pub(super) struct Arrivals(Mutex<Awaited>);

#[derive(Debug, Default)]
pub(super) struct Awaited {
    /// Buffers that are not mapped yet; in a browser also the callbacks of the work before.
    pub(super) pending: usize,
    pub(super) failure: Option<String>,
    pub(super) waker: Option<Waker>,
    #[cfg(not(target_arch = "wasm32"))]
    /// Whether a thread wakes the task from time to time.
    has_timer: bool,
}

impl Arrivals {
    /// Requests the mapping of the buffers.
    pub(super) fn of(buffers: &[&wgpu::Buffer]) -> Arc<Self> {
        let awaited = Awaited { pending: buffers.len(), ..Awaited::default() };
        let arrivals = Arc::new(Self(Mutex::new(awaited)));
        for buffer in buffers {
            let arrivals = Arc::clone(&arrivals);
            buffer.map_async(wgpu::MapMode::Read, .., move |result| {
                arrivals.one_arrived(result.err().map(|error| error.to_string()));
            });
        }
        arrivals
    }

    /// Waits for the callbacks of all work that was submitted before as well.
    #[cfg(target_arch = "wasm32")]
    pub(super) fn await_callbacks(self: &Arc<Self>, queue: &wgpu::Queue) {
        self.lock().pending += 1;
        let arrivals = Arc::clone(self);
        queue.on_submitted_work_done(move || arrivals.one_arrived(None));
    }

    fn one_arrived(&self, failure: Option<String>) {
        let mut awaited = self.lock();
        awaited.pending -= 1;
        awaited.failure = awaited.failure.take().or(failure);
        if awaited.pending == 0 {
            let waker = awaited.waker.take();
            drop(awaited);
            waker.into_iter().for_each(Waker::wake);
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Awaited> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that wakes the waiting task from time to time, until the read-back is dropped.
    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn start_timer(self: &Arc<Self>) {
        if std::mem::replace(&mut self.lock().has_timer, true) {
            return;
        }
        let waiting = Arc::downgrade(self);
        let timer = move || {
            let mut pause = PAUSES[0];
            loop {
                std::thread::sleep(pause);
                pause = PAUSES[1].min(2 * pause);
                let Some(arrivals) = waiting.upgrade() else { return };
                let waker = arrivals.lock().waker.take();
                drop(arrivals);
                waker.into_iter().for_each(Waker::wake);
            }
        };
        let thread = std::thread::Builder::new().name("kvcache get".to_owned());
        if thread.spawn(timer).is_err() {
            // Without a thread the task is woken at once, so that it polls again.
            let mut awaited = self.lock();
            awaited.has_timer = false;
            let waker = awaited.waker.take();
            drop(awaited);
            waker.into_iter().for_each(Waker::wake);
        }
    }
}
