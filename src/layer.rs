//! One layer: its two buffers, and the changes that a kind asks for.
//!
//! A change is staged first: everything is checked, allocated and prepared, and nothing is altered. A
//! staged change cannot fail any more; committing it records its dispatches and moves the layer on.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::kernels::{AppendShape, CopyShape, Dispatch, GatherShape, MOST_MOVES};
use crate::ledger::Ledger;
use crate::plan;
use crate::position::{self, CachePosition};
use crate::sources::BoundSources;
use crate::view::{LayerView, TensorView};

/// What a kind decides about its layers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Policy {
    /// Grows; a layer's first allocation has room for this many tokens at least.
    Dynamic { tokens: usize },
    /// Has room for this many tokens from the start, and never more.
    Static { tokens: usize },
}

impl Policy {
    pub(crate) fn bound(self) -> Option<usize> {
        match self {
            Self::Dynamic { .. } => None,
            Self::Static { tokens } => Some(tokens),
        }
    }
}

/// Shape of a layer: all but its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    batch: usize,
    heads: usize,
    key_dim: usize,
    value_dim: usize,
    dtype: DType,
}

impl Shape {
    /// Bytes of one token of one head, of K and of V.
    fn row_bytes(&self) -> [u64; 2] {
        [self.key_dim, self.value_dim].map(|dim| dim as u64 * self.dtype.size() as u64)
    }

    /// Bytes of K and of V for `tokens` tokens of `rows` batch rows.
    fn bytes(&self, rows: usize, tokens: usize) -> Result<[u64; 2]> {
        let [key, value] = self.row_bytes().map(|row| {
            (rows as u64)
                .checked_mul(self.heads as u64)
                .and_then(|all| all.checked_mul(tokens as u64))
                .and_then(|all| all.checked_mul(row))
        });
        key.zip(value).map(Into::into).ok_or(Error::SizeOverflow { what: "layer" })
    }

    /// Tokens of `rows` batch rows that fit buffers of `bytes` bytes each.
    fn tokens_in(&self, rows: usize, bytes: [u64; 2]) -> usize {
        let tokens = |bytes: u64, row: u64| {
            let token = (rows as u64).saturating_mul(self.heads as u64).saturating_mul(row);
            usize::try_from(bytes / token.max(1)).unwrap_or(usize::MAX)
        };
        let [key, value] = self.row_bytes();
        tokens(bytes[0], key).min(tokens(bytes[1], value))
    }
}

/// A layer's memory.
#[derive(Debug)]
struct Store {
    key: wgpu::Buffer,
    value: wgpu::Buffer,
    sources: BoundSources,
    gather: Option<wgpu::BindGroup>,
}

impl Store {
    fn new(gpu: &Gpu, layer: usize, bytes: [u64; 2]) -> Result<Self> {
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_SRC
            | wgpu::BufferUsages::COPY_DST;
        let make = |role: &str, bytes: u64| {
            gpu.create_buffer(&format!("kvcache layer {layer} {role}"), bytes, usage)
        };
        Ok(Self {
            key: make("key", bytes[0])?,
            value: make("value", bytes[1])?,
            sources: BoundSources::default(),
            gather: None,
        })
    }

    fn bytes(&self) -> [u64; 2] {
        [self.key.size(), self.value.size()]
    }

    fn buffers(&self) -> [&wgpu::Buffer; 2] {
        [&self.key, &self.value]
    }
}

/// What a written layer holds, and where.
#[derive(Clone, Copy, Debug)]
struct Live {
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

impl Live {
    fn view<'a>(&self, store: &'a Store) -> LayerView<'a> {
        LayerView {
            key: &store.key,
            value: &store.value,
            dtype: self.shape.dtype,
            batch: self.shape.batch,
            heads: self.shape.heads,
            key_dim: self.shape.key_dim,
            value_dim: self.shape.value_dim,
            start: self.start,
            len: self.len,
            capacity: self.capacity,
            pages: None,
        }
    }
}

/// One layer of a cache.
#[derive(Debug)]
pub(crate) struct Layer {
    index: usize,
    /// Kept by a reset, for reuse.
    store: Option<Store>,
    /// `None` until the first update, and after a reset.
    live: Option<Live>,
}

