//! Attention over a layer's view: softmax(q·Kᵀ·scale)·V.

use std::collections::HashMap;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::{Gpu, binding_limit};
use crate::kernels::{AttentionShape, MOST_DIM, ROWS};
use crate::ledger::Ledger;
use crate::view::{LayerView, TensorView};

/// Calls between two looks at which bind groups are still in use, and how many calls a bind group may go
/// unused. A step of a model has fewer layers.
const UNUSED: u64 = 512;

/// Attention of new tokens over any [`LayerView`]: contiguous, wrapped or paged, read where it lies.
///
/// For q [B, Hq, Tq, D], with Hq a multiple of the view's H (grouped queries), it records
/// softmax(q·Kᵀ·scale)·V into the caller's pass: one dispatch, or two where the tokens are split. K and V
/// are f32, f16 or bf16; q, the output and all sums are f32. The highest score is taken off before the
/// exponential, so any scores within ±1e38 give finite weights (online softmax: Milakov and Gimelshein, 2018).
/// Where the new tokens are few, the live ones are split over workgroups and put together afterwards, so
/// that a long cache fills a GPU (flash-decoding: Dao et al., 2023).
///
/// One `Attention` serves all layers and caches of a device. It keeps the bind groups of late, which keeps
/// their buffers alive for some hundred calls, and a scratch buffer for splits: in a steady loop a call
/// creates nothing.
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
    /// Bind groups by what they bind, with the call that last used them.
    bound: HashMap<Bound, (wgpu::BindGroup, u64)>,
    calls: u64,
    /// Whether the adapter is a CPU, which has kernels in forms of its own.
    is_cpu: bool,
    /// Partial results of splits.
    scratch: Option<wgpu::Buffer>,
    /// Holds what recorded calls read in place.
    ledger: Ledger,
}

/// How [`Attention::record`] weighs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionOptions {
    /// What scores are multiplied by; `None` for 1/√D.
    pub scale: Option<f32>,
    /// Whether a new token sees only the tokens before it and itself, the last Tq live tokens being the
    /// new ones. If not, all new tokens see all live ones, as in cross-attention.
    pub is_causal: bool,
}

impl Default for AttentionOptions {
    /// Causal, with a scale of 1/√D.
    fn default() -> Self {
        Self { scale: None, is_causal: true }
    }
}

/// What a bind group binds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Bound {
    buffers: Vec<wgpu::Buffer>,
    /// Offset and size of the two that are bound in part.
    windows: [(u64, Option<wgpu::BufferSize>); 2],
}

