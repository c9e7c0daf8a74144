//! Attention over a layer's view: softmax(q·Kᵀ·scale)·V.

mod checks;
mod extras;
mod options;

use std::sync::PoisonError;

use checks::Live;
pub use options::{AttentionOptions, BitMask};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::Formats;
use crate::gpu::Gpu;
use crate::gpu::bind_groups::{Keepers, Purpose};
use crate::gpu::call::Call;
use crate::gpu::device::binding_limit;
use crate::gpu::kernels::{AttentionShape, Items, ROWS, Rules, Tiles, most_tokens};
use crate::gpu::ledger::Ledger;
use crate::host::work::{ITEM_WORDS, Work, WorkLimits};
use crate::layer_shape::LayerShape;
use crate::layout::{KvLayout, Layout};
use crate::tensor::{Source, TensorView};
use crate::view::{LayerView, StepWork, WorkList};
use extras::Extras;

/// Attention of new tokens over any [`LayerView`]: contiguous, wrapped or paged, read where it lies.
///
/// For q [B, Hq, Tq, D], with Hq a multiple of the view's H (grouped queries), it records
/// softmax(q·Kᵀ·scale)·V into the caller's pass: one dispatch, or two where the tokens are split. q, K, V and
/// the output are f32, f16 or bf16, each of its own type; all sums are f32, and a 16-bit output is rounded to nearest
/// even once. The highest score is taken off before the
/// exponential, so any scores within ±1e38 give finite weights (online softmax: Milakov and Gimelshein, 2018).
/// A score of -inf gives a weight of zero, if not all scores of a query are -inf. Windows, masks and biases:
/// [`AttentionOptions`]. A token that a query does
/// not see changes no bit of its result, whatever K and V hold there, NaN included.
/// Where the new tokens are few, the live ones are split over workgroups and put together afterwards, so
/// that a long cache fills a GPU (flash-decoding: Dao et al., 2023). Where they are many, as in a prefill, the queries of a
/// workgroup share the tokens that it reads, on a GPU in tiles of its own memory.
///
/// One `Attention` serves all layers and caches of a device. In a steady loop a call creates nothing: a few
/// bind groups a layer are kept if their buffers have come twice, and a scratch buffer for splits. A bind group
/// keeps the buffers of q and of the output alive. It goes when the layer grows, is reset or is dropped, and
/// at [`release`](Self::release) or when the `Attention` is dropped.
///
/// # Examples
///
/// ```
/// use wgpu_kvcache::{Attention, CachePosition, DynamicKVCache, Gpu, KVCache};
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let gpu = Gpu::headless()?;
/// let mut cache = DynamicKVCache::new(&gpu);
/// let mut attention = Attention::new(&gpu);
/// let key = gpu.upload(&[0.0_f32; 2 * 5 * 4], &[1, 2, 5, 4])?;
/// let value = gpu.upload(&[1.0_f32; 2 * 5 * 4], &[1, 2, 5, 4])?;
/// let query = gpu.upload(&[0.0_f32; 6 * 5 * 4], &[1, 6, 5, 4])?; // three query heads a K/V head
/// let output = gpu.upload(&[0.0_f32; 6 * 5 * 4], &[1, 6, 5, 4])?;
/// gpu.submit_pass("layer 0", |pass| {
///     let view = cache.update(pass, &key.view(), &value.view(), 0, CachePosition::Append)?;
///     attention.record(pass, &query.view(), &view, &output.view(), Default::default())
/// })
/// # }
/// ```
#[derive(Debug)]
pub struct Attention {
    gpu: Gpu,
    /// The layers that keep bind groups for this.
    keepers: Keepers,
    /// Whether the adapter is a CPU, which has kernels in forms of its own.
    is_cpu: bool,
    /// Partial results of splits.
    scratch: Option<wgpu::Buffer>,
    /// Holds what recorded calls read in place.
    ledger: Ledger,
}