/// A change that is ready to happen.
#[derive(Debug)]
#[must_use = "nothing happens until the change is committed"]
pub(crate) struct Staged {
    dispatches: Vec<Dispatch>,
    /// Memory that takes the place of the layer's own.
    store: Option<Store>,
    live: Live,
    /// Bytes that the dispatches write.
    moved: u64,
}

/// What a committed change did, for the statistics.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Effect {
    pub(crate) dispatches: u64,
    pub(crate) moved: u64,
}

impl Staged {
    /// Bytes of new memory.
    pub(crate) fn allocated(&self) -> u64 {
        self.store.as_ref().map_or(0, |store| store.bytes().iter().sum())
    }
}

impl Layer {
    pub(crate) fn new(index: usize) -> Self {
        Self { index, store: None, live: None }
    }

    /// Live tokens.
    pub(crate) fn len(&self) -> usize {
        self.live.map_or(0, |live| live.len)
    }

    /// Batch rows, or `None` for a layer never written.
    pub(crate) fn batch(&self) -> Option<usize> {
        self.live.map(|live| live.shape.batch)
    }

    /// Buffers and bytes that the layer has allocated.
    pub(crate) fn memory(&self) -> (u64, u64) {
        self.store.as_ref().map_or((0, 0), |store| (2, store.bytes().iter().sum()))
    }

