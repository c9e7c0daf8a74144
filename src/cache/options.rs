//! What a cache is made for: [`CacheOptions`].

use crate::error::{Error, Result, WindowError};
use crate::format::Formats;
use crate::host::window::Window;
use crate::storage::write::Storing;

/// What a cache is made for. Every kind takes the same options, and refuses those that it has no use for.
///
/// | option | [`DynamicKVCache`] | [`StaticKVCache`] | [`PagedKVCache`] | [`SequenceCache`] |
/// | --- | --- | --- | --- | --- |
/// | `num_layers` | bound, else as many as are written | required | bound, else as many as are written | - (it is made with its layers) |
/// | `max_cache_len` | - | required | bound, else the pool's | bound, else the pool's |
/// | `capacity` | tokens to begin with | - | - | - |
/// | `page_tokens` | - | - | 16, if not given | 16, if not given |
/// | `max_pages` | - | - | bound, else the pool grows | bound, else the pools grow |
/// | `windows` | by layer | by layer | by layer | by layer |
/// | `max_chunk` | - | longest update of a layer with a window | - | - |
/// | `formats` | all layers | all layers | all layers | all layers |
/// | `value_in_key` | all layers | all layers | all layers | all layers |
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
pub struct CacheOptions<'a> {
    num_layers: Option<usize>,
    max_cache_len: Option<usize>,
    capacity: Option<usize>,
    page_tokens: Option<usize>,
    max_pages: Option<usize>,
    windows: &'a [Option<usize>],
    max_chunk: Option<usize>,
    formats: Formats,
    is_value_in_key: bool,
}

impl<'a> CacheOptions<'a> {
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
    ///
    /// Of a layer with a [window](Self::with_windows) the pool has what the window needs, and no more than this bound:
    /// in a [`PagedKVCache`](crate::PagedKVCache) as many pages as the rows and the longest update so far may need; in a
    /// [`SequenceCache`](crate::SequenceCache) it grows with the sequences, doubling.
    pub fn with_max_pages(self, pages: impl Into<Option<usize>>) -> Self {
        Self { max_pages: pages.into(), ..self }
    }

