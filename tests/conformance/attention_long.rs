//! Attention over more tokens than a single loop of a software adapter can go through.

use half::f16;
use wgpu_kvcache::{
    Attention, CacheOptions, CachePosition, DType, DynamicKVCache, Gpu, KVCache, PagedKVCache,
    TensorView,
};

use crate::gpu;
use crate::rig::{buffer, read_buffer, same_bits};
use wgpu_kvcache::wgpu::BufferUsages;

/// K of zeros, and V of which the first half is 1 and the second 3: each result is 2.
fn check(gpu: &Gpu, cache: &mut dyn KVCache, dtype: DType, len: usize, dim: usize) {
    let values = |is_value: bool| {
        let value = |i: usize| match (is_value, i / dim < len / 2) {
            (false, _) => 0.0,
            (true, true) => 1.0,
            (true, false) => 3.0,
        };
        let shape = [1, 1, len, dim];
        match dtype {
            DType::F32 => gpu.upload(&(0..len * dim).map(value).collect::<Vec<f32>>(), &shape),
            _ => gpu.upload(
                &(0..len * dim).map(|i| f16::from_f32(value(i))).collect::<Vec<f16>>(),
                &shape,
            ),
        }
        .unwrap_or_else(|error| panic!("{error}"))
    };
    let (key, value) = (values(false), values(true));
    // So many query heads that a device is filled without a split.
    let heads = 64;
    let query = gpu.upload(&vec![1.0_f32; heads * dim], &[1, heads, 1, dim]).expect("it fits");
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
    let output = buffer(gpu, (heads * dim * 4) as u64, usage);
    let to = TensorView::new(&output, DType::F32, &[1, heads, 1, dim]).expect("a shape");
    let mut attention = Attention::new(gpu);
    gpu.submit_pass("attention", |pass| {
        let view = cache.update(pass, &key.view(), &value.view(), 0, CachePosition::Append)?;
        attention.record(pass, &query.view(), &view, &to, Default::default())
    })
    .unwrap_or_else(|error| panic!("{len} tokens, head_dim {dim}: {error}"));
    let got = read_buffer(gpu, &output);
    let twos: Vec<u8> = [2.0_f32.to_ne_bytes()].repeat(heads * dim).concat();
    assert!(same_bits(&got, &twos), "{len} tokens, head_dim {dim}: {:?}", &got[..8]);
}

#[test]
fn a_million_tokens_of_small_heads() {
    let gpu = gpu();
    check(&gpu, &mut DynamicKVCache::new(&gpu), DType::F32, 1_060_000, 4);
}

/// Threads that share heads go through a loop of their own for each round, so that fewer tokens use up all
/// rounds: here some 123,000.
#[test]
fn heads_that_threads_share() {
    let gpu = gpu();
    check(&gpu, &mut DynamicKVCache::new(&gpu), DType::F16, 130_000, 130);
    let options = CacheOptions::default().with_page_tokens(64);
    let mut paged = PagedKVCache::with_options(&gpu, options).expect("a power of two");
    check(&gpu, &mut paged, DType::F16, 130_000, 130);
}
