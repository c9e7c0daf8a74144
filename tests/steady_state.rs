//! A decode step in steady state makes nothing, submits nothing by itself, and maps nothing.
//!
//! The witness is wgpu itself: it logs every call of its API, and the test counts the log. A binary of
//! its own, because a logger is global and other tests would be counted as well.

use std::collections::HashMap;
use std::sync::{Mutex, Once};

use wgpu_kvcache::{
    Attention, BatchChange, Cache, CacheOptions, CachePosition, DType, DynamicKVCache,
    EncoderDecoderCache, Gpu, HeadlessOptions, KVCache, LayerShape, PagedKVCache, SequenceCache,
    Side, StaticKVCache, TensorView, wgpu,
};

/// Counts log lines by their first word, e.g. `Queue::submit`.
struct Witness(Mutex<Option<HashMap<String, usize>>>);

static WITNESS: Witness = Witness(Mutex::new(None));
/// One test at a time: the witness cannot tell them apart.
static ALONE: Mutex<()> = Mutex::new(());

impl log::Log for Witness {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("wgpu_core")
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        if let Some(calls) = self.0.lock().unwrap().as_mut() {
            let line = record.args().to_string();
            let call = line.split([' ', '(']).next().unwrap_or_default();
            *calls.entry(call.to_owned()).or_default() += 1;
        }
    }

    fn flush(&self) {}
}

/// How often each call of wgpu's API was made while `run` ran.
fn witnessed(run: impl FnOnce()) -> HashMap<String, usize> {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        log::set_logger(&WITNESS).expect("no other logger");
        log::set_max_level(log::LevelFilter::Trace);
    });
    *WITNESS.0.lock().unwrap() = Some(HashMap::new());
    run();
    WITNESS.0.lock().unwrap().take().unwrap()
}

fn count(calls: &HashMap<String, usize>, call: &str) -> usize {
    calls.get(call).copied().unwrap_or(0)
}

/// Everything that a step must not do by itself.
const MAKING: [&str; 9] = [
    "Device::create_buffer",
    "Device::create_bind_group",
    "Device::create_bind_group_layout",
    "Device::create_shader_module",
    "Device::create_compute_pipeline",
    "Device::create_pipeline_layout",
    "Device::create_command_encoder",
    "Buffer::map_async",
    "Queue::submit",
];

/// A device with immediates where the adapter has them, and one with nothing but WebGPU's baseline.
fn devices() -> [(&'static str, Gpu); 2] {
    let open = |options: &HeadlessOptions| {
        Gpu::headless_with(options).unwrap_or_else(|error| panic!("{error}"))
    };
    let baseline = HeadlessOptions::default()
        .with_features(wgpu::Features::empty())
        .with_limits(wgpu::Limits::default());
    [("best", open(&HeadlessOptions::default())), ("baseline", open(&baseline))]
}

const LAYERS: usize = 6;
const BATCH: usize = 4;

/// The buffers that an engine hands in at every step.
struct Engine {
    key: wgpu::Buffer,
    value: wgpu::Buffer,
}

impl Engine {
    fn new(gpu: &Gpu) -> Self {
        let buffer = || {
            gpu.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some("projection"),
                size: (BATCH * 3 * 64 * 4) as u64,
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            })
        };
        Self { key: buffer(), value: buffer() }
    }

    /// Records one token into every layer, and whatever else a kind of loop does in a step.
    fn step(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        cache: &mut dyn KVCache,
        position: CachePosition<'_>,
        beams: Option<&[u32]>,
    ) {
        if let Some(beams) = beams {
            cache.reorder_cache(pass, beams).unwrap();
        }
        let key = TensorView::bthd(&self.key, DType::F32, &[BATCH, 1, 3, 64]).unwrap();
        let value = TensorView::bthd(&self.value, DType::F32, &[BATCH, 1, 3, 64]).unwrap();
        for layer in 0..LAYERS {
            cache.update(pass, &key, &value, layer, position).unwrap();
        }
    }
}

