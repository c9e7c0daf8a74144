//! A self-attention and a cross-attention cache side by side.

use std::collections::BTreeSet;
#[cfg(feature = "safetensors")]
use std::ops::Range;

#[cfg(feature = "safetensors")]
use crate::cache::SaveFuture;
use crate::cache::dynamic::DynamicKVCache;
use crate::cache::{Cache, GetFuture, KVCache};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::host::batch::BatchChange;
use crate::host::position::CachePosition;
#[cfg(feature = "safetensors")]
use crate::saved::sides::{Sides, join, split};
use crate::stats::Stats;
use crate::tensor::{HostTensor, TensorView};
use crate::view::LayerView;

/// One of the two caches of an [`EncoderDecoderCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The decoder's own tokens.
    SelfAttention,
    /// The encoder's memory.
    CrossAttention,
}

/// The two caches of an encoder-decoder model.
///
/// The cross side is the encoder's memory: it is written once for each layer, after which
/// [`is_updated`](Self::is_updated) says so, and [`crop`](Cache::crop), [`truncate`](Cache::truncate),
/// [`crop_rows`](Cache::crop_rows), [`truncate_rows`](Cache::truncate_rows) and
/// [`drop_latest`](Cache::drop_latest) leave it alone. Batch operations and [`reset`](Cache::reset) concern
/// both sides; a batch operation checks both before it touches one. If all beams attend to the memory of one input,
/// store it once: see [`with_shared_memory`](Self::with_shared_memory).
///
/// # Examples
///
/// ```
/// use wgpu_kvcache::{Cache, CachePosition, EncoderDecoderCache, Gpu, Side};
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let gpu = Gpu::headless()?;
/// let mut cache = EncoderDecoderCache::dynamic(&gpu);
/// let memory = gpu.upload(&[1.0_f32; 6], &[1, 1, 6, 1])?;
/// gpu.submit_pass("encoder memory", |pass| {
///     cache
///         .update(pass, &memory.view(), &memory.view(), 0, CachePosition::Append, Side::CrossAttention)
///         .map(|_| ())
/// })?;
/// assert!(cache.is_updated(0));
/// cache.crop(2);
/// assert_eq!(cache.get_seq_length(0, Side::CrossAttention)?, 6);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct EncoderDecoderCache<S = DynamicKVCache, C = DynamicKVCache> {
    self_attention: S,
    cross_attention: C,
    /// The layers whose cross side was written since the last reset.
    updated: BTreeSet<usize>,
    /// Whether one row of memory serves all rows of the decoder.
    is_shared: bool,
}

impl EncoderDecoderCache {
    /// Two dynamic caches.
    pub fn dynamic(gpu: &Gpu) -> Self {
        Self::new(DynamicKVCache::new(gpu), DynamicKVCache::new(gpu))
    }
}

impl<S: KVCache, C: KVCache> EncoderDecoderCache<S, C> {
    /// A cache made of two.
    pub fn new(self_attention: S, cross_attention: C) -> Self {
        Self { self_attention, cross_attention, updated: BTreeSet::new(), is_shared: false }
    }