impl Attention {
    /// Compiles nothing yet: a kernel is compiled when it is first used.
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            bound: HashMap::new(),
            calls: 0,
            is_cpu: gpu.is_cpu(),
            scratch: None,
            ledger: Ledger::default(),
        }
    }

    /// Records attention of `query` over `view` into `output`.
    ///
    /// `query` is [B, Hq, Tq, D of K] and `output` [B, Hq, Tq, D of V], both f32 with any strides: a
    /// [`TensorView::bthd`] serves a projection that comes in or goes on as (B, T, H, D). `output` must not
    /// lie in a buffer that is read. Elements of `output` that its strides skip are left alone.
    ///
    /// The work of a call grows with Tq times the live tokens, and systems end a dispatch that takes seconds:
    /// hand a prompt of many thousands of tokens in by pieces, a piece's K and V with its queries.
    ///
    /// # Errors
    ///
    /// - [`Error::AttentionShape`] where the shapes do not fit the view, where the view holds no token,
    ///   or, if causal, fewer tokens than there are queries, and where D is more than 256.
    /// - [`Error::WrongDType`] where q or the output is not f32; [`Error::OutputIsRead`].
    /// - Views that a kernel cannot read, as for [`KVCache::update`](crate::KVCache::update).
    /// - [`Error::TooManyWorkgroups`] and [`Error::OutOfMemory`].
    pub fn record(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        query: &TensorView<'_>,
        view: &LayerView<'_>,
        output: &TensorView<'_>,
        options: AttentionOptions,
    ) -> Result<()> {
        let gpu = self.gpu.clone();
        let (group, tokens) = check_shapes(query, view, output, options)?;
        let from = query.source("query", gpu.limits())?;
        let to = output.source("output", gpu.limits())?;
        check_alias(query, view, output)?;
        self.forget_unused();

        let rows = group * tokens;
        let (split, splits) = self.splits(view, rows);
        let scale = options.scale.unwrap_or_else(|| default_scale(view.key_dim));
        let shape = AttentionShape {
            view,
            query: &from,
            output: &to,
            group,
            tokens,
            split,
            splits,
            scale,
            is_causal: options.is_causal,
            is_cpu: self.is_cpu,
        };
        let mut dispatches = Vec::with_capacity(2);
        let query = from.binding(query.buffer);
        let output = to.binding(output.buffer);
        if splits == 1 {
            let bindings = self.bind(query, view, output);
            dispatches.push(gpu.kernels().attention(&gpu, bindings, &shape)?);
        } else {
            let sums = [view.batch, view.heads, rows, view.value_dim + 2, size_of::<f32>()];
            let bytes = sums.iter().try_fold(splits as u64, |all, &n| all.checked_mul(n as u64));
            let scratch = self.scratch(bytes.ok_or_else(|| {
                let asked = format!("{splits} splits of {shape:?}");
                Error::overflow("size of partial results", asked, u64::MAX)
            })?)?;
            let bindings = self.bind(query, view, scratch.as_entire_buffer_binding());
            dispatches.push(gpu.kernels().attention(&gpu, bindings, &shape)?);
            let bindings = self.bind_combine(&scratch, output);
            dispatches.push(gpu.kernels().attention_combine(&gpu, bindings, &shape)?);
        }
        for dispatch in dispatches {
            dispatch.record(pass, &self.ledger, Vec::new());
        }
        Ok(())
    }

    /// Tokens of a split, and how many: enough workgroups to fill the device, and enough tokens for each
    /// to be worth putting together.
    fn splits(&self, view: &LayerView<'_>, rows: usize) -> (usize, usize) {
        let (wanted, least) = if self.is_cpu { (16, 1024) } else { (512, 256) };
        let workgroups = rows.div_ceil(ROWS).saturating_mul(view.batch * view.heads);
        let splits = wanted_splits(workgroups, wanted, view.len, least);
        let split = view.len.div_ceil(splits);
        (split, view.len.div_ceil(split))
    }

    fn bind(
        &mut self,
        query: wgpu::BufferBinding<'_>,
        view: &LayerView<'_>,
        result: wgpu::BufferBinding<'_>,
    ) -> wgpu::BindGroup {
        let buffers = [query.buffer, view.key, view.value, result.buffer].map(Clone::clone);
        let windows = [(query.offset, query.size), (result.offset, result.size)];
        let gpu = self.gpu.clone();
        self.kept(Bound { buffers: buffers.to_vec(), windows }, || {
            gpu.kernels().bind_attention(&gpu, query, view, result)
        })
    }

    fn bind_combine(
        &mut self,
        scratch: &wgpu::Buffer,
        output: wgpu::BufferBinding<'_>,
    ) -> wgpu::BindGroup {
        let buffers = vec![scratch.clone(), output.buffer.clone()];
        let windows = [(0, None), (output.offset, output.size)];
        let gpu = self.gpu.clone();
        self.kept(Bound { buffers, windows }, || {
            gpu.kernels().bind_attention_combine(&gpu, scratch, output)
        })
    }

    fn kept(&mut self, bound: Bound, bind: impl FnOnce() -> wgpu::BindGroup) -> wgpu::BindGroup {
        let (bindings, last_used) = self.bound.entry(bound).or_insert_with(|| (bind(), 0));
        *last_used = self.calls;
        bindings.clone()
    }

    /// Lets go of bind groups of which the buffers are probably gone, as after a cache has grown.
    fn forget_unused(&mut self) {
        self.calls += 1;
        if self.calls.is_multiple_of(UNUSED) {
            let calls = self.calls;
            self.bound.retain(|_, (_, last_used)| *last_used + UNUSED > calls);
        }
    }

    fn scratch(&mut self, bytes: u64) -> Result<wgpu::Buffer> {
        if let Some(scratch) = self.scratch.as_ref().filter(|scratch| scratch.size() >= bytes) {
            return Ok(scratch.clone());
        }
        // Doubling, so that a text that grows token by token rarely needs a new one.
        let least = self.scratch.as_ref().map_or(64 << 10, |scratch| 2 * scratch.size());
        let limit = binding_limit(self.gpu.limits());
        let bytes = bytes.max(least.min(limit)).next_multiple_of(4);
        let usage = wgpu::BufferUsages::STORAGE;
        let scratch = self.gpu.handle().create_buffer("kvcache attention splits", bytes, usage)?;
        Ok(self.scratch.insert(scratch).clone())
    }
}

