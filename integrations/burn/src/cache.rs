//! A cache of batch rows for burn's tensors: [`BurnCache`].

use burn::tensor::Tensor;
use wgpu_kvcache::wgpu::ComputePass;
use wgpu_kvcache::{CachePosition, KVCache};

use crate::device::SharedDevice;
use crate::error::{Error, Result};
use crate::options::AttendOptions;
use crate::record::{Attender, Request};
use crate::tensor::{Order, Wanted, lend};

/// A K/V cache of any kind, and attention over it, for burn's tensors.
///
/// B is the number of batch rows, H of K/V heads, Hq of query heads, T of new tokens, D of elements per head. One call
/// a layer takes the place of `cat` and attention:
///
/// ```
/// use burn::tensor::{Distribution, Tensor};
/// use wgpu_kvcache_burn::wgpu_kvcache::DynamicKVCache;
/// use wgpu_kvcache_burn::{BurnCache, SharedDevice};
///
/// # fn main() -> Result<(), wgpu_kvcache_burn::Error> {
/// let shared = SharedDevice::new()?; // once, before the first tensor
/// let mut cache = BurnCache::new(&shared, DynamicKVCache::new(shared.gpu()));
/// let normal = Distribution::Normal(0.0, 1.0);
/// for tokens in [5, 1, 1] {
///     let query = Tensor::<4>::random([1, 8, tokens, 64], normal, shared.device());
///     let key = Tensor::<4>::random([1, 2, tokens, 64], normal, shared.device());
///     let value = Tensor::<4>::random([1, 2, tokens, 64], normal, shared.device());
///     let context = cache.attend(0, query, key, value, Default::default())?;
///     assert_eq!(context.dims(), [1, 8, tokens, 64]);
/// }
/// assert_eq!(cache.seq_length(0)?, 7);
/// # Ok(())
/// # }
/// ```
///
/// # What a call does
///
/// It runs what burn holds back of the tensors (fusion, then cubecl's queue), records the update and attention into a
/// pass of its own, and submits it. Nothing waits. K, V and the queries are read where they lie, with any strides;
/// a tensor whose elements of a head are not next to each other is copied first. The tensors stay as they are until the
/// pass is submitted. What burn does later comes later on the same queue.
///
/// A call takes its tensors. Clone one that is needed afterwards; a clone copies nothing.
#[derive(Debug)]
pub struct BurnCache<C> {
    inner: C,
    attender: Attender,
}

impl<C: KVCache> BurnCache<C> {
    /// Of a cache on `shared.gpu()`: a `DynamicKVCache`, `StaticKVCache`, `PagedKVCache`, or one of one's own. Windows,
    /// formats and sizes are options of that cache.
    pub fn new(shared: &SharedDevice, inner: C) -> Self {
        Self { inner, attender: Attender::new(shared) }
    }

    /// Writes the new tokens of layer `layer_idx` and returns attention over all live ones.
    ///
    /// `query` is (B, Hq, T, D), with Hq a multiple of H, `key` (B, H, T, D) and `value` (B, H, T, Dv). The result is
    /// (B, Hq, T, Dv), of the query's element type. With [`AttendOptions::bthd`] all four are (B, T, H, D).
    ///
    /// # Errors
    ///
    /// [`Error::OtherDevice`], [`Error::Backend`] and [`Error::DType`] for tensors that the cache cannot read;
    /// [`Error::Memory`]; [`Error::Cache`] as for
    /// [`Attention::update`](wgpu_kvcache::Attention::update), which says what is written after an error.
    pub fn attend(
        &mut self,
        layer_idx: usize,
        query: Tensor<4>,
        key: Tensor<4>,
        value: Tensor<4>,
        options: AttendOptions<'_>,
    ) -> Result<Tensor<4>> {
        let AttendOptions { attention, position, mask, order } = options;
        let shared = self.attender.shared();
        let key = Wanted::new(shared, "the key", key, order)?;
        let value = Wanted::new(shared, "the value", value, order)?;
        let query = Wanted::new(shared, "the query", query, order)?;
        let value_dim = value.shape()[3];
        let new = vec![key, value];
        let request = Request { query, new, value_dim, mask, options: attention };
        let inner = &mut self.inner;
        self.attender.attend(request, |pass, attention, views, options| {
            let tensors = views.layer();
            attention.update(pass, inner, layer_idx, &tensors, position, options).map(|_| ())
        })
    }

    /// As [`attend`](Self::attend) for a cache with
    /// [`with_value_in_key`](wgpu_kvcache::CacheOptions::with_value_in_key): V of each token is the first `value_dim`
    /// elements of its K (multi-head latent attention).
    ///
    /// # Errors
    ///
    /// As for [`attend`](Self::attend).
    pub fn attend_latent(
        &mut self,
        layer_idx: usize,
        query: Tensor<4>,
        key: Tensor<4>,
        value_dim: usize,
        options: AttendOptions<'_>,
    ) -> Result<Tensor<4>> {
        let AttendOptions { attention, position, mask, order } = options;
        let shared = self.attender.shared();
        let key = Wanted::new(shared, "the key", key, order)?;
        let query = Wanted::new(shared, "the query", query, order)?;
        let new = vec![key];
        let request = Request { query, new, value_dim, mask, options: attention };
        let inner = &mut self.inner;
        self.attender.attend(request, |pass, attention, views, options| {
            let tensors = views.latent(value_dim);
            attention.update(pass, inner, layer_idx, &tensors, position, options).map(|_| ())
        })
    }

