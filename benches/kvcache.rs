//! Times of every call, and of the limit of the same adapter, in one run. Absolute times drift, ratios less so; cases
//! that are compared are measured in turns. `cargo bench` prints the times, and `target/criterion/**/estimates.json`
//! has them for programs.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use wgpu_kvcache::{
    Attention, AttentionOptions, Cache, CacheOptions, DType, DynamicKVCache, Gpu, KVCache,
    PagedKVCache, StaticKVCache, TensorView, wgpu,
};

mod support;
use support::{
    BATCH, COPY, COPY_ONE, DIM, HEADS, Inputs, LAYERS, Plain, SUM, TOUCH, concat::ConcatCache,
    fill, finish, gpu, pass, random_buffer, turns::Turns, update,
};

const LENGTHS: [usize; 3] = [128, 1024, 4096];
/// Bytes that the limit's copies move.
const LIMIT_BYTES: u64 = 64 << 20;

/// Bytes of live K and V of all layers.
fn live_bytes(layers: usize, batch: usize, tokens: usize) -> u64 {
    (2 * layers * batch * HEADS * tokens * DIM * 4) as u64
}

/// One token into every layer: one pass, one submit.
fn step(_: &mut Criterion) {
    let gpu = gpu();
    let one = Inputs::new(&gpu, BATCH, 1);
    let words: Vec<_> = (0..LAYERS).map(|_| random_buffer(&gpu, 4)).collect();
    let touches: Vec<_> = words.iter().map(|word| Plain::new(&gpu, TOUCH, &[word], 1)).collect();
    // The bytes of a step's tokens, copied by the simplest kernel: K and V of a layer in one dispatch.
    let bytes = live_bytes(1, BATCH, 1);
    let layers: Vec<_> =
        (0..LAYERS).map(|_| [(); 2].map(|()| random_buffer(&gpu, bytes))).collect();
    let groups = u32::try_from(bytes / 16 / 64).expect("few groups");
    let copies: Vec<_> = layers
        .iter()
        .map(|[source, target]| Plain::new(&gpu, COPY_ONE, &[source, target], groups))
        .collect();

    let mut turns = Turns::default();
    turns.add("limit", BenchmarkId::from_parameter("empty_step"), None, |bencher| {
        bencher.iter(|| pass(&gpu, |pass| touches.iter().for_each(|touch| touch.record(pass))));
    });
    turns.add("limit", BenchmarkId::from_parameter("copy_step"), None, |bencher| {
        bencher.iter(|| pass(&gpu, |pass| copies.iter().for_each(|copy| copy.record(pass))));
    });
    for tokens in LENGTHS {
        let room = 2 * tokens;
        let dynamic =
            DynamicKVCache::with_options(&gpu, CacheOptions::default().with_capacity(room))
                .expect("a capacity");
        let fixed = StaticKVCache::with_options(
            &gpu,
            CacheOptions::default().with_max_cache_len(room).with_num_layers(LAYERS),
        )
        .expect("both options");
        let paged = PagedKVCache::new(&gpu);
        for (kind, mut cache) in [
            ("dynamic", Box::new(dynamic) as Box<dyn KVCache + Send>),
            ("static", Box::new(fixed)),
            ("paged", Box::new(paged)),
        ] {
            fill(&gpu, cache.as_mut(), BATCH, tokens, LAYERS);
            let (gpu, one) = (&gpu, &one);
            // The first step may make the pool grow.
            pass(gpu, |pass| update(pass, cache.as_mut(), &one.bhtd(), LAYERS));
            turns.add("step", BenchmarkId::new(kind, tokens), None, move |bencher| {
                bencher.iter(|| {
                    cache.truncate(tokens);
                    pass(gpu, |pass| update(pass, cache.as_mut(), &one.bhtd(), LAYERS));
                });
            });
        }
    }
    turns.measure(200, Duration::from_secs(3));
}

/// The host's share of a step.
fn record(criterion: &mut Criterion) {
    let gpu = gpu();
    let one = Inputs::new(&gpu, BATCH, 1);
    let mut cache = DynamicKVCache::with_options(&gpu, CacheOptions::default().with_capacity(256))
        .expect("a capacity");
    fill(&gpu, &mut cache, BATCH, 128, LAYERS);
    criterion.benchmark_group("record").bench_function("dynamic", |bencher| {
        bencher.iter_custom(|times| {
            let mut total = Duration::ZERO;
            for _ in 0..times {
                cache.truncate(128);
                gpu.submit_pass("record", |pass| {
                    let start = Instant::now();
                    update(pass, &mut cache, &one.bhtd(), LAYERS);
                    total += start.elapsed();
                });
                finish(&gpu);
            }
            total
        });
    });
}

