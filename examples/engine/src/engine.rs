//! One step of the model: new tokens in, a choice or logits out, one compute pass.
//!
//! A step is recorded and submitted at once; a future completes when its result is read back.
//!
//! There are two kinds of step. [`Engine::next_tokens`] and [`Engine::logits`] run equally many tokens in each
//! batch row of a [`KVCache`]. [`Engine::next_of_sequences`] runs the packed tokens of sequences of a
//! [`SequenceCache`]: one token of a sequence that decodes, a piece of a prompt of one that prefills.
//! Both record the same layers (`engine/step.rs`), and the cache's part in them is small:
//!
//! 1. Before the layers, beam search moves the batch rows of the cache (`batch_repeat_interleave` or
//!    `reorder_cache`), and a step of sequences is planned (`plan_step`), which allocates its pages.
//! 2. In each layer the projection leaves K and V in f32 buffers, and `update` writes them behind the
//!    tokens that the layer holds, in the formats of [`Options::formats`]. It returns a view of where
//!    the layer's tokens lie now.
//! 3. `Attention::record` attends to that view in place, whatever kind of cache returned it and
//!    whatever its formats: the engine never asks how the tokens lie. A layer with a sliding window
//!    passes its size along.
//!
//! The model's own kernels do not ask either: the host writes the position of each token, and the row of each
//! last token whose logits are wanted.
//!
//! The library records its dispatches into the same pass as the model's own kernels, so that a
//! whole step is one submission, and all that comes back to the host is its result.

mod alone;
mod step;

use anyhow::{Result, ensure};
use wgpu_kvcache::{
    Attention, AttentionOptions, CacheOptions, CompileScope, DType, Formats, Gpu, KVCache,
    LayerShape, Layout, SequenceCache, SequenceId, wgpu,
};

use crate::answer::{finished, mapped};
use crate::buffers::Buffers;
use crate::config::Config;
use crate::groups::Groups;
use crate::kernels::Kernels;
use crate::model::Model;
use step::{Ending, Inputs, Target};

/// The limits of an engine.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The formats in which [a cache](Engine::cache_options) stores K and V; f32 where none is given.
    pub formats: Formats,
    /// The longest sequence, in tokens.
    pub max_tokens: usize,
    /// The most batch rows, or sequences in one step.
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