    pub(crate) fn view(&self) -> Option<LayerView<'_>> {
        Some(self.live?.view(self.store.as_ref()?))
    }

    pub(crate) fn reset(&mut self) {
        self.live = None;
        if let Some(store) = &mut self.store {
            // Bind groups keep the engine's buffers alive; nothing says that they will be used again.
            store.sources = BoundSources::default();
        }
    }

    pub(crate) fn crop(&mut self, max_length: usize) {
        if let Some(live) = &mut self.live {
            (live.start, live.len) = plan::cropped(live.start, live.len, live.capacity, max_length);
        }
    }

    pub(crate) fn truncate(&mut self, length: usize) {
        if let Some(live) = &mut self.live {
            live.len = live.len.min(length);
        }
    }

    /// Stages the writing of new tokens.
    pub(crate) fn stage_update(
        &mut self,
        gpu: &Gpu,
        policy: Policy,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
        position: CachePosition<'_>,
    ) -> Result<Staged> {
        let shape = self.check_shapes(key, value)?;
        let sources = [key.source("key", gpu.limits())?, value.source("value", gpu.limits())?];
        self.check_alias(key, value)?;
        let tokens = key.shape[2];
        let len = self.len();
        let new_len = position::check(position, shape.batch, tokens, len, policy.bound())?;

        let (store, live, mut dispatches) = self.stage_room(gpu, policy, shape, new_len)?;
        // Growth copies what is live.
        let grown = if dispatches.is_empty() { 0 } else { len };
        let mut moved: u64 = shape.bytes(shape.batch, grown)?.iter().sum();

        let order = position::order(position, len, new_len);
        let list = order.list().map(|list| gpu.place(list)).transpose()?;
        let live = Live { len: new_len, ..live };
        let views = [(key, &sources[0]), (value, &sources[1])];
        let mut store = store;
        let target = store.as_mut().or(self.store.as_mut());
        let target = target.expect("a layer with room has memory");
        let bindings = target.sources.bind(gpu, views, &target.key, &target.value);
        let append = AppendShape {
            key: &sources[0],
            value: &sources[1],
            tokens,
            order: &order,
            target: &live.view(target),
            lists: list.as_ref().map(|list| (list, list.offset / 4)),
        };
        dispatches.push(gpu.kernels().append(gpu, bindings, &append)?);
        moved += shape.bytes(1, order.written(shape.batch, tokens))?.iter().sum::<u64>();

        Ok(Staged { dispatches, store, live, moved })
    }

    /// Stages a change of the batch: new row `i` becomes old row `map[i]`. `None` where nothing changes
    /// or nothing was ever written.
    pub(crate) fn stage_batch(
        &mut self,
        gpu: &Gpu,
        policy: Policy,
        map: &[u32],
    ) -> Result<Option<Staged>> {
        let Some(live) = self.live else { return Ok(None) };
        if plan::is_identity(map, live.shape.batch) {
            return Ok(None);
        }
        let shape = Shape { batch: map.len(), ..live.shape };
        // In place where the rows have memory. A list of moves cannot be cut in two, since a cycle may run
        // through all of it, so one too long for a dispatch goes through new buffers as well.
        let in_place = (map.len() <= live.rows)
            .then(|| plan::order_row_moves(map, live.shape.batch))
            .filter(|moves| moves.written <= MOST_MOVES);
        let Some(moves) = in_place else {
            return self.stage_copy(gpu, policy, shape, live, map).map(Some);
        };
        let mut dispatches = Vec::new();
        let mut moved = 0;
        if let Some(store) = self.store.as_mut().filter(|_| moves.written > 0 && live.len > 0) {
            let bindings = store
                .gather
                .get_or_insert_with(|| gpu.kernels().bind_gather(gpu, &store.key, &store.value))
                .clone();
            dispatches.push(gpu.kernels().gather(
                gpu,
                bindings,
                &GatherShape {
                    row_bytes: shape.row_bytes(),
                    heads: shape.heads,
                    start: live.start,
                    len: live.len,
                    capacity: live.capacity,
                    moves: &moves,
                },
            )?);
            moved = shape.bytes(moves.written, live.len)?.iter().sum();
        }
        Ok(Some(Staged { dispatches, store: None, live: Live { shape, ..live }, moved }))
    }

    /// Makes a staged change happen. Cannot fail.
    pub(crate) fn commit(
        &mut self,
        staged: Staged,
        pass: &mut wgpu::ComputePass<'_>,
        ledger: &Ledger,
    ) -> Effect {
        let effect = Effect { dispatches: staged.dispatches.len() as u64, moved: staged.moved };
        for dispatch in staged.dispatches {
            dispatch.record(pass, ledger);
        }
        if let Some(store) = staged.store {
            self.store = Some(store);
        }
        self.live = Some(staged.live);
        effect
    }

    /// Where an update with a length of `new_len` finds its room: in the memory at hand, in what a
    /// reset has left, or in new memory that the live tokens are copied to.
    fn stage_room(
        &self,
        gpu: &Gpu,
        policy: Policy,
        shape: Shape,
        new_len: usize,
    ) -> Result<(Option<Store>, Live, Vec<Dispatch>)> {
        if let Some(live) = self.live {
            if new_len <= live.capacity {
                return Ok((None, live, Vec::new()));
            }
            let capacity = self.capacity_for(gpu, shape, policy, live.capacity, new_len)?;
            let copies: Vec<u32> = (0_u32..).take(shape.batch).collect();
            let staged = self.copy_into(gpu, shape, live, capacity, &copies)?;
            return Ok((staged.store, staged.live, staged.dispatches));
        }
        let live = |capacity| Live { shape, rows: shape.batch, capacity, start: 0, len: 0 };
        let least = match policy {
            Policy::Dynamic { .. } => new_len,
            Policy::Static { tokens } => tokens,
        };
        if let Some(store) = &self.store {
            let room = shape.tokens_in(shape.batch, store.bytes());
            if room >= least {
                return Ok((None, live(policy.bound().unwrap_or(room)), Vec::new()));
            }
        }
        let capacity = self.capacity_for(gpu, shape, policy, 0, new_len)?;
        let store = Store::new(gpu, self.index, shape.bytes(shape.batch, capacity)?)?;
        Ok((Some(store), live(capacity), Vec::new()))
    }

    /// Stages a change of the batch that needs larger buffers.
    fn stage_copy(
        &self,
        gpu: &Gpu,
        policy: Policy,
        shape: Shape,
        live: Live,
        map: &[u32],
    ) -> Result<Staged> {
        let capacity = match policy {
            Policy::Static { tokens } => {
                self.capacity_for(gpu, shape, Policy::Static { tokens }, 0, tokens)?
            }
            // Keep the room that there is, as far as it can be bound.
            Policy::Dynamic { .. } => {
                self.capacity_for(gpu, shape, policy, 0, live.len.max(1))?;
                live.capacity.min(shape.tokens_in(shape.batch, [binding_limit(gpu.limits()); 2]))
            }
        };
        self.copy_into(gpu, shape, live, capacity, map)
    }

    /// Stages a copy of the live tokens into new memory, straightened, row `i` from row `map[i]`.
    fn copy_into(
        &self,
        gpu: &Gpu,
        shape: Shape,
        live: Live,
        capacity: usize,
        map: &[u32],
    ) -> Result<Staged> {
        let new = Store::new(gpu, self.index, shape.bytes(shape.batch, capacity)?)?;
        let mut dispatches = Vec::new();
        if let Some(old) = self.store.as_ref().filter(|_| live.len > 0) {
            for copies in &plan::list_copies(&plan::copies_of_map(map), MOST_MOVES) {
                dispatches.push(gpu.kernels().copy_rows(
                    gpu,
                    old.buffers(),
                    new.buffers(),
                    &CopyShape {
                        row_bytes: shape.row_bytes(),
                        heads: shape.heads,
                        start: live.start,
                        len: live.len,
                        old_capacity: live.capacity,
                        new_capacity: capacity,
                        copies,
                    },
                )?);
            }
        }
        Ok(Staged {
            dispatches,
            store: Some(new),
            live: Live { shape, rows: shape.batch, capacity, start: 0, len: live.len },
            moved: shape.bytes(shape.batch, live.len)?.iter().sum(),
        })
    }

    /// The capacity of new memory for `needed` tokens where there is room for `capacity` now.
    fn capacity_for(
        &self,
        gpu: &Gpu,
        shape: Shape,
        policy: Policy,
        capacity: usize,
        needed: usize,
    ) -> Result<usize> {
        let limit = binding_limit(gpu.limits());
        let fits = shape.tokens_in(shape.batch, [limit; 2]);
        let (tokens, grown) = match policy {
            Policy::Static { tokens } => (tokens, (tokens <= fits).then_some(tokens)),
            Policy::Dynamic { tokens } => {
                let needed = needed.max(if capacity == 0 { tokens } else { 0 });
                (needed, plan::grown_capacity(capacity, needed, fits))
            }
        };
        grown.ok_or_else(|| Error::LayerTooLarge {
            layer: self.index,
            needed: shape
                .bytes(shape.batch, tokens)
                .map_or(u64::MAX, |[key, value]| key.max(value)),
            limit,
            tokens,
            fits,
            batch: shape.batch,
            heads: shape.heads,
            head_dim: shape.key_dim.max(shape.value_dim),
            dtype: shape.dtype,
        })
    }

    /// Checks K against V and both against the layer.
    fn check_shapes(&self, key: &TensorView<'_>, value: &TensorView<'_>) -> Result<Shape> {
        if key.dtype != value.dtype {
            return Err(Error::WrongDType { what: "value", expected: key.dtype, got: value.dtype });
        }
        if key.shape[..3] != value.shape[..3] {
            return Err(Error::KeyValueShape { key: key.shape, value: value.shape });
        }
        let [batch, heads, _, key_dim] = key.shape;
        let shape = Shape { batch, heads, key_dim, value_dim: value.shape[3], dtype: key.dtype };
        match self.live {
            Some(live) if live.shape.dtype != shape.dtype => Err(Error::WrongDType {
                what: "the new K and V",
                expected: live.shape.dtype,
                got: shape.dtype,
            }),
            Some(live) if live.shape != shape => Err(Error::LayerShape {
                layer: self.index,
                batch: live.shape.batch,
                heads: live.shape.heads,
                key_dim: live.shape.key_dim,
                value_dim: live.shape.value_dim,
                key: key.shape,
                value: value.shape,
            }),
            _ => Ok(shape),
        }
    }

    /// Refuses to read new tokens from the layer's own memory.
    fn check_alias(&self, key: &TensorView<'_>, value: &TensorView<'_>) -> Result<()> {
        let Some(store) = &self.store else { return Ok(()) };
        for (what, view) in [("key", key), ("value", value)] {
            if store.buffers().contains(&view.buffer) {
                return Err(Error::SourceIsCache { what, layer: self.index });
            }
        }
        Ok(())
    }
}

/// The largest buffer that can be made and bound as a whole; words are counted in 32 bits.
fn binding_limit(limits: &wgpu::Limits) -> u64 {
    limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(u64::from(u32::MAX) * 4)
        / 4
        * 4
}
