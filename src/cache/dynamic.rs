//! The kind that grows.

use crate::cache::kind::implement_cache;
use crate::cache::options::{CacheOptions, windows_of};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::host::capacity::Growth;
use crate::storage::layers::Layers;
use crate::storage::ring::Ring;

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
        Self { layers: Layers::new(gpu, Growth::Dynamic { tokens: 0, most: usize::MAX }, None) }
    }

    /// An empty cache. Takes `num_layers`, `capacity`, `windows`, `formats` and `value_in_key`.
    ///
    /// # Errors
    ///
    /// [`Error::UnusedOption`](crate::Error::UnusedOption) for any other option.
    pub fn with_options(gpu: &Gpu, options: CacheOptions<'_>) -> Result<Self> {
        let options = options.check("DynamicKVCache", &["capacity", "windows"])?;
        let windows = windows_of(options, false)?;
        let growth = Growth::Dynamic { tokens: options.capacity().unwrap_or(0), most: usize::MAX };
        let layers = Layers::new(gpu, growth, options.num_layers());
        Ok(Self { layers: layers.with_windows(windows).with_storing(options.storing()) })
    }
}

implement_cache!(DynamicKVCache);