/// 1 to 8192 tokens, one at a time, one layer, one row, from nothing.
fn grow(criterion: &mut Criterion) {
    let gpu = gpu();
    let mut group = criterion.benchmark_group("grow");
    group.sample_size(10).measurement_time(Duration::from_secs(10));
    let one = Inputs::new(&gpu, 1, 1);
    group.bench_function("8192", |bencher| {
        bencher.iter(|| {
            let mut cache = DynamicKVCache::new(&gpu);
            for _ in 0..8192 / 64 {
                gpu.submit_pass("grow", |pass| {
                    for _ in 0..64 {
                        update(pass, &mut cache, &one.bhtd(), 1);
                    }
                });
            }
            finish(&gpu);
        });
    });
}

/// Calls that copy: the limit, prefills, reorders, and one row that becomes four.
fn copies(_: &mut Criterion) {
    let gpu = gpu();
    for tokens in LENGTHS {
        let limit = (tokens == 4096).then(|| Limit::new(&gpu));
        let caches = [BATCH, 8].map(|batch| {
            let mut cache =
                DynamicKVCache::with_options(&gpu, CacheOptions::default().with_capacity(tokens))
                    .expect("a capacity");
            fill(&gpu, &mut cache, batch, tokens, LAYERS);
            Mutex::new(cache)
        });
        let mut turns = Turns::default();
        if let Some(limit) = &limit {
            limit.add(&gpu, &mut turns);
            prefill(&gpu, &mut turns);
        }
        reorder(&gpu, &mut turns, &caches, tokens);
        repeat(&gpu, &mut turns, tokens);
        turns.measure(40, Duration::from_secs(1));
    }
}

/// Two buffers, and a kernel that copies one to the other.
struct Limit {
    source: wgpu::Buffer,
    target: wgpu::Buffer,
    kernel: Plain,
}

impl Limit {
    fn new(gpu: &Gpu) -> Self {
        let [source, target] = [(); 2].map(|()| random_buffer(gpu, LIMIT_BYTES));
        let groups = u32::try_from(LIMIT_BYTES / 16 / 1024).expect("few groups");
        let kernel = Plain::new(gpu, COPY, &[&source, &target], groups);
        Self { source, target, kernel }
    }

    fn add<'a>(&'a self, gpu: &'a Gpu, turns: &mut Turns<'a>) {
        let bytes = Some(2 * LIMIT_BYTES);
        turns.add("limit", BenchmarkId::from_parameter("copy_kernel"), bytes, |bencher| {
            bencher.iter(|| pass(gpu, |pass| self.kernel.record(pass)));
        });
        turns.add("limit", BenchmarkId::from_parameter("copy_buffer"), bytes, |bencher| {
            bencher.iter(|| {
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                encoder.copy_buffer_to_buffer(&self.source, 0, &self.target, 0, LIMIT_BYTES);
                gpu.queue().submit([encoder.finish()]);
                finish(gpu);
            });
        });
    }
}

/// A prefill of 2048 tokens into every layer, from (B, H, T, D) and from (B, T, H, D) tensors.
fn prefill<'a>(gpu: &'a Gpu, turns: &mut Turns<'a>) {
    let tokens = 2048;
    let bytes = Some(2 * live_bytes(LAYERS, BATCH, tokens));
    for name in ["prefill", "prefill_bthd"] {
        let inputs = Inputs::new(gpu, BATCH, tokens);
        let mut cache = StaticKVCache::with_options(
            gpu,
            CacheOptions::default().with_max_cache_len(tokens).with_num_layers(LAYERS),
        )
        .expect("both options");
        fill(gpu, &mut cache, BATCH, tokens, LAYERS);
        turns.add(name, BenchmarkId::from_parameter(tokens), bytes, move |bencher| {
            let views = if name == "prefill" { inputs.bhtd() } else { inputs.bthd() };
            bencher.iter(|| {
                cache.truncate(0);
                pass(gpu, |pass| update(pass, &mut cache, &views, LAYERS));
            });
        });
    }
}

