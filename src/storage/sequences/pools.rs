//! The pools of all layers of a group, which have as many pages: how they grow, and which pages are copied.

use super::SequenceLayers;
use crate::error::Result;
use crate::gpu::kernels::{Dispatch, MOST_MOVES};
use crate::host::capacity::pool_pages_of;
use crate::host::plan;
use crate::host::sequences::StagedStep;
use crate::storage::pool::{copy_pages, copy_pool, new_pool};
use crate::storage::store::Store;

/// Memory for a step that takes the place of the layers' own.
pub(super) struct Growth {
    stores: Vec<Store>,
    pages: usize,
}

impl SequenceLayers {
    /// Larger pools for all layers, if the step needs more pages than there are.
    pub(super) fn stage_growth(&self, staged: &StagedStep, fits: usize) -> Result<Option<Growth>> {
        let (needed, size) = (staged.pool_pages(), self.limits.page_tokens);
        if needed <= self.pool && !self.stores.is_empty() {
            return Ok(None);
        }
        let (window, most) = (self.sequences.window(), self.limits.most_pages);
        let pages = pool_pages_of(window, most, size, [self.pool, needed, fits]);
        let shapes = self.shapes.iter().enumerate();
        let stores: Result<Vec<Store>> = shapes
            .map(|(at, &shape)| new_pool(&self.gpu, self.numbers[at], shape, size, pages))
            .collect();
        Ok(Some(Growth { stores: stores?, pages }))
    }

    /// The pool of a layer after growth, and its pages.
    pub(super) fn grown<'a>(
        &'a self,
        growth: Option<&'a Growth>,
        layer: usize,
    ) -> (&'a Store, usize) {
        let (stores, pages) =
            growth.map_or((&self.stores, self.pool), |growth| (&growth.stores, growth.pages));
        (&stores[layer], pages)
    }

    /// What copies the pages in use of a layer into a larger pool, and the bytes.
    pub(super) fn stage_pool_copy(
        &self,
        growth: Option<&Growth>,
        layer: usize,
    ) -> Result<(Vec<Dispatch>, u64)> {
        let Some((growth, old)) = growth.zip(self.stores.get(layer)) else {
            return Ok((Vec::new(), 0));
        };
        let pages = [self.pool, growth.pages, self.sequences.pool().used_prefix()];
        let stores = [old, &growth.stores[layer]];
        copy_pool(&self.gpu, self.shapes[layer], self.limits.page_tokens, stores, pages)
    }

    /// What copies the shared pages of a layer that a change writes into, and the bytes.
    pub(super) fn stage_page_copies(
        &self,
        growth: Option<&Growth>,
        layer: usize,
        staged: &StagedStep,
    ) -> Result<(Vec<Dispatch>, u64)> {
        let (store, pages) = self.grown(growth, layer);
        let moves = plan::list_copies(&staged.copies, MOST_MOVES);
        let memory = [pages, self.limits.page_tokens];
        copy_pages(&self.gpu, self.shapes[layer], memory, store, &moves)
    }

    pub(super) fn commit_growth(&mut self, growth: Option<Growth>) {
        let Some(Growth { stores, pages }) = growth else { return };
        let both = bytes_of(&self.stores) + bytes_of(&stores);
        self.peak_bytes_allocated = self.peak_bytes_allocated.max(both);
        (self.stores, self.pool) = (stores, pages);
    }
}

/// Bytes of these pools.
pub(super) fn bytes_of(stores: &[Store]) -> u64 {
    stores.iter().flat_map(Store::bytes).sum()
}
