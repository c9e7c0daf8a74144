//! Windows, masks, biases, caps, sinks and row starts, and q and outputs of 16 bits, against a reference in f64.

use half::{bf16, f16};
use wgpu_kvcache::wgpu::BufferUsages;
use wgpu_kvcache::{
    Attention, AttentionOptions, BitMask, CacheOptions, CachePosition, DType, DynamicKVCache,
    Error, Gpu, KVCache, LayerShape, LayerView, Rings, SequenceCache, Tensor, TensorView,
};

use crate::attention::{
    BOUND, Case, DTYPES, Form, Lie, Placed, Random, distance, filled, forms, lies_and_dtypes,
    upload,
};
use crate::rig::buffer;
use crate::wait::ReadLayer;
use crate::{cases, gpu, kernels_run, shared_plain_gpu};

/// Below this an entry of a mask hides the token.
const HIDDEN: f32 = -1.0e38;

/// What is asked beside causality and scale; nothing, if not set.
#[derive(Clone, Debug, Default)]
struct Asked {
    window: Option<usize>,
    first: usize,
    cap: Option<f32>,
    slopes: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    starts: Option<Vec<u32>>,
    mask: Option<([usize; 4], Vec<f32>)>,
    bits: Option<([usize; 4], Vec<u32>)>,
}

const KINDS: usize = 8;

impl Asked {
    /// Sets option `kind` to random values that fit `case`.
    fn set(&mut self, kind: usize, case: &Case, random: &mut Random) {
        let Case { batch, heads, group, len, tokens, .. } = *case;
        let heads = heads * group;
        match kind {
            0 => self.window = Some(1 + random.below(len + 2)),
            1 => {
                self.first = 1 + random.below(5);
                self.window = self.window.or(Some(1 + random.below(len.div_ceil(2))));
            }
            2 => self.cap = Some([0.5, 3.0, 50.0][random.below(3)]),
            3 => self.slopes = Some((1..=heads).map(|h| 0.5 / exact(h)).collect()),
            4 => {
                let mut sinks = random.floats(heads, 2.0);
                sinks[0] = if random.below(3) == 0 { f32::NEG_INFINITY } else { sinks[0] };
                self.sinks = Some(sinks);
            }
            5 => {
                let start = |_| u32::try_from(random.below(len + 1)).expect("few");
                self.starts = Some((0..batch).map(start).collect());
            }
            6 => {
                let columns = [len, 1 + random.below(len), len + 3][random.below(3)];
                let rows = [[1, batch][random.below(2)], [1, heads][random.below(2)]];
                let count = rows[0] * rows[1] * tokens * columns;
                let mut values = random.floats(count, 1.0);
                for value in &mut values {
                    match random.below(6) {
                        0 => *value = f32::NEG_INFINITY,
                        1 => *value = f32::MIN,
                        _ => {}
                    }
                }
                self.mask = Some(([rows[0], rows[1], tokens, columns], values));
            }
            _ => {
                let columns = [len, 1 + random.below(len), len + 40][random.below(3)];
                let rows = [[1, batch][random.below(2)], [1, heads][random.below(2)]];
                let count = rows[0] * rows[1] * tokens * columns.div_ceil(32);
                let word = |_| random.word();
                self.bits =
                    Some(([rows[0], rows[1], tokens, columns], (0..count).map(word).collect()));
            }
        }
    }

