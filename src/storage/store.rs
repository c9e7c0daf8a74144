//! A layer's shape and memory.

use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result, StoringError};
use crate::format::{Format, Plane, TokenBytes};
use crate::gpu::Gpu;
use crate::gpu::bind_groups::BindGroups;
use crate::gpu::memory::Memory;
use crate::gpu::own_buffers::OwnBuffer;
use crate::gpu::range::BufferRange;
use crate::host::rows::Rows;
use crate::view::{LayerView, PageTable, RowTable};

/// Shape of a layer: all but its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
    /// How K and V are stored.
    pub(crate) formats: [Format; 2],
    /// Whether V is the first elements of each head of K, and not stored.
    pub(crate) is_value_in_key: bool,
}

impl Shape {
    /// What one token of one head takes.
    pub(crate) fn token_bytes(&self) -> TokenBytes {
        TokenBytes::new(self.formats, [self.key_dim, self.value_dim], self.is_value_in_key)
    }

    /// Bytes of one token of one head, of K and of V.
    pub(crate) fn row_bytes(&self) -> [u64; 2] {
        self.token_bytes().of_sides()
    }

    /// Buffers of K and V.
    pub(crate) fn buffers(&self) -> u64 {
        if self.is_value_in_key { 1 } else { 2 }
    }

    /// The planes of buffers that have room for `rows` batch rows, or pages, of `capacity` slots.
    pub(crate) fn planes(&self, rows: usize, capacity: usize) -> impl Iterator<Item = Plane> {
        self.token_bytes().planes((rows * self.heads * capacity) as u64)
    }

    /// Bytes of K and of V for `tokens` tokens of `rows` batch rows.
    pub(crate) fn bytes(&self, rows: usize, tokens: usize) -> Result<[u64; 2]> {
        let [key, value] = self.row_bytes().map(|row| {
            (rows as u64)
                .checked_mul(self.heads as u64)
                .and_then(|all| all.checked_mul(tokens as u64))
                .and_then(|all| all.checked_mul(row))
        });
        key.zip(value).map(Into::into).ok_or_else(|| {
            let Self { heads, key_dim, value_dim, formats: [key, value], .. } = self;
            let dim = key_dim.max(value_dim);
            let asked =
                format!("{rows} x {tokens} tokens of {heads} heads of {dim} {key} and {value}");
            Error::overflow("size of a layer", asked, u64::MAX)
        })
    }

    /// A view of tokens of this shape in `store`, which has room for `memory[0]` batch rows, or pages, of `memory[1]`
    /// slots.
    pub(crate) fn view(
        &self,
        store: &Store,
        rows: &Rows,
        memory: [usize; 2],
        (pages, records): (Option<PageTable>, Option<RowTable>),
    ) -> LayerView {
        let [memory_rows, capacity] = memory;
        let [key, value] = store.ranges();
        let value = if self.is_value_in_key { key } else { value };
        LayerView {
            key: key.clone(),
            value: value.clone(),
            memory: Some(Arc::clone(&store.memory)),
            formats: self.formats,
            scale_slots: (memory_rows * self.heads * capacity) as u64,
            batch: self.batch,
            heads: self.heads,
            key_dim: self.key_dim,
            value_dim: self.value_dim,
            start: if records.is_some() { 0 } else { rows.span(0).start },
            len: rows.len(),
            capacity,
            pages,
            rows: records,
            step: None,
            window: None,
            bind_groups: Arc::clone(&store.bind_groups),
            owner: None,
        }
    }

    /// The refusal, under a device's `limit` of bytes a buffer, of a layer that needs `needed` bytes of K and of V for `tokens` tokens a row, where
    /// `fits` would fit.
    pub(crate) fn too_large(
        &self,
        limit: u64,
        layer: usize,
        needed: Result<[u64; 2]>,
        tokens: usize,
        fits: usize,
    ) -> Error {
        let [key, value] = self.row_bytes();
        Error::LayerTooLarge {
            layer,
            needed: needed.map_or(u64::MAX, |[key, value]| key.max(value)),
            limit,
            tokens,
            fits,
            batch: self.batch,
            heads: self.heads,
            head_dim: self.key_dim.max(self.value_dim),
            format: self.formats[usize::from(value > key)],
        }
    }