/// New tokens of one sequence in a step.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The sequence.
    pub id: SequenceId,
    /// One token if the sequence decodes; its prompt or a piece of it if it prefills.
    pub tokens: &'a [u32],
    /// Whether to choose the token after them: not if more of the prompt follows.
    pub is_last: bool,
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
    /// Of each layer.
    windows: Vec<Option<usize>>,
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
        let kernels = Kernels::new(gpu, model)?;
        let buffers = Buffers::new(gpu, model, options)?;
        let groups = Groups::new(gpu, model, &kernels, &buffers)?;
        Ok(Self {
            gpu: gpu.clone(),
            model: model.clone(),
            options,
            kernels,
            buffers,
            groups,
            windows: (0..model.layers.len()).map(|layer| model.config.window(layer)).collect(),
            attention: Attention::new(gpu),
        })
    }

    /// The device that it was made on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The dimensions of the model.
    pub fn config(&self) -> &Config {
        &self.model.config
    }

    /// Options of a cache for this model: it stores K and V in the engine's formats, and a layer with a window keeps
    /// only what its queries see.
    pub fn cache_options(&self) -> CacheOptions<'_> {
        CacheOptions::default().with_windows(&self.windows).with_formats(self.options.formats)
    }

    /// The shapes of the model's layers, for a cache that is made with them. Their type is that of the K and V that
    /// a step computes, whatever format the cache stores them in.
    pub fn layer_shapes(&self) -> Vec<LayerShape> {
        let Config { layers, kv_heads: heads, head_dim, .. } = self.model.config;
        let dtype = DType::F32;
        vec![LayerShape { dtype, heads, key_dim: head_dim, value_dim: head_dim }; layers]
    }

    /// The most tokens of one step of sequences.
    pub fn step_tokens(&self) -> usize {
        self.buffers.max_rows
    }

    /// The most sequences of one step.
    pub fn max_batch(&self) -> usize {
        self.options.max_batch
    }

    /// Compiles ahead, so that the first prompt does not wait for it: the kernels of caches whose views have
    /// `layout`, and of attention, for the engine's formats. The model's own kernels are compiled since [`Self::new`],
    /// and run once in every shape here, because some drivers finish compiling a pipeline when it first runs.
    ///
    /// `progress` receives the number of stages that are done, and of all; its error ends the work.
    ///
    /// # Errors
    ///
    /// Where a kernel does not compile, or `progress` fails.
    pub async fn warm_up(
        &mut self,
        layout: Layout,
        progress: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<()> {
        let layers = self.layer_shapes();
        let window = self.windows.iter().copied().flatten().next();
        // A layer that keeps a window in a ring comes to lie over the end of it.
        let may_wrap = window.is_some() && layout == Layout::Contiguous;
        let layouts = if may_wrap { &[layout, Layout::Wrapped] } else { &[layout][..] };
        let formats = self.options.formats;
        let scopes = [CompileScope::Caches, CompileScope::CachesAndAttention];
        let shapes = [8, 3, 1].into_iter().filter(|&rows| rows <= self.buffers.max_rows);
        let shapes: Vec<usize> = shapes.collect();
        let all = 1 + scopes.len() + shapes.len();
        let gpu = self.gpu.clone();
        finished(&gpu).await?;
        progress(1, all)?;
        for (done, scope) in (2..).zip(scopes) {
            gpu.compile(&layers, formats, layouts, scope)?;
            if window.is_some() && scope == CompileScope::CachesAndAttention {
                let options = AttentionOptions::default().with_window(window);
                self.attention.compile(&layers, formats, layouts, [DType::F32; 2], options)?;
            }
            finished(&gpu).await?;
            progress(done, all)?;
        }
        for (done, rows) in (2 + scopes.len()..).zip(shapes) {
            let (tokens, banned) = (vec![0; rows], None);
            // As many last tokens as an engine can choose after: the head has the same shapes.
            let ends: Vec<u32> = (0..).take(rows.min(self.options.max_batch)).collect();
            let inputs = Inputs { tokens: &tokens, positions: &tokens, ends: &ends, banned };
            let mut encoder = self.encoder("warm-up");
            let mut pass = encoder.begin_compute_pass(&Default::default());
            self.record(&mut pass, Target::Nowhere, &inputs, Ending::Token)?;
            drop(pass);
            gpu.queue().submit([encoder.finish()]);
            finished(&gpu).await?;
            progress(done, all)?;
        }
        Ok(())
    }

    /// Runs `tokens`, `[batch, tokens]`, after the tokens in the cache, and returns the best next token of each batch
    /// row other than `banned`.
    ///
    /// # Errors
    ///
    /// If the tokens do not fit the engine or the cache. The cache cannot be used any more then.
    pub async fn next_tokens(
        &mut self,
        cache: &mut dyn KVCache,
        tokens: &[u32],
        batch: usize,
        banned: Option<u32>,
    ) -> Result<Vec<u32>> {
        self.run(cache, tokens, batch, Rows::Keep, banned, Ending::Token)?;
        self.read(batch).await
    }

    /// Moves the cache's batch rows, runs `tokens`, `[batch, tokens]`, after their tokens, and returns the logits of
    /// each row's last token: `[batch, vocabulary]`.
    ///
    /// # Errors
    ///
    /// As for [`Self::next_tokens`].
    pub async fn logits(
        &mut self,
        cache: &mut dyn KVCache,
        tokens: &[u32],
        batch: usize,
        rows: Rows<'_>,
    ) -> Result<Vec<f32>> {
        self.run(cache, tokens, batch, rows, None, Ending::Logits)?;
        self.read(batch * self.model.config.vocabulary).await
    }

    /// Runs a step of sequences: the tokens of each piece behind what its sequence holds. Returns the best next token
    /// of each piece, other than `banned`, if it [is the last](Piece::is_last) one.
    ///
    /// # Errors
    ///
    /// Where the tokens do not fit the engine or the cache. The cache is then of no more use.
    pub async fn next_of_sequences(
        &mut self,
        cache: &mut SequenceCache,
        pieces: &[Piece<'_>],
        banned: Option<u32>,
    ) -> Result<Vec<Option<u32>>> {
        let ends = self.run_sequences(cache, pieces, banned, Ending::Token)?;
        let chosen = if ends == 0 { Vec::new() } else { self.read(ends).await? };
        let mut chosen = chosen.into_iter();
        Ok(pieces.iter().map(|piece| if piece.is_last { chosen.next() } else { None }).collect())
    }

    /// As [`Self::next_of_sequences`], but returns the logits after each piece that is the last one:
    /// `[last pieces, vocabulary]`.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn logits_of_sequences(
        &mut self,
        cache: &mut SequenceCache,
        pieces: &[Piece<'_>],
    ) -> Result<Vec<f32>> {
        let ends = self.run_sequences(cache, pieces, None, Ending::Logits)?;
        let words = ends * self.model.config.vocabulary;
        if ends == 0 { Ok(Vec::new()) } else { self.read(words).await }
    }

    /// Records and submits a step of sequences, which ends with `ending` if a piece is the last one. Returns how many
    /// are.
    fn run_sequences(
        &mut self,
        cache: &mut SequenceCache,
        pieces: &[Piece<'_>],
        banned: Option<u32>,
        ending: Ending,
    ) -> Result<usize> {
        let (most, max_rows) = (self.options.max_batch, self.buffers.max_rows);
        let tokens = pieces.iter().flat_map(|piece| piece.tokens).copied().collect::<Vec<_>>();
        ensure!(
            pieces.len() <= most && tokens.len() <= max_rows,
            "{} tokens of {} sequences, and a step holds {max_rows} of {most}",
            tokens.len(),
            pieces.len()
        );
        self.check_tokens(&tokens)?;
        let mut counts = Vec::with_capacity(pieces.len());
        for &Piece { id, tokens, .. } in pieces {
            self.check_length(cache.next_position(id)?, tokens.len())?;
            counts.push((id, tokens.len()));
        }

        let mut encoder = self.encoder("step of sequences");
        let mut pass = encoder.begin_compute_pass(&Default::default());
        let step = cache.plan_step(&mut pass, &counts)?;
        // After `offsets[i + 1]` rows the tokens of piece i end.
        let rows_after = step.offsets().iter().skip(1);
        let ends = rows_after.zip(pieces).filter(|(_, piece)| piece.is_last);
        let ends: Vec<u32> = ends.map(|(rows, _)| rows - 1).collect();
        let inputs = Inputs { tokens: &tokens, positions: step.positions(), ends: &ends, banned };
        let ending = if ends.is_empty() { Ending::Cache } else { ending };
        self.record(&mut pass, Target::Sequences { cache, step: &step }, &inputs, ending)?;
        drop(pass);
        self.submit(encoder, ends.len(), ending)?;
        Ok(ends.len())
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
        self.check_tokens(tokens)?;
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

    /// Refuses tokens that the model does not know.
    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocabulary = self.model.config.vocabulary;
        for &token in tokens {
            let known = usize::try_from(token).is_ok_and(|token| token < vocabulary);
            ensure!(known, "there is no token {token}; the model knows {vocabulary}");
        }
        Ok(())
    }

    /// Refuses tokens at positions that the engine was not made for.
    fn check_length(&self, past: usize, count: usize) -> Result<()> {
        let most = self.options.max_tokens;
        ensure!(
            past + count <= most,
            "{past} tokens and {count} more; the engine was made for {most}"
        );
        Ok(())
    }

    /// Records a step of batch rows into one pass, and submits.
    fn step(
        &mut self,
        cache: &mut dyn KVCache,
        tokens: &[u32],
        batch: usize,
        rows: Rows<'_>,
        banned: Option<u32>,
        ending: Ending,
    ) -> Result<()> {
        // The tokens ever appended: a layer with a window holds fewer.
        let past = cache.get_next_position(0)?;
        let count = tokens.len() / batch;
        self.check_length(past, count)?;
        let positions = size(past)?..size(past + count)?;
        let positions: Vec<u32> = (0..batch).flat_map(|_| positions.clone()).collect();
        let ends: Vec<u32> = (0..size(tokens.len())?).skip(count - 1).step_by(count).collect();
        let inputs = Inputs { tokens, positions: &positions, ends: &ends, banned };

        let mut encoder = self.encoder("step");
        let mut pass = encoder.begin_compute_pass(&Default::default());
        match rows {
            Rows::Keep => {}
            Rows::Repeat(repeats) => cache.batch_repeat_interleave(&mut pass, repeats)?,
            Rows::Reorder(parents) => cache.reorder_cache(&mut pass, parents)?,
        }
        self.record(&mut pass, Target::Rows { cache, batch }, &inputs, ending)?;
        drop(pass);
        self.submit(encoder, batch, ending)
    }

    /// Submits a step, and copies its result, of `ends` last tokens, to where the host reads it.
    fn submit(&self, mut encoder: wgpu::CommandEncoder, ends: usize, ending: Ending) -> Result<()> {
        let result = match ending {
            Ending::Cache => None,
            Ending::Token => Some((&self.buffers.chosen, ends)),
            Ending::Logits => Some((&self.buffers.logits, ends * self.model.config.vocabulary)),
        };
        if let Some((buffer, words)) = result {
            encoder.copy_buffer_to_buffer(buffer, 0, &self.buffers.readback, 0, bytes_of(words)?);
        }
        self.gpu.queue().submit([encoder.finish()]);
        Ok(())
    }

    fn encoder(&self, label: &str) -> wgpu::CommandEncoder {
        self.gpu
            .device()
            .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(label) })
    }

    /// Reads the first `words` words of the last step's result once it has run.
    async fn read<T: bytemuck::AnyBitPattern>(&self, words: usize) -> Result<Vec<T>> {
        let readback = self.buffers.readback.slice(..bytes_of(words)?);
        mapped(&self.gpu, readback).await?;
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
