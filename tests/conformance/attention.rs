//! Attention over every view, against a reference in f64 over the values that the cache holds.

use half::{bf16, f16};
use wgpu_kvcache::{
    Attention, AttentionOptions, CacheOptions, CachePosition, DType, DynamicKVCache, Gpu, KVCache,
    Layout, PagedKVCache, StaticKVCache, Tensor, TensorView,
};

use crate::rig::read_buffer;
use crate::wait::ReadLayer;
use crate::{cases, gpu, kernels_run, shared_plain_gpu};

pub(crate) const BOUND: f64 = 1e-5;

pub(crate) const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Lies between the rows of q and of the output, where the kernel has no business.
const GAP: f32 = 3.0e38;

/// Numbers that look random, the same at every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub(crate) fn word(&mut self) -> u32 {
        u32::try_from(self.next() >> 16).expect("32 of 48 bits")
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("less than a usize")
    }

    /// About normal, with a deviation of about `size`.
    fn float(&mut self, size: f32) -> f32 {
        let bits = self.next();
        let part = |i: u32| u16::try_from((bits >> (12 * i)) % 4096).expect("12 bits");
        size * (f32::from((0..4).map(part).sum::<u16>()) / 8192.0 - 1.0) * 3.4
    }

    pub(crate) fn floats(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| self.float(size)).collect()
    }
}

/// How the tokens come to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    Contiguous,
    Wrapped,
    /// In pages of that many tokens.
    Paged(usize),
}

/// Every lie with every type.
pub(crate) fn lies_and_dtypes() -> Vec<(Lie, DType)> {
    let pages = [1, 4, 16].map(Lie::Paged);
    let lies = [Lie::Contiguous, Lie::Wrapped].into_iter().chain(pages);
    lies.flat_map(|lie| DTYPES.map(|dtype| (lie, dtype))).collect()
}

/// Half of these sizes of heads, for tokens that lie so and are of this type.
///
/// A software adapter takes seconds to compile a pipeline of attention. So every two of a layout, a type and a size
/// meet, and not all three.
pub(crate) fn half_of<T: Copy, const N: usize>(
    (lie, dtype): (Lie, DType),
    sizes: [T; N],
) -> Vec<T> {
    let layout = match lie {
        Lie::Contiguous => 0,
        Lie::Wrapped => 1,
        Lie::Paged(_) => 2,
    };
    sizes.into_iter().skip((layout + dtype as usize) % 2).step_by(2).collect()
}

/// How q or the output lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// (B, H, T, D).
    HeadsFirst,
    /// (B, T, H, D), as a projection writes it.
    TokensFirst,
    /// (B, T, H, D) with other columns before and after, as in one tensor of Q, K and V.
    Fused,
}

/// A form for q and one for the output; numbers that follow one another give all pairs.
pub(crate) fn forms(number: usize) -> [Form; 2] {
    let all = [Form::HeadsFirst, Form::TokensFirst, Form::Fused];
    [all[number % 3], all[number / 3 % 3]]
}

/// A layer, and queries over it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) lie: Lie,
    pub(crate) dtype: DType,
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) group: usize,
    /// Live tokens, and how many of them are new.
    pub(crate) len: usize,
    pub(crate) tokens: usize,
    pub(crate) dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) is_causal: bool,
    pub(crate) scale: Option<f32>,
    /// Of q and of the output.
    pub(crate) forms: [Form; 2],
}

impl Case {
    /// The shape of q, and that of the output.
    pub(crate) fn shapes(&self) -> [[usize; 4]; 2] {
        let heads = self.heads * self.group;
        [self.dim, self.value_dim].map(|dim| [self.batch, heads, self.tokens, dim])
    }

    pub(crate) fn options(&self) -> AttentionOptions<'static> {
        let options = AttentionOptions::default().with_scale(self.scale);
        if self.is_causal { options.causal() } else { options.unmasked() }
    }
}

/// A [B, H, T, D] tensor, in any form.
pub(crate) struct Placed {
    tensor: Tensor,
    form: Form,
    shape: [usize; 4],
}