    /// Whether query `t` of batch row `b` and query head `h` sees token `j`, and what is added to its score.
    fn sees(&self, case: &Case, [b, h, t]: [usize; 3], j: usize) -> Option<f64> {
        let Case { len, tokens, is_causal, .. } = *case;
        // (len - tokens + t), which may be below zero.
        let own_after = len + t;
        let behind = j + tokens;
        let start = self.starts.as_ref().map_or(0, |starts| starts[b] as usize);
        if j < start || (is_causal && behind > own_after) {
            return None;
        }
        if self.window.is_some_and(|window| behind + window <= own_after && j - start >= self.first)
        {
            return None;
        }
        let index = |shape: &[usize; 4], row: usize| -> Option<usize> {
            let [batch, heads, tokens, columns] = *shape;
            let column = (j + columns).checked_sub(len)?;
            let [b, h] = [b % batch, h % heads];
            Some(((b * heads + h) * tokens + t) * row + column)
        };
        let mut added = 0.0;
        if let Some(slopes) = &self.slopes {
            added -= f64::from(slopes[h]) * (f64_of(own_after) - f64_of(behind));
        }
        if let Some((shape, values)) = &self.mask
            && let Some(at) = index(shape, shape[3])
        {
            if values[at] <= HIDDEN {
                return None;
            }
            added += f64::from(values[at]);
        }
        if let Some((shape, words)) = &self.bits {
            let bits = 32 * shape[3].div_ceil(32);
            if let Some(at) = index(shape, bits)
                && words[at / 32] >> (at % 32) & 1 == 0
            {
                return None;
            }
        }
        Some(added)
    }
}

fn exact(n: usize) -> f32 {
    f32::from(u16::try_from(n).expect("small"))
}

fn f64_of(n: usize) -> f64 {
    f64::from(u32::try_from(n).expect("small"))
}

/// The masks of a call on the GPU.
struct Masks {
    mask: Option<(Tensor, [usize; 4])>,
    bits: Option<wgpu_kvcache::wgpu::Buffer>,
}

impl Masks {
    fn new(gpu: &Gpu, asked: &Asked) -> Self {
        let mask = asked
            .mask
            .as_ref()
            .map(|(shape, values)| (upload(gpu, DType::F32, values, shape), *shape));
        let bits = asked.bits.as_ref().map(|(_, words)| {
            // Not from the first byte on.
            let bytes = bytemuck::cast_slice(words);
            let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
            let buffer = buffer(gpu, 4 + bytes.len() as u64, usage);
            gpu.queue().write_buffer(&buffer, 4, bytes);
            buffer
        });
        Self { mask, bits }
    }

    fn options<'a>(&'a self, case: &Case, asked: &'a Asked) -> AttentionOptions<'a> {
        let bits = self.bits.as_ref().zip(asked.bits.as_ref());
        case.options()
            .with_window(asked.window)
            .with_first_tokens(asked.first)
            .with_soft_cap(asked.cap)
            .with_alibi_slopes(asked.slopes.as_deref())
            .with_sink_logits(asked.sinks.as_deref())
            .with_row_starts(asked.starts.as_deref())
            .with_mask(self.mask.as_ref().map(|(mask, _)| mask.view()))
            .with_bit_mask(bits.map(|(bits, (shape, _))| BitMask::new(bits, *shape).with_offset(4)))
    }
}

/// Attention as the options say, in f64, (B, Hq, Tq, D of V). K and V of a single batch row serve all queries.
fn reference(case: &Case, asked: &Asked, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f64> {
    let Case { batch, heads, group, len, tokens, dim, value_dim, scale, .. } = *case;
    let scale = f64::from(scale.unwrap_or(1.0 / exact(dim).sqrt()));
    let kv_batch = k.len() / (heads * len * dim);
    let mut out = Vec::new();
    for row in 0..batch * heads * group {
        let (b, h) = (row / (heads * group), row % (heads * group));
        let kv = b % kv_batch * heads + h / group;
        for t in 0..tokens {
            let q = &q[(row * tokens + t) * dim..][..dim];
            let mut scores: Vec<(usize, f64)> = Vec::new();
            for j in 0..len {
                let Some(added) = asked.sees(case, [b, h, t], j) else { continue };
                let k = &k[(kv * len + j) * dim..][..dim];
                let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                let score = dot * scale;
                let score = asked.cap.map_or(score, |cap| {
                    let cap = f64::from(cap);
                    cap * (score / cap).tanh()
                });
                scores.push((j, score + added));
            }
            let sink = asked.sinks.as_ref().map(|sinks| f64::from(sinks[h]));
            let highest =
                scores.iter().map(|it| it.1).chain(sink).fold(f64::NEG_INFINITY, f64::max);
            let weight =
                |score: f64| if highest.is_finite() { (score - highest).exp() } else { 0.0 };
            let mut total = sink.map_or(0.0, weight);
            let mut sums = vec![0.0; value_dim];
            for (j, score) in scores {
                let weight = weight(score);
                total += weight;
                let v = &v[(kv * len + j) * value_dim..][..value_dim];
                sums.iter_mut().zip(v).for_each(|(sum, &v)| *sum += weight * f64::from(v));
            }
            out.extend(sums.iter().map(|sum| if total > 0.0 { sum / total } else { 0.0 }));
        }
    }
    out
}

/// How far from f64 results of a type may be: f32 sums, then half a unit in the last of the type's 11 or 8 bits.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => BOUND + 0.5_f64.powi(11),
        DType::BF16 => BOUND + 0.5_f64.powi(8),
        _ => BOUND,
    }
}

