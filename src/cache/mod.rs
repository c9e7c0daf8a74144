//! The contract: the traits [`Cache`] and [`KVCache`].

pub(crate) mod attend;
pub(crate) mod dynamic;
pub(crate) mod encoder_decoder;
pub(crate) mod fixed;
mod kind;
pub(crate) mod layer_memory;
pub(crate) mod memory;
pub(crate) mod options;
pub(crate) mod paged;
pub(crate) mod sequences;

use std::future::Future;
use std::pin::Pin;

use crate::error::Result;
use crate::host::batch::BatchChange;
use crate::host::position::CachePosition;
use crate::stats::Stats;
use crate::stored::StoredTensor;
use crate::tensor::{HostTensor, TensorView};
use crate::view::LayerView;

/// What every cache can do, whatever its layers are for.
///
/// # How work reaches the GPU
///
/// Calls that write record compute dispatches into the caller's pass. Nothing is submitted, waited for
/// or mapped. A call counts as done once it is recorded: lengths and views move on at once, and the GPU
/// follows when the engine submits. So
/// - passes are of the device that the cache's [`Gpu`](crate::Gpu) is made with;
/// - one pass is recorded at a time: a call into a pass answers [`Error::EarlierPass`] if the cache has recorded into
///   a later one since, and that has not run yet;
/// - passes must be submitted in the order in which they were recorded, which is not checked;
/// - a pass must not be dropped, and its submit must not fail: if it is, or does, every later call answers
///   [`Error::PassDropped`] until [`reset`](Cache::reset). A dropped pass is known at once. Of a failed submit
///   wgpu says nothing but to the engine's own error handler, where there is one; the cache finds out at the
///   next [`get`](KVCache::get);
/// - a call leaves its own pipeline, bind groups 0 to 2 and immediates set in the pass; set yours again.
///
/// # Errors change nothing
///
/// Everything is checked and allocated before anything is recorded, for all layers. A call that returns
/// an error has left the cache, on the host and the GPU, as it was.
///
/// Any call may answer [`Error::DeviceLost`] once the device is lost, and [`Error::Device`] where wgpu refuses
/// to make something, such as the binding of a buffer that was destroyed.
///
/// # For implementers
///
/// `prepare_batch` must find every reason for which the change could fail. A cache made of several
/// others ([`EncoderDecoderCache`](crate::EncoderDecoderCache)) prepares all of them before it
/// changes one.
///
/// [`Error::Device`]: crate::Error::Device
/// [`Error::DeviceLost`]: crate::Error::DeviceLost
/// [`Error::EarlierPass`]: crate::Error::EarlierPass
/// [`Error::PassDropped`]: crate::Error::PassDropped
pub trait Cache {
    /// Empties every layer and keeps the memory for reuse. A layer may have another shape afterwards.
    fn reset(&mut self);

    /// Lets go of the bind groups that the layers keep for buffers that come again, and so of an engine's buffers: see
    /// [`pooled`](crate::pooled). Tokens stay. What is recorded still runs. A cache of one's own that keeps none has no need of
    /// this method.
    fn release(&mut self) {}

    /// Keeps the latest `max_length` tokens of every layer: a sliding window. Moves no bytes. The
    /// oldest token kept becomes position 0.
    ///
    /// Of a layer whose rows differ in length it drops as many of the first positions of every row as the layer is
    /// too long: a shorter row keeps fewer tokens, or none. [`crop_rows`](Cache::crop_rows) counts for each row.
    fn crop(&mut self, max_length: usize);

    /// Keeps the first `length` tokens of every layer, of each row: the roll-back of speculative decoding. Moves
    /// no bytes. Tokens that a layer has let go for its window ([`CacheOptions::with_windows`](crate::CacheOptions::with_windows))
    /// count as if they were there, here and in [`truncate_rows`](Cache::truncate_rows).
    ///
    /// Where a layer's window would look back on tokens that it has let go, nothing is cut, and every later call
    /// answers [`WindowError::PastWindow`](crate::WindowError::PastWindow) until [`reset`](Cache::reset), since this one cannot.
    /// [`drop_latest`](Cache::drop_latest) answers at once.
    fn truncate(&mut self, length: usize);

