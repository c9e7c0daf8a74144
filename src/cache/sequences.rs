//! The kind whose rows are sequences with names.

use std::ops::Range;

use crate::cache::GetFuture;
use crate::cache::options::{CacheOptions, windows_of};
use crate::error::{Error, Result, SequenceError};
use crate::gpu::Gpu;
use crate::layer_shape::LayerShape;
use crate::sequence::SequenceId;
use crate::stats::Stats;
use crate::storage::sequences::SequenceLimits;
use crate::storage::sequences::groups::{GroupSteps, SequenceGroups};
use crate::storage::step::StepArray;
use crate::stored::{StoredTensor, into_tensors};
use crate::tensor::{HostTensor, TensorView};
use crate::view::LayerView;

/// A cache of sequences that differ in length, join, leave and fork.
///
/// Each sequence has a name, a [`SequenceId`], that stays valid while others come and go. K and V of all sequences
/// lie in pages, [page, H, tokens of a page, D], in one pool a layer; a page has the same number in all layers.
/// A fork shares the pages of its parent. Of these at most the partly filled last one is copied, when one of both
/// writes into it (vLLM's `PagedAttention`: Kwon et al., 2023).
///
/// # A step
///
/// [`plan_step`](Self::plan_step) says which sequences get how many tokens: one for a sequence that decodes, a
/// prompt or a piece of one for a sequence that prefills, in one step. It checks and allocates everything for all
/// layers, so that no layer runs out of room later. Then each layer is updated once with the step's
/// [packed](TensorView::packed) K and V, [tokens of the step, H, D], and
/// [`Attention`](crate::Attention) reads the view that this returns, with packed queries: each token sees its own
/// sequence only, up to itself.
///
/// ```text
/// plan_step(pass, &[(a, 1), (b, 3)])     a decodes, b prefills
///
/// packed tokens    | a0 | b0  b1  b2 |
/// positions        |  7 |  0   1   2 |   a has 7 tokens before the step
/// sequences        |  0 |  1   1   1 |
/// offsets          |  0    1           4 |
/// lengths          |  8    3 |
/// ```
///
/// A step counts as done once it is recorded, as every call that writes: see [`Cache`](crate::Cache) on passes,
/// which holds here, too. Passes must be submitted in the order in which they were recorded. If one is dropped,
/// every later call answers [`Error::PassDropped`] until [`reset`](Self::reset).
///
/// # Prefixes
///
/// [`remember_prefix`](Self::remember_prefix) notes which tokens a sequence begins with. A later sequence that
/// begins with the same tokens starts from their pages ([`add_with_prefix`](Self::add_with_prefix)), also when the
/// first one is gone. Layers with [windows](CacheOptions::with_windows) note the pages that they still have. In a
/// bounded pool ([`CacheOptions::with_max_pages`]) pages of prefixes that no sequence uses make room when they are
/// needed, least recently used first.
///
/// # Examples
///
/// Two sequences of different length in one step:
///
/// ```
/// use wgpu_kvcache::{Attention, DType, Gpu, LayerShape, SequenceCache, TensorView};
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let gpu = Gpu::headless()?;
/// let layer = LayerShape { dtype: DType::F32, heads: 2, key_dim: 4, value_dim: 4 };
/// let mut cache = SequenceCache::new(&gpu, &[layer])?;
/// let mut attention = Attention::new(&gpu);
/// let (a, b) = (cache.add()?, cache.add()?);
///
/// // As a projection writes them: [5 tokens, 2 heads, 4 elements], and 6 query heads.
/// let kv = gpu.upload(&[1.0_f32; 5 * 2 * 4], &[1, 5, 2, 4])?;
/// let query = gpu.upload(&[0.0_f32; 5 * 6 * 4], &[1, 5, 6, 4])?;
/// let output = gpu.upload(&[0.0_f32; 5 * 6 * 4], &[1, 5, 6, 4])?;
/// let kv = TensorView::packed(kv.buffer(), DType::F32, [5, 2, 4])?;
/// let query = TensorView::packed(query.buffer(), DType::F32, [5, 6, 4])?;
/// let output = TensorView::packed(output.buffer(), DType::F32, [5, 6, 4])?;
/// gpu.submit_pass("step", |pass| {
///     let step = cache.plan_step(pass, &[(a, 2), (b, 3)])?;
///     assert_eq!(step.positions(), [0, 1, 0, 1, 2]);
///     let view = cache.update(pass, &step, 0, &kv, &kv)?;
///     attention.record(pass, &query, &view, &output, Default::default())
/// })?;
/// assert_eq!((cache.len(a)?, cache.len(b)?), (2, 3));
/// let c = cache.fork(b, 2)?; // the first two tokens of b, in b's page
/// let (key, _value) = cache.get(c, 0)?.expect("two tokens");
/// assert_eq!(key.shape(), [1, 2, 2, 4]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SequenceCache {
    layers: SequenceGroups,
}