/// Reorders of batches of four and of eight rows.
fn reorder<'a>(
    gpu: &'a Gpu,
    turns: &mut Turns<'a>,
    [four, eight]: &'a [Mutex<DynamicKVCache>; 2],
    tokens: usize,
) {
    type Case<'a> = (&'a str, &'a Mutex<DynamicKVCache>, &'a [u32], usize);
    let cases: [Case<'_>; 4] = [
        ("cycle", four, &[1, 2, 3, 0], 4),
        ("identity", four, &[0, 1, 2, 3], 0),
        ("two_of_eight", eight, &[0, 1, 2, 2, 4, 5, 6, 6], 2),
        ("cycle_of_eight", eight, &[1, 2, 3, 4, 5, 6, 7, 0], 8),
    ];
    for (name, cache, map, moved) in cases {
        let bytes = (moved > 0).then(|| 2 * live_bytes(LAYERS, moved, tokens));
        turns.add("reorder", BenchmarkId::new(name, tokens), bytes, move |bencher| {
            let mut cache = cache.lock().expect("one case at a time");
            bencher.iter(|| {
                pass(gpu, |pass| cache.reorder_cache(pass, map).expect("rows that exist"));
            });
        });
    }
}

/// One row becomes four. The buffers for four rows exist and were written before.
fn repeat<'a>(gpu: &'a Gpu, turns: &mut Turns<'a>, tokens: usize) {
    let mut cache =
        DynamicKVCache::with_options(gpu, CacheOptions::default().with_capacity(tokens))
            .expect("a capacity");
    fill(gpu, &mut cache, 4, tokens, LAYERS);
    // One row is read, and three are written: row 0 does not move.
    let bytes = live_bytes(LAYERS, 1, tokens) + live_bytes(LAYERS, 3, tokens);
    turns.add("repeat", BenchmarkId::new("4", tokens), Some(bytes), move |bencher| {
        bencher.iter(|| {
            pass(gpu, |pass| {
                cache.batch_select_indices(pass, &[0]).expect("rows that exist");
                cache.batch_repeat_interleave(pass, 4).expect("room");
            });
        });
    });
}

/// Pages: the reorder, and the step after it, in one pass. Two beams continue, twice each, and the last page is half
/// full. So all pages are shared, and the step copies two last pages in each layer.
fn reorder_paged(criterion: &mut Criterion) {
    let gpu = gpu();
    let mut cache = PagedKVCache::new(&gpu);
    for tokens in [4096, 8] {
        fill(&gpu, &mut cache, BATCH, tokens, LAYERS);
    }
    let one = Inputs::new(&gpu, BATCH, 1);
    criterion.benchmark_group("reorder").bench_function(
        BenchmarkId::new("paged", 4096),
        |bencher| {
            bencher.iter(|| {
                cache.truncate(4096 + 8);
                pass(&gpu, |pass| {
                    cache.reorder_cache(pass, &[0, 0, 1, 1]).expect("rows that exist");
                    update(pass, &mut cache, &one.bhtd(), LAYERS);
                });
            });
        },
    );
}

/// One query per row over 4096 tokens of one layer, four query heads per K/V head; and a kernel that only reads the
/// same bytes.
fn attention(_: &mut Criterion) {
    let gpu = gpu();
    let tokens = 4096;
    let shape = [BATCH, 4 * HEADS, 1, DIM];
    let floats = (BATCH * 4 * HEADS * DIM * 4) as u64;
    let (query, output) = (random_buffer(&gpu, floats), random_buffer(&gpu, floats));
    let [query, output] = [&query, &output]
        .map(|buffer| TensorView::new(buffer, DType::F32, &shape).expect("a shape"));
    let bytes = live_bytes(1, BATCH, tokens);
    let source = random_buffer(&gpu, bytes);
    let sums = random_buffer(&gpu, bytes / 16);
    let groups = u32::try_from(bytes / 16 / 4096).expect("few groups");
    let sum = Plain::new(&gpu, SUM, &[&source, &sums], groups);

    let mut turns = Turns::default();
    turns.add("limit", BenchmarkId::from_parameter("read_sum"), Some(bytes), |bencher| {
        bencher.iter(|| pass(&gpu, |pass| sum.record(pass)));
    });
    for (name, mut cache) in [
        ("contiguous", Box::new(DynamicKVCache::new(&gpu)) as Box<dyn KVCache + Send>),
        ("paged", Box::new(PagedKVCache::new(&gpu))),
    ] {
        fill(&gpu, cache.as_mut(), BATCH, tokens, 1);
        let (gpu, query, output) = (&gpu, &query, &output);
        let mut attention = Attention::new(gpu);
        turns.add("attention", BenchmarkId::new(name, tokens), Some(bytes), move |bencher| {
            bencher.iter(|| {
                let view = cache.view(0).expect("it exists").expect("it was written");
                pass(gpu, |pass| {
                    let options = AttentionOptions::default();
                    attention.record(pass, query, &view, output, options).expect("shapes that fit");
                });
            });
        });
    }
    turns.measure(100, Duration::from_secs(3));
}