/// What a tensor of this type holds of `values`.
fn rounded(dtype: DType, values: &[f32]) -> Vec<f32> {
    values
        .iter()
        .map(|&x| match dtype {
            DType::F16 => f16::from_f32(x).to_f32(),
            DType::BF16 => bf16::from_f32(x).to_f32(),
            _ => x,
        })
        .collect()
}

/// Attention of `q` over a cache, (B, Hq, Tq, D of V). Nothing where no kernel runs.
fn attend(
    gpu: &Gpu,
    attention: &mut Attention,
    (case, asked): (&Case, &Asked),
    types: [DType; 2],
    q: &[f32],
    cache: &dyn KVCache,
) -> Option<Vec<f32>> {
    let [query, output] = case.shapes();
    let nan = vec![f32::NAN; output.iter().product()];
    let query = Placed::typed(gpu, case.forms[0], types[0], query, q);
    let output = Placed::typed(gpu, case.forms[1], types[1], output, &nan);
    let view = cache.view(0).expect("it exists").expect("it was written");
    let masks = Masks::new(gpu, asked);
    gpu.submit_pass("attention", |pass| {
        let options = masks.options(case, asked);
        attention.record(pass, &query.view(), &view, &output.view(), options)
    })
    .unwrap_or_else(|error| panic!("{case:?}, {asked:?}: {error}"));
    let got = output.read(gpu);
    kernels_run().then_some(got)
}

/// Compares with f64, and poisons tokens: no bit of a query that does not see them may change.
fn check(
    gpu: &Gpu,
    attention: &mut Attention,
    (case, asked): (&Case, &Asked),
    types: [DType; 2],
    random: &mut Random,
) {
    let Case { lie, batch, heads, group, len, tokens, dim, value_dim, .. } = *case;
    let k = random.floats(batch * heads * len * dim, 1.0);
    let v = random.floats(batch * heads * len * value_dim, 1.0);
    let q = rounded(types[0], &random.floats(case.shapes()[0].iter().product(), 1.0));
    let cache = filled(gpu, case, &k, &v);
    let got = attend(gpu, attention, (case, asked), types, &q, cache.as_ref());
    let (held_k, held_v) = cache.read(0).expect("it is submitted").expect("it was written");
    if let Some(got) = &got {
        assert!(got.iter().all(|x| x.is_finite()), "{case:?}, {asked:?}: not finite");
        let expected = reference(case, asked, &q, &held_k.to_f32(), &held_v.to_f32());
        if expected.iter().any(|x| *x != 0.0) {
            let apart = distance(got, &expected);
            let bound = bound(types[1]);
            assert!(apart < bound, "{case:?}, {asked:?}, {types:?}: off by {apart:e}");
        }
        for (x, got) in expected.iter().zip(got) {
            assert!(*x != 0.0 || *got == 0.0, "{case:?}, {asked:?}: a query that sees nothing");
        }
    }
    // Rows of a paged case share their first half, so a token is poisoned in all rows.
    let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.below(3)];
    let poisoned = random.below(len);
    let (mut bad_k, mut bad_v) = (k, v);
    for (values, dim) in [(&mut bad_k, dim), (&mut bad_v, value_dim)] {
        for head in values.chunks_mut(len * dim) {
            head[poisoned * dim..][..dim].fill(poison);
        }
    }
    let cache = filled(gpu, case, &bad_k, &bad_v);
    let bad = attend(gpu, attention, (case, asked), types, &q, cache.as_ref());
    let (Some(got), Some(bad)) = (got, bad) else { return };
    for (row, (good, bad)) in got.chunks(value_dim).zip(bad.chunks(value_dim)).enumerate() {
        let (query, t) = (row / tokens, row % tokens);
        let [b, h] = [query / (heads * group), query % (heads * group)];
        if asked.sees(case, [b, h, t], poisoned).is_none() {
            assert!(
                good.iter().zip(bad).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{lie:?} {case:?}, {asked:?}: {poison} at {poisoned}, row {row} is {bad:?}"
            );
        }
    }
}

