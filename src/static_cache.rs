//! The kind of fixed length and layer count.

use crate::cache::{BatchChange, Cache, GetFuture, KVCache, Stats};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::layers::Layers;
use crate::position::CachePosition;
use crate::ring::{Growth, Ring};
use crate::view::{HostTensor, LayerView, TensorView};

/// A cache of `num_layers` layers with room for `max_cache_len` tokens a row, allocated at a layer's
/// first update. The buffers never change while the batch stays, so bind groups can be made once.
///
/// After a [`crop`](Cache::crop) new tokens take the place of those that were dropped: the live
/// tokens wrap around the end (see [`LayerView`]).
///
/// # Examples
///
/// ```
/// use wgpu_kvcache::{Cache, CachePosition, Gpu, KVCache, StaticKVCache};
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let gpu = Gpu::headless()?;
/// let mut cache = StaticKVCache::new(&gpu, 4, 1);
/// let row = gpu.upload(&[1.0_f32, 2.0, 3.0, 4.0], &[1, 1, 4, 1])?;
/// let one = gpu.upload(&[5.0_f32], &[1, 1, 1, 1])?;
/// gpu.submit_pass("fill", |pass| {
///     cache.update(pass, &row.view(), &row.view(), 0, CachePosition::Append)?;
///     // Full: the next token has no room, and nothing changes.
///     assert!(cache.update(pass, &one.view(), &one.view(), 0, CachePosition::Append).is_err());
///     cache.crop(3);
///     cache.update(pass, &one.view(), &one.view(), 0, CachePosition::Append).map(|_| ())
/// })?;
/// let (key, _value) = cache.get(0)?.expect("layer 0 was written");
/// assert_eq!(key.as_slice::<f32>()?, [2.0, 3.0, 4.0, 5.0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct StaticKVCache {
    layers: Layers<Ring>,
    max_cache_len: usize,
}

impl StaticKVCache {
    /// An empty cache for `num_layers` layers of at most `max_cache_len` tokens a row.
    pub fn new(gpu: &Gpu, max_cache_len: usize, num_layers: usize) -> Self {
        let growth = Growth::Static { tokens: max_cache_len };
        Self { layers: Layers::new(gpu, growth, Some(num_layers)), max_cache_len }
    }
}

impl Cache for StaticKVCache {
    fn reset(&mut self) {
        self.layers.reset();
    }

    fn crop(&mut self, max_length: usize) {
        self.layers.crop(max_length);
    }

    fn truncate(&mut self, length: usize) {
        self.layers.truncate(length);
    }

    fn prepare_batch(&mut self, change: BatchChange<'_>) -> Result<()> {
        self.layers.prepare_batch(change)
    }

    fn batch_select_indices(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        indices: &[u32],
    ) -> Result<()> {
        self.layers.change_batch(pass, BatchChange::Select(indices))
    }

    fn batch_repeat_interleave(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        repeats: usize,
    ) -> Result<()> {
        self.layers.change_batch(pass, BatchChange::Repeat(repeats))
    }

    fn get_max_cache_shape(&self) -> Option<usize> {
        Some(self.max_cache_len)
    }

    fn stats(&self) -> Stats {
        self.layers.stats()
    }
}

impl KVCache for StaticKVCache {
    fn update(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
        layer_idx: usize,
        cache_position: CachePosition<'_>,
    ) -> Result<LayerView<'_>> {
        self.layers.update(pass, key, value, layer_idx, cache_position)
    }

    fn view(&self, layer_idx: usize) -> Result<Option<LayerView<'_>>> {
        self.layers.view(layer_idx)
    }

    fn get(&self, layer_idx: usize) -> Result<Option<(HostTensor, HostTensor)>> {
        self.layers.get(layer_idx)
    }

    fn get_async(&self, layer_idx: usize) -> GetFuture<'_> {
        Box::pin(async move { self.layers.get_async(layer_idx).await })
    }

    fn get_seq_length(&self, layer_idx: usize) -> Result<usize> {
        self.layers.seq_length(layer_idx)
    }
}
