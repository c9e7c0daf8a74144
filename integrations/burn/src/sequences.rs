//! A cache of sequences for burn's tensors: [`BurnSequenceCache`].

use burn::tensor::Tensor;
use wgpu_kvcache::wgpu::ComputePass;
use wgpu_kvcache::{SequenceCache, SequenceId, Step};

use crate::device::SharedDevice;
use crate::error::Result;
use crate::options::AttendOptions;
use crate::record::{Attender, Request};
use crate::tensor::{Order, Wanted};

/// Sequences that differ in length, join, leave and fork, and attention over them, for burn's tensors.
///
/// A step says which sequences get how many tokens. Its K, V and queries are packed: [tokens of the step, heads, D].
///
/// # Examples
///
/// ```
/// use burn::tensor::Tensor;
/// use wgpu_kvcache_burn::wgpu_kvcache::{DType, LayerShape, SequenceCache};
/// use wgpu_kvcache_burn::{BurnSequenceCache, SharedDevice};
///
/// # fn main() -> Result<(), wgpu_kvcache_burn::Error> {
/// let shared = SharedDevice::new()?;
/// let layer = LayerShape { dtype: DType::F32, heads: 2, key_dim: 4, value_dim: 4 };
/// let mut cache = BurnSequenceCache::new(&shared, SequenceCache::new(shared.gpu(), &[layer])?);
/// let (a, b) = (cache.inner_mut().add()?, cache.inner_mut().add()?);
/// let step = cache.plan_step(&[(a, 2), (b, 3)])?;
/// let query = Tensor::<3>::ones([5, 6, 4], shared.device());
/// let key = Tensor::<3>::ones([5, 2, 4], shared.device());
/// let context = cache.attend(&step, 0, query, key.clone(), key, Default::default())?;
/// assert_eq!(context.dims(), [5, 6, 4]);
/// assert_eq!((cache.inner().len(a)?, cache.inner().len(b)?), (2, 3));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct BurnSequenceCache {
    inner: SequenceCache,
    attender: Attender,
}

impl BurnSequenceCache {
    /// Of a cache on `shared.gpu()`.
    pub fn new(shared: &SharedDevice, inner: SequenceCache) -> Self {
        Self { inner, attender: Attender::new(shared) }
    }

    /// Plans a step: which sequences get how many tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Cache`](crate::Error::Cache), as for [`SequenceCache::plan_step`].
    pub fn plan_step(&mut self, tokens: &[(SequenceId, usize)]) -> Result<Step> {
        self.record(|inner, pass| inner.plan_step(pass, tokens))
    }

    /// Writes K and V of the step's T tokens into layer `layer_idx`, and returns attention of each token over its own
    /// sequence.
    ///
    /// `query` is [T, Hq, D], with Hq a multiple of H, `key` [T, H, D] and `value` [T, H, Dv]. The result is
    /// [T, Hq, Dv], of the query's element type. Position and order of the options are not used: a step has both.
    ///
    /// # Errors
    ///
    /// As for [`BurnCache::attend`](crate::BurnCache::attend), and
    /// [`Attention::update_step`](wgpu_kvcache::Attention::update_step).
    pub fn attend(
        &mut self,
        step: &Step,
        layer_idx: usize,
        query: Tensor<3>,
        key: Tensor<3>,
        value: Tensor<3>,
        options: AttendOptions<'_>,
    ) -> Result<Tensor<3>> {
        let AttendOptions { attention, mask, .. } = options;
        let (shared, order) = (self.attender.shared(), Order::Thd);
        let key = Wanted::new(shared, "the key", key, order)?;
        let value = Wanted::new(shared, "the value", value, order)?;
        let query = Wanted::new(shared, "the query", query, order)?;
        let value_dim = value.shape()[3];
        let new = vec![key, value];
        let request = Request { query, new, value_dim, mask, options: attention };
        let inner = &mut self.inner;
        self.attender.attend(request, |pass, attention, views, options| {
            let tensors = views.layer();
            attention.update_step(pass, inner, step, layer_idx, &tensors, options).map(|_| ())
        })
    }

    /// Attention over what the step has written to layer `layer_idx` already, for a layer that reads the K and V of
    /// another one. `query` is [T, Hq, D].
    ///
    /// # Errors
    ///
    /// As for [`attend`](Self::attend), and [`SequenceCache::view`].
    pub fn attend_stored(
        &mut self,
        step: &Step,
        layer_idx: usize,
        query: Tensor<3>,
        options: AttendOptions<'_>,
    ) -> Result<Tensor<3>> {
        let AttendOptions { attention, mask, .. } = options;
        let order = Order::Thd;
        let query = Wanted::new(self.attender.shared(), "the query", query, order)?;
        let view = self.inner.view(step, layer_idx)?;
        let value_dim = view.value_shape()[3];
        let new = Vec::new();
        let request = Request { query, new, value_dim, mask, options: attention };
        self.attender.attend(request, |pass, attention, views, options| {
            attention.record(pass, &views.query, &view, &views.output, options)
        })
    }

    /// Records calls of the cache into a pass and submits it: for calls that take a pass, such as `keep_latest`.
    ///
    /// # Errors
    ///
    /// [`Error::Cache`](crate::Error::Cache), with what `calls` returns.
    pub fn record<R>(
        &mut self,
        calls: impl FnOnce(&mut SequenceCache, &mut ComputePass<'_>) -> wgpu_kvcache::Result<R>,
    ) -> Result<R> {
        let inner = &mut self.inner;
        Ok(self.attender.shared().gpu().submit_pass("burn sequences", |pass| calls(inner, pass))?)
    }

    /// The cache, to look at: `len`, `next_position`, `get`, `stats` and the like.
    pub fn inner(&self) -> &SequenceCache {
        &self.inner
    }

    /// The cache, for calls that need no pass: `add`, `fork`, `remove`, `truncate`, `remember_prefix` and the like.
    pub fn inner_mut(&mut self) -> &mut SequenceCache {
        &mut self.inner
    }

    /// As [`BurnCache::release`](crate::BurnCache::release).
    pub fn release(&mut self) {
        self.inner.release();
        self.attender.release();
    }
}
