//! One step of the model: new tokens in, a choice or logits out, one compute pass.
//!
//! All uses of the cache in a step are in [`Engine::record`]:
//!
//! 1. Beam search first moves the batch rows of the cache: `batch_repeat_interleave` or `reorder_cache`.
//! 2. In each layer the projection writes K and V to a buffer, and `update` appends them to the layer's tokens. It
//!    returns a view of the layer.
//! 3. `Attention::record` reads that view in place. The engine does not depend on the kind of cache or its layout.
//!
//! The library records its dispatches into the same pass as the model's own kernels. So a whole step is one
//! submission, and only its result is copied to the host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use wgpu_kvcache::{Attention, AttentionOptions, CachePosition, DType, Gpu, KVCache, wgpu};

use crate::buffers::{Buffers, Groups, SLOT};
use crate::kernels::Kernels;
use crate::model::{Config, Model};

/// A token id that no vocabulary contains, for a step without a banned token.
const NO_TOKEN: u32 = u32::MAX;

/// The limits of an engine.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The type in which K and V are cached.
    pub dtype: DType,
    /// The longest sequence, in tokens.
    pub max_tokens: usize,
    /// The most batch rows.
    pub max_batch: usize,
}

/// How the cache's batch rows change before a step.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// They stay.
    Keep,
    /// Each row becomes this many equal rows.
    Repeat(usize),
    /// New row i is old row `parents[i]`.
    Reorder(&'a [u32]),
}

/// The last part of a step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// No result: a part of a prompt, but not its last.
    Cache,
    /// The logits of each batch row's last token.
    Logits,
    /// The logits, and the best token of each row.
    Token,
}

/// A model with its pipelines, buffers and bind groups, created once; a step creates none of them.
#[expect(missing_debug_implementations, reason = "it is not for printing")]
pub struct Engine {
    gpu: Gpu,
    model: Model,
    options: Options,
    kernels: Kernels,
    buffers: Buffers,
    groups: Groups,
    /// One for all layers: it keeps bind groups over the cache's buffers.
    attention: Attention,
}

impl Engine {
    /// Prepares a model for sequences of at most `options.max_tokens` tokens.
    ///
    /// # Errors
    ///
    /// If the options exceed the limits of the model or the device.
    pub fn new(gpu: &Gpu, model: &Model, options: Options) -> Result<Self> {
        let context = model.config.context;
        ensure!(
            options.max_tokens <= context,
            "{} tokens were requested, prompt and new ones together, but the model's context holds {context}",
            options.max_tokens
        );
        ensure!(
            options.max_tokens > 0 && options.max_batch > 0,
            "max_tokens and max_batch must be at least 1"
        );
        let kernels = Kernels::new(gpu, model, options.dtype)?;
        let buffers = Buffers::new(gpu, model, options)?;
        let groups = Groups::new(gpu, model, &kernels, &buffers)?;
        Ok(Self {
            gpu: gpu.clone(),
            model: model.clone(),
            options,
            kernels,
            buffers,
            groups,
            attention: Attention::new(gpu),
        })
    }

    /// The dimensions of the model.
    pub fn config(&self) -> &Config {
        &self.model.config
    }

    /// Runs every kind of step once. Drivers finish the compilation of a pipeline at its first dispatch; after a
    /// warm-up this does not add to the time of the first prompt. `cache` must be of the kind that is used later,
    /// because kinds differ in their pipelines; its memory is freed.
    ///
    /// # Errors
    ///
    /// As for [`Self::next_tokens`].
    pub fn warm_up(&mut self, mut cache: Box<dyn KVCache>) -> Result<()> {
        for tokens in [8, 3, 1] {
            if tokens <= self.options.max_tokens {
                self.next_tokens(cache.as_mut(), &vec![0; tokens], 1, None)?;
                cache.reset();
            }
        }
        // The old one's bind groups keep the cache's buffers alive. The pipelines belong to the `Gpu`.
        self.attention = Attention::new(&self.gpu);
        Ok(())
    }

    /// Runs `tokens`, `[batch, tokens]`, after the tokens in the cache, and returns the best next token of each batch
    /// row other than `banned`.
    ///
    /// # Errors
    ///
    /// If the tokens do not fit the engine or the cache. The cache cannot be used any more then.
    pub fn next_tokens(
        &mut self,
        cache: &mut dyn KVCache,
        tokens: &[u32],
        batch: usize,
        banned: Option<u32>,
    ) -> Result<Vec<u32>> {
        self.run(cache, tokens, batch, Rows::Keep, banned, Ending::Token)?;
        self.read(batch)
    }

