//! What is different in a browser: calls that cannot wait, answers that come later, memory that must be destroyed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use wgpu_kvcache::{
    BrowserError, Cache, CacheOptions, CachePosition, DType, DynamicKVCache, EncoderDecoderCache,
    Error, ErrorKind, Gpu, HeadlessOptions, KVCache, LayerShape, PagedKVCache, SequenceCache, Side,
    StaticKVCache, TensorView,
};

use super::{live_bytes, pause, refuse_buffers, rest};
use crate::gpu;
use crate::wait::wait;

const APPEND: CachePosition<'static> = CachePosition::Append;

/// A cache of each kind.
fn caches(gpu: &Gpu) -> [(&'static str, Box<dyn KVCache>); 3] {
    let fixed = CacheOptions::default().with_max_cache_len(4096).with_num_layers(2);
    let fixed = StaticKVCache::with_options(gpu, fixed).expect("both options");
    [
        ("dynamic", Box::new(DynamicKVCache::new(gpu))),
        ("static", Box::new(fixed)),
        ("paged", Box::new(PagedKVCache::new(gpu))),
    ]
}

/// Appends the numbers as tokens of one head of one element.
fn append(gpu: &Gpu, cache: &mut dyn KVCache, layer: usize, numbers: &[f32]) -> Result<(), Error> {
    let tokens = gpu.upload(numbers, &[1, 1, numbers.len(), 1])?;
    gpu.submit_pass("append", |pass| {
        cache.update(pass, &tokens.view(), &tokens.view(), layer, APPEND).map(|_| ())
    })
}

fn numbers(cache: &dyn KVCache, layer: usize) -> Result<Vec<f32>, Error> {
    wait(cache.get_async(layer)).map(|read| read.map_or(vec![], |(key, _)| key.to_f32()))
}

/// Waits until the browser has answered all that it was asked before, in its order.
fn answered(gpu: &Gpu) {
    let is_done = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&is_done);
    gpu.queue().on_submitted_work_done(move || done.store(true, Ordering::Release));
    while !is_done.load(Ordering::Acquire) {
        pause();
    }
}

#[test]
fn a_read_back_before_the_submit_is_an_error() {
    let gpu = gpu();
    for (kind, mut cache) in caches(&gpu) {
        append(&gpu, &mut *cache, 0, &[1.0, 2.0, 3.0, 4.0]).expect("room");
        let token = gpu.upload(&[9.0_f32], &[1, 1, 1, 1]).expect("a token");
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        cache.update(&mut pass, &token.view(), &token.view(), 0, APPEND).expect("room");
        drop(pass);
        for _ in 0..9 {
            let read = numbers(&*cache, 0);
            assert_eq!(read, Err(Error::NotSubmitted { calls: 1 }), "{kind}");
        }
        gpu.queue().submit([encoder.finish()]);
        assert_eq!(numbers(&*cache, 0), Ok(vec![1.0, 2.0, 3.0, 4.0, 9.0]), "{kind}");
    }
}

#[test]
fn a_pass_that_is_dropped_or_fails_is_an_error_until_a_reset() {
    let gpu = gpu();
    for fails in [false, true] {
        for (kind, mut cache) in caches(&gpu) {
            append(&gpu, &mut *cache, 0, &[1.0]).expect("room");
            let token = gpu.upload(&[9.0_f32], &[1, 1, 1, 1]).expect("a token");
            let scope = gpu.device().push_error_scope(wgpu_kvcache::wgpu::ErrorFilter::Validation);
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            cache.update(&mut pass, &token.view(), &token.view(), 0, APPEND).expect("room");
            drop(pass);
            if fails {
                // A copy past the end of the buffer makes the whole encoder invalid.
                encoder.copy_buffer_to_buffer(token.buffer(), 0, token.buffer(), 1 << 20, 4);
                gpu.queue().submit([encoder.finish()]);
            } else {
                drop(encoder);
            }
            let lost = Err(Error::PassDropped { calls: 1 });
            assert_eq!(numbers(&*cache, 0), lost, "{kind}, fails: {fails}");
            assert_eq!(wait(scope.pop()).is_some(), fails, "{kind}");
            assert!(append(&gpu, &mut *cache, 0, &[2.0]).is_err(), "{kind}");
            cache.reset();
            append(&gpu, &mut *cache, 0, &[5.0]).expect("room");
            assert_eq!(numbers(&*cache, 0), Ok(vec![5.0]), "{kind}");
        }
    }
}

