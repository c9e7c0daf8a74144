//! The kind of fixed length and layer count.

use crate::cache::kind::implement_cache;
use crate::cache::layer_memory::{LayerMemory, stores};
use crate::cache::options::{CacheOptions, windows_of};
use crate::error::{Error, Result, StoringError};
use crate::gpu::Gpu;
use crate::host::capacity::Growth;
use crate::storage::layers::Layers;
use crate::storage::ring::Ring;

/// A cache of `num_layers` layers with room for `max_cache_len` tokens a row, allocated at a layer's
/// first update. The buffers never change while the batch stays, so bind groups can be made once.
///
/// After a [`crop`](crate::Cache::crop) new tokens take the place of those that were dropped: the live
/// tokens wrap around the end (see [`LayerView`](crate::LayerView)).
///
/// # Examples
///
/// ```
/// use wgpu_kvcache::{Cache, CacheOptions, CachePosition, Gpu, KVCache, StaticKVCache};
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let gpu = Gpu::headless()?;
/// let options = CacheOptions::default().with_max_cache_len(4).with_num_layers(1);
/// let mut cache = StaticKVCache::with_options(&gpu, options)?;
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
}

impl StaticKVCache {
    /// An empty cache. Takes `max_cache_len` and `num_layers`, and needs both; `windows`,
    /// `max_chunk`, `formats` and `value_in_key`.
    ///
    /// # Errors
    ///
    /// [`Error::MissingOption`] without one of them, [`Error::UnusedOption`] for any other option.
    pub fn with_options(gpu: &Gpu, options: CacheOptions<'_>) -> Result<Self> {
        let kind = "StaticKVCache";
        let options = options.check(kind, &["max_cache_len", "windows", "max_chunk"])?;
        let missing = |option| Error::MissingOption { option, kind };
        let tokens = options.max_cache_len().ok_or_else(|| missing("max_cache_len"))?;
        let layers = options.num_layers().ok_or_else(|| missing("num_layers"))?;
        let windows = windows_of(options, true)?;
        let layers = Layers::new(gpu, Growth::Static { tokens }, Some(layers));
        Ok(Self { layers: layers.with_windows(windows).with_storing(options.storing()) })
    }

    /// An empty cache that keeps its tokens in memory of an engine's own, a [`LayerMemory`] for each layer, and never
    /// in other memory. Takes the options of [`with_options`](Self::with_options); `num_layers` need not be given.
    ///
    /// As many batch rows fit as the memory of a layer has room for. An update with more of them, or a change of the batch to
    /// more, is [`StoringError::MemoryTooShort`]. A change of the batch moves rows in place. The memory counts in
    /// [`Stats::bytes_allocated`](crate::Stats::bytes_allocated).
    ///
    /// # Errors
    ///
    /// As for [`with_options`](Self::with_options); [`StoringError::MemoryRange`] and [`Error::MissingUsage`] for a range that a
    /// kernel cannot bind, [`StoringError::MemoryOverlaps`] for one that is given twice, [`StoringError::MemorySides`], and
    /// [`StoringError::MemoryCount`] if `num_layers` is given and another number.
    pub fn in_memory(gpu: &Gpu, options: CacheOptions<'_>, memory: &[LayerMemory]) -> Result<Self> {
        let given = memory.len();
        let num_layers = options.num_layers().unwrap_or(given);
        if num_layers != given {
            return Err(StoringError::MemoryCount { given, num_layers }.into());
        }
        let Self { layers } = Self::with_options(gpu, options.with_num_layers(given))?;
        Ok(Self { layers: layers.with_memory(stores(gpu, options.storing(), memory)?) })
    }
}

implement_cache!(StaticKVCache);
