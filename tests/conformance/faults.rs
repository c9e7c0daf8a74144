//! A device that is destroyed, and one that runs out of memory: an error within a bound, never a panic,
//! a hang, or a half-moved cache.

use std::time::{Duration, Instant};

use wgpu_kvcache::{
    CachePosition, DType, DynamicKVCache, Error, Gpu, KVCache, StaticKVCache, TensorView, wgpu,
};

use crate::open;
use crate::rig::buffer;

/// Far more than any call here takes, and far less than a hang.
const BOUND: Duration = Duration::from_secs(20);

/// A device of its own, since it is to be destroyed.
fn mortal_gpu() -> Gpu {
    open(wgpu::Features::IMMEDIATES, None)
}

fn one_token(gpu: &Gpu, cache: &mut dyn KVCache, layer: usize) -> Result<(), Error> {
    let source = buffer(gpu, 4 * 64 * 4, wgpu::BufferUsages::STORAGE);
    let view = TensorView::new(&source, DType::F32, &[2, 2, 1, 64]).expect("a shape");
    gpu.submit_pass("token", |pass| {
        cache.update(pass, &view, &view, layer, CachePosition::Append).map(|_| ())
    })
}

#[test]
fn a_device_destroyed_between_two_calls() {
    type Make = fn(&Gpu) -> Box<dyn KVCache>;
    let make: [Make; 2] =
        [|gpu| Box::new(DynamicKVCache::new(gpu)), |gpu| Box::new(StaticKVCache::new(gpu, 8, 4))];
    for make in make {
        let gpu = mortal_gpu();
        let mut cache = make(&gpu);
        for layer in 0..2 {
            one_token(&gpu, cache.as_mut(), layer).expect("a live device");
        }
        assert!(cache.get(0).expect("a live device").is_some());
        gpu.device().destroy();
        let start = Instant::now();
        let error = cache.get(0).expect_err("a destroyed device reads nothing back");
        assert!(matches!(error, Error::Readback { .. } | Error::Device { .. }), "{error:?}");
        assert!(start.elapsed() < BOUND);
        // What is recorded goes nowhere; that it was lost is said when it is asked for.
        let _ = one_token(&gpu, cache.as_mut(), 0);
        let _ = one_token(&gpu, cache.as_mut(), 3);
        let _ = gpu.submit_pass("select", |pass| cache.reorder_cache(pass, &[1, 0]));
        let _ = gpu.submit_pass("repeat", |pass| cache.batch_repeat_interleave(pass, 3));
        for layer in [0, 1, 3] {
            match cache.get(layer) {
                Ok(None) => assert_eq!(cache.get_seq_length(layer), Ok(0)),
                Ok(Some(_)) => panic!("layer {layer} was read back from a destroyed device"),
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
        cache.crop(1);
        cache.truncate(0);
        cache.reset();
        assert!(start.elapsed() < BOUND, "{:?}", start.elapsed());
    }
}

#[test]
fn a_device_destroyed_before_a_submit() {
    let gpu = mortal_gpu();
    let mut cache = DynamicKVCache::new(&gpu);
    one_token(&gpu, &mut cache, 0).expect("a live device");
    let source = buffer(&gpu, 4 * 64 * 4, wgpu::BufferUsages::STORAGE);
    let view = TensorView::new(&source, DType::F32, &[2, 2, 1, 64]).expect("a shape");
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default());
    cache.update(&mut pass, &view, &view, 0, CachePosition::Append).expect("a live device");
    drop(pass);
    gpu.device().destroy();
    let scope = gpu.device().push_error_scope(wgpu::ErrorFilter::Validation);
    gpu.queue().submit([encoder.finish()]);
    let _ = pollster::block_on(scope.pop());
    let start = Instant::now();
    assert!(cache.get(0).is_err());
    assert!(start.elapsed() < BOUND);
}

#[test]
fn a_device_destroyed_while_it_is_read() {
    for delay in [0, 50, 200, 1000] {
        let gpu = mortal_gpu();
        let mut cache = DynamicKVCache::new(&gpu);
        one_token(&gpu, &mut cache, 0).expect("a live device");
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(delay));
                gpu.device().destroy();
            });
            // Right or an error, and an error in the end.
            while let Ok(read) = cache.get(0) {
                let (key, _) = read.expect("layer 0 was written");
                assert!(key.bytes().iter().all(|&byte| byte == 0));
                assert!(start.elapsed() < BOUND, "reads go on for {delay} µs");
            }
        });
        assert!(start.elapsed() < BOUND);
    }
}
