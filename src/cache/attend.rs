//! The update of a layer and attention over it in one call.

use super::KVCache;
use super::sequences::{SequenceCache, Step};
use crate::attention::{Attention, AttentionOptions};
use crate::error::Result;
use crate::host::position::CachePosition;
use crate::tensor::TensorView;
use crate::view::LayerView;

/// What attention of a layer takes in and gives: q, K and V of the new tokens, and where the result goes.
#[derive(Clone, Copy, Debug)]
pub struct LayerTensors<'a> {
    /// q, (B, Hq, T, D of K), or of the latest of the new tokens alone; packed, (1, Hq, tokens of the step, D of K), for a
    /// step of sequences.
    pub query: TensorView<'a>,
    /// New K, (B, H, T, D of K), or packed.
    pub key: TensorView<'a>,
    /// New V, (B, H, T, D of V), or packed.
    pub value: TensorView<'a>,
    /// The result, (B, Hq, T, D of V), or packed. It may lie in q's buffer.
    pub output: TensorView<'a>,
}

impl Attention {
    /// Writes K and V of new tokens into layer `layer_idx`, then records attention of their queries over the layer: what a
    /// model's layer does. [`KVCache::update`] and [`record`](Self::record) in one call.
    ///
    /// # Errors
    ///
    /// Those of both. Where q or the output does not fit K and V in shape, nothing is written. After another
    /// error of attention alone K and V are written: call `record` with the layer's view, and without what was wrong.
    ///
    /// # Examples
    ///
    /// ```
    /// use wgpu_kvcache::{Attention, CachePosition, DynamicKVCache, Gpu, LayerTensors};
    ///
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// let gpu = Gpu::headless()?;
    /// let (mut cache, mut attention) = (DynamicKVCache::new(&gpu), Attention::new(&gpu));
    /// let key = gpu.upload(&[0.5_f32; 2 * 5 * 4], &[1, 2, 5, 4])?;
    /// let query = gpu.upload(&[0.5_f32; 6 * 5 * 4], &[1, 6, 5, 4])?; // three query heads a K/V head
    /// let output = gpu.upload(&[0.0_f32; 6 * 5 * 4], &[1, 6, 5, 4])?;
    /// let tensors = LayerTensors {
    ///     query: query.view(),
    ///     key: key.view(),
    ///     value: key.view(),
    ///     output: output.view(),
    /// };
    /// gpu.submit_pass("layer 0", |pass| {
    ///     let options = Default::default();
    ///     attention.update(pass, &mut cache, 0, &tensors, CachePosition::Append, options).map(|_| ())
    /// })
    /// # }
    /// ```
    pub fn update<C: KVCache + ?Sized>(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        cache: &mut C,
        layer_idx: usize,
        tensors: &LayerTensors<'_>,
        position: CachePosition<'_>,
        options: AttentionOptions<'_>,
    ) -> Result<LayerView> {
        let LayerTensors { query, key, value, output } = tensors;
        Self::check_new([query, key, value, output], false, &options)?;
        let view = cache.update(pass, key, value, layer_idx, position)?;
        self.record(pass, query, &view, output, options)?;
        Ok(view)
    }

    /// The same for a step of sequences: [`SequenceCache::update`] and [`record`](Self::record).
    ///
    /// # Errors
    ///
    /// As for [`update`](Self::update).
    pub fn update_step(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        cache: &mut SequenceCache,
        step: &Step,
        layer_idx: usize,
        tensors: &LayerTensors<'_>,
        options: AttentionOptions<'_>,
    ) -> Result<LayerView> {
        let LayerTensors { query, key, value, output } = tensors;
        Self::check_new([query, key, value, output], true, &options)?;
        let view = cache.update(pass, step, layer_idx, key, value)?;
        self.record(pass, query, &view, output, options)?;
        Ok(view)
    }
}