/// Runs `steps` steps with a pass and a submit of the engine's own each; what wgpu saw of the steps
/// proper is returned apart from what it saw of the submits.
fn run(
    gpu: &Gpu,
    engine: &Engine,
    cache: &mut dyn KVCache,
    steps: std::ops::Range<u32>,
    kind: Loop,
) -> HashMap<String, usize> {
    let mut seen = HashMap::new();
    for step in steps {
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        let ragged: Vec<Vec<u32>> = (0..).take(BATCH).map(|row| vec![step + row]).collect();
        let beams = [step % 4, 0, 1, (step + 1) % 4];
        let calls = witnessed(|| match kind {
            Loop::Greedy => engine.step(&mut pass, cache, CachePosition::Append, None),
            Loop::Beams => engine.step(&mut pass, cache, CachePosition::Append, Some(&beams)),
            Loop::Ragged => engine.step(&mut pass, cache, CachePosition::PerRow(&ragged), None),
        });
        for (call, times) in calls {
            *seen.entry(call).or_default() += times;
        }
        drop(pass);
        gpu.queue().submit([encoder.finish()]);
        // An engine looks at each token before it goes on.
        gpu.device().poll(wgpu::PollType::wait_indefinitely()).unwrap();
    }
    seen
}

#[derive(Clone, Copy, Debug)]
enum Loop {
    Greedy,
    Beams,
    Ragged,
}

#[test]
fn a_steady_step_makes_submits_and_maps_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // Enough steps that the buffers of parameters come round several times.
    const STEPS: u32 = 400;
    for (name, gpu) in devices() {
        let engine = Engine::new(&gpu);
        for kind in [Loop::Greedy, Loop::Beams, Loop::Ragged] {
            let room = STEPS as usize + 100;
            let dynamic =
                DynamicKVCache::with_options(&gpu, CacheOptions::default().with_capacity(room))
                    .expect("a capacity");
            let fixed = StaticKVCache::with_options(
                &gpu,
                CacheOptions::default().with_max_cache_len(room).with_num_layers(LAYERS),
            )
            .expect("both options");
            // Four rows that share nothing in the end.
            let pages = CacheOptions::default().with_max_pages(4 * room / 16);
            let paged = PagedKVCache::with_options(&gpu, pages).unwrap();
            for mut cache in
                [Box::new(dynamic) as Box<dyn KVCache>, Box::new(fixed), Box::new(paged)]
            {
                run(&gpu, &engine, cache.as_mut(), 0..4, kind);
                let before = cache.stats();
                let calls = run(&gpu, &engine, cache.as_mut(), 4..STEPS, kind);
                for call in MAKING {
                    assert_eq!(count(&calls, call), 0, "{call}, {name} device, {kind:?}");
                }
                // One dispatch a layer a step, two where rows move as well.
                let after = cache.stats();
                let steps = u64::from(STEPS - 4) * LAYERS as u64;
                let dispatches = after.dispatches - before.dispatches;
                match kind {
                    Loop::Greedy | Loop::Ragged => assert_eq!(dispatches, steps),
                    // Rows move, or a page that they share is copied.
                    Loop::Beams => assert!(dispatches > steps && dispatches <= 2 * steps),
                }
                assert_eq!(after.bytes_allocated, before.bytes_allocated);
                assert_eq!(after.buffers, before.buffers);
            }
        }
    }
}

/// Sequences that decode, with one that prefills in pieces beside them and is rolled back; and their attention.
#[test]
fn a_steady_step_of_sequences_makes_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    const STEPS: usize = 400;
    for (name, gpu) in devices() {
        let engine = Engine::new(&gpu);
        let layer = LayerShape { dtype: DType::F32, heads: 3, key_dim: 4, value_dim: 4 };
        let options = CacheOptions::default().with_max_pages(200);
        let mut cache = SequenceCache::with_options(&gpu, &[layer; LAYERS], options).unwrap();
        let mut attention = Attention::new(&gpu);
        let ids = [(); BATCH].map(|()| cache.add().unwrap());
        let output = gpu.upload(&[0.0_f32; 8 * 3 * 4], &[1, 8, 3, 4]).unwrap();
        let mut run = |steps: std::ops::Range<usize>| {
            let mut seen = HashMap::new();
            for at in steps {
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                let mut pass = encoder.begin_compute_pass(&Default::default());
                let calls = witnessed(|| {
                    let counts = [(ids[0], 1), (ids[1], 1), (ids[2], 1), (ids[3], 1 + at % 3)];
                    if cache.len(ids[3]).unwrap() > 100 {
                        cache.truncate(ids[3], 10).unwrap();
                    }
                    let step = cache.plan_step(&mut pass, &counts).unwrap();
                    let packed = [step.total_tokens(), 3, 4];
                    let key = TensorView::packed(&engine.key, DType::F32, packed).unwrap();
                    let out = TensorView::packed(output.buffer(), DType::F32, packed).unwrap();
                    for layer in 0..LAYERS {
                        let view = cache.update(&mut pass, &step, layer, &key, &key).unwrap();
                        let options = Default::default();
                        attention.record(&mut pass, &key, &view, &out, options).unwrap();
                    }
                });
                for (call, times) in calls {
                    *seen.entry(call).or_default() += times;
                }
                drop(pass);
                gpu.queue().submit([encoder.finish()]);
                gpu.device().poll(wgpu::PollType::wait_indefinitely()).unwrap();
            }
            seen
        };
        run(0..6);
        let calls = run(6..STEPS);
        for call in MAKING {
            assert_eq!(count(&calls, call), 0, "{call}, {name} device");
        }
    }
}