/// Whether it names the memory that was refused, and is not for trying again.
fn is_refusal<T: std::fmt::Debug>(answer: &Result<T, Error>, label: &str) -> bool {
    let Err(error) = answer else { return false };
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::PassOrder, "{text}");
    let Error::Browser(BrowserError::MemoryRefused { label: named, .. }) = error else {
        return false;
    };
    named.contains(label) && text.contains("reset()")
}

#[test]
fn a_layer_without_memory_is_an_error_as_soon_as_it_is_known() {
    let gpu = gpu();
    let scope = gpu.device().push_error_scope(wgpu_kvcache::wgpu::ErrorFilter::Validation);
    for (kind, mut cache) in caches(&gpu) {
        append(&gpu, &mut *cache, 0, &[1.0, 2.0]).expect("room");
        refuse_buffers("layer 1 value");
        append(&gpu, &mut *cache, 1, &[3.0]).expect("nobody knows yet");
        refuse_buffers("");
        assert!(is_refusal(&numbers(&*cache, 1), "layer 1 value"), "{kind}");
        assert!(is_refusal(&append(&gpu, &mut *cache, 0, &[3.0]), "layer 1 value"), "{kind}");
        assert!(is_refusal(&cache.view(0), "layer 1 value"), "{kind}");
        cache.reset();
        for layer in [0, 1] {
            append(&gpu, &mut *cache, layer, &[7.0, 8.0]).expect("room");
            assert_eq!(numbers(&*cache, layer), Ok(vec![7.0, 8.0]), "{kind}");
        }
    }
    assert!(wait(scope.pop()).is_some(), "passes over no memory are errors of the browser as well");
}

#[test]
fn a_growth_that_was_refused_is_an_error_and_another_cache_goes_on() {
    let gpu = gpu();
    let scope = gpu.device().push_error_scope(wgpu_kvcache::wgpu::ErrorFilter::Validation);
    let mut other = DynamicKVCache::new(&gpu);
    append(&gpu, &mut other, 0, &[1.0]).expect("room");
    for (kind, mut cache) in caches(&gpu) {
        if kind == "static" {
            continue;
        }
        append(&gpu, &mut *cache, 0, &[1.0, 2.0]).expect("room");
        refuse_buffers("layer 0 key");
        append(&gpu, &mut *cache, 0, &[0.5; 5000]).expect("nobody knows yet");
        refuse_buffers("");
        answered(&gpu);
        assert!(is_refusal(&append(&gpu, &mut *cache, 0, &[3.0]), "layer 0 key"), "{kind}");
        assert!(is_refusal(&numbers(&*cache, 0), "layer 0 key"), "{kind}");
        cache.reset();
        append(&gpu, &mut *cache, 0, &[7.0]).expect("room");
        assert_eq!(numbers(&*cache, 0), Ok(vec![7.0]), "{kind}");
        append(&gpu, &mut other, 0, &[2.0]).expect("its memory is there");
    }
    assert_eq!(numbers(&other, 0), Ok(vec![1.0, 2.0, 2.0]));
    assert!(wait(scope.pop()).is_some());
}

#[test]
fn sequences_without_memory_are_an_error() {
    let gpu = gpu();
    let scope = gpu.device().push_error_scope(wgpu_kvcache::wgpu::ErrorFilter::Validation);
    let layer = LayerShape { dtype: DType::F32, heads: 1, key_dim: 1, value_dim: 1 };
    let mut cache = SequenceCache::new(&gpu, &[layer; 2]).expect("a shape");
    let token = gpu.upload(&[3.0_f32], &[1, 1, 1, 1]).expect("a token");
    let step = |cache: &mut SequenceCache, id| {
        gpu.submit_pass("step", |pass| {
            let step = cache.plan_step(pass, &[(id, 1)])?;
            for layer in 0..2 {
                cache.update(pass, &step, layer, &token.view(), &token.view())?;
            }
            Ok::<(), Error>(())
        })
    };
    refuse_buffers("layer 1 key");
    let id = cache.add().expect("a name");
    step(&mut cache, id).expect("nobody knows yet");
    refuse_buffers("");
    assert!(is_refusal(&wait(cache.get_async(id, 0)), "layer 1 key"));
    assert!(is_refusal(&cache.add(), "layer 1 key"));
    cache.reset();
    let id = cache.add().expect("a name");
    step(&mut cache, id).expect("room");
    let (key, _) = wait(cache.get_async(id, 1)).expect("submitted").expect("a token");
    assert_eq!(key.to_f32(), [3.0]);
    assert!(wait(scope.pop()).is_some());
}

