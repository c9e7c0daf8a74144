//! Tokens in a ring: the live part of [B, H, capacity, D], which may run over the end.

use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::device::binding_limit;
use crate::gpu::kernels::{CopyShape, Dispatch, GatherShape, MOST_MOVES};
use crate::host::plan;
use crate::storage::layer::{Arrangement, LayerState, NewTokens, Staged, StagedWrite};
use crate::storage::store::{Shape, Store};
use crate::view::LayerView;

/// How the memory of a ring comes to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Growth {
    /// Grows; a layer's first allocation has room for this many tokens at least.
    Dynamic { tokens: usize },
    /// Has room for this many tokens from the start, and never more.
    Static { tokens: usize },
}

/// Tokens of a first allocation: small, and still room for a few steps.
pub(crate) const LEAST_TOKENS: usize = 64;

/// What a layer holds, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring {
    shape: Shape,
    /// Batch rows that the buffers have room for.
    rows: usize,
    /// Slots of each row and head.
    capacity: usize,
    /// Slot of the oldest live token.
    start: usize,
    /// Live tokens.
    len: usize,
}

impl Arrangement for Ring {
    type Policy = Growth;

    fn bound(policy: &Growth) -> Option<usize> {
        match *policy {
            Growth::Dynamic { .. } => None,
            Growth::Static { tokens } => Some(tokens),
        }
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn len(&self) -> usize {
        self.len
    }

    fn view<'a>(&'a self, store: &'a Store) -> LayerView {
        self.shape.view(store, [self.start, self.len, self.capacity], None)
    }

    fn crop(&mut self, _: &mut Growth, max_length: usize) {
        (self.start, self.len) = plan::cropped(self.start, self.len, self.capacity, max_length);
    }

    fn truncate(&mut self, _: &mut Growth, length: usize) {
        self.len = self.len.min(length);
    }

    fn stage_write(
        state: LayerState<'_, Self>,
        growth: &mut Growth,
        shape: Shape,
        tokens: NewTokens<'_>,
    ) -> Result<StagedWrite<Self>> {
        let LayerState { gpu, layer, store, arrangement } = state;
        // First the checks that need only counts, then the list, which is as long as the caller's, then memory.
        let needed = arrangement.map_or(0, |arrangement| arrangement.capacity);
        if tokens.new_len > needed {
            capacity_for(gpu, layer, shape, *growth, needed, tokens.new_len)?;
        }
        let plan = tokens.plan(gpu)?;
        let mut change = match (arrangement, store) {
            (Some(arrangement), Some(store)) => {
                arrangement.with_room(gpu, layer, store, *growth, tokens.new_len)?
            }
            _ => Self::first_room(gpu, layer, store, *growth, shape, tokens.new_len)?,
        };
        change.arrangement.len = tokens.new_len;
        let list = plan.list().map(|list| gpu.uploads().upload(list)).transpose()?;
        let lists = list.map(|allocation| {
            let list_at = allocation.offset / 4;
            (allocation, list_at)
        });
        Ok(StagedWrite { change, plan, lists })
    }

    fn check_batch(&self, gpu: &Gpu, layer: usize, growth: &Growth, batch: usize) -> Result<()> {
        if batch <= self.rows {
            return Ok(());
        }
        self.capacity_of_copy(gpu, layer, Shape { batch, ..self.shape }, *growth).map(|_| ())
    }

    fn stage_reserve(
        &self,
        gpu: &Gpu,
        layer: usize,
        store: &Store,
        growth: &mut Growth,
        new_len: usize,
    ) -> Result<Option<Staged<Self>>> {
        if new_len <= self.capacity {
            return Ok(None);
        }
        self.with_room(gpu, layer, store, *growth, new_len).map(Some)
    }

    fn stage_batch(
        &self,
        gpu: &Gpu,
        layer: usize,
        store: &Store,
        growth: &mut Growth,
        map: &[u32],
    ) -> Result<Staged<Self>> {
        let shape = Shape { batch: map.len(), ..self.shape };
        // In place where the rows have memory. A list of moves cannot be cut in two, since a cycle may run
        // through all of it, so one too long for a dispatch goes through new buffers as well.
        let in_place = (map.len() <= self.rows)
            .then(|| plan::order_row_moves(map, self.shape.batch))
            .filter(|moves| moves.written <= MOST_MOVES);
        let Some(moves) = in_place else {
            let capacity = self.capacity_of_copy(gpu, layer, shape, *growth)?;
            return self.copy_into(gpu, layer, store, shape, capacity, map);
        };
        let mut dispatches = Vec::new();
        let mut moved = 0;
        if moves.written > 0 && self.len > 0 {
            let gather = GatherShape {
                row_bytes: shape.row_bytes(),
                heads: shape.heads,
                start: self.start,
                len: self.len,
                capacity: self.capacity,
                moves: &moves.words,
                cycles_at: moves.cycles_at,
            };
            dispatches.push(gpu.kernels().gather(store.gather_bindings(gpu)?, &gather)?);
            moved = shape.bytes(moves.written, self.len)?.iter().sum();
        }
        let arrangement = Self { shape, ..*self };
        Ok(Staged { dispatches, moved, ..Staged::unmoved(arrangement) })
    }
}