/// Many new tokens, and one token over a window.
fn attention_forms(_: &mut Criterion) {
    let gpu = gpu();
    support::prefill::prefill(&gpu);
    support::prefill::window(&gpu);
}

/// Formats that K and V are stored in.
fn formats(_: &mut Criterion) {
    let gpu = gpu();
    support::formats::append(&gpu);
    support::formats::attention(&gpu);
}

/// One query a sequence over sequences of different length.
fn sequences(_: &mut Criterion) {
    let gpu = gpu();
    let mut turns = Turns::default();
    support::sequences::sequences(&gpu, &mut turns);
    turns.measure(60, Duration::from_secs(3));
}

/// The baseline: a cache that copies old and new into other buffers at every step.
fn concat(criterion: &mut Criterion) {
    let gpu = gpu();
    let mut group = criterion.benchmark_group("concat");
    group.sample_size(10).warm_up_time(Duration::from_secs(1));
    let one = Inputs::new(&gpu, BATCH, 1);
    for tokens in LENGTHS {
        let mut cache = ConcatCache::new(&gpu, LAYERS, BATCH, HEADS, DIM);
        group.bench_function(BenchmarkId::from_parameter(tokens), |bencher| {
            bencher.iter_custom(|times| {
                let mut total = Duration::ZERO;
                for _ in 0..times {
                    cache.fill(tokens);
                    finish(&gpu);
                    let start = Instant::now();
                    pass(&gpu, |pass| cache.step(pass, &one.key, &one.value));
                    total += start.elapsed();
                }
                total
            });
        });
    }
}

/// One layer read back, and the same bytes by a plain copy.
fn get(_: &mut Criterion) {
    let gpu = gpu();
    let source = random_buffer(&gpu, live_bytes(1, BATCH, 4096));
    let mut turns = Turns::default();
    for tokens in LENGTHS {
        let bytes = live_bytes(1, BATCH, tokens);
        // The id of the longest has no length.
        let id = if tokens == 4096 { "readback".to_owned() } else { format!("readback_{tokens}") };
        let (gpu, source) = (&gpu, &source);
        turns.add("limit", BenchmarkId::from_parameter(id), Some(bytes), move |bencher| {
            bencher.iter(|| read_back(gpu, source, bytes));
        });
        let mut cache =
            DynamicKVCache::with_options(gpu, CacheOptions::default().with_capacity(2 * tokens))
                .expect("a capacity");
        fill(gpu, &mut cache, BATCH, tokens, 1);
        turns.add("get", BenchmarkId::from_parameter(tokens), Some(bytes), move |bencher| {
            bencher.iter(|| cache.get(0).expect("read back").expect("written"));
        });
    }
    turns.measure(20, Duration::from_secs(3));
}

/// A plain copy into a fresh mappable buffer, and its bytes on the host.
fn read_back(gpu: &Gpu, source: &wgpu::Buffer, bytes: u64) -> Vec<u32> {
    let staging = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some("staging"),
        size: bytes,
        usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
        mapped_at_creation: false,
    });
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(source, 0, &staging, 0, bytes);
    gpu.queue().submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |result| result.expect("mapped"));
    finish(gpu);
    let range = staging.slice(..).get_mapped_range().expect("mapped");
    bytemuck::pod_collect_to_vec(&range)
}

fn truncate_crop(criterion: &mut Criterion) {
    let gpu = gpu();
    let mut cache = DynamicKVCache::with_options(&gpu, CacheOptions::default().with_capacity(1024))
        .expect("a capacity");
    fill(&gpu, &mut cache, BATCH, 1024, LAYERS);
    let one = Inputs::new(&gpu, BATCH, 1);
    criterion.bench_function("truncate_crop", |bencher| {
        bencher.iter_custom(|times| {
            let mut total = Duration::ZERO;
            for _ in 0..times {
                pass(&gpu, |pass| {
                    update(pass, &mut cache, &one.bhtd(), LAYERS);
                    update(pass, &mut cache, &one.bhtd(), LAYERS);
                });
                let start = Instant::now();
                cache.truncate(1025);
                cache.crop(1024);
                total += start.elapsed();
            }
            total
        });
    });
}

criterion_group!(
    benches,
    step,
    record,
    concat,
    grow,
    copies,
    reorder_paged,
    attention,
    attention_forms,
    formats,
    sequences,
    get,
    truncate_crop
);
criterion_main!(benches);
