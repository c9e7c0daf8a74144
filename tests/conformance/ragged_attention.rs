//! Attention over rows of different length, against a reference in f64 of each row alone.

use wgpu_kvcache::{
    Attention, AttentionOptions, CacheOptions, CachePosition, DType, DynamicKVCache, Gpu, KVCache,
    PagedKVCache, StaticKVCache,
};

use crate::attention::{BOUND, DTYPES, Lie, Random, distance, half_of, read, upload};
use crate::wait::ReadLayer;
use crate::{gpu, kernels_run};

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// From slot 0 on; the rows start at the same slot or not.
    Ring {
        is_apart: bool,
    },
    /// Over the end of the ring, for some rows at least.
    Wrapped {
        is_apart: bool,
    },
    Paged {
        size: usize,
        is_apart: bool,
    },
}

const HEADS: usize = 2;

/// Live tokens of each row, and the dead ones before them.
#[derive(Clone, Debug)]
struct Case {
    kind: Kind,
    dtype: DType,
    lens: Vec<usize>,
    dim: usize,
}

impl Case {
    fn dead(&self) -> Vec<usize> {
        let (Kind::Ring { is_apart } | Kind::Wrapped { is_apart } | Kind::Paged { is_apart, .. }) =
            self.kind;
        (0..self.lens.len()).map(|row| if is_apart { 3 + 5 * row % 11 } else { 3 }).collect()
    }
}

fn append(gpu: &Gpu, cache: &mut dyn KVCache, case: &Case, values: [&[f32]; 2], tokens: usize) {
    let shape = [case.lens.len(), HEADS, tokens, case.dim];
    let [k, v] = values.map(|values| upload(gpu, case.dtype, values, &shape));
    gpu.submit_pass("append", |pass| {
        cache.update(pass, &k.view(), &v.view(), 0, CachePosition::Append).map(|_| ())
    })
    .unwrap_or_else(|error| panic!("{case:?}: {error}"));
}

/// A cache whose rows are as long as asked, with NaN before and behind the live tokens.
fn filled(gpu: &Gpu, case: &Case, random: &mut Random) -> Box<dyn KVCache> {
    let (batch, dim, dead) = (case.lens.len(), case.dim, case.dead());
    let tokens = case.lens.iter().zip(&dead).map(|(len, dead)| len + dead).max().unwrap() + 2;
    let mut cache: Box<dyn KVCache> = match case.kind {
        Kind::Ring { .. } => Box::new(DynamicKVCache::new(gpu)),
        Kind::Wrapped { .. } => {
            let options = CacheOptions::default().with_num_layers(1);
            let options = options.with_max_cache_len(tokens + 4);
            Box::new(StaticKVCache::with_options(gpu, options).expect("both options"))
        }
        Kind::Paged { size, .. } => {
            let options = CacheOptions::default().with_page_tokens(size);
            Box::new(PagedKVCache::with_options(gpu, options).expect("a power of two"))
        }
    };
    if matches!(case.kind, Kind::Wrapped { .. }) {
        let before = tokens / 2 + 3;
        let nan = vec![f32::NAN; batch * HEADS * before * dim];
        append(gpu, cache.as_mut(), case, [&nan, &nan], before);
        cache.crop(0);
    }
    let mut sides = [Vec::new(), Vec::new()];
    for (&dead, &len) in dead.iter().zip(&case.lens) {
        for _ in 0..HEADS {
            for token in 0..tokens {
                let is_live = (dead..dead + len).contains(&token);
                for side in &mut sides {
                    let values = random.floats(dim, 1.0);
                    side.extend(if is_live { values } else { vec![f32::NAN; dim] });
                }
            }
        }
    }
    append(gpu, cache.as_mut(), case, [&sides[0], &sides[1]], tokens);
    let ends: Vec<usize> = case.lens.iter().zip(&dead).map(|(len, dead)| len + dead).collect();
    cache.truncate_rows(&ends).expect("a length for each row");
    cache.crop_rows(&case.lens).expect("a length for each row");
    cache
}

/// softmax(q·Kᵀ/√D)·V of each row's own tokens, in f64. A query that sees none gets zeros.
fn reference(
    case: &Case,
    lens: &[usize],
    [q, k, v]: [&[f32]; 3],
    [group, tokens, len]: [usize; 3],
    is_causal: bool,
) -> Vec<f64> {
    let dim = case.dim;
    let scale = 1.0 / f64::from(u16::try_from(dim).expect("small")).sqrt();
    let mut out = Vec::new();
    for row in 0..lens.len() * HEADS * group {
        let (b, kv) = (row / (HEADS * group), row / group);
        for token in 0..tokens {
            let unseen = if is_causal { tokens - 1 - token } else { 0 };
            let q = &q[(row * tokens + token) * dim..][..dim];
            let at = |t: usize| (kv * len + t) * dim..(kv * len + t + 1) * dim;
            let dot = |t: usize| -> f64 {
                q.iter().zip(&k[at(t)]).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum()
            };
            let scores: Vec<f64> =
                (0..lens[b].saturating_sub(unseen)).map(|t| dot(t) * scale).collect();
            let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
            let total = weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
            let mut sums = vec![0.0; dim];
            for (t, weight) in weights.iter().enumerate() {
                let values = sums.iter_mut().zip(&v[at(t)]);
                values.for_each(|(sum, &v)| *sum += weight / total * f64::from(v));
            }
            out.extend(sums);
        }
    }
    out
}

