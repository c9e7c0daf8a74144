use half::{bf16, f16};

use super::*;
use crate::{
    CacheOptions, CachePosition, DType, DynamicKVCache, KVCache, LayerShape, Layout, PagedKVCache,
    StaticKVCache, Tensor,
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
        let options = CacheOptions::default().with_page_tokens(page_tokens);
        let cache = PagedKVCache::with_options(gpu, options).expect("a power of two");
        (Layout::Paged, Box::new(cache))
    };
    [
        (Layout::Contiguous, Box::new(DynamicKVCache::new(gpu))),
        (
            Layout::Wrapped,
            Box::new(
                StaticKVCache::with_options(
                    gpu,
                    CacheOptions::default().with_max_cache_len(len).with_num_layers(1),
                )
                .expect("both options"),
            ),
        ),
        paged(1),
        paged(4),
        paged(16),
    ]
}

/// Attention with q and the output of one shape.
fn answer(
    gpu: &Gpu,
    attention: &mut Attention,
    query: &Tensor,
    view: &LayerView,
    options: AttentionOptions,
    case: &str,
) -> Vec<f32> {
    let [batch, heads, tokens, _] = query.shape();
    let shape = [batch, heads, tokens, view.value_dim];
    let output = upload(gpu, DType::F32, &vec![f32::NAN; shape.iter().product()], &shape);
    let mut answer = DynamicKVCache::new(gpu);
    gpu.submit_pass("attention", |pass| {
        let to = output.view();
        attention.record(pass, &query.view(), view, &to, options)?;
        answer.update(pass, &to, &to, 0, APPEND).map(|_| ())
    })
    .unwrap_or_else(|error| panic!("{case}: {error}"));
    answer.get(0).expect("read back").expect("written").0.to_f32()
}

/// A kernel for CPUs and one for GPUs, whatever the adapter is.
fn both_forms(gpu: &Gpu) -> [Attention; 2] {
    [false, true].map(|is_cpu| Attention { is_cpu, ..Attention::new(gpu) })
}

/// Widths of K and V, tokens, queries of a row, and whether the numbers are whole.
type Work = ([usize; 2], usize, usize, bool);

#[test]
fn forms_for_a_gpu_and_for_a_cpu_agree() {
    let work = [
        ([50, 50], 700, 3, false),
        ([32, 32], 3000, 2, false),
        ([64, 64], 2500, 1, true),
        ([96, 32], 40, 5, false),
        ([128, 128], 2100, 3, true),
        ([256, 256], 900, 2, false),
        ([512, 512], 300, 2, false),
    ];
    forms_agree(&work, false);
}

/// So many queries that a GPU's workgroups take them in tiles, whole and split.
#[test]
fn tiles_for_a_gpu_and_rows_for_a_cpu_agree() {
    let work = [
        ([6, 6], 600, 150, false),
        ([50, 10], 90, 70, false),
        ([64, 64], 150, 70, true),
        ([64, 128], 1300, 33, false),
        ([192, 128], 120, 30, false),
        ([256, 256], 40, 17, false),
    ];
    forms_agree(&work, true);
}