impl Placed {
    /// Of f32.
    pub(crate) fn new(gpu: &Gpu, form: Form, shape: [usize; 4], values: &[f32]) -> Self {
        Self::typed(gpu, form, DType::F32, shape, values)
    }

    pub(crate) fn typed(
        gpu: &Gpu,
        form: Form,
        dtype: DType,
        shape: [usize; 4],
        values: &[f32],
    ) -> Self {
        let (starts, count) = Self::rows(form, dtype, shape);
        let mut elements = vec![Self::gap(dtype); count];
        for (start, row) in starts.into_iter().zip(values.chunks(shape[3])) {
            elements[start..][..shape[3]].copy_from_slice(row);
        }
        Self { tensor: upload(gpu, dtype, &elements, &[1, 1, 1, count]), form, shape }
    }

    pub(crate) fn view(&self) -> TensorView<'_> {
        let [b, h, t, d] = self.shape;
        let dtype = self.tensor.dtype();
        let plain = TensorView::new(self.tensor.buffer(), dtype, &self.shape);
        let view = match self.form {
            Form::HeadsFirst => plain,
            Form::TokensFirst => TensorView::bthd(self.tensor.buffer(), dtype, &[b, t, h, d]),
            Form::Fused => plain.map(|view| {
                let columns = h * d + 8;
                let offset = Self::first(dtype) * dtype.size();
                view.with_offset(offset as u64).with_strides([t * columns, d, columns, 1])
            }),
        };
        view.expect("a shape")
    }

    /// The elements, row-major (B, H, T, D). What lies between the rows must be as it was.
    pub(crate) fn read(&self, gpu: &Gpu) -> Vec<f32> {
        let dtype = self.tensor.dtype();
        let bytes = read_buffer(gpu, self.tensor.buffer());
        let mut elements: Vec<f32> = match dtype {
            DType::F16 => {
                bytemuck::pod_collect_to_vec::<_, f16>(&bytes).iter().map(|x| x.to_f32()).collect()
            }
            DType::BF16 => {
                bytemuck::pod_collect_to_vec::<_, bf16>(&bytes).iter().map(|x| x.to_f32()).collect()
            }
            _ => bytemuck::pod_collect_to_vec(&bytes),
        };
        let gap = Self::gap(dtype);
        let (starts, count) = Self::rows(self.form, dtype, self.shape);
        elements.truncate(count);
        let mut values = Vec::new();
        for start in starts {
            let row = &mut elements[start..][..self.shape[3]];
            values.extend_from_slice(row);
            row.fill(gap);
        }
        assert!(elements.iter().all(|&x| x == gap), "written between the rows");
        values
    }

    /// What lies between the rows: a number of the type.
    fn gap(dtype: DType) -> f32 {
        if dtype == DType::F32 { GAP } else { 16384.0 }
    }

    /// The first column of a fused tensor: a whole number of words in.
    fn first(dtype: DType) -> usize {
        if dtype == DType::F32 { 3 } else { 6 }
    }

    /// Where each row of D elements begins, and how many elements the buffer holds.
    fn rows(
        form: Form,
        dtype: DType,
        [batch, heads, tokens, dim]: [usize; 4],
    ) -> (Vec<usize>, usize) {
        let columns = heads * dim + if form == Form::Fused { 8 } else { 0 };
        let mut starts = Vec::new();
        for b in 0..batch {
            for h in 0..heads {
                starts.extend((0..tokens).map(|t| match form {
                    Form::HeadsFirst => ((b * heads + h) * tokens + t) * dim,
                    Form::TokensFirst => (b * tokens + t) * columns + h * dim,
                    Form::Fused => (b * tokens + t) * columns + h * dim + Self::first(dtype),
                }));
            }
        }
        (starts, batch * tokens * columns)
    }
}

pub(crate) fn upload(gpu: &Gpu, dtype: DType, values: &[f32], shape: &[usize]) -> Tensor {
    let tensor = match dtype {
        DType::F32 => gpu.upload(values, shape),
        DType::F16 => {
            gpu.upload(&values.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>(), shape)
        }
        DType::BF16 => {
            gpu.upload(&values.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>(), shape)
        }
        other => panic!("no case is of {other}"),
    };
    tensor.unwrap_or_else(|error| panic!("{error}"))
}

