//! Attention over every view, against a reference in f64 over the values that the cache holds.

use half::{bf16, f16};
use wgpu_kvcache::wgpu::{BufferUsages, MapMode, PollType};
use wgpu_kvcache::{
    Attention, AttentionOptions, CachePosition, DType, DynamicKVCache, Error, Gpu, KVCache, Layout,
    PagedKVCache, PagedOptions, StaticKVCache, Tensor, TensorView,
};

use crate::rig::{buffer, plain_gpu};
use crate::{gpu, kernels_run};

const BOUND: f64 = 1e-5;

/// Numbers that look random, the same at every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next()).expect("48 bits") % end
    }

    /// About normal, with a deviation of about `size`.
    fn float(&mut self, size: f32) -> f32 {
        let sum: u16 = (0..4).map(|_| u16::try_from(self.next() % 16_384).expect("small")).sum();
        size * (f32::from(sum) / 32_768.0 - 1.0) * 3.4
    }

    fn floats(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| self.float(size)).collect()
    }
}

/// How the tokens come to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    Contiguous,
    Wrapped,
    Paged(usize),
}

/// A layer, and queries over it.
#[derive(Clone, Copy, Debug)]
struct Case {
    lie: Lie,
    dtype: DType,
    batch: usize,
    heads: usize,
    group: usize,
    /// Live tokens, and how many of them are new.
    len: usize,
    tokens: usize,
    dim: usize,
    value_dim: usize,
    is_causal: bool,
    /// Deviation of q and K.
    size: f32,
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

/// A cache of which layer 0 holds `len` tokens that lie as asked.
fn filled(gpu: &Gpu, case: &Case, random: &mut Random) -> Box<dyn KVCache> {
    let Case { lie, dtype, batch, heads, len, dim, value_dim, size, .. } = *case;
    let dropped = match lie {
        Lie::Contiguous => 0,
        Lie::Wrapped => len / 2 + 1,
        Lie::Paged(page) => page / 2 + 1,
    };
    let mut cache: Box<dyn KVCache> = match lie {
        Lie::Contiguous => Box::new(DynamicKVCache::new(gpu)),
        Lie::Wrapped => Box::new(StaticKVCache::new(gpu, len, 1)),
        Lie::Paged(page_tokens) => {
            let options = PagedOptions { page_tokens, ..PagedOptions::default() };
            Box::new(PagedKVCache::with_options(gpu, options).expect("a power of two"))
        }
    };
    let mut append = |cache: &mut dyn KVCache, batch: usize, tokens: usize| {
        let k = random.floats(batch * heads * tokens * dim, size);
        let v = random.floats(batch * heads * tokens * value_dim, 1.0);
        let k = upload(gpu, dtype, &k, &[batch, heads, tokens, dim]);
        let v = upload(gpu, dtype, &v, &[batch, heads, tokens, value_dim]);
        gpu.submit_pass("fill", |pass| {
            cache.update(pass, &k.view(), &v.view(), 0, CachePosition::Append).map(|_| ())
        })
        .unwrap_or_else(|error| panic!("{case:?}: {error}"));
    };
    match lie {
        Lie::Contiguous => append(cache.as_mut(), batch, len),
        // Full, the oldest dropped, full again: over the end.
        Lie::Wrapped => {
            append(cache.as_mut(), batch, len);
            cache.crop(len - dropped.min(len));
            append(cache.as_mut(), batch, dropped.min(len));
        }
        // Rows that share a beginning and have changed places, in pages out of order.
        Lie::Paged(_) => {
            let shared = len.div_ceil(2);
            append(cache.as_mut(), 1, shared + dropped);
            let rows = vec![0; batch];
            gpu.submit_pass("fork", |pass| cache.reorder_cache(pass, &rows)).expect("row 0 exists");
            cache.crop(shared);
            if len > shared {
                append(cache.as_mut(), batch, len - shared);
            }
            let turned: Vec<u32> = (0..u32::try_from(batch).expect("few")).rev().collect();
            gpu.submit_pass("turn", |pass| cache.reorder_cache(pass, &turned)).expect("rows exist");
        }
    }
    let view = cache.view(0).expect("it exists").expect("it was written");
    assert_eq!(view.len(), len, "{case:?}");
    match lie {
        Lie::Contiguous => assert_eq!(view.layout(), Layout::Contiguous),
        Lie::Wrapped => assert!(view.layout() == Layout::Wrapped || len < 3, "{case:?}"),
        Lie::Paged(_) => assert_eq!(view.layout(), Layout::Paged),
    }
    cache
}

pub(crate) fn read(gpu: &Gpu, tensor: &Tensor) -> Vec<f32> {
    let bytes = tensor.buffer().size();
    let staging = buffer(gpu, bytes, BufferUsages::COPY_DST | BufferUsages::MAP_READ);
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(tensor.buffer(), 0, &staging, 0, bytes);
    gpu.queue().submit([encoder.finish()]);
    staging.map_async(MapMode::Read, .., |result| result.expect("mapped"));
    gpu.device().poll(PollType::wait_indefinitely()).expect("the device answers");
    bytemuck::pod_collect_to_vec(&staging.slice(..).get_mapped_range().expect("mapped"))
}

/// softmax(q·Kᵀ·scale)·V in f64, row-major (B, Hq, Tq, D of V).
fn reference(case: &Case, q: &[f32], k: &[f32], v: &[f32], scale: f32) -> Vec<f64> {
    let Case { batch, heads, group, len, tokens, dim, value_dim, is_causal, .. } = *case;
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
                    dot * f64::from(scale)
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

fn distance(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let apart: f64 = got.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
    let size: f64 = expected.iter().map(|b| b * b).sum();
    (apart / size).sqrt()
}

/// Runs attention on a case, with q and the output as (B, T, H, D) or (B, H, T, D), and compares.
fn check(gpu: &Gpu, attention: &mut Attention, case: &Case, random: &mut Random) {
    let Case { batch, heads, group, tokens, dim, value_dim, is_causal, size, .. } = *case;
    let cache = filled(gpu, case, random);
    let (key, value) = cache.get(0).expect("it is submitted").expect("it was written");
    let q = random.floats(batch * heads * group * tokens * dim, size);
    let all = heads * group;
    let query = upload(gpu, DType::F32, &q, &[batch, all, tokens, dim]);
    let count = batch * all * tokens * value_dim;
    // Whatever was there before: NaN.
    let output = upload(gpu, DType::F32, &vec![f32::NAN; count], &[batch, all, tokens, value_dim]);
    let is_tokens_first = tokens > 1 && random.below(2) == 0;
    let to = if is_tokens_first {
        TensorView::bthd(output.buffer(), DType::F32, &[batch, tokens, all, value_dim])
            .expect("a shape")
    } else {
        output.view()
    };
    let scale = if random.below(2) == 0 { None } else { Some(0.09) };
    let view = cache.view(0).expect("it exists").expect("it was written");
    let options = AttentionOptions { scale, is_causal };
    gpu.submit_pass("attention", |pass| attention.record(pass, &query.view(), &view, &to, options))
        .unwrap_or_else(|error| panic!("{case:?}: {error}"));
    if !kernels_run() {
        return;
    }
    let mut got = read(gpu, &output);
    if is_tokens_first {
        let at = |b, h, t, d| got[((b * tokens + t) * all + h) * value_dim + d];
        let mut turned = Vec::new();
        for b in 0..batch {
            for h in 0..all {
                for t in 0..tokens {
                    turned.extend((0..value_dim).map(|d| at(b, h, t, d)));
                }
            }
        }
        got = turned;
    }
    assert!(got.iter().all(|x| x.is_finite()), "{case:?}: not finite");
    let inverse = 1.0 / f32::from(u16::try_from(dim).expect("small")).sqrt();
    let expected = reference(case, &q, &key.to_f32(), &value.to_f32(), scale.unwrap_or(inverse));
    let apart = distance(&got, &expected);
    assert!(apart < BOUND, "{case:?}, scale {scale:?}: off by {apart:e}");
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Every layout and type, at lengths around those at which something changes.
#[test]
fn every_layout_and_type() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(7);
    for lie in [Lie::Contiguous, Lie::Wrapped, Lie::Paged(1), Lie::Paged(4), Lie::Paged(16)] {
        for dtype in DTYPES {
            for len in [1, 2, 3, 31, 32, 33, 127, 128, 129, 513, 2049] {
                let dim = [32, 64, 80, 128, 256][random.below(5)];
                let (batch, heads) = (1 + random.below(3), 1 + random.below(3));
                let group = 1 + random.below(6);
                let tokens = if len > 3 && random.below(2) == 0 { 1 + random.below(7) } else { 1 };
                let case = Case {
                    lie,
                    dtype,
                    batch,
                    heads,
                    group,
                    len,
                    tokens: tokens.min(len),
                    dim,
                    value_dim: dim,
                    is_causal: true,
                    size: 1.0,
                };
                check(&gpu, &mut attention, &case, &mut random);
            }
        }
    }
}

/// Random shapes: any even D up to 256, odd ones in f32, K and V of different D, causal or not.
#[test]
fn random_shapes() {
    let gpus = [gpu(), plain_gpu(|_| ())];
    let mut attention = gpus.each_ref().map(Attention::new);
    let mut random = Random(11);
    for number in 0..120 {
        let dtype = DTYPES[random.below(3)];
        let mut some_dim = || match dtype {
            DType::F32 => 1 + random.below(256),
            _ => 2 + 2 * random.below(128),
        };
        let (dim, other) = (some_dim(), some_dim());
        let value_dim = if random.below(2) == 0 { dim } else { other };
        let len = [1 + random.below(40), 1 + random.below(700)][random.below(2)];
        let tokens = [1, 1 + random.below(len.min(40))][random.below(2)];
        let case = Case {
            lie: [Lie::Contiguous, Lie::Wrapped, Lie::Paged(16), Lie::Paged(2)][random.below(4)],
            dtype,
            batch: 1 + random.below(4),
            heads: 1 + random.below(4),
            group: 1 + random.below(9),
            len,
            tokens,
            dim,
            value_dim,
            is_causal: random.below(4) > 0,
            size: [0.3, 1.0, 2.0][random.below(3)],
        };
        let which = number % 2;
        check(&gpus[which], &mut attention[which], &case, &mut random);
    }
}

/// Long rows, split over workgroups.
#[test]
fn long_rows() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(13);
    for (lie, dtype, len, dim, group) in [
        (Lie::Contiguous, DType::F32, 8192, 64, 4),
        (Lie::Contiguous, DType::BF16, 8191, 128, 1),
        (Lie::Wrapped, DType::F16, 8192, 32, 8),
        (Lie::Wrapped, DType::F32, 4097, 256, 2),
        (Lie::Paged(16), DType::F32, 8192, 64, 4),
        (Lie::Paged(64), DType::F16, 5000, 96, 3),
    ] {
        for tokens in [1, 3] {
            let case = Case {
                lie,
                dtype,
                batch: 1,
                heads: 2,
                group,
                len,
                tokens,
                dim,
                value_dim: dim,
                is_causal: true,
                size: 1.0,
            };
            check(&gpu, &mut attention, &case, &mut random);
        }
    }
}

/// Scores of ±1e4, and rows that one token decides: they stay finite, and come out as that token's V.
#[test]
fn scores_that_one_token_decides() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    for (len, winner) in [(1, 0), (130, 0), (130, 129), (3000, 1700)] {
        for height in [1.0e4_f32, -1.0e4] {
            // q is 1 in element 0, and so is each K: `height`, but for the winner, which is higher.
            let dim = 64;
            let mut k = vec![0.0; len * dim];
            (0..len).for_each(|t| k[t * dim] = height);
            k[winner * dim] = height + 200.0;
            let v: Vec<f32> = Random(3).floats(len * dim, 1.0);
            let mut q = vec![0.0; 4 * dim];
            (0..4).for_each(|head| q[head * dim] = 1.0);
            let [k, v_, q] = [(&k, len), (&v, len), (&q, 4)]
                .map(|(values, rows)| upload(&gpu, DType::F32, values, &[1, 1, rows, dim]));
            let query = TensorView::new(q.buffer(), DType::F32, &[1, 4, 1, dim]).expect("a shape");
            let output = upload(&gpu, DType::F32, &vec![f32::NAN; 4 * dim], &[1, 4, 1, dim]);
            let mut cache = DynamicKVCache::new(&gpu);
            gpu.submit_pass("decided", |pass| {
                let view = cache.update(pass, &k.view(), &v_.view(), 0, CachePosition::Append)?;
                let options = AttentionOptions { scale: Some(1.0), is_causal: true };
                attention.record(pass, &query, &view, &output.view(), options)
            })
            .unwrap_or_else(|error| panic!("{error}"));
            if !kernels_run() {
                continue;
            }
            let expected: Vec<f64> =
                v[winner * dim..][..dim].iter().map(|&x| f64::from(x)).collect();
            for head in read(&gpu, &output).chunks(dim) {
                let apart = distance(head, &expected);
                assert!(apart < BOUND, "{len}, {winner}, {height}: off by {apart:e}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut cache = DynamicKVCache::new(&gpu);
    let k = upload(&gpu, DType::F32, &[0.5; 2 * 2 * 3 * 8], &[2, 2, 3, 8]);
    let v = upload(&gpu, DType::F32, &[0.5; 2 * 2 * 3 * 6], &[2, 2, 3, 6]);
    gpu.submit_pass("fill", |pass| {
        cache.update(pass, &k.view(), &v.view(), 0, CachePosition::Append).map(|_| ())
    })
    .expect("a valid update");
    let zeros =
        |dtype, shape: &[usize]| upload(&gpu, dtype, &vec![0.0; shape.iter().product()], shape);
    let f32 = DType::F32;
    let shapes = [
        ([1, 4, 1, 8], [1, 4, 1, 6], "differ in batch rows"),
        ([2, 3, 1, 8], [2, 3, 1, 6], "no multiple"),
        ([2, 4, 1, 6], [2, 4, 1, 6], "differ in head_dim"),
        ([2, 4, 1, 8], [2, 4, 1, 8], "output must be"),
        ([2, 4, 2, 8], [2, 4, 1, 6], "output must be"),
        ([2, 4, 4, 8], [2, 4, 4, 6], "every new token"),
    ];
    let refused =
        |attention: &mut Attention, query: &Tensor, output: &Tensor, layer: &DynamicKVCache| {
            let view = layer.view(0).expect("it exists").expect("it was written");
            let record = |pass: &mut wgpu_kvcache::wgpu::ComputePass<'_>| {
                attention.record(pass, &query.view(), &view, &output.view(), Default::default())
            };
            gpu.submit_pass("refused", record).expect_err("it does not fit")
        };
    for (query, output, words) in shapes {
        let error = refused(&mut attention, &zeros(f32, &query), &zeros(f32, &output), &cache);
        assert!(matches!(error, Error::AttentionShape { .. }), "{error:?}");
        assert!(error.to_string().contains(words), "'{words}' is not in '{error}'");
        assert!(error.to_string().contains(&format!("{query:?}")), "{error}");
    }
    let (query, output) = (zeros(f32, &[2, 4, 1, 8]), zeros(f32, &[2, 4, 1, 6]));
    let half = zeros(DType::F16, &[2, 4, 1, 8]);
    let error = refused(&mut attention, &half, &output, &cache);
    assert!(matches!(error, Error::WrongDType { what: "query", .. }), "{error:?}");
    let error = refused(&mut attention, &query, &zeros(DType::BF16, &[2, 4, 1, 6]), &cache);
    assert!(matches!(error, Error::WrongDType { what: "output", .. }), "{error:?}");
    let view = cache.view(0).expect("it exists").expect("it was written");
    for (what, buffer) in [("query", query.buffer()), ("K", view.key()), ("V", view.value())] {
        let output = TensorView::new(buffer, f32, &[2, 4, 1, 6]).expect("a shape");
        let error = gpu
            .submit_pass("refused", |pass| {
                attention.record(pass, &query.view(), &view, &output, Default::default())
            })
            .expect_err("it is read");
        assert_eq!(error, Error::OutputIsRead { what });
    }
    use wgpu_kvcache::Cache;
    cache.crop(0);
    let error = refused(&mut attention, &query, &output, &cache);
    assert!(error.to_string().contains("no token"), "{error}");
}
