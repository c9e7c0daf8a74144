//! Attention over tokens that a query must not see or that weigh nothing, whatever bits they hold.

use wgpu_kvcache::{Attention, DType, Gpu, KVCache};

use crate::attention::{
    BOUND, Case, Form, Lie, Placed, Random, distance, filled, forms, half_of, lies_and_dtypes,
};
use crate::wait::ReadLayer;
use crate::{gpu, kernels_run, shared_plain_gpu};

/// Attention of `q` over a cache, row-major (B, Hq, Tq, D of V). Nothing where no kernel runs.
fn attend(
    gpu: &Gpu,
    attention: &mut Attention,
    case: &Case,
    q: &[f32],
    cache: &dyn KVCache,
) -> Option<Vec<f32>> {
    let [query, output] = case.shapes();
    let unwritten = vec![-7.0; output.iter().product()];
    let query = Placed::new(gpu, case.forms[0], query, q);
    let output = Placed::new(gpu, case.forms[1], output, &unwritten);
    let view = cache.view(0).expect("it exists").expect("it was written");
    let options = case.options();
    gpu.submit_pass("attention", |pass| {
        attention.record(pass, &query.view(), &view, &output.view(), options)
    })
    .unwrap_or_else(|error| panic!("{case:?}: {error}"));
    let got = output.read(gpu);
    kernels_run().then_some(got)
}

/// One row and head of f32 in one piece.
fn plain(len: usize, tokens: usize, dim: usize) -> Case {
    Case {
        lie: Lie::Contiguous,
        dtype: DType::F32,
        batch: 1,
        heads: 1,
        group: 1,
        len,
        tokens,
        dim,
        value_dim: dim,
        is_causal: true,
        scale: None,
        forms: [Form::HeadsFirst; 2],
    }
}

/// Replaces the elements of the tokens from `first` on, in every row and head.
fn poison(values: &mut [f32], len: usize, dim: usize, first: usize, with: f32) {
    for head in values.chunks_mut(len * dim) {
        head[first * dim..].fill(with);
    }
}

/// The results of queries that come before the poison are the same to the bit as without it: over every
/// layout and type, and in groups and numbers of queries that share a workgroup in every way.
#[test]
fn later_tokens_change_no_bit() {
    let gpus = [gpu(), shared_plain_gpu()];
    let mut attention = gpus.each_ref().map(Attention::new);
    let mut random = Random(29);
    let poisons = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -f32::NAN];
    // Live tokens, queries, query heads a K/V head, K/V heads, batch rows. The last is split.
    let shapes = [
        (2, 2, 1, 1, 1),
        (7, 5, 1, 2, 1),
        (9, 3, 3, 1, 2),
        (40, 33, 2, 1, 1),
        (131, 4, 1, 1, 1),
        (2100, 6, 1, 1, 1),
    ];
    let mut number = 0;
    for (nth, (lie, dtype)) in lies_and_dtypes().into_iter().enumerate() {
        // Heads that are read a word at a time, and heads that are read a quad at a time.
        let words = if dtype == DType::F32 { [1, 47, 130, 2] } else { [2, 46, 130, 10] };
        let dims = half_of((lie, dtype), [words, [20, 64, 256, 128]])[0];
        for (len, tokens, group, heads, batch) in shapes {
            number += 1;
            let (dim, value_dim) = (dims[number % 4], dims[(number + number / 4) % 4]);
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
                is_causal: true,
                scale: None,
                forms: forms(number),
            };
            let device = nth / 3 % 2;
            let (gpu, attention) = (&gpus[device], &mut attention[device]);
            let rows = batch * heads * len;
            let k = random.floats(rows * dim, 1.0);
            let v = random.floats(rows * value_dim, 1.0);
            let q = random.floats(case.shapes()[0].iter().product(), 1.0);
            let cache = filled(gpu, &case, &k, &v);
            let clean = attend(gpu, attention, &case, &q, cache.as_ref());
            // The query that is the first to see poison.
            for (nth, first) in [1, tokens / 2, tokens - 1].into_iter().enumerate() {
                let with = poisons[(number + nth) % poisons.len()];
                let (mut k, mut v) = (k.clone(), v.clone());
                // Of a paged layer the rows share the first half.
                poison(&mut v, len, value_dim, len - tokens + first, with);
                if nth > 0 {
                    poison(&mut k, len, dim, len - tokens + first, with);
                }
                let cache = filled(gpu, &case, &k, &v);
                let got = attend(gpu, attention, &case, &q, cache.as_ref());
                let (Some(clean), Some(got)) = (&clean, got) else { continue };
                let rows = clean.chunks(value_dim).zip(got.chunks(value_dim)).enumerate();
                for (row, (clean, got)) in rows.filter(|(row, _)| row % tokens < first) {
                    let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert!(
                        bits(clean) == bits(got),
                        "{case:?}: {with} from query {first} on changes row {row}: {got:?}"
                    );
                }
            }
        }
    }
}

