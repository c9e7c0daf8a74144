//! Waits for the GPU. Native backends answer while the device is polled, which blocks; a browser polls by itself and
//! answers later.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use anyhow::Result;
use wgpu_kvcache::{Gpu, wgpu};

/// The answer to a callback of wgpu.
#[derive(Debug)]
struct Answer<T>(Arc<Mutex<State<T>>>);

#[derive(Debug)]
struct State<T> {
    value: Option<T>,
    waker: Option<Waker>,
}

impl<T> Answer<T> {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(State { value: None, waker: None })))
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers: what a callback calls.
    fn give(&self, value: T) {
        let mut state = self.lock();
        state.value = Some(value);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Polls the device until it has answered, natively, and completes with the answer.
    async fn take(self, gpu: &Gpu) -> Result<T> {
        gpu.device().poll(wgpu::PollType::wait_indefinitely())?;
        let answer = poll_fn(|context| {
            let mut state = self.lock();
            match state.value.take() {
                Some(value) => Poll::Ready(value),
                None => {
                    state.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        });
        Ok(answer.await)
    }
}

/// Completes when the GPU has finished all that was submitted so far.
///
/// # Errors
///
/// If the device is lost.
pub async fn finished(gpu: &Gpu) -> Result<()> {
    let answer = Answer::new();
    let giver = Answer(Arc::clone(&answer.0));
    gpu.queue().on_submitted_work_done(move || giver.give(()));
    answer.take(gpu).await
}

/// Completes when `slice` is mapped for reading.
///
/// # Errors
///
/// If it cannot be mapped, for example because the device is lost.
pub(crate) async fn mapped(gpu: &Gpu, slice: wgpu::BufferSlice<'_>) -> Result<()> {
    let answer = Answer::new();
    let giver = Answer(Arc::clone(&answer.0));
    slice.map_async(wgpu::MapMode::Read, move |result| giver.give(result));
    Ok(answer.take(gpu).await??)
}
