//! Every kind of cache, windows and formats.

use crate::support::model::{Attend, Concatenated, Form, noise};
use crate::support::*;
use burn::tensor::{DType, Tensor, TensorData};
use wgpu_kvcache_burn::wgpu_kvcache::{
    AttentionOptions, CacheOptions, CachePosition, DynamicKVCache, Format, Formats, KVCache,
    PagedKVCache, StaticKVCache,
};
use wgpu_kvcache_burn::{AttendOptions, BurnCache, Error};

fn dynamic(options: CacheOptions<'_>) -> BurnCache<DynamicKVCache> {
    let shared = shared();
    let cache = DynamicKVCache::with_options(shared.gpu(), options).expect("a cache");
    BurnCache::new(&shared, cache)
}

#[test]
fn greedy_is_that_of_burn_in_every_kind_and_order_of_axes() {
    let shared = shared();
    let bounded = CacheOptions::default().with_num_layers(2).with_max_cache_len(64);
    let paged = CacheOptions::default().with_page_tokens(8);
    let gpu = shared.gpu();
    for order in [Order::Bthd, Order::Bhtd] {
        compare_greedy(dynamic(CacheOptions::default()), order);
        let cache = StaticKVCache::with_options(gpu, bounded).expect("a cache");
        compare_greedy(BurnCache::new(&shared, cache), order);
        let cache = PagedKVCache::with_options(gpu, paged).expect("a cache");
        compare_greedy(BurnCache::new(&shared, cache), order);
    }
}

/// Random (B, T, H, D) of 1 row.
fn random(seed: &mut u64, tokens: usize, heads: usize) -> Tensor<4> {
    let values = noise(seed, tokens * heads * 16);
    Tensor::from_data(TensorData::new(values, [1, tokens, heads, 16]), shared().device())
}

fn difference4(a: Tensor<4>, b: Tensor<4>) -> f32 {
    assert_eq!(a.dims(), b.dims());
    difference(a.cast(DType::F32).flatten(0, 1), b.cast(DType::F32).flatten(0, 1))
}

#[test]
fn a_window_hides_and_frees_what_lies_before_it() {
    let windows = [Some(8), Some(8)];
    let mut cache = dynamic(CacheOptions::default().with_windows(&windows));
    let seed = &mut 3;
    let [mut keys, mut values] = [Vec::new(), Vec::new()];
    for _ in 0..30 {
        let (q, k, v) = (random(seed, 1, 4), random(seed, 1, 2), random(seed, 1, 2));
        keys.push(k.clone());
        values.push(v.clone());
        let attention = AttentionOptions::default().with_window(8);
        // Told of the window or not, attention looks back no further than the layer keeps.
        let options = if keys.len() % 2 == 0 { attention.into() } else { AttendOptions::default() };
        let got = cache.attend(0, q.clone(), k, v, options.bthd()).expect("attention");
        let first = keys.len().saturating_sub(8);
        let mut alone = Concatenated::new(Form::Matmul, 1);
        let [k, v] = [&keys, &values].map(|x| Tensor::cat(x[first..].to_vec(), 1));
        let expected = alone.attend(0, q, k, v);
        assert!(difference4(expected, got) < 1e-5);
    }
    assert!(cache.seq_length(0).expect("a length") <= 8);
    assert_eq!(cache.next_position(0).expect("a position"), 30);

    // A chunk of 5 after them: each of its queries has a window of its own.
    let (q, k, v) = (random(seed, 5, 4), random(seed, 5, 2), random(seed, 5, 2));
    let all = [(&keys, &k), (&values, &v)]
        .map(|(old, new)| Tensor::cat(old.iter().chain([new]).cloned().collect::<Vec<_>>(), 1));
    let got = cache.attend(0, q.clone(), k, v, AttendOptions::default().bthd()).expect("attention");
    for i in 0..5 {
        let [k, v] = all.each_ref().map(|x| x.clone().narrow(1, 30 + i + 1 - 8, 8));
        let alone = Concatenated::new(Form::Matmul, 1).attend(0, q.clone().narrow(1, i, 1), k, v);
        assert!(difference4(alone, got.clone().narrow(1, i, 1)) < 1e-5, "query {i}");
    }
}

