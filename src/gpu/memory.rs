//! The buffers of a layer.
//!
//! Natively their memory is freed with the last handle of it. In a browser it waits for JavaScript's garbage collection,
//! which knows nothing of its size; so there the buffers are destroyed, once their layer and all views of it are
//! dropped and the passes with calls of that time have run or were dropped.

use crate::error::Result;
use crate::gpu::answer::Answer;
use crate::gpu::device::DeviceHandle;

/// K and V of a layer.
#[derive(Debug)]
pub(crate) struct Memory {
    buffers: [wgpu::Buffer; 2],
    answers: [Answer; 2],
    #[cfg(target_arch = "wasm32")]
    queue: wgpu::Queue,
}

impl Memory {
    /// Buffers of so many bytes for K and V of a layer.
    pub(crate) fn new(handle: &DeviceHandle, layer: usize, bytes: [u64; 2]) -> Result<Self> {
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_SRC
            | wgpu::BufferUsages::COPY_DST;
        let make = |role: &str, bytes| {
            handle.create_memory(&format!("kvcache layer {layer} {role}"), bytes, usage)
        };
        let [(key, of_key), (value, of_value)] = [make("key", bytes[0])?, make("value", bytes[1])?];
        Ok(Self {
            buffers: [key, value],
            answers: [of_key, of_value],
            #[cfg(target_arch = "wasm32")]
            queue: handle.queue.clone(),
        })
    }

    pub(crate) fn buffers(&self) -> &[wgpu::Buffer; 2] {
        &self.buffers
    }

    /// Returns an error if it is known that the memory was refused.
    pub(crate) fn check(&self) -> Result<()> {
        self.answers.iter().try_for_each(Answer::check)
    }

    /// Completes when it is known whether there is memory.
    pub(crate) async fn arrive(&self) -> Result<()> {
        for answer in &self.answers {
            answer.arrive().await?;
        }
        Ok(())
    }
}

#[cfg(target_arch = "wasm32")]
impl Drop for Memory {
    fn drop(&mut self) {
        destroy::once_unused(&self.queue, &self.buffers);
    }
}

#[cfg(target_arch = "wasm32")]
pub(crate) mod destroy {
    use std::cell::RefCell;
    use std::sync::{Arc, Weak};

    /// A mark of a pass: it is dropped when the pass has run or was dropped.
    type Mark = Weak<()>;

    /// Nothing of wgpu's leaves its thread in a browser.
    #[derive(Debug, Default)]
    struct Waiting {
        /// Passes with calls that have neither run nor been dropped.
        passes: Vec<Mark>,
        /// Buffers to destroy, each with the passes that may still use it, once these are known.
        buffers: Vec<(wgpu::Buffer, Option<Vec<Mark>>)>,
    }

    thread_local! {
        static WAITING: RefCell<Waiting> = RefCell::default();
    }

    /// Counts a pass among those that may use buffers.
    pub(crate) fn add_pass(mark: &Arc<()>) {
        WAITING.with_borrow_mut(|waiting| {
            waiting.passes.retain(|pass| pass.strong_count() > 0);
            waiting.passes.push(Arc::downgrade(mark));
        });
    }

    /// Destroys the buffers once the passes that use them have run or were dropped.
    ///
    /// A call drops memory that its dispatches alone use before they are recorded. So which passes these are is seen in
    /// a later turn of the event loop, when the call has returned.
    pub(super) fn once_unused(queue: &wgpu::Queue, buffers: &[wgpu::Buffer]) {
        let new = buffers.iter().map(|buffer| (buffer.clone(), None));
        WAITING.with_borrow_mut(|waiting| waiting.buffers.extend(new));
        queue.on_submitted_work_done(sweep);
    }

    /// Destroys the buffers that no pass uses any more. Runs in a turn of the event loop of its own.
    fn sweep() {
        WAITING.with_borrow_mut(|Waiting { passes, buffers }| {
            passes.retain(|pass| pass.strong_count() > 0);
            buffers.retain_mut(|(buffer, users)| {
                let users = users.get_or_insert_with(|| passes.clone());
                let is_used = users.iter().any(|pass| pass.strong_count() > 0);
                if !is_used {
                    buffer.destroy();
                }
                is_used
            });
        });
    }
}