/// A cache of which layer 0 holds `key` and `value`, [B, H, T, D], and they lie as asked.
///
/// Tokens that are dropped on the way are NaN: a kernel that weighs them, by zero even, is found out. Of a
/// paged layer the rows share their first half, that of row 0, and come in reverse.
pub(crate) fn filled(gpu: &Gpu, case: &Case, key: &[f32], value: &[f32]) -> Box<dyn KVCache> {
    filled_as(gpu, case, CacheOptions::default(), key, value)
}

/// As [`filled`], in a cache of these options.
pub(crate) fn filled_as(
    gpu: &Gpu,
    case: &Case,
    options: CacheOptions<'_>,
    key: &[f32],
    value: &[f32],
) -> Box<dyn KVCache> {
    let Case { lie, dtype, batch, heads, len, dim, value_dim, .. } = *case;
    // Appends the tokens of a range, after some dead ones.
    let append = |cache: &mut dyn KVCache, batch: usize, dead: usize, range: [usize; 2]| {
        let piece = |values: &[f32], dim: usize| {
            let mut piece = Vec::new();
            for row in values.chunks(len * dim).take(batch * heads) {
                piece.resize(piece.len() + dead * dim, f32::NAN);
                piece.extend_from_slice(&row[range[0] * dim..range[1] * dim]);
            }
            upload(gpu, dtype, &piece, &[batch, heads, dead + range[1] - range[0], dim])
        };
        let (k, v) = (piece(key, dim), piece(value, value_dim));
        gpu.submit_pass("fill", |pass| {
            cache.update(pass, &k.view(), &v.view(), 0, CachePosition::Append).map(|_| ())
        })
        .unwrap_or_else(|error| panic!("{case:?}: {error}"));
    };
    let dead = len % 3;
    let mut cache: Box<dyn KVCache> = match lie {
        Lie::Contiguous => {
            Box::new(DynamicKVCache::with_options(gpu, options).expect("its options"))
        }
        Lie::Wrapped => Box::new(
            StaticKVCache::with_options(
                gpu,
                options.with_max_cache_len(len + dead).with_num_layers(1),
            )
            .expect("both options"),
        ),
        Lie::Paged(page_tokens) => {
            let options = options.with_page_tokens(page_tokens);
            Box::new(PagedKVCache::with_options(gpu, options).expect("a power of two"))
        }
    };
    match lie {
        // From a slot past the first on, if there are dead ones.
        Lie::Contiguous => {
            append(cache.as_mut(), batch, dead, [0, len]);
            cache.crop(len);
        }
        // Full, the oldest dropped, and over the end.
        Lie::Wrapped => {
            let over = len.div_ceil(2);
            append(cache.as_mut(), batch, dead + over, [0, len - over]);
            cache.crop(len - over);
            append(cache.as_mut(), batch, 0, [len - over, len]);
        }
        // Rows that share a beginning and have changed places, in pages out of order.
        Lie::Paged(page) => {
            let shared = len.div_ceil(2);
            append(cache.as_mut(), 1, page / 2 + 1, [0, shared]);
            let rows = vec![0; batch];
            gpu.submit_pass("fork", |pass| cache.reorder_cache(pass, &rows)).expect("row 0 exists");
            cache.crop(shared);
            if len > shared {
                append(cache.as_mut(), batch, 0, [shared, len]);
            }
            let turned: Vec<u32> = (0..u32::try_from(batch).expect("few")).rev().collect();
            gpu.submit_pass("turn", |pass| cache.reorder_cache(pass, &turned)).expect("rows exist");
        }
    }
    let view = cache.view(0).expect("it exists").expect("it was written");
    assert_eq!(view.len(), len, "{case:?}");
    match lie {
        Lie::Contiguous => assert_eq!(view.layout(), Layout::Contiguous),
        Lie::Wrapped => assert!(view.layout() == Layout::Wrapped || len == 1, "{case:?}"),
        Lie::Paged(_) => assert_eq!(view.layout(), Layout::Paged),
    }
    cache
}

