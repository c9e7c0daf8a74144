//! Devices that were made with other limits than WebGPU's: what they cannot do is an error that says so, and
//! what only takes a longer way they do.

use wgpu_kvcache::wgpu::{Features, Limits};
use wgpu_kvcache::{
    Attention, AttentionOptions, CacheOptions, CachePosition, DynamicKVCache, Gpu, KVCache,
};

use crate::attention::read;
use crate::rig::{Rig, plain_gpu, same_bits};
use crate::{gpu, try_open};

/// A limit, what lowers it (or raises it, where a lower one is the better), to what, and what is needed.
type Low = (&'static str, fn(&mut Limits), u64, u64);

const LOW: [Low; 14] = [
    (
        "max_storage_buffers_per_shader_stage",
        |limits| limits.max_storage_buffers_per_shader_stage = 7,
        7,
        8,
    ),
    (
        "max_storage_buffer_binding_size",
        |it| it.max_storage_buffer_binding_size = 65_532,
        65_532,
        65_536,
    ),
    (
        "max_storage_buffer_binding_size",
        |it| it.max_storage_buffer_binding_size = 1024,
        1024,
        65_536,
    ),
    ("max_buffer_size", |it| it.max_buffer_size = 32_768, 32_768, 65_536),
    ("max_uniform_buffer_binding_size", |it| it.max_uniform_buffer_binding_size = 64, 64, 256),
    (
        "max_compute_invocations_per_workgroup",
        |it| it.max_compute_invocations_per_workgroup = 128,
        128,
        256,
    ),
    ("max_compute_workgroup_size_z", |it| it.max_compute_workgroup_size_z = 0, 0, 1),
    ("max_compute_workgroup_size_x", |it| it.max_compute_workgroup_size_x = 128, 128, 256),
    ("max_compute_workgroup_size_y", |it| it.max_compute_workgroup_size_y = 64, 64, 256),
    (
        "max_compute_workgroup_storage_size",
        |it| it.max_compute_workgroup_storage_size = 1024,
        1024,
        8192,
    ),
    ("max_bind_groups", |it| it.max_bind_groups = 1, 1, 3),
    ("max_bindings_per_bind_group", |it| it.max_bindings_per_bind_group = 6, 6, 7),
    (
        "max_dynamic_storage_buffers_per_pipeline_layout",
        |it| it.max_dynamic_storage_buffers_per_pipeline_layout = 0,
        0,
        1,
    ),
    (
        "max_dynamic_uniform_buffers_per_pipeline_layout",
        |it| it.max_dynamic_uniform_buffers_per_pipeline_layout = 0,
        0,
        1,
    ),
];

#[test]
fn a_device_below_what_the_kernels_need_is_refused() {
    for (name, lower, value, needed) in LOW {
        let mut limits = Limits::default();
        lower(&mut limits);
        let error = try_open(Features::empty(), Some(limits)).expect_err(name);
        let text = error.to_string();
        for word in [name, &format!(" {value}"), &needed.to_string()] {
            assert!(text.contains(word), "'{text}' says {word}");
        }
    }
}

/// As little as the kernels need, and everything works.
#[test]
fn a_device_with_just_what_the_kernels_need() {
    let gpu = plain_gpu(|limits| {
        limits.max_storage_buffers_per_shader_stage = 8;
        limits.max_storage_buffer_binding_size = 64 << 10;
        limits.max_buffer_size = 64 << 10;
        limits.max_uniform_buffer_binding_size = 256;
        limits.max_compute_invocations_per_workgroup = 256;
        limits.max_compute_workgroup_size_x = 256;
        limits.max_compute_workgroup_size_y = 256;
        limits.max_compute_workgroup_size_z = 1;
        limits.max_compute_workgroup_storage_size = 8192;
        limits.max_bind_groups = 3;
        limits.max_bindings_per_bind_group = 7;
        limits.max_dynamic_storage_buffers_per_pipeline_layout = 1;
        limits.max_dynamic_uniform_buffers_per_pipeline_layout = 1;
        limits.max_uniform_buffers_per_shader_stage = 1;
    });
    for mut rig in [Rig::dynamic(&gpu), Rig::fixed(&gpu, 30, 2), Rig::paged(&gpu, 4)] {
        rig.update(0, [2, 3, 20, 4], 6, CachePosition::Append);
        rig.update(1, [2, 1, 1, 100], 2, CachePosition::Append);
        rig.check("filled");
        rig.select(&[1, 0]);
        rig.repeat_interleave(2);
        rig.crop(9);
        rig.update(0, [4, 3, 5, 4], 6, CachePosition::PerToken(&[3, 9, 8, 1, 12]));
        rig.check("used");
    }
    for (len, tokens) in [(300, 3), (2048, 1)] {
        let [expected, result] = [crate::gpu(), gpu.clone()].map(|gpu| attended(&gpu, len, tokens));
        let (result, expected) = (bytemuck::cast_slice(&result), bytemuck::cast_slice(&expected));
        assert!(same_bits(result, expected), "{tokens} of {len} tokens");
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
    let mut cache = DynamicKVCache::with_options(gpu, CacheOptions::default().with_capacity(len))
        .expect("a capacity");
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
