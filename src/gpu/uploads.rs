//! A device with the small data that dispatches on it read.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::arena::{Allocation, Arena, Bound, Layouts};
use super::device::DeviceHandle;
use super::witness::Witness;
use crate::error::Result;

/// A device, and its parameters, lists and witnesses, for kernels and page tables to put theirs into.
#[derive(Debug)]
pub(crate) struct Uploads {
    device: Arc<DeviceHandle>,
    layouts: Layouts,
    arena: Mutex<Arena>,
    /// A list that nothing reads, to bind if a kernel needs none.
    unused_list: Arc<Bound>,
}

impl Uploads {
    pub(crate) fn new(device: Arc<DeviceHandle>) -> Result<Self> {
        let layouts = Layouts::new(&device)?;
        let arena = Arena::new(&device, &layouts)?;
        let unused_list = Arc::clone(arena.unused_list());
        Ok(Self { device, layouts, arena: Mutex::new(arena), unused_list })
    }

    pub(crate) fn device(&self) -> &Arc<DeviceHandle> {
        &self.device
    }

    pub(crate) fn layouts(&self) -> &Layouts {
        &self.layouts
    }

    /// Puts a list or parameters into a buffer that a dispatch can read.
    pub(crate) fn upload(&self, words: &[u32]) -> Result<Allocation> {
        self.arena().upload(&self.device, &self.layouts, words)
    }

    /// Reserves a piece that its owner writes bit by bit, with space beside it for a list of `spare` words.
    pub(crate) fn reserve(&self, words: usize, spare: usize) -> Result<Allocation> {
        self.arena().reserve(&self.device, &self.layouts, words, spare)
    }

    /// Puts `words` into the buffer of a reserved piece; `None` if the piece has to move first.
    pub(crate) fn upload_beside(
        &self,
        piece: &Allocation,
        words: &[u32],
    ) -> Result<Option<Allocation>> {
        self.arena().upload_beside(&self.device, piece, words)
    }

    /// Whether a reserved piece may stay in its chunk.
    pub(crate) fn is_in_place(&self, piece: &Allocation) -> bool {
        self.arena().is_in_place(piece)
    }

    /// Writes words of a reserved piece that nothing has read yet, from its word `at` on.
    pub(crate) fn write_piece(&self, piece: &Allocation, at: usize, words: &[u32]) -> Result<()> {
        let offset = u64::from(piece.offset) + 4 * at as u64;
        self.device.write(&piece.buffer, offset, bytemuck::cast_slice(words))
    }

    /// A list that nothing reads, to bind if a kernel needs none.
    pub(crate) fn unused_list(&self) -> &Arc<Bound> {
        &self.unused_list
    }

    /// A word that counts what has run.
    pub(crate) fn witness(&self) -> Result<Witness> {
        self.arena().witness(&self.device, &self.layouts)
    }

    /// The buffer of a page of witnesses.
    pub(crate) fn witness_page(&self, page: usize) -> wgpu::Buffer {
        self.arena().witness_page(page)
    }

    /// To be called once guards were abandoned.
    pub(crate) fn replace_abandoned(&self) {
        // If that fails, the next call that needs a chunk makes it, and reports the error.
        let _ = self.arena().replace_abandoned(&self.device, &self.layouts);
    }

    fn arena(&self) -> MutexGuard<'_, Arena> {
        // The arena is consistent between any two statements, so a panic elsewhere does not harm it.
        self.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