    /// Keeps the latest `max_lengths[b]` tokens of batch row `b` of every layer that was written; all of a row
    /// that has fewer. Moves no bytes. The oldest token kept of each row becomes its position 0. Afterwards the
    /// layer is as long as its longest row.
    ///
    /// The pages of a [`PagedKVCache`](crate::PagedKVCache) go back once no row needs their positions, counted from
    /// where the rows began together: rows that are cropped at very different rates keep pages that they do not
    /// use.
    ///
    /// # Errors
    ///
    /// [`Error::RowCount`](crate::Error::RowCount) if a layer that was written has another number of rows, and
    /// [`Error::PassDropped`](crate::Error::PassDropped). A cache of one's own that does not have this method
    /// answers [`Error::NotSupported`](crate::Error::NotSupported).
    ///
    /// [`WindowError::RowsApart`](crate::WindowError::RowsApart) for layers with windows, if rows would differ in how many
    /// tokens count that are let go. They do not if each row is cropped to its live tokens or fewer, or equal rows to one
    /// length. Tokens that were let go count here as in [`truncate`](Cache::truncate).
    fn crop_rows(&mut self, max_lengths: &[usize]) -> Result<()> {
        let _ = max_lengths;
        Err(crate::Error::NotSupported { what: "crop_rows()" })
    }

    /// Keeps the first `lengths[b]` tokens of batch row `b` of every layer that was written; all of a row that has
    /// fewer. Moves no bytes. Afterwards the layer is as long as its longest row. With
    /// [`CachePosition::PerRow`], this is the roll-back of a batch of which each row accepts its own number of
    /// drafted tokens.
    ///
    /// # Errors
    ///
    /// As for [`crop_rows`](Cache::crop_rows).
    fn truncate_rows(&mut self, lengths: &[usize]) -> Result<()> {
        let _ = lengths;
        Err(crate::Error::NotSupported { what: "truncate_rows()" })
    }

    /// Drops the latest `tokens` tokens of every layer; all of those that have fewer. Moves no bytes. Unlike
    /// [`truncate`](Cache::truncate) it needs no count of live tokens: to roll `k` drafted tokens back, drop `k`.
    ///
    /// # Errors
    ///
    /// [`WindowError::PastWindow`](crate::WindowError::PastWindow) where a layer's window would then look back on tokens that it
    /// has let go; nothing is dropped. A cache of one's own that does not have this method answers
    /// [`Error::NotSupported`](crate::Error::NotSupported).
    fn drop_latest(&mut self, tokens: usize) -> Result<()> {
        let _ = tokens;
        Err(crate::Error::NotSupported { what: "drop_latest()" })
    }

    /// Of the latest `tokens` tokens of every row, in every layer that was written, keeps those at `keep`, in this
    /// order; 0 is the oldest of them. After a tree of drafted tokens was verified
    /// ([`BitMask::words_of_tree`](crate::BitMask::words_of_tree)), this keeps the accepted path. The tokens are copied
    /// through new memory that goes with the pass.
    ///
    /// Absolute positions follow: the next token comes behind those that were kept, which stand where the first
    /// dropped one stood. K that holds rotations of other positions is the engine's to mend.
    ///
    /// # Errors
    ///
    /// [`Error::PositionOutOfBounds`] for an index past `tokens`, [`Error::TooFewTokens`] if a layer has fewer live
    /// ones, [`WindowError::PastWindow`](crate::WindowError::PastWindow), [`Error::NotSupported`] if rows differ in
    /// length; those of an append; none of them changes anything. A cache of one's own that does not have this method answers
    /// [`Error::NotSupported`].
    ///
    /// [`Error::PositionOutOfBounds`]: crate::Error::PositionOutOfBounds
    /// [`Error::TooFewTokens`]: crate::Error::TooFewTokens
    /// [`Error::NotSupported`]: crate::Error::NotSupported
    fn keep_latest(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        tokens: usize,
        keep: &[u32],
    ) -> Result<()> {
        let _ = (pass, tokens, keep);
        Err(crate::Error::NotSupported { what: "keep_latest()" })
    }