impl SequenceCache {
    /// An empty cache of these layers, with pages of 16 tokens and pools that grow. Memory is allocated by the
    /// first step.
    ///
    /// # Errors
    ///
    /// [`SequenceError::NoLayers`], [`Error::ZeroExtent`], and [`Error::OddHeadDim`] for heads of 16-bit
    /// types that have an odd number of elements.
    pub fn new(gpu: &Gpu, layers: &[LayerShape]) -> Result<Self> {
        Self::with_options(gpu, layers, CacheOptions::default())
    }

    /// An empty cache of these layers. Takes `max_cache_len` (the most tokens of a sequence), `page_tokens`,
    /// `max_pages` (of each layer's pool, which the first step then makes whole, but for layers with windows), `windows`,
    /// `formats` and `value_in_key`. Layers of one window share a table of pages. A step lets go of what its first token
    /// does not look back on, and whole pages go back.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new); [`Error::PageSize`], and [`Error::UnusedOption`] for any other option.
    pub fn with_options(
        gpu: &Gpu,
        layers: &[LayerShape],
        options: CacheOptions<'_>,
    ) -> Result<Self> {
        let kind = "SequenceCache";
        if layers.is_empty() {
            return Err(Error::Sequence(SequenceError::NoLayers));
        }
        if options.num_layers().is_some() {
            return Err(Error::UnusedOption { option: "num_layers", kind });
        }
        let options =
            options.check(kind, &["max_cache_len", "page_tokens", "max_pages", "windows"])?;
        let limits = SequenceLimits {
            page_tokens: options.page_tokens()?,
            most_pages: options.max_pages(),
            most_tokens: options.max_cache_len(),
        };
        let windows = windows_of(options, false)?;
        let storing = options.storing();
        Ok(Self { layers: SequenceGroups::new(gpu, layers, &windows, (limits, storing))? })
    }

    /// Adds a sequence without a token.
    ///
    /// # Errors
    ///
    /// [`Error::PassDropped`] where recorded work was lost; so every call here.
    pub fn add(&mut self) -> Result<SequenceId> {
        self.layers.add()
    }

    /// Adds a sequence with the first `tokens` live tokens of another one, in the same pages. Moves no byte. A parent
    /// that is not needed any more is best removed before the forks' next step: the last one that refers to a partly
    /// filled page writes into it without a copy.
    ///
    /// # Errors
    ///
    /// [`SequenceError::ForkPastEnd`], [`SequenceError::StepUnfinished`] for tokens of a step that has not updated all layers yet, and
    /// [`SequenceError::UnknownSequence`] for a name that was removed or is of another cache;
    /// so every call here that takes a name.
    pub fn fork(&mut self, id: SequenceId, tokens: usize) -> Result<SequenceId> {
        self.layers.fork(id, tokens)
    }

    /// Removes a sequence. Pages that no other sequence and no prefix refers to are free again.
    ///
    /// # Errors
    ///
    /// As for [`fork`](Self::fork).
    pub fn remove(&mut self, id: SequenceId) -> Result<()> {
        self.layers.remove(id)
    }

