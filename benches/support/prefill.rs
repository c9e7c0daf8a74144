//! Attention of many new tokens, beside the plain form of three kernels; and of one token over a window.

use std::time::Duration;

use criterion::BenchmarkId;
use wgpu_kvcache::{
    Attention, AttentionOptions, DType, DynamicKVCache, Gpu, KVCache, TensorView, wgpu,
};

use super::turns::Turns;
use super::{BATCH, DIM, HEADS, Plain, fill, pass, random_buffer};

/// Query heads of a K/V head.
const GROUP: usize = 4;
/// Live tokens, and how many of them are new.
const LEN: usize = 2048;
const NEW: usize = 512;

/// Scores of a plain attention: an invocation for a query row and four tokens, and nothing is shared.
const SCORES: &str = "
@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> scores: array<f32>;
@compute @workgroup_size(16, 16)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(workgroup_id) group: vec3<u32>) {
    let number = group.x;
    let i = number / (LEN / 64u) % (NEW / 16u) * 16u + local.y;
    let h = number / (LEN / 64u) / (NEW / 16u);
    for (var nth = 0u; nth < 4u; nth++) {
        let t = number % (LEN / 64u) * 64u + nth * 16u + local.x;
        var sum = 0.0;
        for (var d = 0u; d < DIM / 4u; d++) {
            sum += dot(q[(h * NEW + i) * (DIM / 4u) + d], k[(h / GROUP * CAPACITY + t) * (DIM / 4u) + d]);
        }
        let is_seen = t <= LEN - NEW + i;
        scores[(h * NEW + i) * LEN + t] = select(-1.0e38, sum * SCALE, is_seen);
    }
}";

/// The softmax of each row, in place: a workgroup a row.
const SOFTMAX: &str = "
@group(0) @binding(0) var<storage, read_write> scores: array<f32>;
var<workgroup> shared_numbers: array<f32, 64>;
@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) group: vec3<u32>) {
    let row = group.x * LEN;
    var highest = -1.0e38;
    for (var t = local; t < LEN; t += 64u) {
        highest = max(highest, scores[row + t]);
    }
    shared_numbers[local] = highest;
    workgroupBarrier();
    for (var i = 0u; i < 64u; i++) {
        highest = max(highest, shared_numbers[i]);
    }
    workgroupBarrier();
    var sum = 0.0;
    for (var t = local; t < LEN; t += 64u) {
        let weight = exp(scores[row + t] - highest);
        scores[row + t] = weight;
        sum += weight;
    }
    shared_numbers[local] = sum;
    workgroupBarrier();
    sum = 0.0;
    for (var i = 0u; i < 64u; i++) {
        sum += shared_numbers[i];
    }
    for (var t = local; t < LEN; t += 64u) {
        scores[row + t] /= sum;
    }
}";

/// Weights times V: an invocation for four elements of a query row.
const PRODUCT: &str = "
@group(0) @binding(0) var<storage, read> weights: array<f32>;
@group(0) @binding(1) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> result: array<vec4<f32>>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let d = id.x % (DIM / 4u);
    let row = id.x / (DIM / 4u);
    let h = row / NEW;
    var sum = vec4(0.0);
    for (var t = 0u; t < LEN; t++) {
        sum += weights[row * LEN + t] * v[(h / GROUP * CAPACITY + t) * (DIM / 4u) + d];
    }
    result[id.x] = sum;
}";

/// A kernel with the bench's numbers.
fn plain(
    gpu: &Gpu,
    wgsl: &str,
    capacity: usize,
    buffers: &[&wgpu::Buffer],
    groups: usize,
) -> Plain {
    let scale = 1.0 / f32::from(u16::try_from(DIM).expect("small")).sqrt();
    let numbers = format!(
        "const LEN = {LEN}u; const NEW = {NEW}u; const DIM = {DIM}u; const GROUP = {GROUP}u; \
         const CAPACITY = {capacity}u; const SCALE = {scale:?};\n"
    );
    Plain::new(gpu, &(numbers + wgsl), buffers, u32::try_from(groups).expect("few"))
}

/// One batch row: 512 new tokens at the end of 2048, in 32 heads over 8 of K and V.
pub(crate) fn prefill(gpu: &Gpu) {
    let heads = GROUP * HEADS;
    let floats = |count: usize| random_buffer(gpu, 4 * count as u64);
    let (query, output, other) =
        (floats(heads * NEW * DIM), floats(heads * NEW * DIM), floats(heads * NEW * DIM));
    let scores = floats(heads * NEW * LEN);
    let mut cache = DynamicKVCache::new(gpu);
    fill(gpu, &mut cache, 1, LEN, 1);
    let view = cache.view(0).expect("it exists").expect("it was written");
    let capacity = view.capacity();
    let kernels = [
        plain(gpu, SCORES, capacity, &[&query, view.key(), &scores], heads * NEW * LEN / 1024),
        plain(gpu, SOFTMAX, capacity, &[&scores], heads * NEW),
        plain(gpu, PRODUCT, capacity, &[&scores, view.value(), &other], heads * NEW * DIM / 256),
    ];
    let shape = [1, heads, NEW, DIM];
    let [q, out] = [&query, &output]
        .map(|buffer| TensorView::new(buffer, DType::F32, &shape).expect("a shape"));
    let mut attention = Attention::new(gpu);
    let mut turns = Turns::default();
    turns.add("attention", BenchmarkId::new("prefill", LEN), None, |bencher| {
        bencher.iter(|| {
            pass(gpu, |pass| {
                let options = AttentionOptions::default();
                attention.record(pass, &q, &view, &out, options).expect("shapes that fit");
            });
        });
    });
    turns.add("attention", BenchmarkId::new("prefill_three_kernels", LEN), None, |bencher| {
        bencher.iter(|| pass(gpu, |pass| kernels.iter().for_each(|kernel| kernel.record(pass))));
    });
    turns.measure(10, Duration::from_secs(3));
}

/// One new token in each of four batch rows: over 512 tokens, and over a window of 512 of 4096.
pub(crate) fn window(gpu: &Gpu) {
    let shape = [BATCH, GROUP * HEADS, 1, DIM];
    let [query, output] =
        [(); 2].map(|()| random_buffer(gpu, (4 * BATCH * GROUP * HEADS * DIM) as u64));
    let mut turns = Turns::default();
    for (name, len, window) in [("live", 512, None), ("window_of_4096", 4096, Some(512))] {
        let mut cache = DynamicKVCache::new(gpu);
        fill(gpu, &mut cache, BATCH, len, 1);
        let [query, output] = [&query, &output]
            .map(|buffer| TensorView::new(buffer, DType::F32, &shape).expect("a shape"));
        let mut attention = Attention::new(gpu);
        turns.add("attention", BenchmarkId::new(name, 512), None, move |bencher| {
            let view = cache.view(0).expect("it exists").expect("it was written");
            bencher.iter(|| {
                pass(gpu, |pass| {
                    let options = AttentionOptions::default().with_window(window);
                    attention.record(pass, &query, &view, &output, options).expect("all fits");
                });
            });
        });
    }
    turns.measure(100, Duration::from_secs(1));
}
