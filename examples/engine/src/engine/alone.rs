//! The cache's own dispatches of a step, for those who time them.

use anyhow::Result;
use wgpu_kvcache::{CachePosition, KVCache, SequenceCache, SequenceId, TensorView, wgpu};

use super::Engine;

impl Engine {
    /// Records the cache's own dispatches of a step: for each layer a new token, written over the last one, after a
    /// reordering of the batch rows by `parents`. This spoils what the cache holds.
    ///
    /// # Errors
    ///
    /// If a call of the cache fails.
    pub fn record_cache_alone(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        cache: &mut dyn KVCache,
        parents: &[u32],
    ) -> Result<()> {
        if parents.len() > 1 {
            cache.reorder_cache(pass, parents)?;
        }
        for layer in 0..self.model.config.layers {
            // Of the live tokens: a layer with a window holds fewer than others.
            let last = u32::try_from(cache.get_seq_length(layer)?)?.saturating_sub(1);
            let (key, value) = self.new_keys_and_values(parents.len(), 1)?;
            cache.update(pass, &key, &value, layer, CachePosition::At(last))?;
        }
        Ok(())
    }

    /// The same for a step that decodes one token of each of some sequences, which then have it more.
    ///
    /// # Errors
    ///
    /// Where the cache refuses.
    pub fn record_sequences_alone(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        cache: &mut SequenceCache,
        sequences: &[SequenceId],
    ) -> Result<()> {
        let counts: Vec<_> = sequences.iter().map(|&id| (id, 1)).collect();
        let step = cache.plan_step(pass, &counts)?;
        for layer in 0..self.model.config.layers {
            let (key, value) = self.new_keys_and_values(1, sequences.len())?;
            cache.update(pass, &step, layer, &key, &value)?;
        }
        Ok(())
    }

    fn new_keys_and_values(
        &self,
        batch: usize,
        count: usize,
    ) -> Result<(TensorView<'_>, TensorView<'_>)> {
        self.buffers.new_keys_and_values(&self.model.config, batch, count)
    }
}
