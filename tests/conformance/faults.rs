//! A device that is destroyed, and one that runs out of memory: an error within a bound, never a panic,
//! a hang, or a half-moved cache.

use std::time::{Duration, Instant};

use wgpu_kvcache::{
    Attention, BatchChange, CacheOptions, CachePosition, DType, DynamicKVCache, Error, Gpu,
    HostTensor, KVCache, PagedKVCache, StaticKVCache, TensorView, wgpu,
};

use crate::open;
use crate::rig::{buffer, same_bits};
use crate::wait::{ReadLayer, wait};

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
    let make: [Make; 3] = [
        |gpu| Box::new(DynamicKVCache::new(gpu)),
        |gpu| {
            Box::new(
                StaticKVCache::with_options(
                    gpu,
                    CacheOptions::default().with_max_cache_len(8).with_num_layers(4),
                )
                .expect("both options"),
            )
        },
        |gpu| Box::new(PagedKVCache::new(gpu)),
    ];
    for make in make {
        let gpu = mortal_gpu();
        let mut cache = make(&gpu);
        for layer in 0..2 {
            one_token(&gpu, cache.as_mut(), layer).expect("a live device");
        }
        assert!(cache.read(0).expect("a live device").is_some());
        gpu.device().destroy();
        let start = Instant::now();
        let error = cache.read(0).expect_err("a destroyed device reads nothing back");
        assert!(matches!(error, Error::DeviceLost), "{error:?}");
        assert!(start.elapsed() < BOUND);
        // What is recorded goes nowhere; that it was lost is said when it is asked for.
        let _ = one_token(&gpu, cache.as_mut(), 0);
        let _ = one_token(&gpu, cache.as_mut(), 3);
        let _ = gpu.submit_pass("select", |pass| cache.reorder_cache(pass, &[1, 0]));
        let _ = gpu.submit_pass("repeat", |pass| cache.batch_repeat_interleave(pass, 3));
        for layer in [0, 1, 3] {
            match cache.read(layer) {
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

/// Nothing can be written to a device that is lost, and every call that would says so, at once: with an error
/// handler and without, whatever the call would have to make.
#[test]
fn a_destroyed_device_takes_no_work() {
    for kind in 0..3 {
        for is_lenient in [false, true] {
            for is_polled in [false, true] {
                let gpu = mortal_gpu();
                if is_lenient {
                    gpu.device().on_uncaptured_error(std::sync::Arc::new(|_| ()));
                }
                let mut cache: Box<dyn KVCache> = match kind {
                    0 => Box::new(DynamicKVCache::new(&gpu)),
                    1 => Box::new(
                        StaticKVCache::with_options(
                            &gpu,
                            CacheOptions::default().with_max_cache_len(8).with_num_layers(4),
                        )
                        .expect("both options"),
                    ),
                    _ => Box::new(PagedKVCache::new(&gpu)),
                };
                let token = gpu.upload(&[1.0_f32; 4], &[2, 1, 1, 2]).expect("a live device");
                let output = gpu.upload(&[1.0_f32; 4], &[2, 1, 1, 2]).expect("a live device");
                let mut attention = Attention::new(&gpu);
                for _ in 0..4 {
                    // The fourth step makes nothing new.
                    gpu.submit_pass("step", |pass| {
                        let input = token.view();
                        let view = cache.update(pass, &input, &input, 0, CachePosition::Append)?;
                        let (query, output) = (token.view(), output.view());
                        attention.record(pass, &query, &view, &output, Default::default())
                    })
                    .expect("a live device");
                }
                let stats = cache.stats();
                gpu.device().destroy();
                if is_polled {
                    let _ = gpu.device().poll(wgpu::PollType::Poll);
                }
                let context = format!("kind {kind}, handler: {is_lenient}, polled: {is_polled}");
                for _ in 0..2 {
                    let mut refused = vec![
                        gpu.upload(&[1.0_f32; 4], &[2, 1, 1, 2]).map(|_| ()),
                        gpu.upload(&[half::f16::ONE; 3], &[1, 1, 3, 1]).map(|_| ()),
                        Gpu::new(gpu.device().clone(), gpu.queue().clone()).map(|_| ()),
                    ];
                    gpu.submit_pass("lost", |pass| {
                        if let Ok(Some(view)) = cache.view(0) {
                            let (query, output) = (token.view(), output.view());
                            refused.push(attention.record(
                                pass,
                                &query,
                                &view,
                                &output,
                                Default::default(),
                            ));
                        }
                        for layer in [0, 1] {
                            let input = token.view();
                            let append = CachePosition::Append;
                            let update = cache.update(pass, &input, &input, layer, append);
                            refused.push(update.map(|_| ()));
                        }
                        refused.push(cache.reorder_cache(pass, &[1, 0]));
                        refused.push(cache.batch_select_indices(pass, &[0, 0, 1]));
                        refused.push(cache.batch_repeat_interleave(pass, 2));
                        refused.push(cache.prepare_batch(BatchChange::Repeat(2)));
                    });
                    refused.push(cache.read(0).map(|_| ()));
                    refused.push(wait(cache.get_async(0)).map(|_| ()));
                    for (call, refused) in refused.into_iter().enumerate() {
                        let error = refused.expect_err(&format!("{context}, call {call}"));
                        let text = error.to_string();
                        assert!(text.contains("lost"), "{context}, call {call}: '{text}'");
                    }
                }
                assert_eq!(cache.stats(), stats, "{context}");
            }
        }
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
    let _ = wait(scope.pop());
    let start = Instant::now();
    assert!(cache.read(0).is_err());
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
            while let Ok(read) = cache.read(0) {
                let (key, _) = read.expect("layer 0 was written");
                assert!(key.bytes().iter().all(|&byte| byte == 0));
                assert!(start.elapsed() < BOUND, "reads go on for {delay} µs");
            }
        });
        assert!(start.elapsed() < BOUND);
    }
}

/// A change of the batch that gathers rows, and the old row of each new one.
type Gather = (
    &'static str,
    fn(&mut dyn KVCache, &mut wgpu::ComputePass<'_>) -> Result<(), Error>,
    &'static [usize],
);

const IN_PLACE: Gather = ("reorder", |cache, pass| cache.reorder_cache(pass, &[1, 0]), &[1, 0]);
const INTO_NEW_BUFFERS: Gather =
    ("repeat", |cache, pass| cache.batch_repeat_interleave(pass, 3), &[0, 0, 0, 1, 1, 1]);

/// Tokens of layer 0 in `filled`: 16 MiB for each of K and V, which takes a software adapter some
/// milliseconds to gather.
const MANY: usize = 4096;

/// A cache of either kind with two rows in layer 0, every element of which is 1 + the row.
fn filled(gpu: &Gpu, is_static: bool) -> Box<dyn KVCache> {
    let mut cache: Box<dyn KVCache> = if is_static {
        Box::new(
            StaticKVCache::with_options(
                gpu,
                CacheOptions::default().with_max_cache_len(MANY + 1).with_num_layers(1),
            )
            .expect("both options"),
        )
    } else {
        Box::new(DynamicKVCache::new(gpu))
    };
    let rows: Vec<f32> = [[1.0; 64], [2.0; 64]].concat();
    let source = gpu.upload(&rows, &[2, 1, 1, 64]).expect("a live device");
    // All heads and tokens of a row are the same 64 elements.
    let view = TensorView::new(source.buffer(), DType::F32, &[2, 8, MANY, 64])
        .map(|view| view.with_strides([64, 0, 0, 1]))
        .expect("a shape");
    gpu.submit_pass("fill", |pass| {
        cache.update(pass, &view, &view, 0, CachePosition::Append).map(|_| ())
    })
    .expect("a live device");
    cache
}

/// What a read-back gave after `gather` was submitted: the rows that it makes, in full, or an error.
fn assert_right_or_error(
    read: Result<Option<(HostTensor, HostTensor)>, Error>,
    (name, _, rows): Gather,
) {
    match read {
        Ok(tensors) => {
            let (key, value) = tensors.expect("layer 0 was written");
            for tensor in [key, value] {
                assert_eq!(tensor.shape(), [rows.len(), 8, MANY, 64], "{name}");
                let bytes = tensor.bytes().chunks(8 * MANY * 64 * 4);
                for (bytes, &row) in bytes.zip(rows) {
                    let expected = vec![[1.0_f32, 2.0][row]; 8 * MANY * 64];
                    assert!(same_bits(bytes, bytemuck::cast_slice(&expected)), "{name}");
                }
            }
        }
        Err(error) => assert!(!error.to_string().is_empty(), "{name}"),
    }
}

/// Nothing is read back from a destroyed device, and whatever is called next, that stays so.
fn assert_lost(gpu: &Gpu, cache: &mut dyn KVCache, context: &str) {
    let start = Instant::now();
    for _ in 0..2 {
        for read in [cache.read(0), wait(cache.get_async(0))] {
            let error = read.map(|_| ()).expect_err(context);
            let is_due = matches!(
                error,
                Error::Readback { .. }
                    | Error::Device { .. }
                    | Error::DeviceLost
                    | Error::PassDropped { .. }
                    | Error::NotSubmitted { .. }
            );
            assert!(is_due, "{context}: {error:?}");
        }
        // Each of these is refused, or goes nowhere.
        let _ = one_token(gpu, cache, 0);
        for (_, gather, _) in [IN_PLACE, INTO_NEW_BUFFERS] {
            let _ = gpu.submit_pass("later", |pass| gather(cache, pass));
        }
        cache.crop(MANY - 1);
    }
    assert!(start.elapsed() < BOUND, "{context}: {:?}", start.elapsed());
    cache.reset();
    assert_eq!(cache.get_seq_length(0), Ok(0), "{context}");
}

#[test]
fn a_device_destroyed_between_a_gather_and_its_submit() {
    for gather in [IN_PLACE, INTO_NEW_BUFFERS] {
        for is_static in [false, true] {
            for is_finished in [false, true] {
                let context = format!("{}, static: {is_static}, {is_finished}", gather.0);
                let gpu = mortal_gpu();
                let mut cache = filled(&gpu, is_static);
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                gather.1(cache.as_mut(), &mut encoder.begin_compute_pass(&Default::default()))
                    .expect("a live device");
                let scope = gpu.device().push_error_scope(wgpu::ErrorFilter::Validation);
                let commands = if is_finished {
                    let commands = encoder.finish();
                    gpu.device().destroy();
                    commands
                } else {
                    gpu.device().destroy();
                    encoder.finish()
                };
                gpu.queue().submit([commands]);
                let _ = wait(scope.pop());
                assert_lost(&gpu, cache.as_mut(), &context);
            }
        }
    }
}

/// Before, during and after the gather, as machines differ: what is read is what it makes, whole, or an error.
#[test]
fn a_device_destroyed_while_a_gather_runs() {
    for gather in [IN_PLACE, INTO_NEW_BUFFERS] {
        for (delay, is_async) in
            [(0, false), (0, true), (300, false), (3000, true), (30_000, false), (500_000, true)]
        {
            let gpu = mortal_gpu();
            let mut cache = filled(&gpu, false);
            let start = Instant::now();
            std::thread::scope(|scope| {
                gpu.submit_pass("gather", |pass| gather.1(cache.as_mut(), pass))
                    .expect("a live device");
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_micros(delay));
                    gpu.device().destroy();
                });
                let read = if is_async { wait(cache.get_async(0)) } else { cache.read(0) };
                assert_right_or_error(read, gather);
            });
            assert!(start.elapsed() < BOUND, "{}, {delay} µs: {:?}", gather.0, start.elapsed());
            assert_lost(&gpu, cache.as_mut(), &format!("{}, {delay} µs", gather.0));
        }
    }
}
