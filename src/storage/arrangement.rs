//! What a kind decides: how the tokens of a layer lie in its memory, and how changes of it are staged.

use std::fmt::Debug;

use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::arena::{Allocation, RegionGuard};
use crate::gpu::device::binding_limit;
use crate::gpu::kernels::Dispatch;
use crate::host::position::{self, CachePosition, WritePlan};
use crate::host::rows::{Cut, Rows};
use crate::host::window::Window;
use crate::storage::store::{Shape, Store};
use crate::view::LayerView;

/// How the tokens of a written layer lie in its memory: in rings or in pages.
pub(crate) trait Arrangement: Clone + Debug + Sized {
    /// What the kind decides about its layers.
    type Policy: Debug;

    /// Tokens that a row holds at most, where that is fixed.
    fn bound(policy: &Self::Policy) -> Option<usize>;

    fn shape(&self) -> Shape;

    /// Live tokens of each row.
    fn rows(&self) -> &Rows;

    /// A view. Uploads the records of ragged rows if they are not on the GPU yet.
    fn view(&self, gpu: &Gpu, store: &Store) -> Result<LayerView>;

    fn cut(&mut self, policy: &mut Self::Policy, cut: &Cut);

    /// Where the table of pages and the records of rows lie that views have shown.
    fn guards(&self) -> [Option<&RegionGuard>; 2];

    /// The pages in use, and those of each row among them; nothing for a ring.
    #[cfg(feature = "safetensors")]
    fn pages_to_save(&self, gpu: &Gpu, store: &Store) -> Result<Option<PagesToSave>> {
        let _ = (gpu, store);
        Ok(None)
    }

    /// Pages in use, shared and free; nothing for a ring.
    fn pages(&self) -> PageCounts {
        PageCounts::default()
    }

    /// Pages in use alone, which takes no counting.
    fn pages_used(&self) -> u64 {
        0
    }

    /// Finds memory for new tokens: the layer's own, what a reset has left, or new memory that the live
    /// tokens are copied to.
    fn stage_write(
        state: LayerState<'_, Self>,
        policy: &mut Self::Policy,
        shape: Shape,
        tokens: NewTokens<'_>,
    ) -> Result<StagedWrite<Self>>;

    /// Refuses a change to `batch` rows that has no room, from counts alone.
    fn check_batch(
        &self,
        gpu: &Gpu,
        layer: usize,
        store: &Store,
        policy: &Self::Policy,
        batch: usize,
    ) -> Result<()>;

    /// Stages a change of the batch: new row `i` becomes old row `map[i]`, which is not the identity.
    fn stage_batch(
        &self,
        gpu: &Gpu,
        layer: usize,
        store: &Store,
        policy: &mut Self::Policy,
        map: &[u32],
    ) -> Result<Staged<Self>>;

    /// Stages room for appends up to `new_len` tokens; `None` where it is there.
    fn stage_reserve(
        &self,
        gpu: &Gpu,
        layer: usize,
        store: &Store,
        policy: &mut Self::Policy,
        room: (usize, Option<Window>),
    ) -> Result<Option<Staged<Self>>>;
}

/// The pages of a layer that are saved, each once.
#[cfg(feature = "safetensors")]
#[derive(Debug)]
pub(crate) struct PagesToSave {
    /// A view with a row for each page.
    pub(crate) view: LayerView,
    /// The pages of each row of the layer, by their rows in the view.
    pub(crate) rows: Vec<Vec<u32>>,
}

/// A layer before a change.
#[derive(Debug)]
pub(crate) struct LayerState<'a, L> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) layer: usize,
    pub(crate) store: Option<&'a Store>,
    /// Without the tokens that the layer lets go for this change.
    pub(crate) arrangement: Option<&'a L>,
    pub(crate) window: Option<Window>,
}

/// The positions and counts of new tokens, checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewTokens<'a> {
    pub(crate) position: CachePosition<'a>,
    /// Batch rows, and tokens in each.
    pub(crate) batch: usize,
    pub(crate) count: usize,
    /// The rows before, and the length of the layer afterwards.
    pub(crate) rows: &'a Rows,
    pub(crate) new_len: usize,
    /// Which tokens of the source are appended, in this order, if not all; all rows are equal then.
    pub(crate) kept: Option<&'a [u32]>,
}

impl NewTokens<'_> {
    /// Which token goes to which position. As long as the positions that the caller names, so it is made after
    /// all checks that need only counts. Refuses a list that is too long for a kernel before it makes it.
    pub(crate) fn plan(&self, gpu: &Gpu) -> Result<WritePlan> {
        if let Some(kept) = self.kept {
            return Ok(position::plan_kept(kept, self.rows.len()));
        }
        let (counts, limit) = ([self.batch, self.count], binding_limit(gpu.limits()));
        position::check_list(self.position, counts, self.rows, limit)?;
        Ok(position::plan_write(self.position, counts, self.rows, self.new_len))
    }

    /// The rows afterwards, of rows that are as those before but for their starts.
    pub(crate) fn rows_after(&self, rows: &Rows) -> Rows {
        position::rows_after(self.position, rows, self.new_len)
    }
}

/// Memory for new tokens, and which of them goes where.
#[derive(Debug)]
pub(crate) struct StagedWrite<L> {
    /// What must run before the tokens are written, and what the layer is afterwards.
    pub(crate) change: Staged<L>,
    pub(crate) plan: WritePlan,
    /// The upload that holds the plan's list, the page table and the records of rows, and the word at which the
    /// list begins.
    pub(crate) lists: Option<(Allocation, u32)>,
}

/// Pages of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageCounts {
    /// Referenced by a row at least.
    pub(crate) used: u64,
    /// Referenced by several.
    pub(crate) shared: u64,
    /// In the pool, and referenced by none.
    pub(crate) free: u64,
}

/// A change that is ready to happen.
#[derive(Debug)]
#[must_use = "nothing happens until the change is committed"]
pub(crate) struct Staged<L> {
    pub(crate) dispatches: Vec<Dispatch>,
    /// Dispatches that were handed over.
    pub(crate) recorded: u64,
    /// Memory that replaces the layer's own.
    pub(crate) store: Option<Store>,
    pub(crate) arrangement: L,
    /// Tokens that the layer lets go for its window.
    pub(crate) let_go: usize,
    /// Bytes that the dispatches write.
    pub(crate) moved: u64,
    /// What earlier work and views read, and must find in place until the pass has run.
    pub(crate) guards: Vec<RegionGuard>,
}

impl<L> Staged<L> {
    /// A change that moves nothing.
    pub(crate) fn unmoved(arrangement: L) -> Self {
        let (dispatches, guards) = (Vec::new(), Vec::new());
        Self { dispatches, recorded: 0, store: None, arrangement, let_go: 0, moved: 0, guards }
    }

    /// Bytes of new memory.
    pub(crate) fn allocated(&self) -> u64 {
        self.store.as_ref().map_or(0, |store| store.bytes().iter().sum())
    }
}
