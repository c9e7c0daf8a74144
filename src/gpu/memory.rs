//! The buffers of a layer.
//!
//! Natively their memory is freed with the last handle of it. In a browser it waits for JavaScript's garbage collection,
//! which knows nothing of its size; so there the buffers are destroyed, once their layer and all views of it are
//! dropped and the passes with calls of that time have run or were dropped.

use crate::error::Result;
use crate::gpu::answer::Answer;
use crate::gpu::device::DeviceHandle;
use crate::gpu::range::BufferRange;
use crate::tensor::Guard;

/// K and V of a layer.
#[derive(Debug)]
pub(crate) struct Memory {
    ranges: [BufferRange; 2],
    /// Of the buffers that were made for this memory, the last ones.
    made: Vec<Answer>,
    /// If an engine gave it, what keeps it in use.
    given: Option<Guard>,
    #[cfg(target_arch = "wasm32")]
    queue: wgpu::Queue,
}

/// Bytes of a buffer that is bound and not used: a unit of the kernels.
const UNUSED_BYTES: u64 = 16;

impl Memory {
    /// Buffers of so many bytes for K and V of a layer.
    pub(crate) fn new(handle: &DeviceHandle, layer: usize, bytes: [u64; 2]) -> Result<Self> {
        let (key, of_key) = make(handle, layer, "key", bytes[0])?;
        let (value, of_value) = make(handle, layer, "value", bytes[1])?;
        Ok(Self {
            ranges: [key, value],
            made: vec![of_key, of_value],
            given: None,
            #[cfg(target_arch = "wasm32")]
            queue: handle.queue.clone(),
        })
    }

    /// What an engine gave for K, and for V if it is stored.
    pub(crate) fn given(
        handle: &DeviceHandle,
        layer: usize,
        (key, value): (BufferRange, Option<BufferRange>),
        guard: Guard,
    ) -> Result<Self> {
        let (value, made) = match value {
            Some(value) => (value, Vec::new()),
            None => {
                let (value, answer) = make(handle, layer, "value", 0)?;
                (value, vec![answer])
            }
        };
        Ok(Self {
            ranges: [key, value],
            made,
            given: Some(guard),
            #[cfg(target_arch = "wasm32")]
            queue: handle.queue.clone(),
        })
    }

    pub(crate) fn ranges(&self) -> [&BufferRange; 2] {
        self.ranges.each_ref()
    }

    /// Whether an engine gave the memory.
    pub(crate) fn is_given(&self) -> bool {
        self.given.is_some()
    }

    /// What keeps an engine's memory in use.
    pub(crate) fn guard(&self) -> Option<&Guard> {
        self.given.as_ref()
    }

    /// Returns an error if it is known that the memory was refused.
    pub(crate) fn check(&self) -> Result<()> {
        self.made.iter().try_for_each(Answer::check)
    }

    /// Completes when it is known whether there is memory.
    pub(crate) async fn arrive(&self) -> Result<()> {
        for answer in &self.made {
            answer.arrive().await?;
        }
        Ok(())
    }
}

/// A buffer of a layer; one that is bound and not used has no bytes asked for.
fn make(
    handle: &DeviceHandle,
    layer: usize,
    role: &str,
    bytes: u64,
) -> Result<(BufferRange, Answer)> {
    let usage =
        wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let label = format!("kvcache layer {layer} {role}");
    let (buffer, answer) = handle.create_memory(&label, bytes.max(UNUSED_BYTES), usage)?;
    Ok((BufferRange::whole(buffer), answer))
}

#[cfg(target_arch = "wasm32")]
impl Drop for Memory {
    fn drop(&mut self) {
        // What an engine gave is its own to destroy.
        let own = self.ranges.iter().skip(2 - self.made.len()).map(|range| range.buffer.clone());
        destroy::once_unused(&self.queue, own.collect());
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
    pub(super) fn once_unused(queue: &wgpu::Queue, buffers: Vec<wgpu::Buffer>) {
        let new = buffers.into_iter().map(|buffer| (buffer, None));
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