    /// Checks a change of the batch and allocates all that it needs, so that the same change, made
    /// next, cannot fail for want of room. Alters nothing that can be seen. To prepare the same change again
    /// keeps what was prepared; any other call that takes the cache mutably lets go of it.
    ///
    /// # Errors
    ///
    /// Those of the change.
    fn prepare_batch(&mut self, change: BatchChange<'_>) -> Result<()>;

    /// Makes new batch row `i` of every layer the old row `indices[i]`. The batch may shrink, grow and
    /// repeat rows. Layers that were never written stay so, and take no part: their first update afterwards
    /// must have as many rows as a layer that did, else it is refused ([`Error::BatchChanged`]) until a reset.
    ///
    /// In a ring ([`DynamicKVCache`](crate::DynamicKVCache), [`StaticKVCache`](crate::StaticKVCache)),
    /// within the rows that a layer has memory for, the rows move in place, without scratch memory, and
    /// rows that stay cost nothing. A larger batch goes into new buffers, and so does a change that moves
    /// more than 8,192 rows. Rows that start at different slots ([`crop_rows`](Cache::crop_rows)) move with all
    /// slots of theirs, live or not. In a [`PagedKVCache`](crate::PagedKVCache) nothing moves.
    ///
    /// # Errors
    ///
    /// [`Error::NoIndices`], [`Error::IndexOutOfRange`]; where the batch grows also
    /// [`Error::LayerTooLarge`] and [`Error::OutOfMemory`]; for very many rows [`Error::ListTooLarge`].
    ///
    /// [`Error::ListTooLarge`]: crate::Error::ListTooLarge
    /// [`Error::BatchChanged`]: crate::Error::BatchChanged
    /// [`Error::NoIndices`]: crate::Error::NoIndices
    /// [`Error::IndexOutOfRange`]: crate::Error::IndexOutOfRange
    /// [`Error::LayerTooLarge`]: crate::Error::LayerTooLarge
    /// [`Error::OutOfMemory`]: crate::Error::OutOfMemory
    fn batch_select_indices(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        indices: &[u32],
    ) -> Result<()>;

    /// [`batch_select_indices`](Cache::batch_select_indices) under its beam-search name: row `i`
    /// continues beam `beam_idx[i]`.
    ///
    /// # Errors
    ///
    /// As there.
    fn reorder_cache(&mut self, pass: &mut wgpu::ComputePass<'_>, beam_idx: &[u32]) -> Result<()> {
        self.batch_select_indices(pass, beam_idx)
    }

    /// Repeats each batch row of every layer `repeats` times in a row: [a, b] becomes [a, a, b, b] for
    /// 2. Copies live tokens only, and in pages none.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroRepeats`], [`Error::LayerTooLarge`] and [`Error::OutOfMemory`]; for very many rows
    /// [`Error::ListTooLarge`] and [`Error::SizeOverflow`].
    ///
    /// [`Error::ListTooLarge`]: crate::Error::ListTooLarge
    /// [`Error::SizeOverflow`]: crate::Error::SizeOverflow
    /// [`Error::ZeroRepeats`]: crate::Error::ZeroRepeats
    /// [`Error::LayerTooLarge`]: crate::Error::LayerTooLarge
    /// [`Error::OutOfMemory`]: crate::Error::OutOfMemory
    fn batch_repeat_interleave(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        repeats: usize,
    ) -> Result<()>;

    /// Makes room for `tokens` more tokens of each row, in every layer written so far: in all of them, or, with
    /// an error, in none. For a step that must not run out of room at its seventh layer.
    ///
    /// After it, appends of up to `tokens` tokens a row in all do not fail for want of room in any of these
    /// layers ([`Error::LayerTooLarge`], [`Error::OutOfPages`], [`Error::SequenceTooLong`], and
    /// [`Error::OutOfMemory`] for K, V and page tables), until the batch changes or the cache is reset.
    /// [`crop`](Cache::crop) and [`truncate`](Cache::truncate) leave the room as it is.
    ///
    /// Where a layer needs new memory, a copy of its live tokens is recorded into `pass`. In pages, the copies
    /// of shared pages that the appends will take are counted in. Changes nothing else: neither lengths nor
    /// contents, nor the pages in use. Of an [`EncoderDecoderCache`](crate::EncoderDecoderCache) it concerns
    /// the self-attention side.
    ///
    /// # Errors
    ///
    /// Those named above, and [`Error::PassDropped`]. A cache of one's own that does not have this method
    /// answers [`Error::NotSupported`].
    ///
    /// [`Error::LayerTooLarge`]: crate::Error::LayerTooLarge
    /// [`Error::OutOfPages`]: crate::Error::OutOfPages
    /// [`Error::SequenceTooLong`]: crate::Error::SequenceTooLong
    /// [`Error::OutOfMemory`]: crate::Error::OutOfMemory
    /// [`Error::PassDropped`]: crate::Error::PassDropped
    /// [`Error::NotSupported`]: crate::Error::NotSupported
    fn reserve(&mut self, pass: &mut wgpu::ComputePass<'_>, tokens: usize) -> Result<()> {
        let _ = (pass, tokens);
        Err(crate::Error::NotSupported { what: "reserve()" })
    }

    /// The most tokens that a row can hold, or `None` where there is no bound but the device's.
    fn get_max_cache_shape(&self) -> Option<usize>;

    /// What the cache has recorded and allocated since it was made. Cheap.
    fn stats(&self) -> Stats;
}

/// A cache of K and V, layer by layer.
///
/// Shapes are (B, H, T, D): batch rows, K/V heads, tokens, elements a head. Layers may differ in H and
/// D, and K and V in D. A layer's shape and type are set by its first update.
///
/// # For implementers
///
/// A cache of one's own returns views of its buffers ([`LayerView::of_rings`]) and tensors of its data
/// ([`HostTensor::from_slice`]), or what a cache that it wraps returns. Methods that it does not have answer
/// [`Error::NotSupported`](crate::Error::NotSupported) with their name as `what`, parentheses included, as the default bodies do;
/// [`prepare_batch`](Cache::prepare_batch) may answer it too. That work was lost with a dropped pass it need not
/// notice: the promises about it are those of this crate's caches. Bind groups that [`Attention`](crate::Attention)
/// keeps go when the last clone of the view that came out of `of_rings` is dropped, so a `reset` that keeps its
/// buffers may keep the view.
///
/// This one counts the tokens that it is handed:
///
/// ```
/// use wgpu_kvcache::{
///     wgpu::ComputePass, BatchChange, Cache, CachePosition, DynamicKVCache, GetFuture, Gpu, HostTensor,
///     KVCache, LayerView, Result, Stats, TensorView,
/// };
///
/// struct Counted<C> {
///     inner: C,
///     tokens: usize,
/// }
///
/// impl<C: Cache> Cache for Counted<C> {
///     fn reset(&mut self) {
///         self.inner.reset();
///     }
///     fn crop(&mut self, max_length: usize) {
///         self.inner.crop(max_length);
///     }
///     fn truncate(&mut self, length: usize) {
///         self.inner.truncate(length);
///     }
///     fn prepare_batch(&mut self, change: BatchChange<'_>) -> Result<()> {
///         self.inner.prepare_batch(change)
///     }
///     fn batch_select_indices(&mut self, pass: &mut ComputePass<'_>, indices: &[u32]) -> Result<()> {
///         self.inner.batch_select_indices(pass, indices)
///     }
///     fn batch_repeat_interleave(&mut self, pass: &mut ComputePass<'_>, repeats: usize) -> Result<()> {
///         self.inner.batch_repeat_interleave(pass, repeats)
///     }
///     fn get_max_cache_shape(&self) -> Option<usize> {
///         self.inner.get_max_cache_shape()
///     }
///     fn stats(&self) -> Stats {
///         self.inner.stats()
///     }
/// }
///
/// impl<C: KVCache> KVCache for Counted<C> {
///     fn update(
///         &mut self,
///         pass: &mut ComputePass<'_>,
///         key: &TensorView<'_>,
///         value: &TensorView<'_>,
///         layer_idx: usize,
///         cache_position: CachePosition<'_>,
///     ) -> Result<LayerView> {
///         let view = self.inner.update(pass, key, value, layer_idx, cache_position)?;
///         self.tokens += key.shape()[2];
///         Ok(view)
///     }
///     fn view(&self, layer_idx: usize) -> Result<Option<LayerView>> {
///         self.inner.view(layer_idx)
///     }
///     fn get(&self, layer_idx: usize) -> Result<Option<(HostTensor, HostTensor)>> {
///         self.inner.get(layer_idx)
///     }
///     fn get_async(&self, layer_idx: usize) -> GetFuture<'_> {
///         self.inner.get_async(layer_idx)
///     }
///     fn get_seq_length(&self, layer_idx: usize) -> Result<usize> {
///         self.inner.get_seq_length(layer_idx)
///     }
/// }
///
/// # fn main() -> Result<()> {
/// let gpu = Gpu::headless()?;
/// let mut cache = Counted { inner: DynamicKVCache::new(&gpu), tokens: 0 };
/// let key = gpu.upload(&[0.0_f32; 12], &[1, 1, 3, 4])?;
/// gpu.submit_pass("prompt", |pass| {
///     cache.update(pass, &key.view(), &key.view(), 0, CachePosition::Append).map(|_| ())
/// })?;
/// assert_eq!((cache.tokens, cache.get_seq_length(0)?), (3, 3));
/// # Ok(())
/// # }
/// ```
pub trait KVCache: Cache {
    /// Writes T new tokens of layer `layer_idx` and returns the layer's view.
    ///
    /// `key` and `value` are read where they lie, when the pass runs. Their bind group is kept where
    /// the same buffers come again, which keeps these buffers alive until others take their place, or
    /// until [`release`](Cache::release) or [`reset`](Cache::reset). In a steady loop a call creates nothing. Memory that the
    /// engine may use again before the pass has run comes as a [`HeldTensor`](crate::HeldTensor).
    ///
    /// # Errors
    ///
    /// - Shapes that disagree: [`Error::KeyValueShape`], [`Error::LayerShape`], [`Error::WrongDType`],
    ///   [`Error::BatchChanged`].
    /// - Inputs that a kernel cannot read: [`Error::OddHeadDim`], [`Error::InnerStride`],
    ///   [`Error::Misaligned`], [`Error::BufferTooShort`], [`Error::MissingUsage`],
    ///   [`Error::SourceTooLarge`], [`Error::SourceIsCache`], [`Error::OtherDevice`].
    /// - Positions: [`Error::PositionCount`], [`Error::PositionOutOfBounds`],
    ///   [`Error::SequenceTooLong`].
    /// - A layer past those that the cache is made for: [`Error::LayerOutOfRange`].
    /// - Of layers with a window: [`WindowError::ChunkTooLong`], and [`WindowError::PastWindow`] after a truncation past it.
    /// - No room: [`Error::LayerTooLarge`], [`Error::OutOfPages`], [`Error::PoolTooLarge`],
    ///   [`Error::ListTooLarge`], [`Error::OutOfMemory`].
    ///
    /// [`Error::BatchChanged`]: crate::Error::BatchChanged
    /// [`WindowError::ChunkTooLong`]: crate::WindowError::ChunkTooLong
    /// [`WindowError::PastWindow`]: crate::WindowError::PastWindow
    /// [`Error::PoolTooLarge`]: crate::Error::PoolTooLarge
    /// [`Error::ListTooLarge`]: crate::Error::ListTooLarge
    /// [`Error::OtherDevice`]: crate::Error::OtherDevice
    /// [`Error::OutOfPages`]: crate::Error::OutOfPages
    /// [`Error::KeyValueShape`]: crate::Error::KeyValueShape
    /// [`Error::LayerShape`]: crate::Error::LayerShape
    /// [`Error::WrongDType`]: crate::Error::WrongDType
    /// [`Error::OddHeadDim`]: crate::Error::OddHeadDim
    /// [`Error::InnerStride`]: crate::Error::InnerStride
    /// [`Error::Misaligned`]: crate::Error::Misaligned
    /// [`Error::BufferTooShort`]: crate::Error::BufferTooShort
    /// [`Error::MissingUsage`]: crate::Error::MissingUsage
    /// [`Error::SourceTooLarge`]: crate::Error::SourceTooLarge
    /// [`Error::SourceIsCache`]: crate::Error::SourceIsCache
    /// [`Error::PositionCount`]: crate::Error::PositionCount
    /// [`Error::PositionOutOfBounds`]: crate::Error::PositionOutOfBounds
    /// [`Error::SequenceTooLong`]: crate::Error::SequenceTooLong
    /// [`Error::LayerOutOfRange`]: crate::Error::LayerOutOfRange
    /// [`Error::LayerTooLarge`]: crate::Error::LayerTooLarge
    /// [`Error::OutOfMemory`]: crate::Error::OutOfMemory
    fn update(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
        layer_idx: usize,
        cache_position: CachePosition<'_>,
    ) -> Result<LayerView>;