impl Ring {
    /// The ring itself where `new_len` tokens fit, else a larger copy.
    fn with_room(
        &self,
        gpu: &Gpu,
        layer: usize,
        store: &Store,
        growth: Growth,
        new_len: usize,
    ) -> Result<Staged<Self>> {
        if new_len <= self.capacity {
            return Ok(Staged::unmoved(*self));
        }
        let shape = self.shape;
        let capacity = capacity_for(gpu, layer, shape, growth, self.capacity, new_len)?;
        let rows: Vec<u32> = (0_u32..).take(shape.batch).collect();
        self.copy_into(gpu, layer, store, shape, capacity, &rows)
    }

    /// An empty ring, in what a reset has left where that is enough.
    fn first_room(
        gpu: &Gpu,
        layer: usize,
        store: Option<&Store>,
        growth: Growth,
        shape: Shape,
        new_len: usize,
    ) -> Result<Staged<Self>> {
        let empty = |capacity| Self { shape, rows: shape.batch, capacity, start: 0, len: 0 };
        if let Some(store) = store {
            let fits = shape.tokens_in(shape.batch, store.bytes());
            let (needed, capacity) = match growth {
                Growth::Static { tokens } => (tokens, tokens),
                Growth::Dynamic { tokens } => (new_len.max(tokens), fits),
            };
            if fits >= needed {
                return Ok(Staged::unmoved(empty(capacity)));
            }
        }
        let capacity = capacity_for(gpu, layer, shape, growth, 0, new_len)?;
        let store = Store::new(gpu, layer, shape.bytes(shape.batch, capacity)?)?;
        Ok(Staged { store: Some(store), ..Staged::unmoved(empty(capacity)) })
    }

    /// Stages a copy of the live tokens into new memory, straightened, row `i` from row `map[i]`.
    fn copy_into(
        &self,
        gpu: &Gpu,
        layer: usize,
        old: &Store,
        shape: Shape,
        capacity: usize,
        map: &[u32],
    ) -> Result<Staged<Self>> {
        let new = Store::new(gpu, layer, shape.bytes(shape.batch, capacity)?)?;
        let mut dispatches: Vec<Dispatch> = Vec::new();
        if self.len > 0 {
            for copies in &plan::list_copies(&plan::copies_of_map(map), MOST_MOVES) {
                let copy = CopyShape {
                    row_bytes: shape.row_bytes(),
                    heads: shape.heads,
                    start: self.start,
                    len: self.len,
                    old_capacity: self.capacity,
                    new_capacity: capacity,
                    copies: &copies.words,
                };
                let buffers = [old.buffers(), new.buffers()];
                dispatches.push(gpu.kernels().copy_rows(buffers, &copy)?);
            }
        }
        let moved = shape.bytes(shape.batch, self.len)?.iter().sum();
        let arrangement = Self { shape, rows: shape.batch, capacity, start: 0, len: self.len };
        Ok(Staged { dispatches, store: Some(new), moved, ..Staged::unmoved(arrangement) })
    }

    /// The capacity of new memory for a change of the batch.
    fn capacity_of_copy(
        &self,
        gpu: &Gpu,
        layer: usize,
        shape: Shape,
        growth: Growth,
    ) -> Result<usize> {
        match growth {
            Growth::Static { tokens } => capacity_for(gpu, layer, shape, growth, 0, tokens),
            // Keep the room that there is, as far as it can be bound.
            Growth::Dynamic { .. } => {
                let live = Growth::Dynamic { tokens: 0 };
                capacity_for(gpu, layer, shape, live, 0, self.len.max(1))?;
                let limit = binding_limit(gpu.limits());
                Ok(self.capacity.min(shape.tokens_in(shape.batch, [limit; 2])))
            }
        }
    }
}

/// The capacity of new memory for `needed` tokens where there is room for `capacity` now.
fn capacity_for(
    gpu: &Gpu,
    layer: usize,
    shape: Shape,
    growth: Growth,
    capacity: usize,
    needed: usize,
) -> Result<usize> {
    let fits = shape.tokens_in(shape.batch, [binding_limit(gpu.limits()); 2]);
    let (tokens, grown) = match growth {
        Growth::Static { tokens } => (tokens, (tokens <= fits).then_some(tokens)),
        Growth::Dynamic { tokens } => {
            let needed = needed.max(if capacity == 0 { tokens } else { 0 });
            (needed, plan::grown_capacity(capacity, needed, fits, LEAST_TOKENS))
        }
    };
    grown.ok_or_else(|| {
        let needed = shape.bytes(shape.batch, tokens);
        shape.too_large(gpu, layer, needed, tokens, fits)
    })
}