/// A page table longer than the ordinary buffers of parameters.
#[test]
fn a_steady_step_of_a_long_page_table_makes_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    const TOKENS: u32 = 4500;
    const STEPS: u32 = 400;
    for (name, gpu) in devices() {
        let engine = Engine::new(&gpu);
        for kind in [Loop::Greedy, Loop::Beams, Loop::Ragged] {
            let max_pages = Some(BATCH * (TOKENS + STEPS + 200) as usize);
            let options = CacheOptions::default().with_page_tokens(1).with_max_pages(max_pages);
            let mut cache = PagedKVCache::with_options(&gpu, options).unwrap();
            let view = |tokens| {
                let view = TensorView::new(&engine.key, DType::F32, &[BATCH, 1, tokens, 4]);
                view.unwrap().with_strides([4, 4, 0, 1])
            };
            let mut run = |steps: std::ops::Range<u32>| {
                let mut seen = HashMap::new();
                for step in steps {
                    let mut encoder = gpu.device().create_command_encoder(&Default::default());
                    let mut pass = encoder.begin_compute_pass(&Default::default());
                    let at = TOKENS + step;
                    let ragged: Vec<Vec<u32>> =
                        (0..).take(BATCH).map(|row| vec![at + row]).collect();
                    let position = match kind {
                        Loop::Ragged => CachePosition::PerRow(&ragged),
                        Loop::Greedy | Loop::Beams => CachePosition::Append,
                    };
                    let new = if step == 0 { view(TOKENS as usize) } else { view(1) };
                    let calls = witnessed(|| {
                        if matches!(kind, Loop::Beams) && step > 0 {
                            let beams = [step % 4, 0, 1, (step + 1) % 4];
                            cache.reorder_cache(&mut pass, &beams).unwrap();
                        }
                        let position = if step == 0 { CachePosition::Append } else { position };
                        for layer in 0..2 {
                            cache.update(&mut pass, &new, &new, layer, position).unwrap();
                        }
                    });
                    for (call, times) in calls {
                        *seen.entry(call).or_default() += times;
                    }
                    drop(pass);
                    gpu.queue().submit([encoder.finish()]);
                    gpu.device().poll(wgpu::PollType::wait_indefinitely()).unwrap();
                }
                seen
            };
            run(0..40);
            let calls = run(40..STEPS);
            for call in MAKING {
                assert_eq!(count(&calls, call), 0, "{call}, {name} device, {kind:?}");
            }
            let table = cache.view(0).unwrap().unwrap().page_table().unwrap().size();
            assert!(table > 64 << 10, "{name} device, {kind:?}: {table} bytes");
        }
    }
}

/// A change of the batch that was prepared is made as it was prepared: a pair of caches does not prepare it
/// again. And any other call on the pair lets go of it, on both sides.
#[test]
fn a_pair_prepares_once_and_lets_go_of_both_sides() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for (name, gpu) in devices() {
        let engine = Engine::new(&gpu);
        let view = TensorView::new(&engine.key, DType::F32, &[2, 1, 3, 4]).unwrap();
        let update = |pair: &mut EncoderDecoderCache, side: Side| {
            gpu.submit_pass("update", |pass| {
                let append = CachePosition::Append;
                pair.update(pass, &view, &view, 0, append, side).map(|_| ()).unwrap();
            });
        };
        let change = BatchChange::Repeat(3);
        for way in 0..6 {
            let context = format!("{name} device, way {way}");
            let mut pair = EncoderDecoderCache::dynamic(&gpu);
            update(&mut pair, Side::SelfAttention);
            update(&mut pair, Side::CrossAttention);
            gpu.device().poll(wgpu::PollType::wait_indefinitely()).unwrap();
            let calls = witnessed(|| pair.prepare_batch(change).unwrap());
            // K and V of a layer of each side.
            assert_eq!(count(&calls, "Device::create_buffer"), 4, "{context}");
            let calls = witnessed(|| match way {
                0 => pair.prepare_batch(change).unwrap(),
                1 => pair.crop(3),
                2 => pair.truncate(3),
                3 => update(&mut pair, Side::SelfAttention),
                4 => update(&mut pair, Side::CrossAttention),
                _ => assert!(pair.prepare_batch(BatchChange::Select(&[7])).is_err()),
            });
            let gone = if way == 0 { 0 } else { 4 };
            assert_eq!(count(&calls, "Buffer::drop"), gone, "{context}: {calls:?}");
            let calls = witnessed(|| {
                let repeat =
                    |pass: &mut wgpu::ComputePass<'_>| pair.batch_repeat_interleave(pass, 3);
                gpu.submit_pass("repeat", repeat).unwrap();
            });
            let made = if way == 0 { 0 } else { 4 };
            assert_eq!(count(&calls, "Device::create_buffer"), made, "{context}");
            let rows = |side| pair.view(0, side).unwrap().unwrap().key_shape()[0];
            assert_eq!(
                [rows(Side::SelfAttention), rows(Side::CrossAttention)],
                [6, 6],
                "{context}"
            );
        }
    }
}

