//! Words on the GPU that count how many of the recorded calls have run.
//!
//! wgpu's callback for completed work also runs when the submit failed and nothing ran. One wrong command elsewhere
//! in the engine's encoder is enough for that, if an error handler prevents the panic. Only the GPU can count what
//! has run. So each cache has a word in a storage buffer, and the last dispatch of each call adds one to it. A read-back
//! copies the word along with the content, in the same submit, and compares it with the number of recorded calls.
//!
//! This costs one atomic addition per call, in a dispatch that is needed anyway. The word is bound in the bind group
//! of the lists, which every such kernel binds, at a dynamic offset, so it needs no bind group of its own.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::gpu::device::DeviceHandle;

/// Bytes of a page of witnesses.
const PAGE_BYTES: u32 = 64 << 10;

/// The address of a witness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word {
    page: usize,
    /// In bytes.
    offset: u32,
}

/// The word of one cache: it counts the calls whose last dispatch has run. Like a guard it holds no wgpu object, so
/// that callbacks which hold it are `Send`.
#[derive(Debug)]
pub(crate) struct Witness {
    word: Word,
    free: Arc<Mutex<Vec<Word>>>,
}

impl Witness {
    /// The page, which selects the bind group, and the dynamic offset in it, in bytes.
    pub(crate) fn binding(&self) -> (usize, u32) {
        (self.word.page, self.word.offset)
    }
}

impl Drop for Witness {
    /// Frees the word for reuse. Every pass that counts in it has run or was dropped, because each pass holds the
    /// cache's ledger, which holds this.
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
    /// One page. Its first word belongs to no cache: dispatches that are not the last of their call count there.
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

    /// Creates a page, to be added once it is bound.
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
        // Words are taken from the end of the list.
        let words = (0..PAGE_BYTES / stride).rev();
        self.free().extend(words.map(|word| Word { page, offset: word * stride }));
    }

    /// A witness with a count of zero; `None` if the pages have no free word.
    pub(crate) fn take(&self, handle: &DeviceHandle) -> Result<Option<Witness>> {
        let Some(word) = self.free().pop() else { return Ok(None) };
        let witness = Witness { word, free: Arc::clone(&self.free) };
        // It may have counted for another cache before. No pass that is still in flight counts in it.
        handle.write(&self.pages[word.page], u64::from(word.offset), &[0; 4])?;
        Ok(Some(witness))
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<Word>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
