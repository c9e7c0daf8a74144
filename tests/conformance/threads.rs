//! The types go from thread to thread, and two caches of one device are used from two at once.

use wgpu_kvcache::{
    Attention, CacheOptions, CachePosition, DynamicKVCache, EncoderDecoderCache, Error, Gpu,
    HostTensor, KVCache, LayerView, PagedKVCache, StaticKVCache, Tensor, TensorView,
};

use crate::gpu;
use crate::rig::same_bits;

#[test]
fn types_are_send_and_sync() {
    fn check<T: Send + Sync>() {}
    check::<Gpu>();
    check::<DynamicKVCache>();
    check::<StaticKVCache>();
    check::<PagedKVCache>();
    check::<EncoderDecoderCache>();
    check::<Attention>();
    check::<Tensor>();
    check::<TensorView<'_>>();
    check::<LayerView>();
    check::<HostTensor>();
    check::<CachePosition<'_>>();
    check::<Error>();
}

/// Hundreds of steps with reads in between, on a cache of the thread's own.
fn decode(gpu: &Gpu, mut cache: Box<dyn KVCache>, seed: u16) {
    let mut rows: [Vec<f32>; 2] = Default::default();
    for step in 0..300_u16 {
        let data: Vec<f32> = (0..2 * 4).map(|i| f32::from(seed + step * 8 + i)).collect();
        rows[0].extend(&data[..4]);
        rows[1].extend(&data[4..]);
        let key = gpu.upload(&data, &[2, 1, 1, 4]).unwrap();
        gpu.submit_pass("step", |pass| {
            cache
                .update(pass, &key.view(), &key.view(), 0, CachePosition::Append)
                .map(|_| ())
                .unwrap();
            if step.is_multiple_of(7) {
                cache.reorder_cache(pass, &[1, 0]).unwrap();
                rows.swap(0, 1);
            }
        });
        if step.is_multiple_of(10) {
            let (key, _) = cache.get(0).unwrap().unwrap();
            let expected = rows.concat();
            let is_right = same_bits(key.bytes(), bytemuck::cast_slice(&expected));
            assert!(is_right, "seed {seed}, step {step}: {key:?} for {expected:?}");
        }
    }
}

#[test]
fn two_caches_of_one_device_serve_two_threads() {
    let gpu = gpu();
    std::thread::scope(|scope| {
        scope.spawn(|| decode(&gpu, Box::new(DynamicKVCache::new(&gpu)), 0));
        scope.spawn(|| {
            decode(
                &gpu,
                Box::new(
                    StaticKVCache::with_options(
                        &gpu,
                        CacheOptions::default().with_max_cache_len(300).with_num_layers(1),
                    )
                    .expect("both options"),
                ),
                30_000,
            )
        });
        scope.spawn(|| decode(&gpu, Box::new(PagedKVCache::new(&gpu)), 60_000));
    });
}
