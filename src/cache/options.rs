//! What a cache is made for: [`CacheOptions`].

use crate::error::{Error, Result};

/// What a cache is made for. Every kind takes the same options, and refuses those that it has no use for.
///
/// | option | [`DynamicKVCache`] | [`StaticKVCache`] | [`PagedKVCache`] | [`SequenceCache`] |
/// | --- | --- | --- | --- | --- |
/// | `num_layers` | bound, else as many as are written | required | bound, else as many as are written | - (it is made with its layers) |
/// | `max_cache_len` | - | required | bound, else the pool's | bound, else the pool's |
/// | `capacity` | tokens to begin with | - | - | - |
/// | `page_tokens` | - | - | 16, if not given | 16, if not given |
/// | `max_pages` | - | - | bound, else the pool grows | bound, else the pools grow |
///
/// # Examples
///
/// ```
/// use wgpu_kvcache::{CacheOptions, Gpu, PagedKVCache, StaticKVCache};
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let gpu = Gpu::headless()?;
/// let options = CacheOptions::default().with_num_layers(24);
/// let fixed = StaticKVCache::with_options(&gpu, options.with_max_cache_len(4096))?;
/// let paged = PagedKVCache::with_options(&gpu, options.with_max_pages(1024))?;
/// # let _ = (fixed, paged);
/// # Ok(())
/// # }
/// ```
///
/// [`DynamicKVCache`]: crate::DynamicKVCache
/// [`StaticKVCache`]: crate::StaticKVCache
/// [`PagedKVCache`]: crate::PagedKVCache
/// [`SequenceCache`]: crate::SequenceCache
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "options do nothing until a cache is made with them"]
pub struct CacheOptions {
    num_layers: Option<usize>,
    max_cache_len: Option<usize>,
    capacity: Option<usize>,
    page_tokens: Option<usize>,
    max_pages: Option<usize>,
}

impl CacheOptions {
    /// The number of layers. An update of a layer past them is refused.
    pub fn with_num_layers(self, layers: impl Into<Option<usize>>) -> Self {
        Self { num_layers: layers.into(), ..self }
    }

    /// The most tokens of a row.
    pub fn with_max_cache_len(self, tokens: impl Into<Option<usize>>) -> Self {
        Self { max_cache_len: tokens.into(), ..self }
    }

    /// Tokens a row that a layer has memory for from its first update on, after a reset to another shape as
    /// well: a sequence of known length never grows.
    pub fn with_capacity(self, tokens: impl Into<Option<usize>>) -> Self {
        Self { capacity: tokens.into(), ..self }
    }

    /// Tokens of a page: a power of two. Small pages share more, large ones have shorter tables.
    pub fn with_page_tokens(self, tokens: impl Into<Option<usize>>) -> Self {
        Self { page_tokens: tokens.into(), ..self }
    }

    /// The most pages of a layer. Its pool is then made at once, at the first update, as large as that or as
    /// the device can bind, and its buffers stay the same while the layer's shape does, after a reset as before
    /// it. Without this option the pool grows, doubling.
    pub fn with_max_pages(self, pages: impl Into<Option<usize>>) -> Self {
        Self { max_pages: pages.into(), ..self }
    }

    pub(super) fn num_layers(&self) -> Option<usize> {
        self.num_layers
    }

    pub(super) fn max_cache_len(&self) -> Option<usize> {
        self.max_cache_len
    }

    pub(super) fn capacity(&self) -> Option<usize> {
        self.capacity
    }

    pub(super) fn max_pages(&self) -> Option<usize> {
        self.max_pages
    }

    /// Checked: a power of two that 32 bits hold.
    pub(super) fn page_tokens(&self) -> Result<usize> {
        let page_tokens = self.page_tokens.unwrap_or(16);
        if !page_tokens.is_power_of_two() || u32::try_from(page_tokens).is_err() {
            return Err(Error::PageSize { page_tokens });
        }
        Ok(page_tokens)
    }

    /// Refuses options that `kind` has no use for.
    pub(super) fn check(self, kind: &'static str, used: &[&'static str]) -> Result<Self> {
        let given = [
            ("max_cache_len", self.max_cache_len),
            ("capacity", self.capacity),
            ("page_tokens", self.page_tokens),
            ("max_pages", self.max_pages),
        ];
        match given.iter().find(|(option, value)| value.is_some() && !used.contains(option)) {
            Some((option, _)) => Err(Error::UnusedOption { option, kind }),
            None => Ok(self),
        }
    }
}
