//! The kind that grows.

use crate::cache::{BatchChange, Cache, GetFuture, KVCache, Stats};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::layers::Layers;
use crate::position::CachePosition;
use crate::ring::{Growth, Ring};
use crate::view::{HostTensor, LayerView, TensorView};

/// A cache that grows: in tokens (doubling, so that a token is copied at most twice on average), in
/// layers, and in batch rows. The bound is what the device can bind as one buffer.
///
/// # Examples
///
/// ```
/// use wgpu_kvcache::{Cache, CachePosition, DynamicKVCache, Gpu, KVCache};
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let gpu = Gpu::headless()?;
/// let mut cache = DynamicKVCache::new(&gpu);
/// let key = gpu.upload(&[1.0_f32, 2.0, 3.0], &[1, 1, 3, 1])?;
/// let value = gpu.upload(&[10.0_f32, 20.0, 30.0], &[1, 1, 3, 1])?;
/// gpu.submit_pass("prompt", |pass| {
///     cache.update(pass, &key.view(), &value.view(), 0, CachePosition::Append).map(|_| ())
/// })?;
/// cache.crop(2);
/// let (key, _value) = cache.get(0)?.expect("layer 0 was written");
/// assert_eq!(key.as_slice::<f32>()?, [2.0, 3.0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DynamicKVCache {
    layers: Layers<Ring>,
}

impl DynamicKVCache {
    /// An empty cache.
    pub fn new(gpu: &Gpu) -> Self {
        Self::with_capacity(gpu, 0)
    }

    /// An empty cache whose layers start with room for `tokens` tokens, so that a sequence of known
    /// length never grows.
    pub fn with_capacity(gpu: &Gpu, tokens: usize) -> Self {
        Self { layers: Layers::new(gpu, Growth::Dynamic { tokens }, None) }
    }
}

impl Cache for DynamicKVCache {
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
        None
    }

    fn stats(&self) -> Stats {
        self.layers.stats()
    }
}

impl KVCache for DynamicKVCache {
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
        Box::pin(self.layers.get_async(layer_idx))
    }

    fn get_seq_length(&self, layer_idx: usize) -> Result<usize> {
        self.layers.seq_length(layer_idx)
    }
}
