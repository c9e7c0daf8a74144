//! Tokens in a ring: the live part of [B, H, capacity, D], which may run over the end.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::arena::RegionGuard;
use crate::gpu::device::binding_limit;
use crate::gpu::kernels::{CopyShape, Dispatch, GatherShape, MOST_MOVES};
use crate::host::capacity::Growth;
use crate::host::plan;
use crate::host::rows::{Cut, Rows};
use crate::host::window::Window;
use crate::storage::arrangement::{Arrangement, LayerState, NewTokens, Staged, StagedWrite};
use crate::storage::records::{self, Records};
use crate::storage::store::{Shape, Store};
use crate::view::LayerView;

/// What a layer holds, and where.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    shape: Shape,
    /// Batch rows that the buffers have room for.
    most_rows: usize,
    /// Slots of each row and head.
    capacity: usize,
    /// Live tokens of each row.
    rows: Rows,
    records: Records,
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

    fn rows(&self) -> &Rows {
        &self.rows
    }

    fn view(&self, gpu: &Gpu, store: &Store) -> Result<LayerView> {
        let upload = || gpu.uploads().upload(&self.rows.records(0));
        let rows = self.records.get(&self.rows, upload)?;
        let memory = [self.most_rows, self.capacity];
        Ok(self.shape.view(store, &self.rows, memory, (None, rows)))
    }

    fn cut(&mut self, _: &mut Growth, cut: &Cut) {
        (self.rows, self.records) = (self.rows.cut(cut, self.capacity), Records::default());
    }

    fn guards(&self) -> [Option<&RegionGuard>; 2] {
        [self.records.guard(), None]
    }

    fn stage_write(
        state: LayerState<'_, Self>,
        growth: &mut Growth,
        shape: Shape,
        tokens: NewTokens<'_>,
    ) -> Result<StagedWrite<Self>> {
        let LayerState { gpu, layer, store, arrangement, window } = state;
        let growth = growth.of_window(window, tokens.count);
        // First the checks that need only counts, then the list, which is as long as the caller's, then memory.
        let needed = arrangement.map_or(0, |arrangement| arrangement.capacity);
        if tokens.new_len > needed {
            capacity_for(gpu, layer, shape, growth, needed, tokens.new_len)?;
        }
        let plan = tokens.plan(gpu)?;
        let mut change = match (arrangement, store) {
            (Some(arrangement), Some(store)) => {
                arrangement.with_room(gpu, layer, store, growth, tokens.new_len)?
            }
            _ => Self::first_room(gpu, layer, store, growth, shape, tokens.new_len)?,
        };
        let rows = tokens.rows_after(&change.arrangement.rows);
        let lists = records::upload(gpu, &rows, plan.list().unwrap_or_default())?;
        let records = lists.as_ref().map(|(allocation, _)| Records::at(allocation.clone(), &rows));
        change.arrangement.records = records.unwrap_or_default();
        change.arrangement.rows = rows;
        Ok(StagedWrite { change, plan, lists })
    }

    fn check_batch(
        &self,
        gpu: &Gpu,
        layer: usize,
        store: &Store,
        growth: &Growth,
        batch: usize,
    ) -> Result<()> {
        if batch <= self.most_rows {
            return Ok(());
        }
        if store.is_given() {
            return Err(store.too_short(layer, Shape { batch, ..self.shape }, self.capacity));
        }
        self.capacity_of_copy(gpu, layer, Shape { batch, ..self.shape }, *growth).map(|_| ())
    }

    fn stage_reserve(
        &self,
        gpu: &Gpu,
        layer: usize,
        store: &Store,
        growth: &mut Growth,
        (new_len, window): (usize, Option<Window>),
    ) -> Result<Option<Staged<Self>>> {
        if new_len <= self.capacity {
            return Ok(None);
        }
        let count = new_len.saturating_sub(self.rows.len());
        let growth = growth.of_window(window, count);
        self.with_room(gpu, layer, store, growth, new_len).map(Some)
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
        let in_place = (map.len() <= self.most_rows)
            .then(|| plan::order_row_moves(map, self.shape.batch))
            .filter(|moves| moves.written <= MOST_MOVES);
        let Some(moves) = in_place else {
            if store.is_given() {
                let what = "a change of more than 8192 rows at once in memory that the engine gave";
                return Err(Error::NotSupported { what });
            }
            let capacity = self.capacity_of_copy(gpu, layer, shape, *growth)?;
            return self.copy_into(gpu, layer, store, shape, capacity, map);
        };
        let mut dispatches = Vec::new();
        let mut moved = 0;
        if moves.written > 0 && self.rows.len() > 0 {
            // Rows keep their slots. If they start at different ones, whole capacities move.
            let (start, len) = match self.rows.start() {
                Some(start) => (start, self.rows.len()),
                None => (0, self.capacity),
            };
            for plane in shape.planes(self.most_rows, self.capacity) {
                let gather = GatherShape {
                    plane,
                    heads: shape.heads,
                    start,
                    len,
                    capacity: self.capacity,
                    moves: &moves.words,
                    cycles_at: moves.cycles_at,
                };
                dispatches.push(gpu.kernels().gather(store.gather_bindings(gpu)?, &gather)?);
            }
            moved = shape.bytes(moves.written, len)?.iter().sum();
        }
        let rows = self.rows.select(map);
        let arrangement = Self { shape, rows, records: Records::default(), ..*self };
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
            return Ok(Staged::unmoved(self.clone()));
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
        let empty = |capacity, most_rows| Self {
            shape,
            most_rows,
            capacity,
            rows: Rows::default(),
            records: Records::default(),
        };
        if let Some(store) = store {
            let fits = shape.tokens_in(shape.batch, store.bytes());
            let (needed, capacity) = match growth {
                Growth::Static { tokens } => (tokens, tokens),
                // Of a window no more than it needs, though there be more. And no longer rows than before: memory for
                // many rows is not memory for one long one, whose length every row of a later batch would get.
                Growth::Dynamic { tokens, most } => {
                    let needed = new_len.max(tokens.min(most));
                    (needed, fits.min(most.max(new_len)).min(needed.max(store.capacity)))
                }
            };
            if fits >= needed {
                let rows = shape.rows_in(capacity, store.bytes()).max(shape.batch);
                return Ok(Staged::unmoved(empty(capacity, rows)));
            }
            if store.is_given() {
                return Err(store.too_short(layer, shape, needed));
            }
        }
        let capacity = capacity_for(gpu, layer, shape, growth, 0, new_len)?;
        let store = ring_store(gpu, layer, shape, capacity)?;
        Ok(Staged { store: Some(store), ..Staged::unmoved(empty(capacity, shape.batch)) })
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
        let new = ring_store(gpu, layer, shape, capacity)?;
        let mut dispatches: Vec<Dispatch> = Vec::new();
        let len = self.rows.len();
        // A dispatch for each start that rows have.
        let mut by_start: BTreeMap<usize, Vec<(u32, u32)>> = BTreeMap::new();
        for (from, to) in plan::copies_of_map(map) {
            let start = self.rows.span(from as usize).start;
            by_start.entry(start).or_default().push((from, to));
        }
        for (start, copies) in by_start.into_iter().filter(|_| len > 0) {
            for copies in &plan::list_copies(&copies, MOST_MOVES) {
                let from = shape.planes(self.most_rows, self.capacity);
                for planes in from.zip(shape.planes(shape.batch, capacity)) {
                    let copy = CopyShape {
                        planes: planes.into(),
                        heads: shape.heads,
                        start,
                        len,
                        old_capacity: self.capacity,
                        new_capacity: capacity,
                        copies: &copies.words,
                    };
                    let bindings = [old.bindings(), new.bindings()];
                    dispatches.push(gpu.kernels().copy_rows(bindings, &copy)?);
                }
            }
        }
        let moved = shape.bytes(shape.batch, len)?.iter().sum();
        let rows = self.rows.select(map).moved(|_| 0);
        let records = Records::default();
        let arrangement = Self { shape, most_rows: shape.batch, capacity, rows, records };
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
            Growth::Static { .. } => {
                let growth = Growth::Static { tokens: self.capacity };
                capacity_for(gpu, layer, shape, growth, 0, self.capacity)
            }
            // Keep the room that there is, as far as it can be bound.
            Growth::Dynamic { .. } => {
                let live = Growth::Dynamic { tokens: 0, most: usize::MAX };
                capacity_for(gpu, layer, shape, live, 0, self.rows.len().max(1))?;
                let limit = binding_limit(gpu.limits());
                Ok(self.capacity.min(shape.tokens_in(shape.batch, [limit; 2])))
            }
        }
    }
}

/// New memory for rows of `capacity` tokens.
fn ring_store(gpu: &Gpu, layer: usize, shape: Shape, capacity: usize) -> Result<Store> {
    let mut store = Store::new(gpu, layer, shape.bytes(shape.batch, capacity)?)?;
    store.capacity = capacity;
    Ok(store)
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
    let limit = binding_limit(gpu.limits());
    let fits = shape.tokens_in(shape.batch, [limit; 2]);
    let (tokens, grown) = growth.capacity(capacity, needed, fits);
    grown.ok_or_else(|| {
        let needed = shape.bytes(shape.batch, tokens);
        shape.too_large(limit, layer, needed, tokens, fits)
    })
}