    /// The layer's K and V as they lie on the GPU; `None` for a layer never written. Free, but for the first view
    /// of rows of different length after they were cut or selected: it uploads four words a row.
    ///
    /// # Errors
    ///
    /// [`Error::LayerOutOfRange`](crate::Error::LayerOutOfRange) past the layers that the cache is made for;
    /// [`Error::PassDropped`](crate::Error::PassDropped) where what was written was lost with a pass;
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) if there is an upload, and no memory for it.
    fn view(&self, layer_idx: usize) -> Result<Option<LayerView>>;

    /// Reads the live tokens of K and V back to the host; `None` for a layer never written. Rows that are shorter
    /// than the layer end with zeros. Quantized K and V come as f32.
    ///
    /// The only call that submits and waits. What is to be read must have been submitted. Waits for at
    /// most two minutes. Blocks; in a browser use [`get_async`](KVCache::get_async).
    ///
    /// # Errors
    ///
    /// [`Error::NotSubmitted`] where recorded work has not been submitted, [`Error::PassDropped`] where it
    /// never ran, [`Error::LayerOutOfRange`], [`Error::Readback`] and [`Error::OutOfMemory`].
    ///
    /// [`Error::NotSubmitted`]: crate::Error::NotSubmitted
    /// [`Error::PassDropped`]: crate::Error::PassDropped
    /// [`Error::LayerOutOfRange`]: crate::Error::LayerOutOfRange
    /// [`Error::Readback`]: crate::Error::Readback
    /// [`Error::OutOfMemory`]: crate::Error::OutOfMemory
    fn get(&self, layer_idx: usize) -> Result<Option<(HostTensor, HostTensor)>>;

