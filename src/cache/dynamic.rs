//! The kind that grows.

use crate::cache::kind::implement_cache;
use crate::gpu::Gpu;
use crate::storage::layers::Layers;
use crate::storage::ring::{Growth, Ring};

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

    /// An empty cache whose layers start with room for `tokens` tokens a row, after a
    /// [`reset`](crate::Cache::reset) to another shape as well, so that a sequence of known length never grows.
    pub fn with_capacity(gpu: &Gpu, tokens: usize) -> Self {
        Self { layers: Layers::new(gpu, Growth::Dynamic { tokens }, None) }
    }
}

implement_cache!(DynamicKVCache);