/// A case of a few tokens, or of so many that they are split.
fn case((lie, dtype): (Lie, DType), number: usize, random: &mut Random) -> Case {
    // Few sizes of heads, since each is compiled for itself.
    let dim = [64, 16, 20, 8][number % 4];
    let len = [3, 17, 40, 70, 2100][random.below(5)];
    let tokens = [1, 1 + random.below(len.min(9))][random.below(2)];
    Case {
        lie,
        dtype,
        batch: 1 + random.below(if len > 100 { 1 } else { 3 }),
        heads: 1 + random.below(2),
        group: 1 + random.below(5),
        len,
        tokens,
        dim,
        value_dim: dim,
        is_causal: random.below(4) > 0,
        scale: None,
        forms: forms(number),
    }
}

/// Each option alone, each pair of them, and all at once, over changing layouts, types and shapes.
#[test]
fn options_alone_in_pairs_and_all_at_once() {
    let gpus = [gpu(), shared_plain_gpu()];
    let mut attention = gpus.each_ref().map(Attention::new);
    let mut random = Random(41);
    let lies = lies_and_dtypes();
    let mut sets: Vec<Vec<usize>> = (0..KINDS).map(|kind| vec![kind]).collect();
    for a in 0..KINDS {
        sets.extend((0..a).map(|b| vec![b, a]));
    }
    sets.extend([(0..KINDS).collect(), (0..KINDS).collect(), (0..KINDS).collect()]);
    // Each is compiled for itself. All of them count on the first device, others take every fourth or so.
    let step = sets.len().div_ceil(cases(sets.len()));
    for (number, set) in sets.iter().enumerate().step_by(step) {
        let case = case(lies[7 * number % lies.len()], number, &mut random);
        let mut asked = Asked::default();
        for &kind in set {
            asked.set(kind, &case, &mut random);
        }
        let device = number % 2;
        let types = [DType::F32; 2];
        check(&gpus[device], &mut attention[device], (&case, &asked), types, &mut random);
    }
}

/// Windows of every size over every layout, for one query and for several, split and not.
#[test]
fn a_window_of_any_size_over_every_layout() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(43);
    for (number, (lie, dtype)) in lies_and_dtypes().into_iter().enumerate() {
        for (len, tokens, group) in [(7, 3, 1), (40, 33, 3), (2500, 5, 1), (600, 1, 4)] {
            for window in [1, 2, 4, 16, 511, 512, 2048, 5000] {
                let asked = Asked {
                    window: Some(window),
                    first: [0, 0, 3][random.below(3)],
                    ..Default::default()
                };
                let case = Case {
                    lie,
                    dtype,
                    batch: 1,
                    heads: 1,
                    group,
                    len,
                    tokens,
                    dim: 16,
                    value_dim: 16,
                    is_causal: window != 4,
                    scale: None,
                    forms: forms(number),
                };
                check(&gpu, &mut attention, (&case, &asked), [DType::F32; 2], &mut random);
            }
        }
    }
}

