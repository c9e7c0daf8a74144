//! How long the cache's own dispatches of a step take.

use std::time::{Duration, Instant};

use anyhow::Result;
use wgpu_kvcache::{CachePosition, KVCache, SequenceCache, SequenceId, TensorView, wgpu};

use super::Engine;

impl Engine {
    /// The time that the cache's own dispatches of a step take, from submission to the end of the
    /// work: for each layer a new token, written over the last one, after a reordering of the batch
    /// rows. This spoils what the cache holds. With `parents` as `None` the pass is empty, which
    /// tells what a submission costs by itself.
    ///
    /// # Errors
    ///
    /// If a call of the cache fails.
    pub fn time_cache_alone(
        &self,
        cache: &mut dyn KVCache,
        parents: Option<&[u32]>,
    ) -> Result<Duration> {
        self.time(|pass| {
            let Some(parents) = parents else { return Ok(()) };
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
        })
    }

    /// The same for a step that decodes one token of each of some sequences, which then have it more. With none the
    /// pass is empty.
    ///
    /// # Errors
    ///
    /// Where the cache refuses.
    pub fn time_sequences_alone(
        &self,
        cache: &mut SequenceCache,
        sequences: &[SequenceId],
    ) -> Result<Duration> {
        self.time(|pass| {
            if sequences.is_empty() {
                return Ok(());
            }
            let counts: Vec<_> = sequences.iter().map(|&id| (id, 1)).collect();
            let step = cache.plan_step(pass, &counts)?;
            for layer in 0..self.model.config.layers {
                let (key, value) = self.new_keys_and_values(1, sequences.len())?;
                cache.update(pass, &step, layer, &key, &value)?;
            }
            Ok(())
        })
    }

    /// The time of a pass, from recording to the end of its work.
    fn time(
        &self,
        record: impl FnOnce(&mut wgpu::ComputePass<'_>) -> Result<()>,
    ) -> Result<Duration> {
        let start = Instant::now();
        let mut encoder = self.encoder("the cache alone");
        let mut pass = encoder.begin_compute_pass(&Default::default());
        record(&mut pass)?;
        drop(pass);
        self.gpu.queue().submit([encoder.finish()]);
        self.gpu.device().poll(wgpu::PollType::wait_indefinitely())?;
        Ok(start.elapsed())
    }

    fn new_keys_and_values(
        &self,
        batch: usize,
        count: usize,
    ) -> Result<(TensorView<'_>, TensorView<'_>)> {
        self.buffers.new_keys_and_values(&self.model.config, batch, count)
    }
}