fn check(
    gpu: &Gpu,
    attention: &mut Attention,
    case: &Case,
    cache: &dyn KVCache,
    random: &mut Random,
) {
    let (batch, dim) = (case.lens.len(), case.dim);
    let view = cache.view(0).expect("it exists").expect("it was written");
    let lens: Vec<usize> = (0..batch).map(|row| view.row_len(row).expect("a row")).collect();
    let (key, value) = cache.read(0).expect("it is submitted").expect("it was written");
    let (k, v) = (key.to_f32(), value.to_f32());
    assert!(!kernels_run() || k.iter().chain(&v).all(|x| x.is_finite()), "{case:?}: dead tokens");
    for (group, tokens, is_causal) in [(1, 1, true), (3, 1, false), (2, 3, true), (1, 2, false)] {
        if tokens > view.len() {
            continue;
        }
        let shape = [batch, HEADS * group, tokens, dim];
        let q = random.floats(shape.iter().product(), 1.0);
        let query = upload(gpu, DType::F32, &q, &shape);
        let output = upload(gpu, DType::F32, &vec![f32::NAN; q.len()], &shape);
        let options = AttentionOptions::default();
        let options = if is_causal { options.causal() } else { options.unmasked() };
        gpu.submit_pass("attention", |pass| {
            attention.record(pass, &query.view(), &view, &output.view(), options)
        })
        .unwrap_or_else(|error| panic!("{case:?}: {error}"));
        if !kernels_run() {
            continue;
        }
        let got = read(gpu, &output);
        let counts = [group, tokens, view.len()];
        let due = reference(case, &lens, [&q, &k, &v], counts, is_causal);
        let row = got.len() / batch;
        for b in 0..batch {
            let (got, due) = (&got[b * row..][..row], &due[b * row..][..row]);
            assert!(got.iter().all(|x| x.is_finite()), "{case:?}, row {b}, {counts:?}");
            let is_zero = due.iter().all(|&x| x == 0.0);
            let apart = if is_zero { 0.0 } else { distance(got, due) };
            assert!(apart < BOUND, "{case:?}, row {b}, {counts:?}: off by {apart:e}");
            assert!(!is_zero || got.iter().all(|&x| x == 0.0), "{case:?}, row {b}: {got:?}");
        }
    }
}

/// Rows of 4 and 2 tokens, where K is zero and V is one: the mean of what a row holds is one. Zeros behind the
/// shorter row must take no weight.
#[test]
fn a_shorter_row_sees_its_own_tokens_alone() {
    let gpu = gpu();
    let caches: [Box<dyn KVCache>; 2] =
        [Box::new(DynamicKVCache::new(&gpu)), Box::new(PagedKVCache::new(&gpu))];
    let mut attention = Attention::new(&gpu);
    for mut cache in caches {
        let key = upload(&gpu, DType::F32, &[0.0; 16], &[2, 1, 2, 4]);
        let value = upload(&gpu, DType::F32, &[1.0; 16], &[2, 1, 2, 4]);
        let query = upload(&gpu, DType::F32, &[1.0; 8], &[2, 1, 1, 4]);
        let output = upload(&gpu, DType::F32, &[7.0; 8], &[2, 1, 1, 4]);
        gpu.submit_pass("ragged", |pass| {
            cache.update(pass, &key.view(), &value.view(), 0, CachePosition::Append)?;
            let rows = [vec![2, 3], vec![0, 1]];
            let rows = CachePosition::PerRow(&rows);
            let view = cache.update(pass, &key.view(), &value.view(), 0, rows)?;
            assert_eq!([0, 1, 2].map(|row| view.row_len(row)), [Some(4), Some(2), None]);
            attention.record(pass, &query.view(), &view, &output.view(), Default::default())
        })
        .expect("valid calls");
        let got = read(&gpu, &output);
        assert!(!kernels_run() || got.iter().all(|x| (x - 1.0).abs() < 1e-6), "{got:?}");
    }
}

#[test]
fn every_arrangement_and_type_is_as_each_row_alone() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(17);
    let mut kinds = Vec::new();
    for is_apart in [false, true] {
        kinds.extend([Kind::Ring { is_apart }, Kind::Wrapped { is_apart }]);
        kinds.extend([1, 4, 16].map(|size| Kind::Paged { size, is_apart }));
    }
    for (number, kind) in kinds.into_iter().enumerate() {
        let lie = match kind {
            Kind::Ring { .. } => Lie::Contiguous,
            Kind::Wrapped { .. } => Lie::Wrapped,
            Kind::Paged { size, .. } => Lie::Paged(size),
        };
        for dtype in DTYPES {
            let dim = half_of((lie, dtype), [[20, 64], [6, 10]])[0][number % 2];
            let long = 20 + random.below(80);
            let lens = [
                vec![4, 2],
                vec![1, 0, 37],
                vec![long, 2 * long, 5, 1],
                vec![2100, 70 + random.below(900)],
            ];
            for lens in lens {
                let case = Case { kind, dtype, lens, dim };
                let mut cache = filled(&gpu, &case, &mut random);
                check(&gpu, &mut attention, &case, cache.as_ref(), &mut random);
                // Each row goes on by its own.
                let view = cache.view(0).expect("it exists").expect("it was written");
                let rows: Vec<Vec<u32>> = (0..case.lens.len())
                    .map(|row| u32::try_from(view.row_len(row).expect("a row")).expect("short"))
                    .map(|len| vec![len, len + 1])
                    .collect();
                let shape = [rows.len(), HEADS, 2, dim];
                let count = shape.iter().product();
                let [k, v] =
                    [0, 1].map(|_| upload(&gpu, dtype, &random.floats(count, 1.0), &shape));
                gpu.submit_pass("decode", |pass| {
                    let rows = CachePosition::PerRow(&rows);
                    cache.update(pass, &k.view(), &v.view(), 0, rows).map(|_| ())
                })
                .unwrap_or_else(|error| panic!("{case:?}: {error}"));
                check(&gpu, &mut attention, &case, cache.as_ref(), &mut random);
            }
        }
    }
}