/// q and the output in every pair of types, over every type of K and V, in every form, split and not.
#[test]
fn queries_and_outputs_of_every_type() {
    let gpus = [gpu(), shared_plain_gpu()];
    let mut attention = gpus.each_ref().map(Attention::new);
    let mut random = Random(47);
    for number in 0..18 {
        let types = [DTYPES[number % 3], DTYPES[number / 3 % 3]];
        let long = number % 2 == 0;
        let case = Case {
            lie: [Lie::Contiguous, Lie::Paged(4)][number / 9],
            dtype: DTYPES[number % 3],
            batch: if long { 1 } else { 2 },
            heads: 2,
            group: 3,
            len: if long { 2100 } else { 33 },
            tokens: 2,
            dim: [16, 6][number / 3 % 2],
            value_dim: [16, 10][number / 3 % 2],
            is_causal: true,
            scale: None,
            forms: forms(number),
        };
        let mut asked = Asked::default();
        if number % 4 == 1 {
            asked.set(0, &case, &mut random);
        }
        let device = number / 3 % 2;
        check(&gpus[device], &mut attention[device], (&case, &asked), types, &mut random);
    }
}

/// A chunk of queries over a window is exact: each looks back on its own.
#[test]
fn each_query_of_a_chunk_has_its_own_window() {
    let gpu = gpu();
    let mut cache = DynamicKVCache::new(&gpu);
    let values: Vec<f32> = (0..7).map(exact).collect();
    let key = upload(&gpu, DType::F32, &[0.0; 7], &[1, 1, 7, 1]);
    let value = upload(&gpu, DType::F32, &values, &[1, 1, 7, 1]);
    let query = upload(&gpu, DType::F32, &[0.0; 3], &[1, 1, 3, 1]);
    let output = upload(&gpu, DType::F32, &[f32::NAN; 3], &[1, 1, 3, 1]);
    let mut attention = Attention::new(&gpu);
    gpu.submit_pass("window", |pass| {
        let position = CachePosition::Append;
        let view = cache.update(pass, &key.view(), &value.view(), 0, position)?;
        let options = AttentionOptions::default().with_window(4);
        attention.record(pass, &query.view(), &view, &output.view(), options)
    })
    .expect("all fits");
    if kernels_run() {
        // Positions 1 to 4, 2 to 5, and 3 to 6.
        assert_eq!(crate::attention::read(&gpu, &output), [2.5, 3.5, 4.5]);
    }
}

/// One batch row of K and V serves queries of many rows, as if each had its own.
#[test]
fn one_row_of_a_cache_serves_many_rows_of_queries() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(53);
    for (number, lie) in [Lie::Contiguous, Lie::Paged(4), Lie::Wrapped].into_iter().enumerate() {
        for len in [9, 2100] {
            let case = Case {
                lie,
                dtype: DType::F32,
                batch: 1,
                heads: 2,
                group: 2,
                len,
                tokens: 2,
                dim: 16,
                value_dim: 16,
                is_causal: false,
                scale: None,
                forms: forms(number),
            };
            let k = random.floats(2 * len * 16, 1.0);
            let v = random.floats(2 * len * 16, 1.0);
            let cache = filled(&gpu, &case, &k, &v);
            let case = Case { batch: 5, ..case };
            let q = random.floats(case.shapes()[0].iter().product(), 1.0);
            let mut asked = Asked::default();
            asked.set(3, &case, &mut random);
            let types = [DType::F32; 2];
            let got = attend(&gpu, &mut attention, (&case, &asked), types, &q, cache.as_ref());
            if let Some(got) = got {
                let apart = distance(&got, &reference(&case, &asked, &q, &k, &v));
                assert!(apart < BOUND, "{case:?}: {apart}");
            }
        }
    }
}