/// Software adapters, which most tests run on, get the kernels in other forms than GPUs do.
///
/// They are given the same work, over every layout and type. Those for CPUs are compared with f64
/// elsewhere. Whole numbers have exact scores, up to some thousands, so one token decides there.
fn forms_agree(work: &[Work], is_tiled: bool) {
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let mut attention = both_forms(&gpu);
    let mut state = 1;
    let mut number = 0;
    let slopes = [0.5, 0.25, 0.125, 0.06, 0.03, 0.01];
    let sinks = [1.0, f32::NEG_INFINITY, 0.0, 3.0, -2.0, 0.5];
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for &([dim, value_dim], len, tokens, is_whole) in work {
            let tiles = Tiles::of([dim, value_dim], 2 * tokens, false, u32::MAX);
            assert_eq!(tiles.is_some(), is_tiled, "{dim}");
            for (nth, (layout, mut cache)) in caches(&gpu, len).into_iter().enumerate() {
                // A pipeline takes seconds to compile here. Every two of a shape, a layout and a type meet, but not
                // every three; tiles hold f32 whatever was stored, so a shape in tiles has one type.
                let which = if is_tiled { tokens } else { dim / 2 + nth };
                if dtype as usize != which % 3 {
                    continue;
                }
                // A second piece follows where the oldest are dropped: over the end of a ring, or
                // from amid a page on.
                let mut pieces = vec![(0, len)];
                if layout != Layout::Contiguous {
                    pieces.push((len - len / 3, len / 3));
                }
                for (kept, tokens) in pieces {
                    let [key, value] =
                        [(dim, is_whole), (value_dim, false)].map(|(dim, is_whole)| {
                            let values = random(&mut state, 6 * tokens * dim, is_whole);
                            upload(&gpu, dtype, &values, &[2, 3, tokens, dim])
                        });
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
                let plain = AttentionOptions::default().with_scale(scale);
                let starts = [1, 2];
                number += 1;
                let options = match number % 6 {
                    1 => plain.with_window(len / 3 + 1),
                    2 => plain.with_window(9).with_first_tokens(4),
                    3 => plain.with_soft_cap(2.0).with_sink_logits(&sinks[..]),
                    4 => plain.with_alibi_slopes(&slopes[..]).with_row_starts(&starts[..]),
                    _ => plain,
                };
                let answers = attention
                    .each_mut()
                    .map(|attention| answer(&gpu, attention, &query, &view, options, &case));
                let square =
                    |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|n| n * n).sum::<f32>();
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

/// A layer of one batch row whose K and V are `key` and `value`, [1, H, T, D].
fn layer(
    gpu: &Gpu,
    cache: &mut dyn KVCache,
    dtype: DType,
    [key, value]: [&[f32]; 2],
    shape: [usize; 4],
) {
    let [key, value] = [key, value].map(|values| upload(gpu, dtype, values, &shape));
    gpu.submit_pass("fill", |pass| {
        cache.update(pass, &key.view(), &value.view(), 0, APPEND).map(|_| ())
    })
    .unwrap_or_else(|error| panic!("{error}"));
}

/// Tokens that a query must not see change no bit of its result, in kernels for a GPU as in those for a CPU,
/// and in splits that it does not see at all: a GPU's are 256 tokens long.
#[test]
fn unseen_tokens_change_no_bit_in_either_form() {
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let mut attention = both_forms(&gpu);
    let mut state = 3;
    let poisons = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    for (number, (dim, len, tokens)) in [
        (64, 9, 4),
        (32, 70, 3),
        (6, 9, 4),
        (20, 33, 7),
        (96, 130, 5),
        (256, 300, 2),
        (8, 1024, 500),
    ]
    .into_iter()
    .enumerate()
    {
        // One type for both groups: a pipeline takes seconds to compile here, and knows no group.
        let dtype = dtypes[number % 3];
        for group in [1, 3] {
            let shape = [1, 2, len, dim];
            let key = random(&mut state, 2 * len * dim, false);
            let value = random(&mut state, 2 * len * dim, false);
            let query = random(&mut state, 2 * group * tokens * dim, false);
            let query = upload(&gpu, DType::F32, &query, &[1, 2 * group, tokens, dim]);
            for (which, first) in [1, tokens / 2, tokens - 1].into_iter().enumerate() {
                let (mut bad_key, mut bad_value) = (key.clone(), value.clone());
                for values in [&mut bad_key, &mut bad_value] {
                    for head in values.chunks_mut(len * dim) {
                        head[(len - tokens + first) * dim..].fill(poisons[(number + which) % 3]);
                    }
                }
                for (mut good, mut bad) in
                    caches(&gpu, len).into_iter().zip(caches(&gpu, len)).map(|(a, b)| (a.1, b.1))
                {
                    layer(&gpu, good.as_mut(), dtype, [&key, &value], shape);
                    layer(&gpu, bad.as_mut(), dtype, [&bad_key, &bad_value], shape);
                    for attention in &mut attention {
                        let [good, bad] = [&good, &bad].map(|cache| {
                            let view = cache.view(0).expect("it exists").expect("it was written");
                            answer(&gpu, attention, &query, &view, Default::default(), "unseen")
                        });
                        let rows = good.chunks(dim).zip(bad.chunks(dim)).enumerate();
                        for (row, (good, bad)) in rows.filter(|(row, _)| row % tokens < first) {
                            assert!(
                                good.iter().zip(bad).all(|(a, b)| a.to_bits() == b.to_bits()),
                                "D {dim}, {len} tokens, {tokens} new, group {group}, {dtype:?}, \
                                 poison from {first} on, CPU form {}: row {row} is {bad:?}",
                                attention.is_cpu
                            );
                        }
                    }
                }
            }
        }
    }
}

/// An infinity that is seen makes the mean infinite and not NaN, and a key of -inf weighs nothing, in both
/// forms, for every `head_dim` up to 100 and some above.
#[test]
fn infinities_count_as_they_should_in_either_form() {
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let mut attention = both_forms(&gpu);
    for dim in (1..=100).chain([127, 128, 129, 132, 160, 192, 200, 254, 255, 256]) {
        for len in [1, 2, 5, 33] {
            let mut value = vec![1.0; len * dim];
            value[(len - 1) * dim..].fill(f32::INFINITY);
            let mut infinite = DynamicKVCache::new(&gpu);
            let zeros = vec![0.0; len * dim];
            layer(&gpu, &mut infinite, DType::F32, [&zeros, &value], [1, 1, len, dim]);
            // The last key of all but the first token.
            let (mut key, value) = (zeros, vec![1.0; len * dim]);
            for token in 1..len {
                key[(token + 1) * dim - 1] = f32::NEG_INFINITY;
            }
            let mut lowest = DynamicKVCache::new(&gpu);
            layer(&gpu, &mut lowest, DType::F32, [&key, &value], [1, 1, len, dim]);
            let tokens = len.min(2);
            let query = upload(&gpu, DType::F32, &vec![1.0; tokens * dim], &[1, 1, tokens, dim]);
            for attention in &mut attention {
                let case = format!("D {dim}, {len} tokens, CPU form {}", attention.is_cpu);
                let view = infinite.view(0).expect("it exists").expect("it was written");
                let got = answer(&gpu, attention, &query, &view, Default::default(), &case);
                for (token, row) in got.chunks(dim).enumerate() {
                    let mean = if token + 1 == tokens { f32::INFINITY } else { 1.0 };
                    assert!(
                        row.iter().all(|&x| x == mean || (x - mean).abs() < 1e-5),
                        "{case}: {row:?}"
                    );
                }
                let view = lowest.view(0).expect("it exists").expect("it was written");
                let got = answer(&gpu, attention, &query, &view, Default::default(), &case);
                assert!(got.iter().all(|&x| (x - 1.0).abs() < 1e-6), "{case}: {got:?}");
            }
        }
    }
}

/// After compiling ahead, calls of the same form compile nothing: short or split, one query or several.
#[test]
fn what_was_compiled_ahead_is_not_compiled_again() {
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let dim = 8;
    let layer = LayerShape { dtype: DType::F16, heads: 2, key_dim: dim, value_dim: dim };
    let slopes = [0.5, 0.25];
    for options in [
        AttentionOptions::default().with_window(700),
        AttentionOptions::default().with_soft_cap(5.0).with_alibi_slopes(&slopes[..]),
    ] {
        for types in [[DType::F32; 2], [DType::F16, DType::BF16]] {
            let mut attention = Attention::new(&gpu);
            for len in [40, 3000] {
                let (mut cache, mut state) = (PagedKVCache::new(&gpu), 5);
                let kv = random(&mut state, 2 * len * dim, false);
                self::layer(&gpu, &mut cache, DType::F16, [&kv, &kv], [1, 2, len, dim]);
                let view = cache.view(0).expect("it exists").expect("it was written");
                attention
                    .compile(&[layer], Formats::default(), &[Layout::Paged], types, options)
                    .unwrap_or_else(|error| panic!("{error}"));
                let compiled = gpu.kernels().compiled();
                for tokens in [1, 3] {
                    let shape = [1, 2, tokens, dim];
                    let [q, out] = types
                        .map(|dtype| upload(&gpu, dtype, &vec![0.5; 2 * tokens * dim], &shape));
                    gpu.submit_pass("attention", |pass| {
                        attention.record(pass, &q.view(), &view, &out.view(), options)
                    })
                    .unwrap_or_else(|error| panic!("{error}"));
                }
                assert_eq!(gpu.kernels().compiled(), compiled, "{len} tokens, {types:?}");
            }
        }
    }
}
