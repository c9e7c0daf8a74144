//! Devices that were made with other limits than WebGPU's: what they cannot do is an error that says so, and
//! what only takes a longer way they do.

use wgpu_kvcache::wgpu::{Features, Limits};
use wgpu_kvcache::{
    Attention, AttentionOptions, CachePosition, DynamicKVCache, Error, Gpu, KVCache,
};

use crate::attention::read;
use crate::rig::{Rig, plain_gpu, same_bits};
use crate::{gpu, try_open};

/// Kernels bind five storage buffers.
#[test]
fn too_few_storage_buffers_are_refused() {
    let limits = Limits { max_storage_buffers_per_shader_stage: 4, ..Limits::default() };
    let error = try_open(Features::empty(), Some(limits)).expect_err("too few");
    assert!(matches!(error, Error::Device { .. }), "{error:?}");
    assert!(error.to_string().contains("storage"), "'{error}' says which limit");
}

/// A kernel that the device does not take is an error of the call that wants it, each time, and the cache
/// stays as it was.
#[test]
fn a_kernel_that_does_not_fit_is_refused() {
    let gpu = plain_gpu(|limits| limits.max_compute_invocations_per_workgroup = 64);
    let mut rig = Rig::dynamic(&gpu);
    // A token of few heads is appended by few threads; changes of the batch take 256.
    rig.update(0, [2, 1, 1, 4], 4, CachePosition::Append);
    for _ in 0..2 {
        let stats = rig.cache.stats();
        for refused in [
            gpu.submit_pass("turn", |pass| rig.cache.reorder_cache(pass, &[1, 0])),
            gpu.submit_pass("grow", |pass| rig.cache.batch_repeat_interleave(pass, 2)),
        ] {
            let error = refused.expect_err("256 threads");
            assert!(matches!(error, Error::Device { .. }), "{error:?}");
            assert!(error.to_string().contains("256"), "'{error}' says what is too much");
        }
        assert_eq!(rig.cache.stats(), stats);
        rig.check("after what was refused");
    }
}

/// More query rows than workgroups go along one side of a grid, on a device where that is few: the same
/// results as elsewhere, bit for bit, with one split of the tokens and with several.
#[test]
fn more_query_rows_than_a_side_of_the_grid() {
    for (limit, len, tokens) in [(4, 2048, 20), (4, 2048, 18), (8, 300, 200), (8, 300, 129)] {
        let narrow = plain_gpu(|limits| limits.max_compute_workgroups_per_dimension = limit);
        let [expected, result] = [gpu(), narrow].map(|gpu| attended(&gpu, len, tokens));
        let (result, expected) = (bytemuck::cast_slice(&result), bytemuck::cast_slice(&expected));
        assert!(same_bits(result, expected), "{tokens} of {len} tokens in grids of {limit}");
    }
}

fn attended(gpu: &Gpu, len: usize, tokens: usize) -> Vec<f32> {
    let mut cache = DynamicKVCache::with_capacity(gpu, len);
    let tensor = |seed: usize, tokens: usize| {
        let number = |i: usize| u8::try_from((i * 37 + seed * 101) % 199).expect("below 199");
        let numbers: Vec<f32> =
            (0..4 * tokens).map(|i| f32::from(number(i)) / 50.0 - 2.0).collect();
        gpu.upload(&numbers, &[1, 1, tokens, 4]).expect("a tensor")
    };
    let piece = 4;
    for seed in 0..len / piece {
        let (key, value) = (tensor(2 * seed, piece), tensor(2 * seed + 1, piece));
        gpu.submit_pass("piece", |pass| {
            cache.update(pass, &key.view(), &value.view(), 0, CachePosition::Append).map(|_| ())
        })
        .expect("a short piece");
    }
    let (query, output) = (tensor(1, tokens), tensor(3, tokens));
    let view = cache.view(0).expect("it exists").expect("it was written");
    gpu.submit_pass("attention", |pass| {
        let options = AttentionOptions::default();
        Attention::new(gpu).record(pass, &query.view(), &view, &output.view(), options)
    })
    .expect("a grid that fits");
    read(gpu, &output)
}
