//! The dispatches of one step: the model's layers, in one compute pass.

use anyhow::Result;
use wgpu_kvcache::{
    AttentionOptions, CachePosition, KVCache, LayerView, SequenceCache, Step, TensorView, wgpu,
};

use super::{Engine, size};
use crate::buffers::SLOT;
use crate::config::Config;

/// A token id that no vocabulary contains, for a step without a banned token.
const NO_TOKEN: u32 = u32::MAX;

/// What the host writes for a step.
pub(super) struct Inputs<'a> {
    /// Token ids, one a row.
    pub(super) tokens: &'a [u32],
    /// The position of each token.
    pub(super) positions: &'a [u32],
    /// The rows of the last tokens whose logits are wanted.
    pub(super) ends: &'a [u32],
    /// A token that is never chosen.
    pub(super) banned: Option<u32>,
}

/// Where a step's K and V are written. Its queries attend to what is there then.
pub(super) enum Target<'a> {
    /// Behind what each batch row of a cache holds.
    Rows { cache: &'a mut dyn KVCache, batch: usize },
    /// Behind what each sequence of a planned step holds.
    Sequences { cache: &'a mut SequenceCache, step: &'a Step },
    /// Nowhere, and nothing attends: a run of the model's own kernels alone.
    Nowhere,
}

impl Target<'_> {
    /// Batch rows of the step's tensors. Packed tokens are one row.
    fn batch(&self) -> usize {
        match self {
            Self::Rows { batch, .. } => *batch,
            Self::Sequences { .. } | Self::Nowhere => 1,
        }
    }

    /// Writes K and V of one layer, and returns what its queries attend to.
    fn update(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        layer: usize,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
    ) -> Result<Option<LayerView>> {
        let view = match self {
            Self::Rows { cache, .. } => {
                cache.update(pass, key, value, layer, CachePosition::Append)?
            }
            Self::Sequences { cache, step } => cache.update(pass, step, layer, key, value)?,
            Self::Nowhere => return Ok(None),
        };
        Ok(Some(view))
    }
}

/// What a step ends with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// No result: a part of a prompt, but not its last.
    Cache,
    /// The logits of the last tokens.
    Logits,
    /// Those, and the best token after each.
    Token,
}

impl Engine {
    /// Records the model's layers, and what the step ends with.
    pub(super) fn record(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        mut target: Target<'_>,
        inputs: &Inputs<'_>,
        ending: Ending,
    ) -> Result<()> {
        self.write(inputs)?;
        let Self { model, kernels, buffers, groups, windows, attention, .. } = self;
        let Config { width, heads, kv_heads, head_dim, feed_forward, .. } = model.config;
        let new = size(inputs.tokens.len())?;
        let width = size(width)?;
        let normed_heads = size(heads + kv_heads)?;
        let quads_of_heads = size(heads * head_dim / 4)?;
        let quads_of_feed_forward = size(feed_forward / 4)?;
        let pairs_of_heads = size((heads + 2 * kv_heads) * head_dim / 2)?;
        let batch = target.batch();
        let count = inputs.tokens.len() / batch;
        let (query, mixed) = buffers.query_and_mixed(&model.config, batch, count)?;
        let (key, value) = buffers.new_keys_and_values(&model.config, batch, count)?;

        kernels.embed.dispatch(pass, &groups.embed, width, new);
        for (layer, bound) in groups.layers.iter().enumerate() {
            kernels.norm.dispatch(pass, &bound.attention_norm, new, 1);
            kernels.matmul.dispatch(pass, &bound.qkv, new);
            if let Some(norm) = &bound.head_norm {
                kernels.head_norm.dispatch(pass, norm, normed_heads, new);
            }
            kernels.rope.dispatch(pass, &bound.rope, pairs_of_heads.div_ceil(64), new);

            if let Some(view) = target.update(pass, layer, &key, &value)? {
                let options = AttentionOptions::default().with_window(windows[layer]);
                attention.record(pass, &query, &view, &mixed, options)?;
            }

            kernels.to_texture.dispatch(pass, &groups.to_texture, quads_of_heads.div_ceil(64), new);
            bound.attention_output.dispatch(pass, kernels, new);
            kernels.norm.dispatch(pass, &bound.feed_forward_norm, new, 1);
            kernels.matmul.dispatch(pass, &bound.gate_up, new);
            kernels.gate.dispatch(pass, &groups.gate, quads_of_feed_forward.div_ceil(64), new);
            bound.down.dispatch(pass, kernels, new);
        }

        if ending != Ending::Cache {
            let ends = size(inputs.ends.len())?;
            kernels.norm_last.dispatch(pass, &groups.norm_last, ends, 1);
            kernels.matmul.dispatch(pass, &groups.head, ends);
            if ending == Ending::Token {
                kernels.argmax.dispatch(pass, &groups.argmax, ends, 1);
            }
        }
        Ok(())
    }

    /// Writes what a step reads. `write_buffer` takes effect before all of the step's dispatches, so everything is
    /// written to a place of its own, once a step.
    fn write(&self, inputs: &Inputs<'_>) -> Result<()> {
        let Inputs { tokens, positions, ends, banned } = *inputs;
        let (queue, buffers) = (self.gpu.queue(), &self.buffers);
        for (buffer, words) in
            [(&buffers.tokens, tokens), (&buffers.positions, positions), (&buffers.ends, ends)]
        {
            queue.write_buffer(buffer, 0, bytemuck::cast_slice(words));
        }
        for (slot, rows) in [(0, tokens.len()), (1, ends.len())] {
            let stage = [size(rows)?, banned.unwrap_or(NO_TOKEN)];
            queue.write_buffer(&buffers.stage, slot * SLOT as u64, bytemuck::cast_slice(&stage));
        }
        Ok(())
    }
}