    /// The same cache, whose cross side is of one batch row that all rows of the decoder share, such as the beams of
    /// one input: batch operations concern the self side alone. [`Attention`](crate::Attention) reads a view of one batch row
    /// for any number of query rows.
    ///
    /// # Examples
    ///
    /// ```
    /// use wgpu_kvcache::{Cache, CachePosition, EncoderDecoderCache, Gpu, Side};
    ///
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// let gpu = Gpu::headless()?;
    /// let mut cache = EncoderDecoderCache::dynamic(&gpu).with_shared_memory();
    /// let tokens = gpu.upload(&[1.0_f32; 6], &[1, 1, 6, 1])?;
    /// gpu.submit_pass("four beams", |pass| {
    ///     for side in [Side::CrossAttention, Side::SelfAttention] {
    ///         cache.update(pass, &tokens.view(), &tokens.view(), 0, CachePosition::Append, side)?;
    ///     }
    ///     cache.batch_repeat_interleave(pass, 4)
    /// })?;
    /// let rows = |side| cache.view(0, side).map(|view| view.map(|view| view.key_shape()[0]));
    /// assert_eq!(rows(Side::SelfAttention)?, Some(4));
    /// assert_eq!(rows(Side::CrossAttention)?, Some(1));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_shared_memory(self) -> Self {
        Self { is_shared: true, ..self }
    }

    /// The decoder's side.
    pub fn self_attention_cache(&self) -> &S {
        &self.self_attention
    }

    /// The decoder's side, to be changed.
    pub fn self_attention_cache_mut(&mut self) -> &mut S {
        &mut self.self_attention
    }

    /// The encoder's memory.
    pub fn cross_attention_cache(&self) -> &C {
        &self.cross_attention
    }

    /// The encoder's memory, to be changed.
    pub fn cross_attention_cache_mut(&mut self) -> &mut C {
        &mut self.cross_attention
    }

    /// Whether the cross side of `layer_idx` was written through this cache since the last reset, so
    /// that the encoder's K and V need not be computed again. Not where what was written is known to be
    /// lost: with a pass that was dropped, say, after which [`view`](Self::view) is an error until a reset.
    pub fn is_updated(&self, layer_idx: usize) -> bool {
        self.updated.contains(&layer_idx) && self.cross_attention.view(layer_idx).is_ok()
    }

    fn side(&self, side: Side) -> &dyn KVCache {
        match side {
            Side::SelfAttention => &self.self_attention,
            Side::CrossAttention => &self.cross_attention,
        }
    }

    /// [`KVCache::update`] on one of the sides.
    ///
    /// # Errors
    ///
    /// As there; [`Error::SharedMemory`] for a [shared memory](Self::with_shared_memory) of more than one batch row.
    pub fn update(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
        layer_idx: usize,
        cache_position: CachePosition<'_>,
        side: Side,
    ) -> Result<LayerView> {
        if side == Side::SelfAttention {
            let_go(&mut self.cross_attention);
            return self.self_attention.update(pass, key, value, layer_idx, cache_position);
        }
        let_go(&mut self.self_attention);
        if self.is_shared && key.shape()[0] != 1 {
            return Err(Error::SharedMemory { batch: key.shape()[0] });
        }
        let view = self.cross_attention.update(pass, key, value, layer_idx, cache_position)?;
        self.updated.insert(layer_idx);
        Ok(view)
    }

    /// [`KVCache::view`] of one of the sides.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn view(&self, layer_idx: usize, side: Side) -> Result<Option<LayerView>> {
        self.side(side).view(layer_idx)
    }

    /// [`KVCache::get`] of one of the sides.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn get(&self, layer_idx: usize, side: Side) -> Result<Option<(HostTensor, HostTensor)>> {
        self.side(side).get(layer_idx)
    }

    /// [`KVCache::get_async`] of one of the sides: as [`get`](Self::get), without blocking.
    pub fn get_async(&self, layer_idx: usize, side: Side) -> GetFuture<'_> {
        self.side(side).get_async(layer_idx)
    }

    /// [`KVCache::save`] of both sides in one file: the layers of a range, of each side those that hold tokens. The
    /// names of tensors are those of one cache with the side before them: `self_attention.layer.3.key` and
    /// `cross_attention.layer.3.key`. The metadata says which layers [are updated](Self::is_updated).
    ///
    /// # Errors
    ///
    /// As there, of either side; [`StoringError::BadSave`](crate::StoringError::BadSave) if a side of one's own saves
    /// in another format.
    #[cfg(feature = "safetensors")]
    pub fn save(&self, layers: Range<usize>) -> Result<Vec<u8>> {
        let own = self.self_attention.save(layers.clone())?;
        let memory = self.cross_attention.save(layers)?;
        join([&own, &memory], &self.updated)
    }

    /// As [`save`](Self::save), without blocking.
    #[cfg(feature = "safetensors")]
    pub fn save_async(&self, layers: Range<usize>) -> SaveFuture<'_> {
        let own = self.self_attention.save_async(layers.clone());
        let memory = self.cross_attention.save_async(layers);
        let updated = &self.updated;
        Box::pin(async move { join([&own.await?, &memory.await?], updated) })
    }

    /// Records the writing of both sides of a saved cache into this one, which holds nothing: see
    /// [`KVCache::restore`]. The sides may be of other kinds than those that were saved.
    ///
    /// # Examples
    ///
    /// ```
    /// use wgpu_kvcache::{CachePosition, EncoderDecoderCache, Gpu, Side};
    ///
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// let gpu = Gpu::headless()?;
    /// let mut cache = EncoderDecoderCache::dynamic(&gpu);
    /// let tokens = gpu.upload(&[1.0_f32; 6], &[1, 1, 6, 1])?;
    /// gpu.submit_pass("both sides", |pass| {
    ///     [Side::CrossAttention, Side::SelfAttention].into_iter().try_for_each(|side| {
    ///         cache
    ///             .update(pass, &tokens.view(), &tokens.view(), 0, CachePosition::Append, side)
    ///             .map(|_| ())
    ///     })
    /// })?;
    /// let bytes = cache.save(0..usize::MAX)?;
    /// let mut other = EncoderDecoderCache::dynamic(&gpu);
    /// gpu.submit_pass("restore", |pass| other.restore(pass, &bytes))?;
    /// assert!(other.is_updated(0));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As there; [`StoringError::BadSave`](crate::StoringError::BadSave) for a file of one cache, and
    /// [`Error::SharedMemory`] for a cross side of several batch rows where one is [shared](Self::with_shared_memory).
    /// After any of them, a side that held nothing holds nothing, and one that held tokens is as it was.
    #[cfg(feature = "safetensors")]
    pub fn restore(&mut self, pass: &mut wgpu::ComputePass<'_>, bytes: &[u8]) -> Result<()> {
        let_go(&mut self.self_attention);
        let_go(&mut self.cross_attention);
        let Sides { files: [own, memory], updated, memory_rows } = split(bytes)?;
        if self.is_shared && memory_rows > 1 {
            return Err(Error::SharedMemory { batch: memory_rows });
        }
        self.self_attention.restore(pass, &own)?;
        if let Err(error) = self.cross_attention.restore(pass, &memory) {
            // It held nothing, or would have refused.
            self.self_attention.reset();
            return Err(error);
        }
        self.updated = updated;
        Ok(())
    }

    /// [`KVCache::get_seq_length`] of one of the sides.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn get_seq_length(&self, layer_idx: usize, side: Side) -> Result<usize> {
        self.side(side).get_seq_length(layer_idx)
    }

    /// [`KVCache::get_next_position`] of one of the sides.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn get_next_position(&self, layer_idx: usize, side: Side) -> Result<usize> {
        self.side(side).get_next_position(layer_idx)
    }
}