    /// Batch rows of `capacity` tokens that fit buffers of `bytes` bytes each.
    pub(crate) fn rows_in(&self, capacity: usize, bytes: [u64; 2]) -> usize {
        // A row of so many tokens, or so many rows of one token: the bytes are the same.
        self.tokens_in(capacity, bytes)
    }

    /// Tokens of `rows` batch rows that fit buffers of `bytes` bytes each.
    pub(crate) fn tokens_in(&self, rows: usize, bytes: [u64; 2]) -> usize {
        let tokens = |bytes: u64, row: u64| {
            let token = (rows as u64).saturating_mul(self.heads as u64).saturating_mul(row);
            let tokens = bytes.checked_div(token).unwrap_or(u64::MAX);
            usize::try_from(tokens).unwrap_or(usize::MAX)
        };
        let [key, value] = self.row_bytes();
        tokens(bytes[0], key).min(tokens(bytes[1], value))
    }
}

/// A layer's memory.
#[derive(Debug)]
pub(crate) struct Store {
    /// K and V. If V is not stored, what stands in its place where kernels bind both.
    memory: Arc<Memory>,
    bytes: [u64; 2],
    /// Tokens a row that the memory of a ring was made for.
    pub(crate) capacity: usize,
    /// Bind groups that name the buffers and an engine's own; they go with the memory.
    pub(crate) bind_groups: Arc<BindGroups>,
    gather: OnceLock<wgpu::BindGroup>,
    /// Outputs must not lie in the buffers as long as this is the store of a layer.
    _own: Vec<OwnBuffer>,
}

impl Store {
    pub(crate) fn new(gpu: &Gpu, layer: usize, bytes: [u64; 2]) -> Result<Self> {
        let memory = Memory::new(gpu.handle(), layer, bytes)?;
        let own = |range: &BufferRange| gpu.handle().own_buffers.add(&range.buffer);
        Ok(Self { _own: memory.ranges().map(own).into(), ..Self::of(memory, bytes) })
    }

    /// What an engine gave for K, and for V if it is stored.
    pub(crate) fn given(memory: Memory, is_value_stored: bool) -> Self {
        let [key, value] = memory.ranges().map(|range| range.size);
        Self::of(memory, [key, if is_value_stored { value } else { 0 }])
    }

    fn of(memory: Memory, bytes: [u64; 2]) -> Self {
        let (bind_groups, gather) = (Arc::default(), OnceLock::new());
        let memory = Arc::new(memory);
        Self { memory, bytes, capacity: 0, bind_groups, gather, _own: Vec::new() }
    }

    /// Whether an engine gave the memory, so that no other can take its place.
    pub(crate) fn is_given(&self) -> bool {
        self.memory.is_given()
    }

    /// The refusal of more rows, or longer ones, than there is room for in what an engine gave.
    pub(crate) fn too_short(&self, layer: usize, shape: Shape, tokens: usize) -> Error {
        let needed = match shape.bytes(shape.batch, tokens) {
            Ok(needed) => needed,
            Err(error) => return error,
        };
        let at = usize::from(needed[0] <= self.bytes[0]);
        let (side, needed, given) = (["K", "V"][at], needed[at], self.bytes[at]);
        let Shape { batch, heads, .. } = shape;
        StoringError::MemoryTooShort { layer, side, needed, given, batch, tokens, heads }.into()
    }

    /// Bytes of K and of V.
    pub(crate) fn bytes(&self) -> [u64; 2] {
        self.bytes
    }

    /// Buffers of K and V.
    pub(crate) fn count(&self) -> u64 {
        self.bytes.iter().filter(|&&bytes| bytes > 0).count() as u64
    }

    pub(crate) fn ranges(&self) -> [&BufferRange; 2] {
        self.memory.ranges()
    }

    /// Both, as kernels bind them.
    pub(crate) fn bindings(&self) -> [wgpu::BufferBinding<'_>; 2] {
        self.ranges().map(BufferRange::binding)
    }

    /// The buffers, of which a browser may say later that it refused them.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The buffers, bound for moves in place.
    pub(crate) fn gather_bindings(&self, gpu: &Gpu) -> Result<wgpu::BindGroup> {
        if let Some(bindings) = self.gather.get() {
            return Ok(bindings.clone());
        }
        let bindings = gpu.kernels().bind_gather(self.bindings())?;
        Ok(self.gather.get_or_init(|| bindings).clone())
    }
}
