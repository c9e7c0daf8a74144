//! A layer's shape and memory.

use std::sync::{Arc, OnceLock};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::bind_groups::BindGroups;
use crate::gpu::own_buffers::OwnBuffer;
use crate::host::rows::Rows;
use crate::view::{LayerView, PageTable, RowTable};

/// Shape of a layer: all but its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) dtype: DType,
}

impl Shape {
    /// Bytes of one token of one head, of K and of V.
    pub(crate) fn row_bytes(&self) -> [u64; 2] {
        [self.key_dim, self.value_dim].map(|dim| dim as u64 * self.dtype.size() as u64)
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
            let Self { heads, key_dim, value_dim, dtype, .. } = self;
            let dim = key_dim.max(value_dim);
            let asked = format!("{rows} x {tokens} tokens of {heads} heads of {dim} {dtype}");
            Error::overflow("size of a layer", asked, u64::MAX)
        })
    }

    /// A view of tokens of this shape in `store`.
    pub(crate) fn view(
        &self,
        store: &Store,
        rows: &Rows,
        capacity: usize,
        (pages, records): (Option<PageTable>, Option<RowTable>),
    ) -> LayerView {
        LayerView {
            key: store.key.clone(),
            value: store.value.clone(),
            dtype: self.dtype,
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
        Error::LayerTooLarge {
            layer,
            needed: needed.map_or(u64::MAX, |[key, value]| key.max(value)),
            limit,
            tokens,
            fits,
            batch: self.batch,
            heads: self.heads,
            head_dim: self.key_dim.max(self.value_dim),
            dtype: self.dtype,
        }
    }

    /// Tokens of `rows` batch rows that fit buffers of `bytes` bytes each.
    pub(crate) fn tokens_in(&self, rows: usize, bytes: [u64; 2]) -> usize {
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
pub(crate) struct Store {
    pub(crate) key: wgpu::Buffer,
    pub(crate) value: wgpu::Buffer,
    /// Bind groups that name the buffers and an engine's own; they go with the memory.
    pub(crate) bind_groups: Arc<BindGroups>,
    gather: OnceLock<wgpu::BindGroup>,
    _own: [OwnBuffer; 2],
}

impl Store {
    pub(crate) fn new(gpu: &Gpu, layer: usize, bytes: [u64; 2]) -> Result<Self> {
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_SRC
            | wgpu::BufferUsages::COPY_DST;
        let make = |role: &str, bytes: u64| {
            gpu.handle().create_buffer(&format!("kvcache layer {layer} {role}"), bytes, usage)
        };
        let (key, value) = (make("key", bytes[0])?, make("value", bytes[1])?);
        let own = [&key, &value].map(|buffer| gpu.handle().own_buffers.add(buffer));
        Ok(Self { key, value, bind_groups: Arc::default(), gather: OnceLock::new(), _own: own })
    }

    /// Bytes of K and of V.
    pub(crate) fn bytes(&self) -> [u64; 2] {
        self.buffers().map(wgpu::Buffer::size)
    }

    pub(crate) fn buffers(&self) -> [&wgpu::Buffer; 2] {
        [&self.key, &self.value]
    }

    /// The buffers, bound for moves in place.
    pub(crate) fn gather_bindings(&self, gpu: &Gpu) -> Result<wgpu::BindGroup> {
        if let Some(bindings) = self.gather.get() {
            return Ok(bindings.clone());
        }
        let bindings = gpu.kernels().bind_gather(&self.key, &self.value)?;
        Ok(self.gather.get_or_init(|| bindings).clone())
    }
}