/// Waits until the browser has told of the loss of the device.
fn until_lost(gpu: &Gpu) {
    for _ in 0..100 {
        rest();
        if gpu.upload(&[1.0_f32], &[1, 1, 1, 1]).is_err() {
            return;
        }
    }
}

#[test]
fn a_lost_device_is_an_error_of_every_call() {
    let gpu = wait(Gpu::headless_async(&HeadlessOptions::default())).expect("a device");
    let mut cache = DynamicKVCache::new(&gpu);
    append(&gpu, &mut cache, 0, &[1.0]).expect("room");
    let token = gpu.upload(&[9.0_f32], &[1, 1, 1, 1]).expect("a token");
    gpu.device().destroy();
    until_lost(&gpu);
    let update = gpu.submit_pass("late", |pass| {
        cache.update(pass, &token.view(), &token.view(), 0, APPEND).map(|_| ())
    });
    assert_eq!(update, Err(Error::DeviceLost));
    assert_eq!(gpu.upload(&[1.0_f32], &[1, 1, 1, 1]).map(|_| ()), Err(Error::DeviceLost));
    assert_eq!(cache.view(0).map(|_| ()), Err(Error::DeviceLost));
    assert_eq!(numbers(&cache, 0), Err(Error::DeviceLost));
    // A new handle of it learns of the loss one turn later.
    let (device, queue) = (gpu.device().clone(), gpu.queue().clone());
    if let Ok(late) = Gpu::new(device, queue) {
        until_lost(&late);
        assert_eq!(late.upload(&[1.0_f32], &[1, 1, 1, 1]).map(|_| ()), Err(Error::DeviceLost));
    }
}

#[test]
fn calls_that_wait_name_those_that_do_not() {
    let gpu = gpu();
    let blocking = |answer: Result<(), Error>, instead: &str| {
        let error = answer.expect_err("it would wait");
        assert!(matches!(&error, Error::Browser(BrowserError::Blocking { .. })), "{error}");
        assert!(error.to_string().contains(instead), "{error}");
        assert_eq!(error.kind(), ErrorKind::Input);
    };
    blocking(Gpu::headless().map(|_| ()), "Gpu::headless_async()");
    for (_, mut cache) in caches(&gpu) {
        append(&gpu, &mut *cache, 0, &[1.0]).expect("room");
        blocking(cache.get(0).map(|_| ()), "get_async()");
        blocking(cache.get_stored(0).map(|_| ()), "get_async()");
        blocking(cache.save(0..1).map(|_| ()), "save_async()");
    }
}

#[test]
fn a_pair_reads_both_sides() {
    let gpu = gpu();
    let mut pair = EncoderDecoderCache::dynamic(&gpu);
    for (side, number) in [(Side::SelfAttention, 1.0_f32), (Side::CrossAttention, 2.0)] {
        let token = gpu.upload(&[number], &[1, 1, 1, 1]).expect("a token");
        gpu.submit_pass("token", |pass| {
            pair.update(pass, &token.view(), &token.view(), 0, APPEND, side).map(|_| ())
        })
        .expect("room");
    }
    for (side, number) in [(Side::SelfAttention, 1.0), (Side::CrossAttention, 2.0)] {
        let (key, _) = wait(pair.get_async(0, side)).expect("submitted").expect("a token");
        assert_eq!(key.to_f32(), [number]);
    }
}