/// Appends `tokens` tokens of eight rows to every layer.
fn fill(gpu: &Gpu, cache: &mut dyn KVCache, tokens: usize) {
    let engine = Engine::new(gpu);
    let [key, value] = [&engine.key, &engine.value].map(|buffer| {
        let view = TensorView::bthd(buffer, DType::F32, &[8, tokens, 3, 64]).unwrap();
        // The same token everywhere: what rows hold is for the conformance tests.
        view.with_strides([0, 64, 0, 1])
    });
    gpu.submit_pass("fill", |pass| {
        for layer in 0..LAYERS {
            cache.update(pass, &key, &value, layer, CachePosition::Append).unwrap();
        }
    });
}

/// Rows move in place from the very first reorder on, without scratch memory: the most memory that a reorder
/// needs is the cache itself. No step before has warmed anything up, on the device neither.
#[test]
fn the_first_reorder_of_a_filled_ring_makes_no_buffer() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    const TOKENS: usize = 256;
    // An order, and the rows that change.
    let orders: [(&[u32], usize); 2] =
        [(&[1, 2, 3, 4, 5, 6, 7, 0], 8), (&[0, 1, 2, 2, 4, 5, 6, 6], 2)];
    // A cache of each kind is the first of its device once for each order.
    for (turn, (order, rows)) in (0..2).flat_map(|turn| orders.map(|order| (turn, order))) {
        for (name, gpu) in devices() {
            let dynamic = Box::new(DynamicKVCache::new(&gpu)) as Box<dyn KVCache>;
            let mut caches = [
                dynamic,
                Box::new(
                    StaticKVCache::with_options(
                        &gpu,
                        CacheOptions::default().with_max_cache_len(TOKENS).with_num_layers(LAYERS),
                    )
                    .expect("both options"),
                ),
            ];
            caches.rotate_left(turn);
            for (cache, is_wrapped) in caches.iter_mut().zip([false, true]) {
                let context = format!("{name} device, {order:?}, wrapped: {is_wrapped}");
                fill(&gpu, cache.as_mut(), TOKENS);
                if is_wrapped {
                    cache.crop(TOKENS - 100);
                    fill(&gpu, cache.as_mut(), 100);
                }
                for layer in 0..LAYERS {
                    let view = cache.view(layer).unwrap().unwrap();
                    assert_eq!((view.len(), view.capacity()), (TOKENS, TOKENS), "{context}");
                    assert_eq!(view.is_contiguous(), !is_wrapped, "{context}");
                }
                let before = cache.stats();
                // The submit is witnessed as well: nothing is put off until then.
                let calls = witnessed(|| {
                    gpu.submit_pass("first", |pass| cache.reorder_cache(pass, order).unwrap());
                });
                assert_eq!(count(&calls, "Device::create_buffer"), 0, "{context}: {calls:?}");
                assert!(count(&calls, "Queue::submit") >= 1, "{context}");
                let after = cache.stats();
                let moved = LAYERS * rows * 2 * 3 * TOKENS * 64 * 4;
                assert_eq!(after.bytes_moved - before.bytes_moved, moved as u64, "{context}");
                assert_eq!(after.bytes_allocated, before.bytes_allocated, "{context}");
                assert_eq!(after.peak_bytes_allocated, before.bytes_allocated, "{context}");
                // The witness would see it: a ninth row takes new buffers, K and V of every layer.
                let calls = witnessed(|| {
                    gpu.submit_pass("ninth", |pass| cache.reorder_cache(pass, &[0; 9]).unwrap());
                });
                assert_eq!(count(&calls, "Device::create_buffer"), 2 * LAYERS, "{context}");
            }
        }
    }
}

