//! Memory that an engine gives for a cache: [`LayerMemory`].

use std::any::Any;
use std::fmt::{self, Debug, Formatter};
use std::iter;
use std::sync::Arc;

use crate::error::{Error, Result, StoringError};
use crate::gpu::Gpu;
use crate::gpu::device::binding_limit;
use crate::gpu::memory::Memory;
use crate::gpu::range::BufferRange;
use crate::storage::store::Store;
use crate::storage::write::Storing;
use crate::tensor::Guard;

/// Memory for one layer of a [`StaticKVCache`](crate::StaticKVCache), in buffers of an engine's own.
///
/// K and V are stored row-major, [B, H, capacity, D], from the first byte of each range on. The capacity is the
/// `max_cache_len` of the cache; of a layer with a window it is the tokens that the window and the longest update need.
/// So the live tokens of a view that [`is_contiguous`](crate::LayerView::is_contiguous) are a slice of an engine's tensor
/// of that shape, tokens `start..start + len`. A range may be larger than the rows need, and then more rows fit. (The
/// scales of quantized [formats](crate::Format) follow the slots of all rows that fit.) What the range contains before
/// the first update does not matter.
///
/// The engine may read the memory whenever it likes, and must not write it while the cache is there. One dispatch cannot
/// read a buffer and write it, in whatever ranges. So new K and V, and the output of attention, must lie in other
/// buffers than the memory; q may lie in the same.
///
/// # Examples
///
/// One buffer of an engine's own, for two layers of 8 tokens, and K and V of each:
///
/// ```
/// use wgpu_kvcache::{
///     wgpu, Cache, CacheOptions, CachePosition, Gpu, KVCache, LayerMemory, StaticKVCache,
/// };
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let gpu = Gpu::headless()?;
/// // [B 1, H 2, capacity 8, D 16] in f32: 1,024 bytes, four times. What `upload` makes has the usage STORAGE.
/// let pool = gpu.upload(&[0.0_f32; 4 * 256], &[4, 2, 8, 16])?;
/// let piece = |at: u64| wgpu::BufferBinding {
///     buffer: pool.buffer(),
///     offset: at * 1024,
///     size: wgpu::BufferSize::new(1024),
/// };
/// let memory = [0, 1].map(|layer| LayerMemory::new(piece(2 * layer), piece(2 * layer + 1)));
/// let options = CacheOptions::default().with_max_cache_len(8);
/// let mut cache = StaticKVCache::in_memory(&gpu, options, &memory)?;
///
/// let tokens = gpu.upload(&[1.0_f32; 2 * 3 * 16], &[1, 2, 3, 16])?;
/// let view = gpu.submit_pass("prompt", |pass| {
///     cache.update(pass, &tokens.view(), &tokens.view(), 1, CachePosition::Append)
/// })?;
/// assert!(view.key() == pool.buffer() && view.key_offset() == 2048);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct LayerMemory {
    key: BufferRange,
    value: Option<BufferRange>,
    /// Nothing of note, if the engine gives none.
    guard: Guard,
}

impl Debug for LayerMemory {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { key, value, .. } = self;
        f.debug_struct("LayerMemory")
            .field("key", key)
            .field("value", value)
            .finish_non_exhaustive()
    }
}

impl LayerMemory {
    /// Ranges for K and for V, of one buffer or of two, with [`wgpu::BufferUsages::STORAGE`]. Each begins at a multiple of
    /// the device's `min_storage_buffer_offset_alignment`; 256 is always enough. A binding without a size ends with the
    /// buffer. [`CachePlan::bytes_of_layers`](crate::CachePlan::bytes_of_layers) tells how many bytes a layer needs.
    pub fn new(key: wgpu::BufferBinding<'_>, value: wgpu::BufferBinding<'_>) -> Self {
        Self { value: Some(BufferRange::of(&value)), ..Self::of_key(key) }
    }

    /// A range for K of a cache that [stores K alone](crate::CacheOptions::with_value_in_key).
    pub fn of_key(key: wgpu::BufferBinding<'_>) -> Self {
        Self { key: BufferRange::of(&key), value: None, guard: Arc::new(()) }
    }

    /// The same with a guard: a handle of the engine's allocator, say. While the guard is not dropped, the memory must
    /// stay the cache's. It is dropped when the cache and all views of it are, and the GPU has run the work on it.
    #[must_use]
    pub fn held_by(self, guard: impl Any + Send + Sync) -> Self {
        Self { guard: Arc::new(guard), ..self }
    }

    /// The ranges, with their names.
    fn sides(&self) -> impl Iterator<Item = (&'static str, &BufferRange)> {
        iter::once(("K", &self.key)).chain(self.value.iter().map(|value| ("V", value)))
    }
}

/// The stores of layers in what an engine gave, checked.
pub(super) fn stores(gpu: &Gpu, storing: Storing, memory: &[LayerMemory]) -> Result<Vec<Store>> {
    let limits = gpu.limits();
    let alignment = u64::from(limits.min_storage_buffer_offset_alignment.max(16));
    let mut seen: Vec<(usize, &'static str, &BufferRange)> = Vec::new();
    for (layer, memory) in memory.iter().enumerate() {
        let sides = match (memory.value.is_some(), storing.is_value_in_key) {
            (true, true) => Some(("K and V", "K alone", "LayerMemory::of_key")),
            (false, false) => Some(("K alone", "K and V", "LayerMemory::new")),
            _ => None,
        };
        if let Some((given, stored, remedy)) = sides {
            return Err(StoringError::MemorySides { layer, given, stored, remedy }.into());
        }
        for (side, range) in memory.sides() {
            let &BufferRange { ref buffer, offset, size } = range;
            let end = offset.checked_add(size).filter(|&end| end <= buffer.size());
            if !offset.is_multiple_of(alignment) || end.is_none() || size == 0 {
                let buffer = buffer.size();
                let error =
                    StoringError::MemoryRange { layer, side, offset, size, buffer, alignment };
                return Err(error.into());
            }
            if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
                let what = if side == "K" { "the memory for K" } else { "the memory for V" };
                return Err(Error::MissingUsage { what });
            }
            if let Some((other, of, _)) = seen.iter().find(|(_, _, other)| other.overlaps(range)) {
                let (sides, layers) = ([*of, side], [*other, layer]);
                return Err(StoringError::MemoryOverlaps { sides, layers }.into());
            }
            seen.push((layer, side, range));
        }
    }
    let limit = binding_limit(limits);
    let store = |(layer, memory): (usize, &LayerMemory)| {
        let LayerMemory { key, value, guard } = memory.clone();
        let bound =
            |range: BufferRange| BufferRange { size: range.size.min(limit) / 4 * 4, ..range };
        let ranges = (bound(key), value.map(bound));
        let is_value_stored = ranges.1.is_some();
        Ok(Store::given(Memory::given(gpu.handle(), layer, ranges, guard)?, is_value_stored))
    };
    memory.iter().enumerate().map(store).collect()
}