    /// Keeps the first `length` live tokens of a sequence. Moves no byte.
    ///
    /// # Errors
    ///
    /// As for [`fork`](Self::fork); [`WindowError::PastWindow`](crate::WindowError::PastWindow) where a layer's window
    /// would then look back on tokens that it has let go, so in `drop_latest` and `fork`.
    pub fn truncate(&mut self, id: SequenceId, length: usize) -> Result<()> {
        self.layers.truncate(id, length)
    }

    /// Drops the latest `tokens` live tokens of a sequence, or all if it has fewer: the roll-back of speculative
    /// decoding. Moves no byte.
    ///
    /// # Errors
    ///
    /// As for [`fork`](Self::fork).
    pub fn drop_latest(&mut self, id: SequenceId, tokens: usize) -> Result<()> {
        let length = self.len(id)?.saturating_sub(tokens);
        self.layers.truncate(id, length)
    }

    /// Of the latest `tokens` tokens of a sequence, keeps those at `keep`, in this order, in all layers; 0 is the oldest
    /// of them. As [`Cache::keep_latest`](crate::Cache::keep_latest). The latest [`Step`] is of no use afterwards.
    ///
    /// # Errors
    ///
    /// [`Error::PositionOutOfBounds`] for an index past `tokens`, [`Error::TooFewTokens`],
    /// [`WindowError::PastWindow`](crate::WindowError::PastWindow), and those of [`plan_step`](Self::plan_step).
    pub fn keep_latest(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        id: SequenceId,
        tokens: usize,
        keep: &[u32],
    ) -> Result<()> {
        self.layers.keep_latest(pass, id, tokens, keep)
    }

    /// Keeps the latest `max_length` live tokens of a sequence: a sliding window. Moves no byte.
    ///
    /// # Errors
    ///
    /// As for [`fork`](Self::fork).
    pub fn crop(&mut self, id: SequenceId, max_length: usize) -> Result<()> {
        self.layers.crop(id, max_length)
    }

    /// Live tokens of a sequence; those that layers with a window have let go count, as if they were there.
    ///
    /// # Errors
    ///
    /// As for [`fork`](Self::fork).
    pub fn len(&self, id: SequenceId) -> Result<usize> {
        self.layers.sequences()?.len(id)
    }

    /// The absolute position of a sequence's next token, as rotary embeddings need it: its live tokens, and those
    /// before them that [`crop`](Self::crop) has dropped. A fork counts on from its parent.
    ///
    /// # Errors
    ///
    /// As for [`fork`](Self::fork).
    pub fn next_position(&self, id: SequenceId) -> Result<usize> {
        self.layers.sequences()?.next_position(id)
    }