#[test]
fn the_witness_sees_what_a_step_must_not_do() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for (name, gpu) in devices() {
        let engine = Engine::new(&gpu);
        let mut cache = DynamicKVCache::new(&gpu);
        let first = run(&gpu, &engine, &mut cache, 0..1, Loop::Greedy);
        assert_eq!(count(&first, "Device::create_buffer"), 2 * LAYERS, "{name}");
        assert_eq!(count(&first, "Device::create_bind_group"), LAYERS, "{name}");
        let get = witnessed(|| assert!(cache.get(0).unwrap().is_some()));
        assert_eq!(count(&get, "Buffer::map_async"), 2, "{name}: {get:?}");
        assert_eq!(count(&get, "Device::create_buffer"), 2, "{name}");
        assert_eq!(count(&get, "Device::create_command_encoder"), 1, "{name}");
        assert!(count(&get, "Queue::submit") >= 1, "{name}");
    }
}

/// Rows of different length: a step drafts three tokens a row, attends to them, and rolls each row back to what
/// it accepts.
#[test]
fn a_steady_step_of_ragged_rows_makes_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    const STEPS: usize = 300;
    for (name, gpu) in devices() {
        let engine = Engine::new(&gpu);
        let buffer = |usage| {
            let size = (BATCH * 3 * 3 * 64 * 4) as u64;
            let label = Some("tensor");
            let mapped_at_creation = false;
            gpu.device().create_buffer(&wgpu::BufferDescriptor {
                label,
                size,
                usage,
                mapped_at_creation,
            })
        };
        let [query, output] = [0, 1].map(|_| buffer(wgpu::BufferUsages::STORAGE));
        let shape = [BATCH, 3, 3, 64];
        let [q, out] = [&query, &output].map(|it| TensorView::new(it, DType::F32, &shape).unwrap());
        // The same token three times.
        let new = |buffer| {
            let view = TensorView::new(buffer, DType::F32, &shape).unwrap();
            view.with_strides([3 * 64, 64, 0, 1])
        };
        let room = 3 * STEPS + 100;
        let options = CacheOptions::default().with_capacity(room);
        let dynamic = DynamicKVCache::with_options(&gpu, options).unwrap();
        let pages = CacheOptions::default().with_max_pages(4 * room / 16);
        let paged = PagedKVCache::with_options(&gpu, pages).unwrap();
        for mut cache in [Box::new(dynamic) as Box<dyn KVCache>, Box::new(paged)] {
            let mut attention = wgpu_kvcache::Attention::new(&gpu);
            let mut lens = [0, 5, 17, 2];
            let mut seen = HashMap::new();
            for step in 0..STEPS {
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                let mut pass = encoder.begin_compute_pass(&Default::default());
                let drafted: Vec<Vec<u32>> = lens
                    .iter()
                    .map(|&len| (u32::try_from(len).unwrap()..).take(3).collect())
                    .collect();
                // One to three of them are accepted.
                for (row, len) in lens.iter_mut().enumerate() {
                    *len += 1 + (step * 7 + row * 5) % 3;
                }
                let calls = witnessed(|| {
                    for layer in 0..LAYERS {
                        let position = CachePosition::PerRow(&drafted);
                        let (k, v) = (new(&engine.key), new(&engine.value));
                        let view = cache.update(&mut pass, &k, &v, layer, position).unwrap();
                        let options = Default::default();
                        attention.record(&mut pass, &q, &view, &out, options).unwrap();
                    }
                    cache.truncate_rows(&lens).unwrap();
                    assert!(cache.view(0).unwrap().unwrap().is_ragged());
                });
                // Splits of longer rows take a larger scratch buffer once in a while.
                if step >= 40 {
                    for (call, times) in calls {
                        *seen.entry(call).or_default() += times;
                    }
                }
                drop(pass);
                gpu.queue().submit([encoder.finish()]);
                gpu.device().poll(wgpu::PollType::wait_indefinitely()).unwrap();
            }
            for call in MAKING {
                assert_eq!(count(&seen, call), 0, "{call}, {name} device: {seen:?}");
            }
        }
    }
}