/// How often the tokens are split.
fn wanted_splits(workgroups: usize, wanted: usize, len: usize, least: usize) -> usize {
    (wanted / workgroups.max(1)).min(len / least).clamp(1, 64)
}

/// 1/√D.
fn default_scale(dim: usize) -> f32 {
    let dim = u16::try_from(dim).expect("the head was checked to have at most 256 elements");
    1.0 / f32::from(dim).sqrt()
}

/// Query heads of a K/V head, and new tokens.
fn check_shapes(
    query: &TensorView<'_>,
    view: &LayerView<'_>,
    output: &TensorView<'_>,
    options: AttentionOptions,
) -> Result<(usize, usize)> {
    for (what, tensor) in [("query", query), ("output", output)] {
        if tensor.dtype != DType::F32 {
            return Err(Error::WrongDType { what, expected: DType::F32, got: tensor.dtype });
        }
    }
    let [batch, heads, tokens, dim] = query.shape;
    let refused = |reason| Error::AttentionShape {
        reason,
        query: query.shape,
        what: "K",
        other: view.key_shape(),
    };
    if batch != view.batch {
        return Err(refused("the query and the cache differ in batch rows"));
    }
    if heads % view.heads != 0 {
        return Err(refused("the query's heads are no multiple of the cache's"));
    }
    if dim != view.key_dim {
        return Err(refused("the query and K differ in head_dim"));
    }
    if output.shape != [batch, heads, tokens, view.value_dim] {
        return Err(Error::AttentionShape {
            reason: "the output must be (B, Hq, Tq, D of V)",
            query: query.shape,
            what: "output",
            other: output.shape,
        });
    }
    if output.shape.iter().zip(output.strides).any(|(&extent, stride)| extent > 1 && stride == 0) {
        return Err(Error::AttentionShape {
            reason: "the output has a stride of 0, so that several results would lie in one place",
            query: query.shape,
            what: "output",
            other: output.shape,
        });
    }
    if view.key_dim.max(view.value_dim) > MOST_DIM {
        return Err(refused("head_dim is more than the 256 that the kernel holds"));
    }
    if view.len == 0 {
        return Err(refused("the cache holds no token to attend to"));
    }
    if options.is_causal && tokens > view.len {
        return Err(refused("causal attention needs every new token in the cache first"));
    }
    Ok((heads / view.heads, tokens))
}