    /// Attention over the tokens that layer `layer_idx` holds already: cross-attention (with
    /// [`unmasked`](wgpu_kvcache::AttentionOptions::unmasked)), or a layer that reads the K and V of another one.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyLayer`] for a layer that was never written; else as for [`attend`](Self::attend).
    pub fn attend_stored(
        &mut self,
        layer_idx: usize,
        query: Tensor<4>,
        options: AttendOptions<'_>,
    ) -> Result<Tensor<4>> {
        let AttendOptions { attention, mask, order, .. } = options;
        let query = Wanted::new(self.attender.shared(), "the query", query, order)?;
        let view = self.inner.view(layer_idx)?.ok_or(Error::EmptyLayer { layer: layer_idx })?;
        let value_dim = view.value_shape()[3];
        let new = Vec::new();
        let request = Request { query, new, value_dim, mask, options: attention };
        self.attender.attend(request, |pass, attention, views, options| {
            attention.record(pass, &views.query, &view, &views.output, options)
        })
    }

    /// Writes the new tokens of layer `layer_idx`, `key` (B, H, T, D) and `value` (B, H, T, Dv), without attention.
    ///
    /// # Errors
    ///
    /// As for [`attend`](Self::attend).
    pub fn update(
        &mut self,
        layer_idx: usize,
        key: Tensor<4>,
        value: Tensor<4>,
        position: CachePosition<'_>,
    ) -> Result<()> {
        let shared = self.attender.shared();
        let key = Wanted::new(shared, "the key", key, Order::Bhtd)?;
        let value = Wanted::new(shared, "the value", value, Order::Bhtd)?;
        let (lent, _) = lend(vec![key, value], None)?;
        let (key, value) = (lent[0].view()?, lent[1].view()?);
        self.record(|inner, pass| inner.update(pass, &key, &value, layer_idx, position).map(|_| ()))
    }

    /// New row i is old row `beam_idx[i]`, in all layers: the beams of a beam search. The number of rows may change.
    ///
    /// # Errors
    ///
    /// [`Error::Cache`], as for [`reorder_cache`](wgpu_kvcache::Cache::reorder_cache).
    pub fn reorder_cache(&mut self, beam_idx: &[u32]) -> Result<()> {
        self.record(|inner, pass| inner.reorder_cache(pass, beam_idx))
    }

    /// Repeats each row `repeats` times: [a, b] becomes [a, a, b, b] for 2.
    ///
    /// # Errors
    ///
    /// [`Error::Cache`], as for [`batch_repeat_interleave`](wgpu_kvcache::Cache::batch_repeat_interleave).
    pub fn batch_repeat_interleave(&mut self, repeats: usize) -> Result<()> {
        self.record(|inner, pass| inner.batch_repeat_interleave(pass, repeats))
    }

    /// Of the latest `tokens` tokens keeps those at `keep`: the accepted path of a drafted tree.
    ///
    /// # Errors
    ///
    /// [`Error::Cache`], as for [`keep_latest`](wgpu_kvcache::Cache::keep_latest).
    pub fn keep_latest(&mut self, tokens: usize, keep: &[u32]) -> Result<()> {
        self.record(|inner, pass| inner.keep_latest(pass, tokens, keep))
    }

    /// Live tokens of layer `layer_idx`; 0 if it was never written.
    ///
    /// # Errors
    ///
    /// [`Error::Cache`], as for [`KVCache::get_seq_length`].
    pub fn seq_length(&self, layer_idx: usize) -> Result<usize> {
        Ok(self.inner.get_seq_length(layer_idx)?)
    }

    /// The absolute position of the next token, for rotary embeddings.
    ///
    /// # Errors
    ///
    /// [`Error::Cache`], as for [`KVCache::get_next_position`].
    pub fn next_position(&self, layer_idx: usize) -> Result<usize> {
        Ok(self.inner.get_next_position(layer_idx)?)
    }

    /// Records calls of the cache into a pass and submits it: for all calls that take a pass, such as `reserve`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use wgpu_kvcache_burn::{BurnCache, Result, wgpu_kvcache::{Cache, DynamicKVCache}};
    /// # fn reserve(cache: &mut BurnCache<DynamicKVCache>) -> Result<()> {
    /// cache.record(|inner, pass| inner.reserve(pass, 1024))
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Cache`], with what `calls` returns.
    pub fn record<R>(
        &mut self,
        calls: impl FnOnce(&mut C, &mut ComputePass<'_>) -> wgpu_kvcache::Result<R>,
    ) -> Result<R> {
        let inner = &mut self.inner;
        Ok(self.attender.shared().gpu().submit_pass("burn cache", |pass| calls(inner, pass))?)
    }

    /// The cache: `get`, `view`, `stats`, `save` and the like.
    pub fn inner(&self) -> &C {
        &self.inner
    }

    /// The cache, for calls that need no pass: `reset`, `crop`, `truncate`, `drop_latest` and the like.
    pub fn inner_mut(&mut self) -> &mut C {
        &mut self.inner
    }

    /// Lets go of all bind groups, which keep pages of burn's memory from going back to the device. They are made
    /// again when they are needed. For the moment before burn's `memory_cleanup`.
    pub fn release(&mut self) {
        self.inner.release();
        self.attender.release();
    }
}
