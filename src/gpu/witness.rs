//! Words on the GPU that say how much of what was recorded has run.
//!
//! wgpu calls back when work that was submitted is done, and it also does so when the submit failed and nothing
//! ran: an engine's mistake elsewhere in its encoder is enough, where an error handler keeps it from being a
//! panic. Only the GPU knows. So each cache has a word in a storage buffer, and the last dispatch of each call
//! adds one to it. A read-back copies the word along with the content, in the same submit, and compares it with
//! the number of calls that were recorded.
//!
//! This costs an atomic addition a call, in a dispatch that is made anyway. The word is bound beside the lists
//! that every such kernel binds, at a dynamic offset, so no bind group is made for it.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::gpu::device::DeviceHandle;

/// Bytes of a page of witnesses.
const PAGE_BYTES: u32 = 64 << 10;

/// Where a witness lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word {
    page: usize,
    /// In bytes.
    offset: u32,
}

/// A word of a cache's own: it counts the calls of which the last dispatch has run. Holds nothing of wgpu's,
/// as a guard does not.
#[derive(Debug)]
pub(crate) struct Witness {
    word: Word,
    free: Arc<Mutex<Vec<Word>>>,
}

impl Witness {
    /// The page, which picks the bind group, and the dynamic offset in it, in bytes.
    pub(crate) fn binding(&self) -> (usize, u32) {
        (self.word.page, self.word.offset)
    }
}

impl Drop for Witness {
    /// The word is used anew. Every pass that counts in it has run or is gone: each holds the cache's ledger,
    /// and that holds this.
    fn drop(&mut self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.word);
    }
}

/// All witnesses of a device, in pages.
#[derive(Debug)]
pub(crate) struct Witnesses {
    pages: Vec<wgpu::Buffer>,
    free: Arc<Mutex<Vec<Word>>>,
}

impl Witnesses {
    /// One page, whose first word is nobody's: dispatches count there that are not the last of their call.
    pub(crate) fn new(handle: &DeviceHandle) -> Result<Self> {
        let mut new = Self { pages: Vec::new(), free: Arc::default() };
        let page = new.new_page(handle)?;
        new.add(handle, page);
        new.free().pop();
        Ok(new)
    }

    pub(crate) fn pages(&self) -> &[wgpu::Buffer] {
        &self.pages
    }

    /// A page, to be added once it is bound.
    pub(crate) fn new_page(&self, handle: &DeviceHandle) -> Result<wgpu::Buffer> {
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_SRC
            | wgpu::BufferUsages::COPY_DST;
        handle.create_shared_buffer("kvcache witnesses", PAGE_BYTES, usage)
    }

    pub(crate) fn add(&mut self, handle: &DeviceHandle, buffer: wgpu::Buffer) {
        let page = self.pages.len();
        self.pages.push(buffer);
        let stride = handle.limits.min_storage_buffer_offset_alignment.max(4);
        // Words are taken from the end.
        let words = (0..PAGE_BYTES / stride).rev();
        self.free().extend(words.map(|word| Word { page, offset: word * stride }));
    }

    /// A witness that has seen nothing yet; `None` where the pages have no word left.
    pub(crate) fn take(&self, handle: &DeviceHandle) -> Result<Option<Witness>> {
        let Some(word) = self.free().pop() else { return Ok(None) };
        let witness = Witness { word, free: Arc::clone(&self.free) };
        // It may have counted for another cache before. Nothing that is still to run counts in it.
        handle.write(&self.pages[word.page], u64::from(word.offset), &[0; 4])?;
        Ok(Some(witness))
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<Word>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
