//! The baseline of the benchmark and the chart is a cache too: it holds what this crate's holds.

use wgpu_kvcache::{Cache, CachePosition, DynamicKVCache, Gpu, KVCache, Tensor, TensorView, wgpu};

#[path = "../benches/support/concat.rs"]
mod concat;
use concat::ConcatCache;

const LAYERS: usize = 2;
const HEADS: usize = 3;
const DIM: usize = 8;

/// One token of a batch, every element another number.
fn token(gpu: &Gpu, batch: u16, from: u16) -> Tensor {
    let count = batch * 3 * 8;
    let data: Vec<_> = (from..from + count).map(f32::from).collect();
    gpu.upload(&data, &[usize::from(batch), HEADS, 1, DIM]).expect("room")
}

/// The numbers of a buffer: read through an empty cache, which takes them as one long prompt.
fn numbers(gpu: &Gpu, buffer: &wgpu::Buffer, shape: &[usize; 4]) -> Vec<f32> {
    let mut reader = DynamicKVCache::new(gpu);
    let view = TensorView::new(buffer, wgpu_kvcache::DType::F32, shape).expect("a shape");
    gpu.submit_pass("read", |pass| {
        reader.update(pass, &view, &view, 0, CachePosition::Append).map(|_| ()).expect("room");
    });
    reader.get(0).expect("read back").expect("written").0.to_f32()
}

#[test]
fn concatenating_cache_holds_the_same() {
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let mut ours = DynamicKVCache::new(&gpu);
    let mut theirs = ConcatCache::new(&gpu, LAYERS, 4, HEADS, DIM);
    let mut batch = 4;
    for (turn, rows) in (0..).zip([&[0, 0, 2, 1][..], &[3, 2, 1, 0], &[1, 2], &[1, 1, 0]]) {
        // Long enough for several workgroups of a row in the end.
        for step in 0..200 {
            let [key, value] = [0, 50].map(|more| token(&gpu, batch, 400 * turn + step + more));
            gpu.submit_pass("step", |pass| {
                for layer in 0..LAYERS {
                    ours.update(pass, &key.view(), &value.view(), layer, CachePosition::Append)
                        .map(|_| ())
                        .expect("room");
                }
                theirs.step(pass, key.buffer(), value.buffer());
            });
        }
        gpu.submit_pass("reorder", |pass| {
            ours.reorder_cache(pass, rows).expect("rows that exist");
            theirs.reorder(pass, rows);
        });
        batch = u16::try_from(rows.len()).expect("few rows");
        for layer in 0..LAYERS {
            let (key, value) = ours.get(layer).expect("read back").expect("written");
            for (ours, theirs) in [key, value].iter().zip(theirs.layer(layer)) {
                assert!(ours.to_f32() == numbers(&gpu, theirs, &ours.shape()), "turn {turn}");
            }
        }
    }
}