impl Attention {
    /// Compiles nothing yet: a kernel is compiled when it is first used.
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            keepers: Keepers::default(),
            is_cpu: gpu.is_cpu(),
            scratch: None,
            ledger: Ledger::default(),
        }
    }

    /// Compiles ahead what [`record`](Self::record) will need with `options`, so that the first prompt does not wait: over
    /// layers of these shapes whose views have one of these layouts, for queries and outputs of these two types, for one
    /// new token and for many. Of masks, slopes and such it matters that they are there, not what they hold.
    /// [`Gpu::compile`] does the same for plain causal attention in f32.
    ///
    /// # Errors
    ///
    /// [`Error::AttentionOption`]; else as for [`Gpu::compile`].
    pub fn compile(
        &self,
        layers: &[LayerShape],
        formats: Formats,
        layouts: &[Layout],
        query_and_output: [DType; 2],
        options: AttentionOptions<'_>,
    ) -> Result<()> {
        let rules = checks::rules(&options, 1)?;
        self.gpu.kernels().compile_attention(layers, formats, layouts, &rules, query_and_output)
    }

    /// Refuses shapes and options of q, K, V and the output with which attention would be refused once K and V are written.
    pub(crate) fn check_new(
        [query, key, value, output]: [&TensorView<'_>; 4],
        is_packed: bool,
        options: &AttentionOptions<'_>,
    ) -> Result<()> {
        checks::shapes(query, Live::to_be(key, value, is_packed), output, options)?;
        checks::rules(options, key.shape[3]).map(|_| ())
    }

    /// Records attention of `query` over `view` into `output`.
    ///
    /// `query` is [B, Hq, Tq, D of K] and `output` [B, Hq, Tq, D of V], of any type and with any strides: a
    /// [`TensorView::bthd`] serves a projection that comes in or goes on as (B, T, H, D). Both may lie in one
    /// buffer if they do not overlap: at different ranges, or in different columns of the same rows. Elements
    /// of `output` that its strides skip are left alone. A view of one batch row serves queries of any number of rows:
    /// the memory of an encoder that all beams share is stored once.
    ///
    /// Where the rows of a view differ in length, the queries of row b are the latest Tq of that row's own live tokens;
    /// a query of a row with fewer tokens than that, which has no token of its own, sees none and gives zeros.
    ///
    /// Over a layer that keeps [a window](crate::CacheOptions::with_windows) a causal query looks back no further than that,
    /// with or without a window of its own.
    ///
    /// The work of a call grows with Tq times the live tokens, and systems end a dispatch that takes seconds:
    /// hand a prompt of many thousands of tokens in by pieces, a piece's K and V with its queries.
    ///
    /// # Errors
    ///
    /// - [`Error::AttentionShape`] where the shapes do not fit the view, where the view holds no token,
    ///   or, if causal, fewer tokens than there are queries, and where D is more than 1024.
    /// - [`Error::AttentionShape`] as well for an output whose strides put two elements in one place.
    /// - [`Error::AttentionOption`] for a scale, window, soft cap, slope or sink that no scores can be made with;
    ///   [`Error::WrongDType`] for a mask that is not f32, and [`Error::PositionOutOfBounds`] for a row start past the
    ///   live tokens.
    /// - [`Error::OutputIsRead`] for an output in a buffer of a cache of this device, and
    ///   [`Error::OutputOverlapsQuery`].
    /// - Views that a kernel cannot read, as for [`KVCache::update`](crate::KVCache::update).
    /// - [`Error::PassDropped`] where the view shows what was lost with a pass, [`Error::OtherDevice`],
    ///   [`Error::DeviceLost`], and [`Error::Device`] for a buffer that cannot be bound.
    /// - [`Error::AttentionTooLarge`] where very many tokens need splits, and the queries are too many for
    ///   their partial results; [`Error::TooManyWorkgroups`] and [`Error::OutOfMemory`].
    pub fn record(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        query: &TensorView<'_>,
        view: &LayerView,
        output: &TensorView<'_>,
        options: AttentionOptions<'_>,
    ) -> Result<()> {
        let gpu = self.gpu.clone();
        let (group, tokens) = checks::shapes(query, Live::of(view), output, &options)?;
        let options = options.over(view);
        let rules = checks::rules(&options, view.key_dim)?;
        view.check(gpu.handle(), pass, [("query", query), ("output", output)])?;
        let mut from = query.source("query", gpu.limits())?;
        let mut to = output.source("output", gpu.limits())?;
        checks::output(&gpu, (query, &from), view, (output, &to))?;
        checks::masks(&gpu, &options, output)?;
        let extras = Extras::new(&gpu, view, query.shape, &options)?;

        let mut call = Call::default();
        call.borrow([query, output].into_iter().chain(&options.mask));
        call.keep(view.guard());
        if let Some(step) = &view.step {
            let extras = extras.as_ref();
            let packed = Packed { view, step, group, rules, extras, query, output };
            return self.record_packed(pass, call, &packed, [from, to]);
        }
        let batch = query.shape[0];
        let rows = group * tokens;
        let bytes = gpu.limits().max_compute_workgroup_storage_size;
        let tiles = Tiles::of([view.key_dim, view.value_dim], rows, self.is_cpu, bytes);
        let together = tiles.map_or(ROWS, |tiles| tiles.rows);
        let walked = walked(view.len, &rules, group, tokens, together);
        let (mut split, mut splits) = self.splits(view, batch, rows, together, walked);
        let mut is_pooled = splits == 1 && query.buffer == output.buffer;
        if is_pooled {
            if let Some(joined) = joined([from, to], binding_limit(gpu.limits())) {
                [from, to] = joined;
            } else {
                // Too far apart for one binding, so partial results go through another buffer. The second
                // split is empty.
                (split, splits, is_pooled) = (walked, 2, false);
            }
        }
        let shape = AttentionShape {
            view,
            batch,
            query: &from,
            output: &to,
            tiles,
            group,
            tokens,
            split,
            splits,
            types: [query.dtype, output.dtype],
            rules,
            extras: extras.as_ref().map(|extras| &extras.values),
            is_cpu: self.is_cpu,
            is_pooled,
            items: None,
        };
        let [k, v] = view.bindings();
        let q = if is_pooled { k.clone() } else { from.binding(query.buffer) };
        let output = to.binding(output.buffer);
        let extras = extras.as_ref();
        if splits == 1 {
            let bindings = with_extras([q, k, v, output], extras);
            let bindings = self.bind(view, Purpose::Attention, &bindings)?;
            call.add(gpu.kernels().attention(bindings, &shape)?);
        } else {
            let scratch = self.scratch(view, splits, scratch_bytes(view, batch * rows, splits))?;
            let scratch = scratch.as_entire_buffer_binding();
            let bindings = with_extras([q, k, v, scratch.clone()], extras);
            let bindings = self.bind(view, Purpose::Attention, &bindings)?;
            call.add(gpu.kernels().attention(bindings, &shape)?);
            let bindings = self.bind(view, Purpose::AttentionCombine, &[scratch, output])?;
            call.add(gpu.kernels().attention_combine(bindings, &shape)?);
        }
        call.record(pass, &self.ledger)
    }

    /// Records attention of packed queries: items that write to the output, then items that write partial
    /// results, and their merge.
    fn record_packed(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        mut call: Call,
        packed: &Packed<'_>,
        [mut from, mut to]: [Source; 2],
    ) -> Result<()> {
        let gpu = self.gpu.clone();
        let view = packed.view;
        let is_shared = packed.query.buffer == packed.output.buffer;
        let joined = joined([from, to], binding_limit(gpu.limits())).filter(|_| is_shared);
        // In one buffer, but too far apart for one binding: all results go through another buffer.
        let list = self.work_list(packed, !is_shared || joined.is_some())?;
        let is_pooled = joined.is_some() && list.whole[1] > 0;
        if let Some(joined) = joined.filter(|_| is_pooled) {
            [from, to] = joined;
        }
        let kv = rebased(view.kv_layout(), &list);
        let shape = |[at, count]: [u32; 2], splits: usize| AttentionShape {
            view,
            batch: view.batch,
            query: &from,
            output: &to,
            // The items are of four rows.
            tiles: None,
            group: packed.group,
            tokens: packed.step.rows.iter().map(|row| row.tokens).max().unwrap_or(0),
            split: 0,
            splits,
            types: [packed.query.dtype, packed.output.dtype],
            rules: packed.rules,
            extras: packed.extras.map(|extras| &extras.values),
            is_cpu: self.is_cpu,
            is_pooled: is_pooled && splits == 1,
            items: Some(Items { lists: &list.allocation, kv, at, count }),
        };
        let (whole, parts, merged) =
            (shape(list.whole, 1), shape(list.parts, 2), shape(list.merged, 2));
        let [k, v] = view.bindings();
        let output = to.binding(packed.output.buffer);
        if list.whole[1] > 0 {
            let q = if is_pooled { k.clone() } else { from.binding(packed.query.buffer) };
            let bindings = [q, k.clone(), v.clone(), output.clone()];
            let bindings = with_extras(bindings, packed.extras);
            let bindings = self.bind(view, Purpose::Attention, &bindings)?;
            call.add(gpu.kernels().attention(bindings, &whole)?);
        }
        if list.parts[1] > 0 {
            let count = list.parts[1] as usize;
            let scratch = self.scratch(view, count, part_bytes(view, count))?;
            let scratch = scratch.as_entire_buffer_binding();
            let q = from.binding(packed.query.buffer);
            let bindings = with_extras([q, k, v, scratch.clone()], packed.extras);
            let bindings = self.bind(view, Purpose::AttentionParts, &bindings)?;
            call.add(gpu.kernels().attention(bindings, &parts)?);
            let bindings = self.bind(view, Purpose::AttentionCombine, &[scratch, output])?;
            call.add(gpu.kernels().attention_combine(bindings, &merged)?);
        }
        call.record(pass, &self.ledger)
    }

    /// The work of a call, uploaded with the records and pages of its step. Layers of the same geometry share
    /// it.
    fn work_list(&self, packed: &Packed<'_>, has_whole: bool) -> Result<WorkList> {
        let (view, step) = (packed.view, packed.step);
        let (wanted, least) = self.wanted();
        let limit = binding_limit(self.gpu.limits());
        let limits = WorkLimits {
            group: packed.group,
            heads: view.heads,
            rows: ROWS,
            wanted,
            least,
            most: most_tokens(view, self.is_cpu),
            parts: usize::try_from(limit / part_bytes(view, 1)).unwrap_or(usize::MAX),
            is_causal: packed.rules.is_causal,
            window: packed.rules.window,
            has_whole,
        };
        let mut lists = step.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, list)) = lists.iter().find(|(its, _)| *its == limits) {
            return Ok(list.clone());
        }
        let Some(work) = Work::new(&step.rows, limits) else {
            let longest = step.rows.iter().map(|row| row.len).max().unwrap_or(0);
            let splits = longest.div_ceil(limits.most);
            let bytes = part_bytes(view, splits.saturating_mul(step.total));
            return Err(Error::AttentionTooLarge { tokens: longest, splits, bytes, limit });
        };
        let mut words = step.words.to_vec();
        let mut section = |items: &[u32]| {
            let at = words.len();
            words.extend(items);
            [at, items.len() / ITEM_WORDS]
        };
        let sections = [section(&work.whole), section(&work.parts), section(&work.merged)];
        let allocation = self.gpu.uploads().upload(&words)?;
        let first = allocation.offset as usize / 4;
        // What can be bound is counted in 32 bits.
        let word = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let [whole, parts, merged] = sections.map(|[at, count]| [word(first + at), word(count)]);
        let list = WorkList { allocation, whole, parts, merged };
        lists.push((limits, list.clone()));
        Ok(list)
    }

    /// Workgroups that fill the device, and the fewest tokens of a split.
    fn wanted(&self) -> (usize, usize) {
        if self.is_cpu { (16, 1024) } else { (512, 256) }
    }

    /// Lets go of the bind groups that layers keep for this `Attention`, and so of the buffers of q and of the
    /// output, and of the scratch buffer. What is recorded still runs; what is needed again is made again.
    pub fn release(&mut self) {
        self.keepers.release();
        self.scratch = None;
    }

    /// Tokens of a split, and how many: enough workgroups to fill the device, and enough tokens for each
    /// to be worth putting together; but no more tokens than a workgroup can go through. `walked` is the most tokens
    /// that a workgroup goes through.
    fn splits(
        &self,
        view: &LayerView,
        batch: usize,
        rows: usize,
        together: usize,
        walked: usize,
    ) -> (usize, usize) {
        let (wanted, least) = self.wanted();
        let workgroups = rows.div_ceil(together).saturating_mul(batch * view.heads);
        let splits = wanted_splits(workgroups, wanted, walked, least);
        let fit = binding_limit(self.gpu.limits()) / scratch_bytes(view, batch * rows, 1);
        let splits = splits.min(usize::try_from(fit).unwrap_or(usize::MAX));
        let splits = splits.max(walked.div_ceil(most_tokens(view, self.is_cpu)));
        let split = walked.div_ceil(splits);
        (split, walked.div_ceil(split))
    }

    /// A bind group, kept with the layer if its buffers have come before. All of attention's are made here.
    fn bind(
        &mut self,
        view: &LayerView,
        purpose: Purpose,
        bindings: &[wgpu::BufferBinding<'_>],
    ) -> Result<wgpu::BindGroup> {
        let kernels = self.gpu.kernels();
        let make = |bindings: &[wgpu::BufferBinding<'_>]| match purpose {
            Purpose::AttentionCombine => kernels.bind_attention_combine(bindings),
            _ => kernels.bind_attention(bindings),
        };
        let (bindings, is_kept) = view.bind_groups.get(purpose, bindings, make)?;
        if is_kept {
            self.keepers.add(&view.bind_groups);
        }
        Ok(bindings)
    }

    /// A buffer for the partial results of all splits.
    fn scratch(&mut self, view: &LayerView, splits: usize, bytes: u64) -> Result<wgpu::Buffer> {
        let limit = binding_limit(self.gpu.limits());
        if bytes > limit {
            return Err(Error::AttentionTooLarge { tokens: view.len, splits, bytes, limit });
        }
        if let Some(scratch) = self.scratch.as_ref().filter(|scratch| scratch.size() >= bytes) {
            return Ok(scratch.clone());
        }
        // Doubling, so that a text that grows token by token rarely needs a new one.
        let least = self.scratch.as_ref().map_or(64 << 10, |scratch| 2 * scratch.size());
        let bytes = bytes.max(least.min(limit)).next_multiple_of(4);
        let usage = wgpu::BufferUsages::STORAGE;
        let scratch = self.gpu.handle().create_buffer("kvcache attention splits", bytes, usage)?;
        // Bind groups keep the one before alive.
        self.keepers.release();
        Ok(self.scratch.insert(scratch).clone())
    }
}