    /// The pages of a sequence's live tokens in layer `layer_idx`, oldest tokens first: their numbers in the layer's
    /// pool. Sequences that share a page have its number in common, and layers of one window have the same pages. For
    /// those who draw, count or debug; a kernel finds the pages in the [view](LayerView).
    ///
    /// # Examples
    ///
    /// ```
    /// # use wgpu_kvcache::{DType, Gpu, LayerShape, SequenceCache};
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// # let gpu = Gpu::headless()?;
    /// # let layer = LayerShape { dtype: DType::F32, heads: 2, key_dim: 4, value_dim: 4 };
    /// let mut cache = SequenceCache::new(&gpu, &[layer])?;
    /// let a = cache.add()?;
    /// gpu.submit_pass("20 tokens", |pass| cache.plan_step(pass, &[(a, 20)]).map(|_| ()))?;
    /// assert_eq!(cache.pages(a, 0)?.len(), 2); // of 16 tokens each
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::LayerOutOfRange`]; else as for [`fork`](Self::fork).
    pub fn pages(&self, id: SequenceId, layer_idx: usize) -> Result<&[u32]> {
        self.layers.pages(id, layer_idx)
    }

    /// The names of all sequences, in no particular order.
    ///
    /// # Errors
    ///
    /// [`Error::PassDropped`].
    pub fn sequences(&self) -> Result<Vec<SequenceId>> {
        Ok(self.layers.sequences()?.ids().collect())
    }

    /// How many of these tokens, from the first on, a new sequence can begin with, since they lie in pages that
    /// [`remember_prefix`](Self::remember_prefix) has noted: a multiple of the tokens of a page. Of layers with a window
    /// the pages must be there that the next token looks back on.
    ///
    /// # Errors
    ///
    /// [`Error::PassDropped`].
    pub fn cached_prefix(&self, tokens: &[u32]) -> Result<usize> {
        self.layers.cached_prefix(tokens)
    }

    /// Adds a sequence that begins with the longest [noted prefix](Self::cached_prefix) of `tokens`, and returns how many
    /// tokens it has: an engine prefills the rest. Moves no byte. An engine that needs the logits of the last token hands in all
    /// tokens but that one.
    ///
    /// # Errors
    ///
    /// [`Error::PassDropped`].
    pub fn add_with_prefix(&mut self, tokens: &[u32]) -> Result<(SequenceId, usize)> {
        self.layers.add_with_prefix(tokens)
    }

    /// Notes that a sequence begins with `tokens`, for later sequences that do as well. Whole pages are noted and
    /// kept, also after the sequence is changed or removed. The ids come from the caller; the cache compares them
    /// and nothing else.
    ///
    /// Of a layer with a window those pages are noted that it still has. So the first n tokens, a multiple of those of a
    /// page, can be reused if and only if every layer with a window of w tokens still had the last w - 1 of them when
    /// they were noted; what several calls note adds up. A step lets go of what its first token does not look back on:
    /// note a shared prompt as soon as its last token is written, before tokens that are not shared, and a conversation
    /// after each answer. If no layer looks back on other tokens (windows of one token), nothing is noted.
    ///
    /// # Errors
    ///
    /// [`SequenceError::PrefixTokens`] for more ids than the sequence has tokens, and after a crop; else as for
    /// [`fork`](Self::fork).
    pub fn remember_prefix(&mut self, id: SequenceId, tokens: &[u32]) -> Result<()> {
        self.layers.remember_prefix(id, tokens)
    }

    /// Forgets all prefixes. Pages that no sequence refers to are free again.
    ///
    /// # Errors
    ///
    /// [`Error::PassDropped`].
    pub fn forget_prefixes(&mut self) -> Result<()> {
        self.layers.forget_prefixes()
    }

    /// Plans a step: `tokens` lists sequences, each once, and how many new tokens it gets.
    ///
    /// Everything is checked and allocated, for all layers, or nothing has changed. Lengths move on at once. Copies
    /// of shared pages that the step writes into, and of pools that grow, are recorded into `pass`. The lists of
    /// the step go to the GPU in one write. In a steady loop no buffer and no bind group is made.
    ///
    /// # Errors
    ///
    /// - [`SequenceError::EmptyStep`], [`SequenceError::SequenceTwice`], [`SequenceError::NoNewTokens`], [`SequenceError::UnknownSequence`].
    /// - [`SequenceError::StepUnfinished`] if the step before has not updated all layers.
    /// - No room: [`Error::OutOfPages`], [`Error::PoolTooLarge`], [`Error::SequenceTooLong`],
    ///   [`Error::ListTooLarge`], [`Error::OutOfMemory`].
    pub fn plan_step(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        tokens: &[(SequenceId, usize)],
    ) -> Result<Step> {
        Ok(Step(self.layers.plan_step(pass, tokens)?))
    }

    /// Takes the tokens of the latest step back, for an engine that cannot finish it. Its [`Step`] is of no use
    /// afterwards. Does nothing if no step was planned.
    ///
    /// # Errors
    ///
    /// [`Error::PassDropped`].
    pub fn cancel_step(&mut self) -> Result<()> {
        self.layers.cancel_step()
    }

    /// Writes K and V of the step's tokens into layer `layer_idx`, and returns its view: one row for each sequence
    /// of the step. Both are [packed](TensorView::packed), (1, H, tokens of the step, D), in the step's order, and
    /// read where they lie when the pass runs. Their bind group is kept if the same buffers come again, which keeps
    /// these buffers alive until others replace them, or until [`reset`](Self::reset).
    ///
    /// # Errors
    ///
    /// - [`SequenceError::StaleStep`] for a step that is not the latest of this cache.
    /// - [`SequenceError::StepTokens`], [`Error::LayerShape`], [`Error::WrongDType`], [`Error::LayerOutOfRange`].
    /// - Inputs that a kernel cannot read, as for [`KVCache::update`](crate::KVCache::update).
    pub fn update(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        step: &Step,
        layer_idx: usize,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
    ) -> Result<LayerView> {
        self.layers.update(pass, &step.0, layer_idx, key, value)
    }

    /// The view that [`update`](Self::update) returns, for a model's layer that reads the K and V of another one.
    ///
    /// # Errors
    ///
    /// [`SequenceError::StaleStep`], [`Error::LayerOutOfRange`], [`Error::PassDropped`], and [`SequenceError::StepUnfinished`] before the
    /// layer's update.
    pub fn view(&self, step: &Step, layer_idx: usize) -> Result<LayerView> {
        self.layers.view(&step.0, layer_idx)
    }

    /// Reads the live tokens of a sequence back, K and V (1, H, T, D); `None` if it has none. Submits and waits:
    /// see [`KVCache::get`](crate::KVCache::get).
    ///
    /// # Errors
    ///
    /// As there, [`SequenceError::UnknownSequence`], and [`SequenceError::StepUnfinished`] if the sequence's latest step has not updated
    /// the layer yet.
    pub fn get(
        &self,
        id: SequenceId,
        layer_idx: usize,
    ) -> Result<Option<(HostTensor, HostTensor)>> {
        Ok(self.layers.get(id, layer_idx)?.map(into_tensors))
    }

    /// As [`get`](Self::get), without blocking: see [`KVCache::get_async`](crate::KVCache::get_async).
    pub fn get_async(&self, id: SequenceId, layer_idx: usize) -> GetFuture<'_> {
        let stored = self.layers.get_async(id, layer_idx);
        Box::pin(async { Ok(stored.await?.map(into_tensors)) })
    }

    /// As [`get`](Self::get), with the bytes of each token as they are stored: see
    /// [`KVCache::get_stored`](crate::KVCache::get_stored).
    ///
    /// # Errors
    ///
    /// As for [`get`](Self::get).
    pub fn get_stored(
        &self,
        id: SequenceId,
        layer_idx: usize,
    ) -> Result<Option<(StoredTensor, StoredTensor)>> {
        self.layers.get(id, layer_idx)
    }

    /// As [`get_stored`](Self::get_stored), without blocking.
    pub fn get_stored_async(
        &self,
        id: SequenceId,
        layer_idx: usize,
    ) -> GetFuture<'_, StoredTensor> {
        Box::pin(self.layers.get_async(id, layer_idx))
    }

    /// A sequence as a file in the format safetensors: for a later run, another cache of sequences, or a cache of rows.
    /// See [`KVCache::save`](crate::KVCache::save).
    ///
    /// # Errors
    ///
    /// As for [`get`](Self::get).
    #[cfg(feature = "safetensors")]
    pub fn save(&self, id: SequenceId) -> Result<Vec<u8>> {
        crate::saved::to_bytes(&self.layers.save(id)?)
    }

    /// As [`save`](Self::save), without blocking.
    #[cfg(feature = "safetensors")]
    pub fn save_async(&self, id: SequenceId) -> crate::cache::SaveFuture<'_> {
        Box::pin(async move { crate::saved::to_bytes(&self.layers.save_async(id).await?) })
    }

    /// Records the writing of a saved sequence, or of a saved cache of one row, and adds it under a new name. It is a
    /// [`Step`] of its own: the step before must be finished, and [`cancel_step`](Self::cancel_step) does not take it
    /// back.
    ///
    /// Windows may be others than those of the cache that was saved, as long as the file holds what they need. A layer
    /// with a window keeps what its window needs, one token at least, and if it was saved from a layer with a window
    /// what that one held.
    ///
    /// # Errors
    ///
    /// [`StoringError::BadSave`](crate::StoringError::BadSave) for bytes that are damaged, foreign, of other layers or
    /// formats, or without tokens that a layer needs; those of [`plan_step`](Self::plan_step). None of them leaves a
    /// sequence behind.
    #[cfg(feature = "safetensors")]
    pub fn restore(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        bytes: &[u8],
    ) -> Result<SequenceId> {
        self.layers.restore(pass, &crate::saved::parse(bytes)?)
    }

    /// Removes all sequences, forgets all prefixes and lost passes, and keeps the memory. Names of before are
    /// errors.
    pub fn reset(&mut self) {
        self.layers.reset();
    }

    /// Lets go of the bind groups that the layers keep, as [`Cache::release`](crate::Cache::release) does.
    pub fn release(&mut self) {
        self.layers.release();
    }

    /// The number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.layer_count()
    }

    /// Tokens of a page.
    pub fn page_tokens(&self) -> usize {
        self.layers.limits().page_tokens
    }

    /// The most tokens of a sequence, or `None` if only the device bounds it.
    pub fn get_max_cache_shape(&self) -> Option<usize> {
        self.layers.limits().most_tokens
    }

    /// What the cache has recorded and allocated since it was made. Pages are those of one layer, since all layers
    /// of a window use the same ones: of the layers that use most. Pages of noted prefixes count as used, and a page that a sequence and a prefix refer to
    /// as shared.
    pub fn stats(&self) -> Stats {
        self.layers.stats()
    }
}

/// A step that [`SequenceCache::plan_step`] has planned: its sequences in order, and its lists on the host and on
/// the GPU. A clone is the same step.
///
/// The arrays on the GPU are of `u32`, and lie in a buffer with [`wgpu::BufferUsages::STORAGE`] at offsets that are
/// multiples of 256 bytes. Both change from step to step: use dynamic offsets, or make a bind group for each step.
/// Bind read-only. They stay as they are until what was recorded up to the next step has run.
#[derive(Clone, Debug)]
pub struct Step(GroupSteps);

impl Step {
    /// The sequences, in the order of their packed tokens.
    pub fn sequences(&self) -> &[SequenceId] {
        &self.0.first().ids
    }

    /// New tokens of all sequences: T of packed K, V and queries.
    pub fn total_tokens(&self) -> usize {
        self.0.first().work.total
    }

    /// The packed tokens of the `i`-th sequence; `None` past the last one. The last of them is the one whose
    /// logits continue the sequence.
    pub fn tokens(&self, i: usize) -> Option<Range<usize>> {
        self.0.first().work.rows.get(i).map(|row| row.first..row.first + row.tokens)
    }

    /// The absolute position of each packed token, for rotary embeddings: see
    /// [`SequenceCache::next_position`].
    pub fn positions(&self) -> &[u32] {
        self.0.first().array(StepArray::Positions)
    }

    /// The first packed token of each sequence, and at last the number of tokens.
    pub fn offsets(&self) -> &[u32] {
        self.0.first().array(StepArray::Offsets)
    }

    /// Live tokens of each sequence, the new ones included, in the layers that keep most: those without a window, or
    /// with the largest one.
    pub fn lengths(&self) -> &[u32] {
        self.0.first().array(StepArray::Lengths)
    }

    /// [`positions`](Self::positions) on the GPU: a word a token.
    pub fn positions_binding(&self) -> wgpu::BufferBinding<'_> {
        self.binding(StepArray::Positions)
    }

    /// The sequence of each packed token on the GPU, as its number in the step: a word a token.
    pub fn sequences_binding(&self) -> wgpu::BufferBinding<'_> {
        self.binding(StepArray::Sequences)
    }

    /// [`offsets`](Self::offsets) on the GPU: a word a sequence, and one more.
    pub fn offsets_binding(&self) -> wgpu::BufferBinding<'_> {
        self.binding(StepArray::Offsets)
    }

    /// [`lengths`](Self::lengths) on the GPU: a word a sequence.
    pub fn lengths_binding(&self) -> wgpu::BufferBinding<'_> {
        self.binding(StepArray::Lengths)
    }

    fn binding(&self, array: StepArray) -> wgpu::BufferBinding<'_> {
        let (offset, bytes) = self.0.first().binding(array);
        let size = wgpu::BufferSize::new(bytes);
        wgpu::BufferBinding { buffer: &self.0.first().allocation.buffer, offset, size }
    }
}