    /// As [`get`](KVCache::get), without blocking.
    ///
    /// The device must be polled for anything to arrive. In a browser that happens by itself. On native
    /// backends the future polls it, without waiting, each time that it is polled itself, so callbacks of the
    /// engine's may run there. It is woken when its bytes have arrived, if the engine polls the device
    /// elsewhere, and otherwise by a thread of its own, up to once a millisecond.
    fn get_async(&self, layer_idx: usize) -> GetFuture<'_>;

    /// As [`get`](KVCache::get), with the bytes of each token as they are stored: of a quantized layer, blocks and
    /// scales instead of f32.
    ///
    /// # Errors
    ///
    /// As for [`get`](KVCache::get). A cache of one's own that does not have this method answers
    /// [`Error::NotSupported`](crate::Error::NotSupported).
    fn get_stored(&self, layer_idx: usize) -> Result<Option<(StoredTensor, StoredTensor)>> {
        let _ = layer_idx;
        Err(crate::Error::NotSupported { what: "get_stored()" })
    }

    /// As [`get_stored`](KVCache::get_stored), without blocking: as [`get_async`](KVCache::get_async).
    fn get_stored_async(&self, layer_idx: usize) -> GetFuture<'_, StoredTensor> {
        let _ = layer_idx;
        Box::pin(async { Err(crate::Error::NotSupported { what: "get_stored_async()" }) })
    }

    /// The layers of a range that hold tokens, as a file in the format
    /// [safetensors](https://github.com/huggingface/safetensors): for a later run, another kind of cache or another
    /// device. `0..usize::MAX` saves all. Submits and waits, as [`get`](KVCache::get).
    ///
    /// Tensors `layer.3.key` and `layer.3.value` hold the tokens as they are stored, [page, H, tokens of a page, D], and
    /// `layer.3.pages` the pages of each row, so a page that rows share is saved once. A ring is one page a row: [B, H, T,
    /// D]. Quantized tensors have their blocks' bytes in place of D, and their scales in `layer.3.key.scales` and
    /// `layer.3.value.scales`. `layer.3.rows` holds the first slot and the number of live tokens of each row. The metadata
    /// says the rest: formats, elements a head, and how many tokens are gone before the live ones.
    ///
    /// # Errors
    ///
    /// As for [`get`](KVCache::get). A cache of one's own that does not have this method answers
    /// [`Error::NotSupported`](crate::Error::NotSupported).
    #[cfg(feature = "safetensors")]
    fn save(&self, layers: std::ops::Range<usize>) -> Result<Vec<u8>> {
        let _ = layers;
        Err(crate::Error::NotSupported { what: "save()" })
    }

    /// As [`save`](KVCache::save), without blocking: as [`get_async`](KVCache::get_async).
    #[cfg(feature = "safetensors")]
    fn save_async(&self, layers: std::ops::Range<usize>) -> SaveFuture<'_> {
        let _ = layers;
        Box::pin(async { Err(crate::Error::NotSupported { what: "save_async()" }) })
    }

    /// Records the writing of saved layers into this cache, which holds nothing: it is new, or was
    /// [reset](Cache::reset). It may be of another kind, and on another device, than the cache that was saved; it must
    /// store in the same [formats](crate::CacheOptions::with_formats). Pages are shared by the rows that shared them,
    /// whatever the size of a page. A layer with a window keeps what its window needs.
    ///
    /// # Examples
    ///
    /// ```
    /// use wgpu_kvcache::{Cache, CachePosition, DynamicKVCache, Gpu, KVCache, PagedKVCache};
    ///
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// let gpu = Gpu::headless()?;
    /// let mut cache = DynamicKVCache::new(&gpu);
    /// let tokens = gpu.upload(&[0.5_f32; 3 * 4], &[1, 1, 3, 4])?;
    /// gpu.submit_pass("prompt", |pass| {
    ///     cache.update(pass, &tokens.view(), &tokens.view(), 0, CachePosition::Append).map(|_| ())
    /// })?;
    /// let bytes = cache.save(0..usize::MAX)?; // std::fs::write(path, &bytes)
    /// let mut other = PagedKVCache::new(&gpu);
    /// gpu.submit_pass("restore", |pass| other.restore(pass, &bytes))?;
    /// assert_eq!(other.get(0)?, cache.get(0)?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`StoringError::BadSave`] for bytes that are damaged, foreign, or of other formats than this cache stores: everything is
    /// checked before anything is allocated. [`Error::NotSupported`] for a cache that holds tokens, or one of one's own
    /// that does not have this method. Those of an append, of which [`Error::LayerTooLarge`] may also be for what is
    /// uploaded. After any of them the cache holds nothing, as before.
    ///
    /// [`StoringError::BadSave`]: crate::StoringError::BadSave
    /// [`Error::NotSupported`]: crate::Error::NotSupported
    /// [`Error::LayerTooLarge`]: crate::Error::LayerTooLarge
    #[cfg(feature = "safetensors")]
    fn restore(&mut self, pass: &mut wgpu::ComputePass<'_>, bytes: &[u8]) -> Result<()> {
        let _ = (pass, bytes);
        Err(crate::Error::NotSupported { what: "restore()" })
    }

    /// Live tokens; 0 for a layer never written. If rows differ in length, those of the longest row, or more if that
    /// row was selected away: as many as [`get`](KVCache::get) returns. Of one row:
    /// [`LayerView::row_len`](crate::LayerView::row_len).
    ///
    /// # Errors
    ///
    /// As for [`view`](KVCache::view).
    fn get_seq_length(&self, layer_idx: usize) -> Result<usize>;

    /// The absolute position of the next token that is appended, as rotary embeddings need it: live tokens, and
    /// those before them that [`crop`](Cache::crop) has dropped since the last reset. Without a crop it is
    /// [`get_seq_length`](KVCache::get_seq_length). Tokens that were rolled back do not count. 0 for a layer
    /// never written.
    ///
    /// If rows differ in length, this counts for the longest row as the layer's length does, and
    /// [`crop_rows`](Cache::crop_rows) leaves it as it is. An engine that crops rows one by one keeps count of each
    /// row's next position itself.
    ///
    /// # Errors
    ///
    /// As for [`view`](KVCache::view). A cache of one's own that does not have this method answers
    /// [`Error::NotSupported`](crate::Error::NotSupported).
    fn get_next_position(&self, layer_idx: usize) -> Result<usize> {
        let _ = layer_idx;
        Err(crate::Error::NotSupported { what: "get_next_position()" })
    }
}

/// What [`KVCache::save_async`] returns.
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
pub type SaveFuture<'a> = Pin<Box<dyn Future<Output = Result<Vec<u8>>> + Send + 'a>>;
/// What [`KVCache::save_async`] returns.
#[cfg(all(feature = "safetensors", target_arch = "wasm32"))]
pub type SaveFuture<'a> = Pin<Box<dyn Future<Output = Result<Vec<u8>>> + 'a>>;

/// What [`KVCache::get_async`] returns, and with [`StoredTensor`] [`KVCache::get_stored_async`].
#[cfg(not(target_arch = "wasm32"))]
pub type GetFuture<'a, T = HostTensor> =
    Pin<Box<dyn Future<Output = Result<Option<(T, T)>>> + Send + 'a>>;
/// What [`KVCache::get_async`] returns, and with [`StoredTensor`] [`KVCache::get_stored_async`].
#[cfg(target_arch = "wasm32")]
pub type GetFuture<'a, T = HostTensor> = Pin<Box<dyn Future<Output = Result<Option<(T, T)>>> + 'a>>;