/// A call of attention over a step.
struct Packed<'a> {
    view: &'a LayerView,
    step: &'a StepWork,
    group: usize,
    rules: Rules,
    extras: Option<&'a Extras<'a>>,
    query: &'a TensorView<'a>,
    output: &'a TensorView<'a>,
}

/// The parameters of a step's view, for the buffer of a list of work.
fn rebased(kv: KvLayout, list: &WorkList) -> KvLayout {
    let first = list.allocation.offset / 4;
    KvLayout { table: first, rows: first, ..kv }
}

/// Bytes of `parts` partial results of four query rows of all K/V heads.
fn part_bytes(view: &LayerView, parts: usize) -> u64 {
    [view.heads, ROWS, view.value_dim + 2, size_of::<f32>()]
        .iter()
        .fold(parts as u64, |all, &n| all.saturating_mul(n as u64))
}

/// The most tokens that four query rows go through: with a window, those of the rows together.
fn walked(len: usize, rules: &Rules, group: usize, tokens: usize, together: usize) -> usize {
    let Some([window, first]) = rules.window else { return len };
    // Tokens of the rows of a workgroup.
    let spanned = tokens.min((together - 1).div_ceil(group) + 1);
    let latest = if rules.is_causal { spanned } else { tokens };
    first.saturating_add(window).saturating_add(latest - 1).min(len)
}