pub(crate) fn read(gpu: &Gpu, tensor: &Tensor) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(&read_buffer(gpu, tensor.buffer()))
}

/// softmax(q·Kᵀ·scale)·V in f64, row-major (B, Hq, Tq, D of V).
pub(crate) fn reference(case: &Case, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f64> {
    let Case { batch, heads, group, len, tokens, dim, value_dim, is_causal, scale, .. } = *case;
    let inverse = 1.0 / f32::from(u16::try_from(dim).expect("small")).sqrt();
    let scale = f64::from(scale.unwrap_or(inverse));
    let mut out = Vec::new();
    for row in 0..batch * heads * group {
        let kv = row / (heads * group) * heads + row % (heads * group) / group;
        for token in 0..tokens {
            let seen = if is_causal { len - tokens + token + 1 } else { len };
            let q = &q[(row * tokens + token) * dim..][..dim];
            let scores: Vec<f64> = (0..seen)
                .map(|t| {
                    let k = &k[(kv * len + t) * dim..][..dim];
                    let dot: f64 =
                        q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                    dot * scale
                })
                .collect();
            let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sums = vec![0.0; value_dim];
            for (t, weight) in weights.iter().enumerate() {
                let v = &v[(kv * len + t) * value_dim..][..value_dim];
                sums.iter_mut().zip(v).for_each(|(sum, &v)| *sum += weight * f64::from(v));
            }
            out.extend(sums.iter().map(|sum| sum / total));
        }
    }
    out
}

pub(crate) fn distance(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let apart: f64 = got.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
    let size: f64 = expected.iter().map(|b| b * b).sum();
    (apart / size).sqrt()
}

/// What attention of `q` over a cache gives, and what it should, both row-major (B, Hq, Tq, D of V).
/// Nothing where no kernel runs.
pub(crate) fn attend(
    gpu: &Gpu,
    attention: &mut Attention,
    case: &Case,
    q: &[f32],
    cache: &dyn KVCache,
) -> Option<(Vec<f32>, Vec<f64>)> {
    let [query, output] = case.shapes();
    // Whatever was there before: NaN.
    let nan = vec![f32::NAN; output.iter().product()];
    let query = Placed::new(gpu, case.forms[0], query, q);
    let output = Placed::new(gpu, case.forms[1], output, &nan);
    let view = cache.view(0).expect("it exists").expect("it was written");
    let options = case.options();
    gpu.submit_pass("attention", |pass| {
        attention.record(pass, &query.view(), &view, &output.view(), options)
    })
    .unwrap_or_else(|error| panic!("{case:?}: {error}"));
    let (key, value) = cache.read(0).expect("it is submitted").expect("it was written");
    if !kernels_run() {
        return None;
    }
    let got = output.read(gpu);
    assert!(got.iter().all(|x| x.is_finite()), "{case:?}: not finite");
    Some((got, reference(case, q, &key.to_f32(), &value.to_f32())))
}

/// Attention on a case, with q and K of a deviation of `size`.
fn check(gpu: &Gpu, attention: &mut Attention, case: &Case, random: &mut Random, size: f32) {
    let rows = case.batch * case.heads * case.len;
    let k = random.floats(rows * case.dim, size);
    let v = random.floats(rows * case.value_dim, 1.0);
    let q = random.floats(case.shapes()[0].iter().product(), size);
    let cache = filled(gpu, case, &k, &v);
    if let Some((got, expected)) = attend(gpu, attention, case, &q, cache.as_ref()) {
        let apart = distance(&got, &expected);
        assert!(apart < BOUND, "{case:?}, size {size}: off by {apart:e}");
    }
}

/// Every layout and type, at lengths around those at which something changes.
#[test]
fn every_layout_and_type() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(7);
    for (number, (lie, dtype)) in lies_and_dtypes().into_iter().enumerate() {
        let sizes = half_of((lie, dtype), [[32; 3], [80; 3], [128, 256, 512], [64; 3]]);
        for (nth, len) in [1, 2, 3, 31, 32, 33, 127, 128, 129, 513, 2049].into_iter().enumerate() {
            // One size has one query in a contiguous layer and several in others, the next the other way round.
            let dim = sizes[nth % 2][random.below(3)];
            let has_several = len > 3 && (nth % 2 == 0) != (lie == Lie::Contiguous);
            let tokens = if has_several { 2 + random.below(6) } else { 1 };
            let case = Case {
                lie,
                dtype,
                batch: 1 + random.below(3),
                heads: 1 + random.below(3),
                group: 1 + random.below(6),
                len,
                tokens,
                dim,
                value_dim: dim,
                is_causal: true,
                scale: None,
                forms: forms(number + nth),
            };
            check(&gpu, &mut attention, &case, &mut random, 1.0);
        }
    }
}