impl<S: KVCache, C: KVCache> Cache for EncoderDecoderCache<S, C> {
    fn reset(&mut self) {
        self.self_attention.reset();
        self.cross_attention.reset();
        self.updated.clear();
    }

    fn release(&mut self) {
        self.self_attention.release();
        self.cross_attention.release();
    }

    fn crop(&mut self, max_length: usize) {
        let_go(&mut self.cross_attention);
        self.self_attention.crop(max_length);
    }

    fn truncate(&mut self, length: usize) {
        let_go(&mut self.cross_attention);
        self.self_attention.truncate(length);
    }

    fn crop_rows(&mut self, max_lengths: &[usize]) -> Result<()> {
        let_go(&mut self.cross_attention);
        self.self_attention.crop_rows(max_lengths)
    }

    fn truncate_rows(&mut self, lengths: &[usize]) -> Result<()> {
        let_go(&mut self.cross_attention);
        self.self_attention.truncate_rows(lengths)
    }

    fn drop_latest(&mut self, tokens: usize) -> Result<()> {
        let_go(&mut self.cross_attention);
        self.self_attention.drop_latest(tokens)
    }

    /// Of the self-attention side.
    fn keep_latest(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        tokens: usize,
        keep: &[u32],
    ) -> Result<()> {
        let_go(&mut self.cross_attention);
        self.self_attention.keep_latest(pass, tokens, keep)
    }

    fn prepare_batch(&mut self, change: BatchChange<'_>) -> Result<()> {
        let prepared = self.self_attention.prepare_batch(change);
        let prepared = prepared.and_then(|()| match self.is_shared {
            true => Ok(()),
            false => self.cross_attention.prepare_batch(change),
        });
        if prepared.is_err() {
            let_go(&mut self.self_attention);
            let_go(&mut self.cross_attention);
        }
        prepared
    }

    fn batch_select_indices(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        indices: &[u32],
    ) -> Result<()> {
        // Where it is prepared already, this only asks whether the sides are still whole.
        self.prepare_batch(BatchChange::Select(indices))?;
        self.self_attention.batch_select_indices(pass, indices)?;
        if self.is_shared {
            return Ok(());
        }
        self.cross_attention.batch_select_indices(pass, indices)
    }

    fn batch_repeat_interleave(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        repeats: usize,
    ) -> Result<()> {
        self.prepare_batch(BatchChange::Repeat(repeats))?;
        self.self_attention.batch_repeat_interleave(pass, repeats)?;
        if self.is_shared {
            return Ok(());
        }
        self.cross_attention.batch_repeat_interleave(pass, repeats)
    }

    /// Room on the self-attention side.
    fn reserve(&mut self, pass: &mut wgpu::ComputePass<'_>, tokens: usize) -> Result<()> {
        let_go(&mut self.cross_attention);
        self.self_attention.reserve(pass, tokens)
    }

    /// The bound of the self-attention side.
    fn get_max_cache_shape(&self) -> Option<usize> {
        self.self_attention.get_max_cache_shape()
    }

    fn stats(&self) -> Stats {
        self.self_attention.stats() + self.cross_attention.stats()
    }
}

/// Lets go of what a side has prepared: any call does, and this one does nothing else.
fn let_go(side: &mut impl Cache) {
    side.truncate(usize::MAX);
}
