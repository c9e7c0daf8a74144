//! Shared by the benchmarks: a device, an engine's buffers, and plain kernels that measure the limit.

use wgpu_kvcache::{CachePosition, DType, Gpu, KVCache, TensorView, wgpu};

pub(crate) mod concat;
pub(crate) mod formats;
pub(crate) mod prefill;
pub(crate) mod sequences;
pub(crate) mod turns;

/// The shape of the benchmarks, unless one says otherwise.
pub(crate) const LAYERS: usize = 16;
pub(crate) const BATCH: usize = 4;
pub(crate) const HEADS: usize = 8;
pub(crate) const DIM: usize = 64;

pub(crate) fn gpu() -> Gpu {
    Gpu::headless().unwrap_or_else(|error| panic!("{error}"))
}

/// A storage buffer of random words. It is written here, so that its first use is not measured.
pub(crate) fn random_buffer(gpu: &Gpu, bytes: u64) -> wgpu::Buffer {
    let mut state = 0x9e37_79b9_u32;
    let words: Vec<u32> = (0..bytes / 4)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            // As f32 between 0.5 and 2, of either sign: NaN and subnormal numbers would take a slow path on some
            // processors.
            0x3f00_0000 | (state & 0x80ff_ffff)
        })
        .collect();
    let buffer = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some("random"),
        size: bytes,
        usage: wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_DST
            | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    });
    gpu.queue().write_buffer(&buffer, 0, bytemuck::cast_slice(&words));
    finish(gpu);
    buffer
}

/// Submits pending writes and waits for the device.
pub(crate) fn finish(gpu: &Gpu) {
    gpu.queue().submit([]);
    gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device answers");
}

/// Records into one pass, submits, and waits.
pub(crate) fn pass(gpu: &Gpu, record: impl FnOnce(&mut wgpu::ComputePass<'_>)) {
    gpu.submit_pass("bench", record);
    gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device answers");
}

/// The new K and V of every layer, in the layout of an engine's projections.
pub(crate) struct Inputs {
    pub(crate) key: wgpu::Buffer,
    pub(crate) value: wgpu::Buffer,
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
}

impl Inputs {
    pub(crate) fn new(gpu: &Gpu, batch: usize, tokens: usize) -> Self {
        let bytes = (batch * HEADS * tokens * DIM * 4) as u64;
        Self { key: random_buffer(gpu, bytes), value: random_buffer(gpu, bytes), batch, tokens }
    }

    /// Row-major (B, H, T, D).
    pub(crate) fn bhtd(&self) -> [TensorView<'_>; 2] {
        let shape = [self.batch, HEADS, self.tokens, DIM];
        [&self.key, &self.value]
            .map(|buffer| TensorView::new(buffer, DType::F32, &shape).expect("a shape"))
    }

    /// Row-major (B, T, H, D).
    pub(crate) fn bthd(&self) -> [TensorView<'_>; 2] {
        let shape = [self.batch, self.tokens, HEADS, DIM];
        [&self.key, &self.value]
            .map(|buffer| TensorView::bthd(buffer, DType::F32, &shape).expect("a shape"))
    }
}

/// Writes `views` into the first `layers` layers.
pub(crate) fn update(
    pass: &mut wgpu::ComputePass<'_>,
    cache: &mut dyn KVCache,
    [key, value]: &[TensorView<'_>; 2],
    layers: usize,
) {
    for layer in 0..layers {
        cache.update(pass, key, value, layer, CachePosition::Append).expect("room");
    }
}

/// Fills `layers` layers with `tokens` tokens.
pub(crate) fn fill(gpu: &Gpu, cache: &mut dyn KVCache, batch: usize, tokens: usize, layers: usize) {
    let piece = tokens.min(512);
    let inputs = Inputs::new(gpu, batch, piece);
    let mut left = tokens;
    while left > 0 {
        assert!(left >= piece && left.is_multiple_of(piece), "whole pieces");
        pass(gpu, |pass| update(pass, cache, &inputs.bhtd(), layers));
        left -= piece;
    }
}

/// A compute pipeline with its bind group, for the kernels that measure the limit.
pub(crate) struct Plain {
    pipeline: wgpu::ComputePipeline,
    bindings: wgpu::BindGroup,
    groups: u32,
}

impl Plain {
    pub(crate) fn new(gpu: &Gpu, wgsl: &str, buffers: &[&wgpu::Buffer], groups: u32) -> Self {
        let module = gpu.device().create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some("plain"),
            source: wgpu::ShaderSource::Wgsl(wgsl.into()),
        });
        let pipeline = gpu.device().create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some("plain"),
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: Default::default(),
            cache: None,
        });
        let entries: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry {
                binding,
                resource: buffer.as_entire_binding(),
            })
            .collect();
        let bindings = gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("plain"),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        Self { pipeline, bindings, groups }
    }

    pub(crate) fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bindings, &[]);
        pass.dispatch_workgroups(self.groups, 1, 1);
    }
}

/// The fastest plain copy that was found: four vectors per invocation, and eight invocations copy 512 contiguous bytes.
pub(crate) const COPY: &str = "
@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> target_: array<vec4<u32>>;
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) group: vec3<u32>) {
    let at = group.x * 1024u + local / 8u * 32u + local % 8u;
    target_[at] = source[at];
    target_[at + 8u] = source[at + 8u];
    target_[at + 16u] = source[at + 16u];
    target_[at + 24u] = source[at + 24u];
}";

/// Copies one 16-byte vector per invocation: the few bytes of a decode step.
pub(crate) const COPY_ONE: &str = "
@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> target_: array<vec4<u32>>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) global_id: vec3<u32>) {
    target_[global_id.x] = source[global_id.x];
}";

/// Writes four bytes.
pub(crate) const TOUCH: &str = "
@group(0) @binding(0) var<storage, read_write> target_: array<u32>;
@compute @workgroup_size(1)
fn main() {
    target_[0] += 1u;
}";

/// Reads 64 KiB per workgroup, in the pattern of the fastest copy, and writes the sum of every sixteen vectors. It is
/// the variant that reads most bytes per second.
pub(crate) const SUM: &str = "
@group(0) @binding(0) var<storage, read> source: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> sums: array<vec4<f32>>;
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) group: vec3<u32>) {
    var at = group.x * 4096u + local / 8u * 128u + local % 8u;
    let end = at + 128u;
    var sum = vec4(0.0);
    loop {
        sum += source[at] + source[at + 8u];
        at += 16u;
        if at == end {
            break;
        }
    }
    sums[group.x * 256u + local] = sum;
}";