/// The bindings of a call of attention.
fn with_extras<'a>(
    bindings: [wgpu::BufferBinding<'a>; 4],
    extras: Option<&'a Extras<'_>>,
) -> Vec<wgpu::BufferBinding<'a>> {
    let others = extras.map(|extras| extras.bindings(&bindings[1]));
    bindings.into_iter().chain(others.into_iter().flatten()).collect()
}

/// Bytes of the partial results of `splits` splits: sums, highest score and total weight of each query row.
/// `rows` are those of all batch rows.
fn scratch_bytes(view: &LayerView, rows: usize, splits: usize) -> u64 {
    [view.heads, rows, view.value_dim + 2, size_of::<f32>()]
        .iter()
        .fold(splits as u64, |all, &n| all.saturating_mul(n as u64))
}

/// Two views of one buffer in one window, if it can be bound.
fn joined(sources: [Source; 2], limit: u64) -> Option<[Source; 2]> {
    let [a, b] = sources.map(|source| source.window);
    let begin = a.0.min(b.0);
    let bytes = (a.0 + a.1).max(b.0 + b.1) - begin;
    (bytes <= limit).then(|| {
        sources.map(|source| Source {
            offset: source.offset + source.window.0 - begin,
            window: (begin, bytes),
            ..source
        })
    })
}

/// How often the tokens are split.
fn wanted_splits(workgroups: usize, wanted: usize, len: usize, least: usize) -> usize {
    (wanted / workgroups.max(1)).min(len / least).clamp(1, 64)
}

#[cfg(test)]
mod tests;