/// One dispatch cannot read and write a buffer through two bindings.
fn check_alias(
    query: &TensorView<'_>,
    view: &LayerView<'_>,
    output: &TensorView<'_>,
) -> Result<()> {
    for (what, buffer) in [("query", query.buffer), ("K", view.key), ("V", view.value)] {
        if output.buffer == buffer {
            return Err(Error::OutputIsRead { what });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::{
        CachePosition, DynamicKVCache, KVCache, Layout, PagedKVCache, PagedOptions, StaticKVCache,
        Tensor,
    };

    const APPEND: CachePosition<'_> = CachePosition::Append;

    /// Numbers from -1 up to 1, or whole ones from -8 to 8.
    fn random(state: &mut u32, count: usize, is_whole: bool) -> Vec<f32> {
        let mut next = || {
            *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let number = f32::from((*state >> 16) as u16) / 32_768.0 - 1.0;
            if is_whole { (8.0 * number).round() } else { number }
        };
        (0..count).map(|_| next()).collect()
    }

    fn upload(gpu: &Gpu, dtype: DType, values: &[f32], shape: &[usize]) -> Tensor {
        let tensor = match dtype {
            DType::F32 => gpu.upload(values, shape),
            DType::F16 => {
                gpu.upload(&values.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>(), shape)
            }
            DType::BF16 => {
                gpu.upload(&values.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>(), shape)
            }
        };
        tensor.unwrap_or_else(|error| panic!("{error}"))
    }

    /// An empty cache for each layout.
    fn caches(gpu: &Gpu, len: usize) -> [(Layout, Box<dyn KVCache>); 5] {
        let paged = |page_tokens| -> (Layout, Box<dyn KVCache>) {
            let options = PagedOptions { page_tokens, ..PagedOptions::default() };
            let cache = PagedKVCache::with_options(gpu, options).expect("a power of two");
            (Layout::Paged, Box::new(cache))
        };
        [
            (Layout::Contiguous, Box::new(DynamicKVCache::new(gpu))),
            (Layout::Wrapped, Box::new(StaticKVCache::new(gpu, len, 1))),
            paged(1),
            paged(4),
            paged(16),
        ]
    }

    /// Software adapters, which most tests run on, get the kernels in other forms than GPUs do.
    ///
    /// They are given the same work, over every layout and type. Those for CPUs are compared with f64
    /// elsewhere. Whole numbers have exact scores, up to some thousands, so one token decides there.
    #[test]
    fn forms_for_a_gpu_and_for_a_cpu_agree() {
        let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
        let mut attention =
            [false, true].map(|is_cpu| Attention { is_cpu, ..Attention::new(&gpu) });
        let mut state = 1;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (dim, len, tokens, is_whole) in [
                (50, 700, 3, false),
                (32, 3000, 2, false),
                (64, 2500, 1, true),
                (96, 40, 5, false),
                (128, 2100, 3, true),
                (256, 900, 2, false),
            ] {
                for (layout, mut cache) in caches(&gpu, len) {
                    // A second piece follows where the oldest are dropped: over the end of a ring, or
                    // from amid a page on.
                    let mut pieces = vec![(0, len)];
                    if layout != Layout::Contiguous {
                        pieces.push((len - len / 3, len / 3));
                    }
                    for (kept, tokens) in pieces {
                        let shape = [2, 3, tokens, dim];
                        let key = random(&mut state, 6 * tokens * dim, is_whole);
                        let value = random(&mut state, 6 * tokens * dim, false);
                        let [key, value] =
                            [key, value].map(|values| upload(&gpu, dtype, &values, &shape));
                        cache.crop(kept);
                        gpu.submit_pass("fill", |pass| {
                            cache.update(pass, &key.view(), &value.view(), 0, APPEND).map(|_| ())
                        })
                        .unwrap_or_else(|error| panic!("{error}"));
                    }
                    let view = cache.view(0).expect("it exists").expect("it was written");
                    let case = format!("{layout:?}, {dtype:?}, {:?}", view.key_shape());
                    assert!(view.layout() == layout && view.len == len, "{case}");

                    let query = random(&mut state, 12 * tokens * dim, is_whole);
                    let query = upload(&gpu, DType::F32, &query, &[2, 6, tokens, dim]);
                    let scale = is_whole.then_some(2.0);
                    let options = AttentionOptions { scale, is_causal: true };
                    let answers = attention.each_mut().map(|attention| {
                        let unwritten = vec![f32::NAN; 12 * tokens * dim];
                        let output = upload(&gpu, DType::F32, &unwritten, &query.shape());
                        let mut answer = DynamicKVCache::new(&gpu);
                        gpu.submit_pass("attention", |pass| {
                            let to = output.view();
                            attention.record(pass, &query.view(), &view, &to, options)?;
                            answer.update(pass, &to, &to, 0, APPEND).map(|_| ())
                        })
                        .unwrap_or_else(|error| panic!("{case}: {error}"));
                        answer.get(0).expect("read back").expect("written").0.to_f32()
                    });
                    let square = |numbers: &mut dyn Iterator<Item = f32>| {
                        numbers.map(|n| n * n).sum::<f32>()
                    };
                    let apart = &mut answers[0].iter().zip(&answers[1]).map(|(a, b)| a - b);
                    let (apart, whole) = (square(apart), square(&mut answers[1].iter().copied()));
                    assert!(apart <= 1e-10 * whole && whole > 0.0, "{case}: {apart} of {whole}");
                }
            }
        }
    }

    #[test]
    fn splits_fill_the_device_and_are_worth_it() {
        assert_eq!(wanted_splits(32, 512, 4096, 256), 16);
        assert_eq!(wanted_splits(1, 512, 8192, 256), 32);
        assert_eq!(wanted_splits(1, 512, 300, 256), 1);
        assert_eq!(wanted_splits(600, 512, 8192, 256), 1);
        assert_eq!(wanted_splits(0, 512, 1, 256), 1);
    }
}