    /// Moves the cache's batch rows, runs `tokens`, `[batch, tokens]`, after their tokens, and returns the logits of
    /// each row's last token: `[batch, vocabulary]`.
    ///
    /// # Errors
    ///
    /// As for [`Self::next_tokens`].
    pub fn logits(
        &mut self,
        cache: &mut dyn KVCache,
        tokens: &[u32],
        batch: usize,
        rows: Rows<'_>,
    ) -> Result<Vec<f32>> {
        self.run(cache, tokens, batch, rows, None, Ending::Logits)?;
        self.read(batch * self.model.config.vocabulary)
    }

    /// The time of the cache's own dispatches of a step, from the start of recording to the end of the work: a reorder
    /// of the batch rows, then for each layer a new token that overwrites the last one. This destroys the cache's
    /// content. If `parents` is `None`, the pass is empty, and the time is that of a submission alone.
    ///
    /// # Errors
    ///
    /// If a call of the cache fails.
    pub fn time_cache_alone(
        &self,
        cache: &mut dyn KVCache,
        parents: Option<&[u32]>,
    ) -> Result<Duration> {
        let start = Instant::now();
        let mut encoder = self.encoder("the cache alone");
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        if let Some(parents) = parents {
            if parents.len() > 1 {
                cache.reorder_cache(&mut pass, parents)?;
            }
            let last = u32::try_from(cache.get_seq_length(0)?)?.saturating_sub(1);
            for layer in 0..self.model.config.layers {
                let (key, value) = self.buffers.new_keys_and_values(
                    &self.model.config,
                    self.options.dtype,
                    parents.len(),
                    1,
                )?;
                cache.update(&mut pass, &key, &value, layer, CachePosition::At(last))?;
            }
        }
        drop(pass);
        self.gpu.queue().submit([encoder.finish()]);
        self.gpu.device().poll(wgpu::PollType::wait_indefinitely())?;
        Ok(start.elapsed())
    }

    /// Runs one step, or several for a long prompt.
    fn run(
        &mut self,
        cache: &mut dyn KVCache,
        tokens: &[u32],
        batch: usize,
        rows: Rows<'_>,
        banned: Option<u32>,
        ending: Ending,
    ) -> Result<()> {
        let most = self.options.max_batch;
        ensure!(
            (1..=most).contains(&batch),
            "{batch} batch rows were passed, but the engine was made for 1 to {most}"
        );
        ensure!(
            !tokens.is_empty() && tokens.len().is_multiple_of(batch),
            "{} tokens cannot be divided among {batch} batch rows; pass the same number, at least 1, for each",
            tokens.len()
        );
        let vocabulary = self.model.config.vocabulary;
        for &token in tokens {
            let known = usize::try_from(token).is_ok_and(|token| token < vocabulary);
            ensure!(known, "token {token} does not exist; the model has {vocabulary} tokens");
        }
        let max_rows = self.buffers.max_rows;
        if tokens.len() <= max_rows {
            return self.step(cache, tokens, batch, rows, banned, ending);
        }
        ensure!(
            batch == 1,
            "{} new tokens in {batch} batch rows, but a step holds at most {max_rows}",
            tokens.len()
        );
        let mut parts = tokens.chunks(max_rows).peekable();
        let mut rows = rows;
        while let Some(part) = parts.next() {
            let ending = if parts.peek().is_some() { Ending::Cache } else { ending };
            self.step(cache, part, batch, rows, banned, ending)?;
            rows = Rows::Keep;
        }
        Ok(())
    }