    /// The window of each layer, the first layer's first; `None`, and layers past the last entry, keep all tokens.
    ///
    /// A layer with a window of w tokens, of which a query sees its own and the w - 1 before it, keeps what its window needs:
    /// an update that appends n tokens lets go of all live tokens but the latest w - 1 first. So
    /// the view that it returns has at most w - 1 + n tokens, and causal attention over it is exact, whatever the pieces
    /// that a prompt comes in: it looks back no further than the window, with or without a
    /// [window of its own](crate::AttentionOptions::with_window). In rings the memory is never more than that of w tokens and the longest update; in pages, whole
    /// pages before the window go back.
    ///
    /// [`get_seq_length`](crate::KVCache::get_seq_length) and [`get`](crate::KVCache::get) tell of the live tokens;
    /// [`get_next_position`](crate::KVCache::get_next_position) counts on. Positions of an update count live tokens, as after a
    /// [`crop`](crate::Cache::crop), and an update at positions lets go of nothing. The latest update can be rolled
    /// back whole; further back tokens are missing, which is [`WindowError::PastWindow`].
    ///
    /// # Examples
    ///
    /// ```
    /// use wgpu_kvcache::{CacheOptions, CachePosition, DynamicKVCache, Gpu, KVCache};
    ///
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// let gpu = Gpu::headless()?;
    /// // Layer 0 looks back on four tokens, layer 1 on all.
    /// let options = CacheOptions::default().with_windows(&[Some(4), None]);
    /// let mut cache = DynamicKVCache::with_options(&gpu, options)?;
    /// let tokens = gpu.upload(&[0.0_f32; 5], &[1, 1, 5, 1])?;
    /// gpu.submit_pass("ten tokens in two pieces", |pass| {
    ///     for layer in [0, 1, 0, 1] {
    ///         cache.update(pass, &tokens.view(), &tokens.view(), layer, CachePosition::Append)?;
    ///     }
    ///     Ok::<_, wgpu_kvcache::Error>(())
    /// })?;
    /// assert_eq!([cache.get_seq_length(0)?, cache.get_seq_length(1)?], [3 + 5, 10]);
    /// assert_eq!([cache.get_next_position(0)?, cache.get_next_position(1)?], [10, 10]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_windows(self, windows: &'a [Option<usize>]) -> Self {
        Self { windows, ..self }
    }

    /// The most tokens of an update of a layer with a window, in a cache that allocates once; as many as the
    /// window, if not given.
    pub fn with_max_chunk(self, tokens: impl Into<Option<usize>>) -> Self {
        Self { max_chunk: tokens.into(), ..self }
    }

    /// How K and V are stored, whatever type they come in as: f32, f16 or bf16, and not always the same. Without this
    /// option they are stored as they come in, bits untouched, and always come in as the same type.
    ///
    /// # Examples
    ///
    /// ```
    /// use wgpu_kvcache::{CacheOptions, DynamicKVCache, Format, Formats, Gpu};
    ///
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// let gpu = Gpu::headless()?;
    /// let mixed = Formats { key: Some(Format::Q8_0), value: Some(Format::Q4_0) };
    /// let cache = DynamicKVCache::with_options(&gpu, CacheOptions::default().with_formats(mixed))?;
    /// # let _ = cache;
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_formats(self, formats: impl Into<Formats>) -> Self {
        Self { formats: formats.into(), ..self }
    }

    /// Stores K alone: V of every token is the first elements of its K (multi-head latent attention: DeepSeek-AI, 2024),
    /// in all layers. What comes in as V must be [those elements](crate::TensorView::with_head_dim) of what comes in as
    /// K; they are not stored again.
    ///
    /// # Examples
    ///
    /// ```
    /// use wgpu_kvcache::{Cache, CacheOptions, CachePosition, DynamicKVCache, Gpu, KVCache};
    ///
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// let gpu = Gpu::headless()?;
    /// let options = CacheOptions::default().with_value_in_key();
    /// let mut cache = DynamicKVCache::with_options(&gpu, options)?;
    /// // A latent of 512 elements and 64 rotated ones.
    /// let key = gpu.upload(&[1.0_f32; 3 * 576], &[1, 1, 3, 576])?;
    /// let value = key.view().with_head_dim(512);
    /// let view = gpu.submit_pass("prompt", |pass| {
    ///     cache.update(pass, &key.view(), &value, 0, CachePosition::Append)
    /// })?;
    /// assert!(view.is_value_in_key());
    /// assert_eq!((view.value_shape(), view.value_strides()[2]), ([1, 1, 3, 512], 576));
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_value_in_key(self) -> Self {
        Self { is_value_in_key: true, ..self }
    }

    /// How what comes in is stored.
    pub(super) fn storing(&self) -> Storing {
        Storing { formats: self.formats, is_value_in_key: self.is_value_in_key }
    }

    pub(super) fn max_chunk(&self) -> Option<usize> {
        self.max_chunk
    }

    /// The window of each layer, checked.
    pub(super) fn windows(&self) -> Result<Vec<Option<usize>>> {
        match self.windows.iter().position(|window| *window == Some(0)) {
            Some(layer) => Err(WindowError::NoWindow { layer }.into()),
            None => Ok(self.windows.to_vec()),
        }
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
            ("windows", (!self.windows.is_empty()).then_some(0)),
            ("max_chunk", self.max_chunk),
        ];
        match given.iter().find(|(option, value)| value.is_some() && !used.contains(option)) {
            Some((option, _)) => Err(Error::UnusedOption { option, kind }),
            None => Ok(self),
        }
    }
}

/// The window of each layer, as the storage takes it; a kind that allocates once bounds updates.
pub(super) fn windows_of(
    options: CacheOptions<'_>,
    is_bounded: bool,
) -> Result<Vec<Option<Window>>> {
    let window = |tokens: usize| Window {
        tokens,
        max_chunk: is_bounded.then(|| options.max_chunk().unwrap_or(tokens)),
    };
    Ok(options.windows()?.into_iter().map(|tokens| tokens.map(window)).collect())
}
