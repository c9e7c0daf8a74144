//! The kind whose rows share pages.

use crate::cache::kind::implement_cache;
use crate::cache::options::{CacheOptions, windows_of};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::storage::layers::Layers;
use crate::storage::paging::{Paged, Paging};

/// A cache whose batch rows share memory: beams and samples cost what they differ in.
///
/// Per layer K and V are pools of pages, [page, H, tokens of a page, D], and a table names the pages of
/// each row. Repeating, selecting and reordering rows change the table and move no byte. A page that
/// several rows name is copied when one of them writes into it, which is the partly filled last page of a
/// row at most as long as rows are appended to. [`truncate`](crate::Cache::truncate) and
/// [`crop`](crate::Cache::crop) give whole pages back; pages given back are used again. This is the scheme of
/// vLLM's `PagedAttention` (Kwon et al., 2023).
///
/// Everything else is as in the other kinds, `get` included. An attention shader reads the view through
/// the text of [`Layout::Paged`](crate::Layout::Paged), or is [`Attention`](crate::Attention).
///
/// # Examples
///
/// A prompt that is decoded once, and three continuations of it:
///
/// ```
/// use wgpu_kvcache::{Cache, CachePosition, Gpu, KVCache, PagedKVCache};
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let gpu = Gpu::headless()?;
/// let mut cache = PagedKVCache::new(&gpu);
/// let prompt = gpu.upload(&[1.0_f32; 40], &[1, 1, 40, 1])?;
/// let next = gpu.upload(&[2.0_f32, 3.0, 4.0], &[3, 1, 1, 1])?;
/// gpu.submit_pass("prompt and fork", |pass| {
///     cache.update(pass, &prompt.view(), &prompt.view(), 0, CachePosition::Append)?;
///     cache.batch_repeat_interleave(pass, 3)?; // three rows, still three pages of 16 tokens
///     assert_eq!((cache.stats().pages_used, cache.stats().pages_shared), (3, 3));
///     cache.update(pass, &next.view(), &next.view(), 0, CachePosition::Append).map(|_| ())
/// })?;
/// // Each row now has a last page of its own; the first two are still shared.
/// assert_eq!((cache.stats().pages_used, cache.stats().pages_shared), (5, 2));
/// let (key, _value) = cache.get(0)?.expect("layer 0 was written");
/// assert_eq!(key.shape(), [3, 1, 41, 1]);
/// assert_eq!(key.as_slice::<f32>()?[2 * 41 + 40], 4.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct PagedKVCache {
    layers: Layers<Paged>,
}

impl PagedKVCache {
    /// An empty cache with pages of 16 tokens and a pool that grows.
    pub fn new(gpu: &Gpu) -> Self {
        Self { layers: Layers::new(gpu, Paging::new(16, None, None), None) }
    }

    /// An empty cache. Takes `num_layers`, `max_cache_len`, `page_tokens`, `max_pages`, `windows`, `formats` and
    /// `value_in_key`.
    ///
    /// # Errors
    ///
    /// [`Error::PageSize`](crate::Error::PageSize) if `page_tokens` is no power of two, or more than 2^31;
    /// [`Error::UnusedOption`](crate::Error::UnusedOption) for any other option.
    pub fn with_options(gpu: &Gpu, options: CacheOptions<'_>) -> Result<Self> {
        let used = ["max_cache_len", "page_tokens", "max_pages", "windows"];
        let options = options.check("PagedKVCache", &used)?;
        let (pages, tokens) = (options.max_pages(), options.max_cache_len());
        let paging = Paging::new(options.page_tokens()?, pages, tokens);
        let windows = windows_of(options, false)?;
        let layers = Layers::new(gpu, paging, options.num_layers());
        Ok(Self { layers: layers.with_windows(windows).with_storing(options.storing()) })
    }
}

implement_cache!(PagedKVCache);