/// Random shapes, for every layout and type: in each layout a length between any two powers of two up to 8192, one
/// or more rows, any even D up to 256, odd ones in f32 up to 512, K and V of different D, causal or not.
#[test]
fn random_shapes() {
    // So many elements of K, and so many products with q, that a case takes no longer than needed.
    const ELEMENTS: usize = 1 << 21;
    const PRODUCTS: usize = 1 << 23;
    let gpus = [gpu(), shared_plain_gpu()];
    let mut attention = gpus.each_ref().map(Attention::new);
    let mut random = Random(11);
    // Every two of a layout, a type and a length meet; with KV_HISTORIES=3000 all three do.
    let is_whole = cases(1) >= 3;
    for (number, (lie, dtype)) in lies_and_dtypes().into_iter().enumerate() {
        for octave in
            (0..13).filter(|octave| is_whole || (number + number / 3 + octave).is_multiple_of(3))
        {
            let len = (1 << octave) + random.below(1 << octave);
            // Every fourth is below the 32 that models begin at.
            let mut some_dim = || match (dtype, random.below(4)) {
                (DType::F32, 0) => 1 + random.below(31),
                (DType::F32, 1) => 32 + random.below(481),
                (DType::F32, _) => 32 + random.below(225),
                (_, 0) => 2 + 2 * random.below(15),
                _ => 32 + 2 * random.below(113),
            };
            let (dim, other) = (some_dim(), some_dim());
            let value_dim = if random.below(2) == 0 { dim } else { other };
            let size = len * dim.max(value_dim);
            // Every second has several rows.
            let batch = 1 + octave % 2 + random.below((ELEMENTS / size).clamp(1, 3));
            let heads = 1 + random.below((ELEMENTS / size / batch).clamp(1, 4));
            let products = size * batch * heads;
            let group = 1 + random.below((PRODUCTS / products).clamp(1, 9));
            let most = (PRODUCTS / products / group).clamp(1, len.min(40));
            let tokens = [1, 1 + random.below(most)][random.below(2)];
            let case = Case {
                lie,
                dtype,
                batch,
                heads,
                group,
                len,
                tokens,
                dim,
                value_dim,
                is_causal: random.below(4) > 0,
                scale: [None, Some(0.09)][random.below(2)],
                forms: forms(number + octave),
            };
            let which = (number + octave / 2) % 2;
            let size = [0.3, 1.0, 2.0][random.below(3)];
            check(&gpus[which], &mut attention[which], &case, &mut random, size);
        }
    }
}

/// Rows as long as the contract goes, split over workgroups, and pages of more than 16 tokens.
#[test]
fn long_rows() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(13);
    let large_pages = DTYPES.map(|dtype| (Lie::Paged(64), dtype));
    let all = lies_and_dtypes().into_iter().chain(large_pages);
    for (number, (lie, dtype)) in all.step_by(2).enumerate() {
        let dim = [64, 256, 32, 128, 96][number % 5];
        let case = Case {
            lie,
            dtype,
            batch: 1 + number % 2,
            heads: 1 + usize::from(dim < 128),
            group: [4, 1, 8, 2, 3][number % 5],
            len: 8192 - number % 2,
            tokens: [1, 3][number / 2 % 2],
            dim,
            value_dim: dim,
            is_causal: true,
            scale: None,
            forms: forms(number),
        };
        check(&gpu, &mut attention, &case, &mut random, 1.0);
    }
}
