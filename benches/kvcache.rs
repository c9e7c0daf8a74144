//! Times of every call beside the limit of the same adapter, in one run. Ratios hold where absolute
//! times drift. `cargo bench` prints them; `target/criterion/**/estimates.json` has them for programs.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use wgpu_kvcache::{
    Attention, AttentionOptions, Cache, DType, DynamicKVCache, Gpu, KVCache, PagedKVCache,
    StaticKVCache, TensorView, wgpu,
};

mod support;
use support::{
    BATCH, COPY, DIM, HEADS, Inputs, LAYERS, Plain, SUM, TOUCH, concat::ConcatCache, fill, finish,
    gpu, pass, random_buffer, update,
};

const LENGTHS: [usize; 3] = [128, 1024, 4096];
/// Bytes that the copies of the limit move.
const LIMIT_BYTES: u64 = 64 << 20;

/// Bytes of live K and V of all layers.
fn live_bytes(layers: usize, batch: usize, tokens: usize) -> u64 {
    (2 * layers * batch * HEADS * tokens * DIM * 4) as u64
}

fn limit(criterion: &mut Criterion) {
    let gpu = gpu();
    let mut group = criterion.benchmark_group("limit");
    group.sample_size(20);
    let source = random_buffer(&gpu, LIMIT_BYTES);
    let target = random_buffer(&gpu, LIMIT_BYTES);

    group.throughput(Throughput::Bytes(2 * LIMIT_BYTES));
    let groups = u32::try_from(LIMIT_BYTES / 16 / 1024).expect("few groups");
    let copy = Plain::new(&gpu, COPY, &[&source, &target], groups);
    group.bench_function("copy_kernel", |bencher| {
        bencher.iter(|| pass(&gpu, |pass| copy.record(pass)));
    });
    group.bench_function("copy_buffer", |bencher| {
        bencher.iter(|| {
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            encoder.copy_buffer_to_buffer(&source, 0, &target, 0, LIMIT_BYTES);
            gpu.queue().submit([encoder.finish()]);
            finish(&gpu);
        });
    });

    for tokens in LENGTHS {
        let bytes = live_bytes(1, BATCH, tokens);
        group.throughput(Throughput::Bytes(bytes));
        // At the longest the id is plain; the others carry their length.
        let id = if tokens == 4096 { "readback".to_owned() } else { format!("readback_{tokens}") };
        group.bench_function(id, |bencher| bencher.iter(|| read_back(&gpu, &source, bytes)));
    }

    // What attention over 4096 tokens reads of one layer.
    let bytes = live_bytes(1, BATCH, 4096);
    group.throughput(Throughput::Bytes(bytes));
    let groups = u32::try_from(bytes / 16 / 4096).expect("few groups");
    let sums = random_buffer(&gpu, bytes / 16);
    let sum = Plain::new(&gpu, SUM, &[&source, &sums], groups);
    group.bench_function("read_sum", |bencher| {
        bencher.iter(|| pass(&gpu, |pass| sum.record(pass)));
    });

    let words: Vec<_> = (0..LAYERS).map(|_| random_buffer(&gpu, 4)).collect();
    let touches: Vec<_> = words.iter().map(|word| Plain::new(&gpu, TOUCH, &[word], 1)).collect();
    group.throughput(Throughput::Elements(1));
    group.bench_function("empty_step", |bencher| {
        bencher.iter(|| pass(&gpu, |pass| touches.iter().for_each(|touch| touch.record(pass))));
    });
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

/// One token into every layer: one pass, one submit.
fn step(criterion: &mut Criterion) {
    let gpu = gpu();
    let mut group = criterion.benchmark_group("step");
    let one = Inputs::new(&gpu, BATCH, 1);
    for tokens in LENGTHS {
        let room = 2 * tokens;
        let dynamic = DynamicKVCache::with_capacity(&gpu, room);
        let fixed = StaticKVCache::new(&gpu, room, LAYERS);
        let paged = PagedKVCache::new(&gpu);
        for (kind, mut cache) in [
            ("dynamic", Box::new(dynamic) as Box<dyn KVCache>),
            ("static", Box::new(fixed)),
            ("paged", Box::new(paged)),
        ] {
            fill(&gpu, cache.as_mut(), BATCH, tokens, LAYERS);
            group.bench_function(BenchmarkId::new(kind, tokens), |bencher| {
                bencher.iter(|| {
                    cache.truncate(tokens);
                    pass(&gpu, |pass| update(pass, cache.as_mut(), &one.bhtd(), LAYERS));
                });
            });
        }
    }
    group.finish();

    let mut cache = DynamicKVCache::with_capacity(&gpu, 256);
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

fn prefill(criterion: &mut Criterion) {
    let gpu = gpu();
    let tokens = 2048;
    let inputs = Inputs::new(&gpu, BATCH, tokens);
    let mut cache = StaticKVCache::new(&gpu, tokens, LAYERS);
    fill(&gpu, &mut cache, BATCH, tokens, LAYERS);
    for (name, views) in [("prefill", inputs.bhtd()), ("prefill_bthd", inputs.bthd())] {
        let mut group = criterion.benchmark_group(name);
        group.sample_size(20).throughput(Throughput::Bytes(2 * live_bytes(LAYERS, BATCH, tokens)));
        group.bench_function(tokens.to_string(), |bencher| {
            bencher.iter(|| {
                cache.truncate(0);
                pass(&gpu, |pass| update(pass, &mut cache, &views, LAYERS));
            });
        });
    }
}

fn reorder(criterion: &mut Criterion) {
    let gpu = gpu();
    let mut group = criterion.benchmark_group("reorder");
    group.sample_size(10).warm_up_time(Duration::from_secs(1));
    for tokens in LENGTHS {
        let cases: [(&str, usize, &[u32], usize); 3] = [
            ("cycle", BATCH, &[1, 2, 3, 0], BATCH),
            ("two_of_eight", 8, &[0, 1, 2, 2, 4, 5, 6, 6], 2),
            ("identity", BATCH, &[0, 1, 2, 3], 0),
        ];
        for (name, batch, map, moved) in cases {
            let mut cache = DynamicKVCache::with_capacity(&gpu, tokens);
            fill(&gpu, &mut cache, batch, tokens, LAYERS);
            group.throughput(Throughput::Bytes(2 * live_bytes(LAYERS, moved, tokens)));
            group.bench_function(BenchmarkId::new(name, tokens), |bencher| {
                bencher.iter(|| {
                    pass(&gpu, |pass| cache.reorder_cache(pass, map).expect("rows that exist"));
                });
            });
            if name == "two_of_eight" {
                group.throughput(Throughput::Bytes(2 * live_bytes(LAYERS, 8, tokens)));
                group.bench_function(BenchmarkId::new("cycle_of_eight", tokens), |bencher| {
                    let map = [1, 2, 3, 4, 5, 6, 7, 0];
                    bencher.iter(|| {
                        pass(&gpu, |pass| {
                            cache.reorder_cache(pass, &map).expect("rows that exist")
                        });
                    });
                });
            }
        }
    }

    // Pages: the reorder, and the step after it, in one pass. Two beams go on, twice each, and the last page is
    // half full: so all pages are shared, and the step copies two of the last ones in each layer.
    let mut cache = PagedKVCache::new(&gpu);
    for tokens in [4096, 8] {
        fill(&gpu, &mut cache, BATCH, tokens, LAYERS);
    }
    let one = Inputs::new(&gpu, BATCH, 1);
    group.throughput(Throughput::Elements(1));
    group.bench_function(BenchmarkId::new("paged", 4096), |bencher| {
        bencher.iter(|| {
            cache.truncate(4096 + 8);
            pass(&gpu, |pass| {
                cache.reorder_cache(pass, &[0, 0, 1, 1]).expect("rows that exist");
                update(pass, &mut cache, &one.bhtd(), LAYERS);
            });
        });
    });
}

/// One query a row over 4096 tokens of one layer, four query heads a K/V head.
fn attention(criterion: &mut Criterion) {
    let gpu = gpu();
    let mut group = criterion.benchmark_group("attention");
    group.sample_size(20);
    let tokens = 4096;
    let shape = [BATCH, 4 * HEADS, 1, DIM];
    let floats = (BATCH * 4 * HEADS * DIM * 4) as u64;
    let (query, output) = (random_buffer(&gpu, floats), random_buffer(&gpu, floats));
    let [query, output] = [&query, &output]
        .map(|buffer| TensorView::new(buffer, DType::F32, &shape).expect("a shape"));
    for (name, mut cache) in [
        ("contiguous", Box::new(DynamicKVCache::new(&gpu)) as Box<dyn KVCache>),
        ("paged", Box::new(PagedKVCache::new(&gpu))),
    ] {
        fill(&gpu, cache.as_mut(), BATCH, tokens, 1);
        let mut attention = Attention::new(&gpu);
        group.throughput(Throughput::Bytes(live_bytes(1, BATCH, tokens)));
        group.bench_function(BenchmarkId::new(name, tokens), |bencher| {
            bencher.iter(|| {
                let view = cache.view(0).expect("it exists").expect("it was written");
                pass(&gpu, |pass| {
                    let options = AttentionOptions::default();
                    attention
                        .record(pass, &query, &view, &output, options)
                        .expect("shapes that fit");
                });
            });
        });
    }
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

/// One row becomes four. The buffers for four rows exist and have been touched.
fn repeat(criterion: &mut Criterion) {
    let gpu = gpu();
    let mut group = criterion.benchmark_group("repeat");
    group.sample_size(10).warm_up_time(Duration::from_secs(1));
    for tokens in LENGTHS {
        let mut cache = DynamicKVCache::with_capacity(&gpu, tokens);
        fill(&gpu, &mut cache, 4, tokens, LAYERS);
        // One row is read, and three are written: row 0 stays where it is.
        let bytes = live_bytes(LAYERS, 1, tokens) + live_bytes(LAYERS, 3, tokens);
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(BenchmarkId::new("4", tokens), |bencher| {
            bencher.iter(|| {
                pass(&gpu, |pass| {
                    cache.batch_select_indices(pass, &[0]).expect("rows that exist");
                    cache.batch_repeat_interleave(pass, 4).expect("room");
                });
            });
        });
    }
}

fn get(criterion: &mut Criterion) {
    let gpu = gpu();
    let mut group = criterion.benchmark_group("get");
    group.sample_size(20);
    for tokens in LENGTHS {
        let mut cache = DynamicKVCache::with_capacity(&gpu, 2 * tokens);
        fill(&gpu, &mut cache, BATCH, tokens, 1);
        group.throughput(Throughput::Bytes(live_bytes(1, BATCH, tokens)));
        group.bench_function(BenchmarkId::from_parameter(tokens), |bencher| {
            bencher.iter(|| cache.get(0).expect("read back").expect("written"));
        });
    }
}

fn truncate_crop(criterion: &mut Criterion) {
    let gpu = gpu();
    let mut cache = DynamicKVCache::with_capacity(&gpu, 1024);
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
    limit,
    step,
    concat,
    grow,
    prefill,
    reorder,
    attention,
    repeat,
    get,
    truncate_crop
);
criterion_main!(benches);
