//! K and V in every format: what their conversion and their attention cost, in turns.

use std::time::Duration;

use criterion::BenchmarkId;
use wgpu_kvcache::{
    Attention, AttentionOptions, Cache, CacheOptions, DType, DynamicKVCache, Format, Formats, Gpu,
    KVCache, TensorView,
};

use super::turns::Turns;
use super::{BATCH, DIM, HEADS, Inputs, fill, pass, random_buffer, update};

/// Formats of K and of V, with the name of the case.
const FORMATS: [(&str, Formats); 5] = [
    ("f32", both(Format::F32)),
    ("f16", both(Format::F16)),
    ("q8_0", both(Format::Q8_0)),
    ("q4_0", both(Format::Q4_0)),
    ("q8_0+q4_0", Formats { key: Some(Format::Q8_0), value: Some(Format::Q4_0) }),
];

const fn both(format: Format) -> Formats {
    Formats { key: Some(format), value: Some(format) }
}

fn cache(gpu: &Gpu, formats: Formats) -> DynamicKVCache {
    let options = CacheOptions::default().with_formats(formats);
    DynamicKVCache::with_options(gpu, options).expect("its options")
}

/// New f32 tokens of a prompt, and one token, into a layer.
pub(crate) fn append(gpu: &Gpu) {
    let mut turns = Turns::default();
    for tokens in [512, 1] {
        // Counted in bytes of f32, whatever is written.
        let bytes = Some((2 * BATCH * HEADS * tokens * DIM * 4) as u64);
        for (name, formats) in FORMATS {
            let inputs = Inputs::new(gpu, BATCH, tokens);
            let mut cache = cache(gpu, formats);
            fill(gpu, &mut cache, BATCH, 512, 1);
            let name = format!("append_{name}");
            turns.add(&name, BenchmarkId::from_parameter(tokens), bytes, move |bencher| {
                bencher.iter(|| {
                    cache.truncate(512 - tokens);
                    pass(gpu, |pass| update(pass, &mut cache, &inputs.bthd(), 1));
                });
            });
        }
    }
    turns.measure(60, Duration::from_secs(3));
}

/// One query per row over 4096 tokens of one layer, four query heads per K/V head.
pub(crate) fn attention(gpu: &Gpu) {
    let tokens = 4096;
    let shape = [BATCH, 4 * HEADS, 1, DIM];
    let floats = (BATCH * 4 * HEADS * DIM * 4) as u64;
    let (query, output) = (random_buffer(gpu, floats), random_buffer(gpu, floats));
    let [query, output] = [&query, &output]
        .map(|buffer| TensorView::new(buffer, DType::F32, &shape).expect("a shape"));
    let (query, output) = (&query, &output);
    let mut turns = Turns::default();
    for (name, formats) in FORMATS {
        let mut cache = cache(gpu, formats);
        fill(gpu, &mut cache, BATCH, tokens, 1);
        let mut attention = Attention::new(gpu);
        turns.add("attention", BenchmarkId::new(name, tokens), None, move |bencher| {
            bencher.iter(|| {
                let view = cache.view(0).expect("it exists").expect("it was written");
                pass(gpu, |pass| {
                    let options = AttentionOptions::default();
                    attention.record(pass, query, &view, output, options).expect("shapes that fit");
                });
            });
        });
    }
    turns.measure(60, Duration::from_secs(3));
}
