//! Sequences of different length beside a batch of equal length with as many tokens.

use criterion::BenchmarkId;
use wgpu_kvcache::{
    Attention, AttentionOptions, CacheOptions, DType, Gpu, KVCache, LayerShape, PagedKVCache,
    SequenceCache, SequenceId, Step, TensorView, wgpu,
};

use super::turns::Turns;
use super::{DIM, HEADS, fill, pass, random_buffer};

/// Sequences, and their lengths: from 64 to 4096 tokens, in even steps.
const COUNT: usize = 16;
const GROUP: usize = 4;

fn lengths() -> [usize; COUNT] {
    std::array::from_fn(|i| 64 + i * (4096 - 64) / (COUNT - 1))
}

/// Packed K and V, q and the output, of one buffer each.
struct Packed {
    kv: wgpu::Buffer,
    query: wgpu::Buffer,
    output: wgpu::Buffer,
}

impl Packed {
    fn new(gpu: &Gpu, tokens: usize) -> Self {
        let floats = |heads: usize| random_buffer(gpu, (tokens * heads * DIM * 4) as u64);
        let heads = GROUP * HEADS;
        Self { kv: floats(HEADS), query: floats(heads), output: floats(heads) }
    }

    fn view(buffer: &wgpu::Buffer, tokens: usize, heads: usize) -> TensorView<'_> {
        TensorView::packed(buffer, DType::F32, [tokens, heads, DIM]).expect("a shape")
    }

    fn step(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        cache: &mut SequenceCache,
        counts: &[(SequenceId, usize)],
    ) -> Step {
        let step = cache.plan_step(pass, counts).expect("room");
        let kv = Self::view(&self.kv, step.total_tokens(), HEADS);
        for layer in 0..cache.num_layers() {
            cache.update(pass, &step, layer, &kv, &kv).expect("the step's tokens");
        }
        step
    }

    /// A cache of one layer with a decode step over sequences of these lengths.
    fn filled(
        &self,
        gpu: &Gpu,
        lengths: &[usize],
        layers: usize,
    ) -> (SequenceCache, Vec<SequenceId>) {
        let layer = LayerShape { dtype: DType::F32, heads: HEADS, key_dim: DIM, value_dim: DIM };
        let pages: usize = lengths.iter().map(|len| len.div_ceil(16) + 1).sum();
        let options = CacheOptions::default().with_max_pages(pages);
        let layers = vec![layer; layers];
        let mut cache = SequenceCache::with_options(gpu, &layers, options).expect("options");
        let ids: Vec<SequenceId> =
            lengths.iter().map(|_| cache.add().expect("nothing was lost")).collect();
        for (&id, &len) in ids.iter().zip(lengths) {
            let mut left = len - 1;
            while left > 0 {
                let piece = left.min(64);
                pass(gpu, |pass| drop(self.step(pass, &mut cache, &[(id, piece)])));
                left -= piece;
            }
        }
        (cache, ids)
    }
}

/// Attention of a decode step over one layer, and a step of all layers without it.
pub(crate) fn sequences(gpu: &Gpu, turns: &mut Turns<'_>) {
    let lengths = lengths();
    let tokens: usize = lengths.iter().sum();
    for (name, lengths) in [("linear_16", lengths), ("equal_16", [tokens / COUNT; COUNT])] {
        let (gpu, packed) = (gpu.clone(), Packed::new(gpu, 64));
        let (mut cache, ids) = packed.filled(&gpu, &lengths, 1);
        let counts: Vec<(SequenceId, usize)> = ids.iter().map(|&id| (id, 1)).collect();
        let mut step = None;
        pass(&gpu, |pass| step = Some(packed.step(pass, &mut cache, &counts)));
        let step = step.expect("a step");
        let mut attention = Attention::new(&gpu);
        turns.add("sequences", BenchmarkId::new("attention", name), None, move |bencher| {
            let view = cache.view(&step, 0).expect("the latest step");
            let [query, output] = [&packed.query, &packed.output]
                .map(|buffer| Packed::view(buffer, COUNT, GROUP * HEADS));
            bencher.iter(|| {
                pass(&gpu, |pass| {
                    let options = AttentionOptions::default();
                    attention
                        .record(pass, &query, &view, &output, options)
                        .expect("shapes that fit");
                });
            });
        });
    }
    // A batch of equal length in pages, which knows nothing of sequences.
    let (own, packed) = (gpu.clone(), Packed::new(gpu, 64));
    let mut cache = PagedKVCache::new(gpu);
    fill(gpu, &mut cache, COUNT, 512, 1);
    let mut attention = Attention::new(gpu);
    for _ in 0..3 {
        fill(gpu, &mut cache, COUNT, 512, 1);
    }
    let rest = tokens / COUNT - 4 * 512;
    fill(gpu, &mut cache, COUNT, rest, 1);
    turns.add("sequences", BenchmarkId::new("attention", "batch_16"), None, move |bencher| {
        let view = cache.view(0).expect("it exists").expect("it was written");
        let shape = [COUNT, 1, GROUP * HEADS, DIM];
        let [query, output] = [&packed.query, &packed.output]
            .map(|buffer| TensorView::bthd(buffer, DType::F32, &shape).expect("a shape"));
        bencher.iter(|| {
            pass(&own, |pass| {
                let options = AttentionOptions::default();
                attention.record(pass, &query, &view, &output, options).expect("shapes that fit");
            });
        });
    });
    let (gpu, packed) = (gpu.clone(), Packed::new(gpu, 64));
    let (mut cache, ids) = packed.filled(&gpu, &[512; COUNT], 4);
    let counts: Vec<(SequenceId, usize)> = ids.iter().map(|&id| (id, 1)).collect();
    turns.add("sequences", BenchmarkId::new("step", COUNT), None, move |bencher| {
        bencher.iter(|| {
            pass(&gpu, |pass| drop(packed.step(pass, &mut cache, &counts)));
            ids.iter().for_each(|&id| cache.drop_latest(id, 1).expect("it is there"));
        });
    });
}