/// Packed queries of sequences of different length, with each option that they take, and all of them.
#[test]
fn packed_queries_take_the_options_too() {
    const HEADS: usize = 2;
    const GROUP: usize = 3;
    const DIM: usize = 16;
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(59);
    let layer = LayerShape { dtype: DType::F32, heads: HEADS, key_dim: DIM, value_dim: DIM };
    let options = CacheOptions::default().with_page_tokens(4);
    let kinds = [0, 1, 2, 3, 4, 6, 7];
    let sets = kinds.iter().map(|&kind| vec![kind]).chain([kinds.to_vec(), kinds.to_vec()]);
    for (number, set) in sets.enumerate() {
        let mut cache = SequenceCache::with_options(&gpu, &[layer], options).expect("options");
        // Live tokens after the step, and new ones.
        let rows = [(2300, 1), (5, 5), (1, 1), (40, 9)];
        let ids = rows.map(|_| cache.add().expect("nothing was lost"));
        let mut held = rows.map(|_| [Vec::new(), Vec::new()]);
        let mut append = |cache: &mut SequenceCache, counts: &[usize], random: &mut Random| {
            let total: usize = counts.iter().sum();
            let tokens = [(); 2].map(|()| random.floats(total * HEADS * DIM, 1.0));
            let mut at = 0;
            for (held, count) in held.iter_mut().zip(counts) {
                for (held, values) in held.iter_mut().zip(&tokens) {
                    held.extend_from_slice(&values[at * HEADS * DIM..][..count * HEADS * DIM]);
                }
                at += count;
            }
            let [key, value] =
                tokens.map(|values| upload(&gpu, DType::F32, &values, &[1, total, HEADS, DIM]));
            let counts: Vec<_> =
                ids.iter().copied().zip(counts.iter().copied()).filter(|(_, n)| *n > 0).collect();
            gpu.submit_pass("step", |pass| {
                let step = cache.plan_step(pass, &counts)?;
                let key = TensorView::packed(key.buffer(), DType::F32, [total, HEADS, DIM])?;
                let value = TensorView::packed(value.buffer(), DType::F32, [total, HEADS, DIM])?;
                cache.update(pass, &step, 0, &key, &value)?;
                Ok::<_, wgpu_kvcache::Error>(step)
            })
            .expect("a step")
        };
        append(&mut cache, &rows.map(|(len, new)| len - new), &mut random);
        let step = append(&mut cache, &rows.map(|(_, new)| new), &mut random);
        let total = step.total_tokens();
        // Made for a single row of as many queries as the step has.
        let whole = Case {
            lie: Lie::Contiguous,
            dtype: DType::F32,
            batch: 1,
            heads: HEADS,
            group: GROUP,
            len: 60,
            tokens: total,
            dim: DIM,
            value_dim: DIM,
            is_causal: number % 3 > 0,
            scale: None,
            forms: [Form::TokensFirst; 2],
        };
        let mut asked = Asked::default();
        for kind in set {
            asked.set(kind, &whole, &mut random);
        }
        let [query, output] = whole.shapes();
        let q = random.floats(query.iter().product(), 1.0);
        let query = Placed::new(&gpu, Form::TokensFirst, query, &q);
        let nan = vec![f32::NAN; output.iter().product()];
        let output = Placed::new(&gpu, Form::TokensFirst, output, &nan);
        let masks = Masks::new(&gpu, &asked);
        let view = cache.view(&step, 0).expect("the latest step");
        gpu.submit_pass("attention", |pass| {
            let options = masks.options(&whole, &asked);
            attention.record(pass, &query.view(), &view, &output.view(), options)
        })
        .unwrap_or_else(|error| panic!("{asked:?}: {error}"));
        if !kernels_run() {
            continue;
        }
        let got = output.read(&gpu);
        for (i, &(len, new)) in rows.iter().enumerate() {
            let own = step.tokens(i).expect("a sequence of the step");
            // (Hq, T, D) of the sequence's own tokens.
            let part = |values: &[f32]| -> Vec<f32> {
                let heads =
                    (0..HEADS * GROUP).flat_map(|h| own.clone().map(move |t| h * total + t));
                heads.flat_map(|row| values[row * DIM..][..DIM].to_vec()).collect()
            };
            let rows_of = |shape: &[usize; 4], values: usize| -> Vec<usize> {
                let heads = (0..shape[1]).flat_map(|h| own.clone().map(move |t| h * total + t));
                heads.flat_map(|row| row * values..(row + 1) * values).collect()
            };
            let mut mine = asked.clone();
            if let Some((shape, values)) = &mut mine.mask {
                *values = rows_of(shape, shape[3]).into_iter().map(|at| values[at]).collect();
                shape[2] = new;
            }
            if let Some((shape, words)) = &mut mine.bits {
                let row = shape[3].div_ceil(32);
                *words = rows_of(shape, row).into_iter().map(|at| words[at]).collect();
                shape[2] = new;
            }
            let case = Case { len, tokens: new, ..whole };
            // Held as (T, H, D).
            let [k, v] = held[i].each_ref().map(|values| -> Vec<f32> {
                let rows = (0..HEADS).flat_map(|h| (0..len).map(move |t| t * HEADS + h));
                rows.flat_map(|row| values[row * DIM..][..DIM].to_vec()).collect()
            });
            let expected = reference(&case, &mine, &part(&q), &k, &v);
            let apart = if expected.iter().all(|x| *x == 0.0) {
                f64::from(part(&got).iter().fold(0.0_f32, |most, x| most.max(x.abs())))
            } else {
                distance(&part(&got), &expected)
            };
            assert!(apart < BOUND, "{asked:?}, sequence {i}: {apart:e}");
        }
    }
}