/// Each kind is restored into each: the memory that the tokens go through is there until they are written.
#[test]
fn what_was_saved_is_restored() {
    let gpu = gpu();
    let held = vec![1.0, 2.0, 3.0, 4.0, 5.0];
    for (from, mut cache) in caches(&gpu) {
        append(&gpu, &mut *cache, 0, &held).expect("room");
        let bytes = wait(cache.save_async(0..1)).expect("submitted");
        for (to, mut other) in caches(&gpu) {
            gpu.submit_pass("restore", |pass| other.restore(pass, &bytes)).expect("room");
            assert_eq!(numbers(&*other, 0), Ok(held.clone()), "{from} into {to}");
        }
    }
}

/// Rows that share their pages are more bytes on the host than its addresses reach.
#[test]
fn what_the_host_cannot_hold_is_refused() {
    let gpu = gpu();
    let mut cache = PagedKVCache::new(&gpu);
    let (heads, tokens, dim) = (8, 16_384, 64);
    let whole = gpu.upload(&vec![1.0_f32; heads * 512 * dim], &[1, heads, 512, dim]).expect("room");
    for _ in 0..tokens / 512 {
        gpu.submit_pass("tokens", |pass| {
            cache.update(pass, &whole.view(), &whole.view(), 0, APPEND).map(|_| ())
        })
        .expect("room");
    }
    gpu.submit_pass("repeat", |pass| cache.batch_repeat_interleave(pass, 128)).expect("shared");
    let error = wait(cache.get_async(0)).expect_err("4 GiB");
    assert!(matches!(error, Error::SizeOverflow { .. }), "{error}");
    assert!(error.to_string().contains("4294967296 bytes for [128, 8, 16384, 64]"), "{error}");
}

#[test]
fn buffers_are_destroyed_when_they_are_done_with() {
    let gpu = gpu();
    let numbers = vec![1.0_f32; 1 << 18];
    let tokens = gpu.upload(&numbers, &[1, 4, 1 << 10, 64]).expect("a mebibyte");
    let fill = |cache: &mut dyn KVCache| {
        gpu.submit_pass("tokens", |pass| {
            cache.update(pass, &tokens.view(), &tokens.view(), 0, APPEND).map(|_| ())
        })
        .expect("room");
    };
    let mut cache = DynamicKVCache::new(&gpu);
    fill(&mut cache);
    let _ = wait(cache.get_async(0)).expect("submitted");
    answered(&gpu);
    let before = live_bytes();
    for _ in 0..40 {
        let _ = wait(cache.get_async(0)).expect("submitted");
    }
    assert!(live_bytes() <= before, "read-backs: {before} became {}", live_bytes());
    // Growth, and caches that are dropped.
    for _ in 0..40 {
        let mut other = DynamicKVCache::new(&gpu);
        fill(&mut other);
        fill(&mut other);
        let _ = wait(other.get_async(0)).expect("submitted");
    }
    answered(&gpu);
    drop(DynamicKVCache::new(&gpu));
    assert!(live_bytes() <= before, "caches: {before} became {}", live_bytes());
}

/// What a recorded pass or a view still reads is not destroyed under it.
#[test]
fn buffers_in_use_are_not_destroyed() {
    let gpu = gpu();
    let scope = gpu.device().push_error_scope(wgpu_kvcache::wgpu::ErrorFilter::Validation);
    let mut cache = DynamicKVCache::new(&gpu);
    append(&gpu, &mut cache, 0, &[1.0]).expect("room");
    let many = vec![0.5_f32; 5000];
    let tokens = gpu.upload(&many, &[1, 1, many.len(), 1]).expect("tokens");
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default());
    // The layer outgrows its memory in a pass that reads the old one, and the cache is gone before the submit.
    cache.update(&mut pass, &tokens.view(), &tokens.view(), 0, APPEND).expect("room");
    let view = cache.view(0).expect("whole").expect("written");
    drop(pass);
    drop(cache);
    answered(&gpu);
    gpu.queue().submit([encoder.finish()]);
    answered(&gpu);
    // The view still shows what was written.
    let size = view.key().size();
    let bytes = crate::rig::read_buffer(&gpu, view.key());
    assert_eq!(bytes.len() as u64, size);
    assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&bytes[..8]), [1.0, 0.5]);
    assert!(wait(scope.pop()).is_none(), "no buffer was used after it was destroyed");
    let _ = TensorView::new(view.key(), DType::F32, &[1, 1, 1, 1]).expect("a view");
}