#[test]
fn sixteen_bits_and_quantised_formats_are_near_f32() {
    // q4_0 has steps of 1/8 of a block's largest number, 8 on its side of zero and 7 on the other: V of at most 1 is a step
    // off at most.
    for (key, value, bound) in [
        (Format::F16, Format::F16, 1e-3),
        (Format::Q8_0, Format::Q8_0, 2e-2),
        (Format::Q8_0, Format::Q4_0, 0.13),
    ] {
        let formats = Formats { key: Some(key), value: Some(value) };
        let shared = shared();
        let options = CacheOptions::default().with_formats(formats);
        let cache = PagedKVCache::with_options(shared.gpu(), options).expect("a cache");
        let mut cache = BurnCache::new(&shared, cache);
        let mut alone = Concatenated::new(Form::Matmul, 1);
        let seed = &mut 5;
        let mut wide = |tokens: usize, heads: usize| {
            let values = noise(seed, tokens * heads * 32);
            let data = TensorData::new(values, [1, tokens, heads, 32]);
            Tensor::<4>::from_data(data, shared.device())
        };
        for tokens in [7, 1, 1] {
            let (q, k, v) = (wide(tokens, 4), wide(tokens, 2), wide(tokens, 2));
            let expected = alone.attend(0, q.clone(), k.clone(), v.clone());
            let got = cache.attend(0, q, k, v, AttendOptions::default().bthd()).expect("attention");
            let difference = difference4(expected, got);
            assert!(difference < bound, "{key:?}: {difference}");
        }
    }
}

#[test]
fn tensors_of_f16_come_back_as_f16() {
    let mut cache = dynamic(CacheOptions::default());
    let mut alone = Concatenated::new(Form::Matmul, 1);
    let seed = &mut 11;
    for tokens in [9, 1, 1] {
        let (q, k, v) = (random(seed, tokens, 4), random(seed, tokens, 2), random(seed, tokens, 2));
        let expected = alone.attend(0, q.clone(), k.clone(), v.clone());
        let [q, k, v] = [q, k, v].map(|x| x.cast(DType::F16));
        let got = cache.attend(0, q, k, v, AttendOptions::default().bthd()).expect("attention");
        assert_eq!(got.dtype(), DType::F16);
        assert!(difference4(expected, got) < 3e-3);
    }
}

#[test]
fn latent_attention_stores_k_alone() {
    let shared = shared();
    let mut cache = dynamic(CacheOptions::default().with_value_in_key());
    let mut alone = Concatenated::new(Form::Matmul, 1);
    let seed = &mut 29;
    let mut wide = |tokens: usize, heads: usize| {
        let data = TensorData::new(noise(seed, tokens * heads * 24), [1, tokens, heads, 24]);
        Tensor::<4>::from_data(data, shared.device())
    };
    for tokens in [5, 1, 3] {
        let (q, k) = (wide(tokens, 4), wide(tokens, 1));
        let value = k.clone().narrow(3, 0, 16);
        let expected = alone.attend(0, q.clone(), k.clone(), value);
        let got = cache.attend_latent(0, q, k, 16, AttendOptions::default().bthd());
        assert!(difference4(expected, got.expect("attention")) < 1e-5);
    }
    let both = cache.attend(0, wide(1, 4), wide(1, 1), wide(1, 1), AttendOptions::default().bthd());
    assert!(matches!(both, Err(Error::Cache(_))), "V of another tensor");
}

#[test]
fn rows_of_different_length_see_their_own_tokens() {
    let mut cache = dynamic(CacheOptions::default());
    let mut alone = [(); 2].map(|()| Concatenated::new(Form::Matmul, 1));
    let seed = &mut 31;
    // Two prompts of 4 and 2 tokens, padded to 4, and then a token each.
    let rounds: [&[Vec<u32>]; 3] =
        [&[vec![0, 1, 2, 3], vec![0, 1, 1, 1]], &[vec![4], vec![2]], &[vec![5], vec![3]]];
    for (round, positions) in rounds.into_iter().enumerate() {
        let count = positions[0].len();
        let rows = [(); 2].map(|()| [4, 2, 2].map(|heads| random(seed, count, heads)));
        let mut expected = Vec::new();
        for (row, [q, k, v]) in rows.iter().enumerate() {
            // Of the padding of the shorter prompt the last token is the one that stays.
            let of = |x: &Tensor<4>| match (round, row) {
                (0, 1) => {
                    Tensor::cat(vec![x.clone().narrow(1, 0, 1), x.clone().narrow(1, 3, 1)], 1)
                }
                _ => x.clone(),
            };
            let attended = alone[row].attend(0, of(q), of(k), of(v));
            let latest = attended.dims()[1] - 1;
            expected.push(attended.narrow(1, latest, 1));
        }
        let both = |at: usize| Tensor::cat(rows.iter().map(|row| row[at].clone()).collect(), 0);
        let options =
            AttendOptions::default().bthd().with_position(CachePosition::PerRow(positions));
        let got = cache.attend(0, both(0), both(1), both(2), options).expect("attention");
        let got = got.narrow(1, count - 1, 1);
        assert!(difference4(Tensor::cat(expected, 0), got) < 1e-5, "round {round}");
    }
    assert_eq!(cache.seq_length(0).expect("a length"), 6);
}