    /// Writes the parameters of a step, records it into one pass, and submits.
    fn step(
        &mut self,
        cache: &mut dyn KVCache,
        tokens: &[u32],
        batch: usize,
        rows: Rows<'_>,
        banned: Option<u32>,
        ending: Ending,
    ) -> Result<()> {
        // A token's position is the number of tokens before it: the cache's length, because nothing is cropped.
        let past = cache.get_seq_length(0)?;
        let count = tokens.len() / batch;
        let most = self.options.max_tokens;
        ensure!(
            past + count <= most,
            "the cache holds {past} tokens and {count} are new, but the engine was made for {most}"
        );

        // `write_buffer` takes effect before all of the step's dispatches, so each range is written once per step.
        let queue = self.gpu.queue().clone();
        queue.write_buffer(&self.buffers.tokens, 0, bytemuck::cast_slice(tokens));
        for (slot, rows) in [(0, tokens.len()), (1, batch)] {
            let stage = [size(rows)?, size(count)?, size(past)?, banned.unwrap_or(NO_TOKEN)];
            queue.write_buffer(
                &self.buffers.stage,
                slot * SLOT as u64,
                bytemuck::cast_slice(&stage),
            );
        }
        let mut encoder = self.encoder("step");
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("step"),
            timestamp_writes: None,
        });
        self.record(&mut pass, cache, batch, count, rows, ending)?;
        drop(pass);

        let result = match ending {
            Ending::Cache => None,
            Ending::Token => Some((&self.buffers.chosen, batch)),
            Ending::Logits => Some((&self.buffers.logits, batch * self.model.config.vocabulary)),
        };
        if let Some((buffer, words)) = result {
            encoder.copy_buffer_to_buffer(buffer, 0, &self.buffers.readback, 0, bytes_of(words)?);
        }
        queue.submit([encoder.finish()]);
        Ok(())
    }

    /// Records a step: `count` new tokens in each of `batch` rows.
    fn record(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        cache: &mut dyn KVCache,
        batch: usize,
        count: usize,
        rows: Rows<'_>,
        ending: Ending,
    ) -> Result<()> {
        match rows {
            Rows::Keep => {}
            Rows::Repeat(repeats) => cache.batch_repeat_interleave(pass, repeats)?,
            Rows::Reorder(parents) => cache.reorder_cache(pass, parents)?,
        }

        let Self { model, options, kernels, buffers, groups, attention, .. } = self;
        let Config { width, heads, kv_heads, head_dim, feed_forward, .. } = model.config;
        let new = size(batch * count)?;
        let width = size(width)?;
        let quads_of_heads = size(heads * head_dim / 4)?;
        let quads_of_feed_forward = size(feed_forward / 4)?;
        let pairs_of_heads = size((heads + 2 * kv_heads) * head_dim / 2)?;
        let (query, mixed) = buffers.query_and_mixed(&model.config, batch, count)?;

        kernels.embed.dispatch(pass, &groups.embed, width, new);
        for (layer, bound) in groups.layers.iter().enumerate() {
            kernels.norm.dispatch(pass, &bound.attention_norm, new, 1);
            kernels.matmul.dispatch(pass, &bound.qkv, new);
            kernels.rope.dispatch(pass, &groups.rope, pairs_of_heads.div_ceil(64), new);

            let (key, value) =
                buffers.new_keys_and_values(&model.config, options.dtype, batch, count)?;
            let view = cache.update(pass, &key, &value, layer, CachePosition::Append)?;
            attention.record(pass, &query, &view, &mixed, AttentionOptions::default())?;

            kernels.to_texture.dispatch(pass, &groups.to_texture, quads_of_heads.div_ceil(64), new);
            kernels.matmul_add.dispatch(pass, &bound.attention_output, new);
            kernels.norm.dispatch(pass, &bound.feed_forward_norm, new, 1);
            kernels.matmul.dispatch(pass, &bound.gate_up, new);
            kernels.swiglu.dispatch(pass, &groups.swiglu, quads_of_feed_forward.div_ceil(64), new);
            kernels.matmul_add.dispatch(pass, &bound.down, new);
        }

        if ending != Ending::Cache {
            let batch = size(batch)?;
            kernels.norm_last.dispatch(pass, &groups.norm_last, batch, 1);
            kernels.matmul.dispatch(pass, &groups.head, batch);
            if ending == Ending::Token {
                kernels.argmax.dispatch(pass, &groups.argmax, batch, 1);
            }
        }
        Ok(())
    }

    fn encoder(&self, label: &str) -> wgpu::CommandEncoder {
        self.gpu
            .device()
            .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(label) })
    }

    /// Waits for the last step and reads the first `words` words of its result.
    fn read<T: bytemuck::AnyBitPattern>(&self, words: usize) -> Result<Vec<T>> {
        let readback = self.buffers.readback.slice(..bytes_of(words)?);
        let (sender, receiver) = std::sync::mpsc::channel();
        readback.map_async(wgpu::MapMode::Read, move |result| {
            // The receiver is dropped only if waiting has failed, which is reported there.
            let _ = sender.send(result);
        });
        self.gpu.device().poll(wgpu::PollType::wait_indefinitely())?;
        receiver.recv().context("the device did not answer")??;
        let result = bytemuck::cast_slice(&readback.get_mapped_range()?).to_vec();
        self.buffers.readback.unmap();
        Ok(result)
    }
}

/// A count in 32 bits, as shaders take it.
fn size(n: usize) -> Result<u32> {
    Ok(u32::try_from(n)?)
}

/// The bytes of this many 32-bit words.
fn bytes_of(words: usize) -> Result<u64> {
    Ok(4 * u64::try_from(words)?)
}