/// V as the first elements of each head of K, in one buffer, with heads as long as those of multi-head latent
/// attention: one K/V head of 576 elements, of which 512 are V, for all query heads.
#[test]
fn v_may_be_a_prefix_of_k() {
    let gpu = gpu();
    let mut random = Random(89);
    for (dim, value_dim, dtype) in
        [(576, 512, DType::F32), (576, 512, DType::BF16), (12, 8, DType::F32), (10, 6, DType::F16)]
    {
        for (len, tokens) in [(40, 3), (2200, 1)] {
            let mut attention = Attention::new(&gpu);
            let case = Case {
                lie: Lie::Contiguous,
                dtype,
                batch: 1,
                heads: 1,
                group: 16,
                len,
                tokens,
                dim,
                value_dim,
                is_causal: true,
                scale: None,
                forms: [Form::TokensFirst; 2],
            };
            let k = rounded(dtype, &random.floats(len * dim, 1.0));
            let v: Vec<f32> = k.chunks(dim).flat_map(|head| head[..value_dim].to_vec()).collect();
            let held = upload(&gpu, dtype, &k, &[1, 1, len, dim]);
            let rings = Rings {
                key: held.buffer().clone(),
                value: held.buffer().clone(),
                key_format: dtype.into(),
                value_format: dtype.into(),
                batch: 1,
                heads: 1,
                key_dim: dim,
                value_dim,
                capacity: len,
                start: 0,
                len,
            };
            let view = LayerView::of_rings(rings.clone()).expect("V fits into K");
            assert!(view.is_value_in_key() && view.value_strides() == view.key_strides());
            let too_long = Rings { value_dim: dim + 2, ..rings };
            assert!(matches!(LayerView::of_rings(too_long), Err(Error::AttentionOption { .. })));
            let [query, output] = case.shapes();
            let q = random.floats(query.iter().product(), 1.0);
            let nan = vec![f32::NAN; output.iter().product()];
            let query = Placed::new(&gpu, Form::TokensFirst, query, &q);
            let output = Placed::new(&gpu, Form::TokensFirst, output, &nan);
            gpu.submit_pass("attention", |pass| {
                let options = AttentionOptions::default();
                attention.record(pass, &query.view(), &view, &output.view(), options)
            })
            .unwrap_or_else(|error| panic!("{case:?}: {error}"));
            if kernels_run() {
                let expected = reference(&case, &Asked::default(), &q, &k, &v);
                let apart = distance(&output.read(&gpu), &expected);
                assert!(apart < BOUND, "{case:?}: {apart}");
            }
        }
    }
}