#[test]
fn slices_and_transposed_tensors_are_read_where_they_lie_or_copied() {
    let mut cache = dynamic(CacheOptions::default());
    let mut alone = Concatenated::new(Form::Matmul, 1);
    let seed = &mut 13;
    for tokens in [5, 1, 3] {
        // q, K and V are parts of one tensor, as of a fused projection.
        let fused = random(seed, tokens, 8);
        let parts = |x: &Tensor<4>| {
            let part = |first, heads| x.clone().narrow(2, first, heads);
            [part(0, 4), part(4, 2), part(6, 2)]
        };
        let [q, k, v] = parts(&fused);
        let expected = alone.attend(0, q, k, v);
        let [q, k, v] = parts(&fused);
        // K comes with D as its slowest axis.
        let k = k.permute([0, 3, 2, 1]) * 1.0;
        let k = k.permute([0, 3, 2, 1]);
        let got = cache.attend(0, q, k, v, AttendOptions::default().bthd()).expect("attention");
        assert!(difference4(expected, got) < 1e-5);
    }
}

#[test]
fn a_mask_of_burn_hides_tokens() {
    let mut cache = dynamic(CacheOptions::default());
    let mut alone = Concatenated::new(Form::Matmul, 1);
    let seed = &mut 17;
    let (q, k, v) = (random(seed, 6, 4), random(seed, 6, 2), random(seed, 6, 2));
    // The first two tokens are hidden from the last query.
    let mut mask = vec![0.0_f32; 36];
    mask[30] = -1e38;
    mask[31] = -1e38;
    let mask = Tensor::<4>::from_data(TensorData::new(mask, [1, 1, 6, 6]), shared().device());
    let options = AttendOptions::default().bthd().with_mask(mask);
    let got = cache.attend(0, q.clone(), k.clone(), v.clone(), options).expect("attention");
    let [q, k, v] = [q.narrow(1, 5, 1), k.narrow(1, 2, 4), v.narrow(1, 2, 4)];
    let expected = alone.attend(0, q, k, v);
    assert!(difference4(expected, got.narrow(1, 5, 1)) < 1e-5);
}

#[test]
fn memory_of_an_encoder_is_attended_without_an_update() {
    let mut cache = dynamic(CacheOptions::default());
    let seed = &mut 19;
    let (q, k, v) = (random(seed, 1, 4), random(seed, 7, 2), random(seed, 7, 2));
    let error = cache.attend_stored(0, q.clone(), Default::default()).expect_err("nothing stored");
    assert!(matches!(error, Error::EmptyLayer { layer: 0 }));
    let [keys, values] = [k.clone(), v.clone()].map(|x| x.swap_dims(1, 2));
    cache.update(0, keys, values, CachePosition::Append).expect("an update");
    let options = AttendOptions::from(AttentionOptions::default().unmasked()).bthd();
    let got = cache.attend_stored(0, q.clone(), options).expect("attention");
    let expected = Concatenated::new(Form::Matmul, 1).attend(0, q, k, v);
    assert!(difference4(expected, got) < 1e-5);
    assert_eq!(cache.inner().get_seq_length(0).expect("a length"), 7);
}

#[test]
fn a_refused_call_says_why_and_changes_nothing() {
    let mut cache = dynamic(CacheOptions::default());
    let seed = &mut 23;
    let (q, k, v) = (random(seed, 2, 4), random(seed, 2, 2), random(seed, 2, 2));
    let of = |x: &Tensor<4>| x.clone();
    let bthd = || AttendOptions::default().bthd();
    cache.attend(0, of(&q), of(&k), of(&v), bthd()).expect("attention");
    let error = cache.attend(0, of(&q), of(&k), random(seed, 3, 2), bthd()).expect_err("a shape");
    assert!(matches!(error, Error::Cache(_)), "{error}");
    assert_eq!(cache.seq_length(0).expect("a length"), 2);
    let error = cache.attend(0, random(seed, 2, 3), of(&k), of(&v), bthd());
    assert!(matches!(error, Err(Error::Cache(_))), "3 query heads of 2 K/V heads");
    assert_eq!(cache.seq_length(0).expect("a length"), 2);
    // More queries than new tokens, of a layer that is still empty as well.
    let long = random(seed, 3, 4);
    for layer in [0, 1] {
        let before = cache.seq_length(layer).expect("a length");
        let error = cache.attend(layer, of(&long), of(&k), of(&v), bthd()).expect_err("3 of 2");
        assert!(error.to_string().contains("more queries"), "{error}");
        assert_eq!(cache.seq_length(layer).expect("a length"), before);
    }
    let wide = of(&k).cast(DType::F64);
    let error = cache.attend(0, of(&q), wide, of(&v), bthd()).expect_err("f64");
    assert!(error.to_string().contains("F64"), "{error}");
}