/// Where K is zero, the mean of the tokens seen is infinite as soon as one of them is, and never NaN.
#[test]
fn the_mean_of_an_infinity_is_infinite() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    for dim in [1, 4, 20, 64, 96] {
        for len in [1, 2, 3, 15, 17, 33, 130, 700] {
            for tokens in [1, 2.min(len), 5.min(len)] {
                let case = plain(len, tokens, dim);
                for (at, is_causal) in
                    [(len - 1, true), (len / 2, true), (len - 1, false), (0, false)]
                {
                    let case = Case { is_causal, ..case };
                    let mut v = vec![1.0; len * dim];
                    v[at * dim..(at + 1) * dim].fill(f32::INFINITY);
                    let cache = filled(&gpu, &case, &vec![0.0; len * dim], &v);
                    let q = vec![1.0; tokens * dim];
                    let Some(got) = attend(&gpu, &mut attention, &case, &q, cache.as_ref()) else {
                        continue;
                    };
                    for (token, row) in got.chunks(dim).enumerate() {
                        let is_infinite = !is_causal || len - tokens + token >= at;
                        assert!(
                            row.iter().all(|&x| if is_infinite {
                                x == f32::INFINITY
                            } else {
                                (x - 1.0).abs() < 1e-5
                            }),
                            "{case:?}, infinite at {at}: query {token} gets {row:?}"
                        );
                    }
                }
            }
        }
    }
}

/// A key of -inf, in any of its elements, weighs nothing if q is positive, whatever `head_dim` is.
#[test]
fn a_key_of_minus_infinity_weighs_nothing() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(31);
    for (number, (lie, dtype)) in lies_and_dtypes().into_iter().enumerate() {
        let dims =
            [2, 4, 8, 12, 16, 20, 32, 36, 48, 50, 52, 64, 68, 80, 96, 100, 128, 130, 200, 254];
        let all = dims.into_iter().chain([256, 1, 3, 63, 65, 255]);
        // Every head_dim in one layout and type. In each of the others a quarter of those that are read a quad at a time
        // or of those that are read a word at a time.
        let is_whole = half_of((lie, dtype), [true, false])[0];
        let some = |at: usize, dim: usize| {
            (at + number).is_multiple_of(4) && dim.is_multiple_of(4) == is_whole
        };
        for (_, dim) in all.enumerate().filter(|&(at, dim)| number == 0 || some(at, dim)) {
            if dtype != DType::F32 && dim % 2 == 1 {
                continue;
            }
            let case = Case { lie, dtype, heads: 2, group: 2, ..plain(37, 2, dim) };
            let case = Case { value_dim: [dim, 6][dim / 2 % 2], ..case };
            let Case { heads, len, tokens, value_dim, .. } = case;
            let (mut k, mut without) = (vec![0.0; heads * len * dim], Vec::new());
            let v = random.floats(heads * len * value_dim, 1.0);
            // Which tokens: the last but one, all but the first, or one in the middle.
            let unseen = |token: usize| match (number + dim) % 3 {
                0 => token == len - 2,
                1 => token > 0,
                _ => token == len / 2,
            };
            for (row, key) in k.chunks_mut(dim).enumerate() {
                if unseen(row % len) {
                    match dim % 5 {
                        0 => key.fill(f32::NEG_INFINITY),
                        1 => key[0] = f32::NEG_INFINITY,
                        _ => key[dim - 1] = f32::NEG_INFINITY,
                    }
                }
            }
            let cache = filled(&gpu, &case, &k, &v);
            let q = vec![1.0; heads * 2 * tokens * dim];
            let Some(got) = attend(&gpu, &mut attention, &case, &q, cache.as_ref()) else {
                continue;
            };
            let (_, stored) = cache.read(0).expect("it is submitted").expect("it was written");
            for row in 0..heads * 2 * tokens {
                let (head, token) = (row / tokens / 2, row % tokens);
                let seen: Vec<usize> =
                    (0..len - tokens + token + 1).filter(|&token| !unseen(token)).collect();
                let stored = stored.to_f32();
                without.extend((0..value_dim).map(|d| {
                    let value = |t: &usize| f64::from(stored[(head * len + t) * value_dim + d]);
                    let count = u16::try_from(seen.len()).expect("few");
                    seen.iter().map(value).sum::<f64>() / f64::from(count)
                }));
            }
            assert!(got.iter().all(|x| x.is_finite()), "{case:?}: {got:?}");
            let apart = distance(&got, &without);
            assert!(apart < BOUND, "{case:?}: off by {apart:e}");
        }
    }
}
