//! The baseline: the cache of most frameworks. Every step concatenates the old tokens and the new one into a new
//! tensor, and a reorder gathers all rows into new tensors.
//!
//! It has the optimisations of a good framework: the memory of dropped tensors is reused in the order of the queue, as
//! by a caching allocator; K and V share a dispatch; an invocation copies several 16-byte vectors; no address needs a
//! division.
#![allow(dead_code, reason = "the benchmark, the chart and the test each use a part")]

use wgpu::util::{BufferInitDescriptor, DeviceExt};
use wgpu_kvcache::{Gpu, wgpu};

/// Memory is allocated in multiples of this, so that a layer with one more token usually fits a dropped allocation.
const GRANULE: u64 = 2 << 20;
/// Vectors that a workgroup copies of one row.
const CHUNK: usize = 1024;

/// K and V of one layer, [B, H, T, D] in f32 each, without gaps.
type Layer = [wgpu::Buffer; 2];

pub(crate) struct ConcatCache {
    gpu: Gpu,
    append: wgpu::ComputePipeline,
    select: wgpu::ComputePipeline,
    layers: Vec<Layer>,
    /// Memory of dropped layers.
    free: Vec<Layer>,
    batch: usize,
    heads: usize,
    dim: usize,
    tokens: usize,
    moved: u64,
}

impl ConcatCache {
    /// An empty cache. `dim` must be a multiple of four, so that a head is whole vectors.
    pub(crate) fn new(gpu: &Gpu, layers: usize, batch: usize, heads: usize, dim: usize) -> Self {
        assert!(dim.is_multiple_of(4), "a head of {dim} elements is not whole vectors of four");
        let mut cache = Self {
            gpu: gpu.clone(),
            append: pipeline(gpu, APPEND),
            select: pipeline(gpu, SELECT),
            layers: Vec::new(),
            free: Vec::new(),
            batch,
            heads,
            dim,
            tokens: 0,
            moved: 0,
        };
        let bytes = cache.allocation_bytes(1);
        cache.layers = (0..layers).map(|_| cache.take(bytes)).collect();
        cache
    }

    /// Makes every layer `tokens` tokens long. Their content is undefined: the time of a copy does not depend on it.
    pub(crate) fn fill(&mut self, tokens: usize) {
        self.tokens = tokens;
        // One token more, so that the next step can reuse a dropped allocation.
        let bytes = self.allocation_bytes(tokens + 1);
        for layer in 0..self.layers.len() {
            if self.layers[layer][0].size() != bytes {
                self.layers[layer] = self.take(bytes);
            }
        }
    }

    /// Appends one token, [B, H, 1, D], to every layer.
    pub(crate) fn step(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        key: &wgpu::Buffer,
        value: &wgpu::Buffer,
    ) {
        let old_row = self.tokens * self.dim / 4;
        let new_row = old_row + self.dim / 4;
        let params = self.words(wgpu::BufferUsages::UNIFORM, &[old_row, new_row]);
        let rows = self.batch * self.heads;
        self.tokens += 1;
        pass.set_pipeline(&self.append);
        self.replace(pass, |cache, [old_key, old_value], [new_key, new_value]| {
            let buffers = [old_key, old_value, key, value, new_key, new_value, &params];
            (cache.bind(&cache.append, &buffers), [new_row.div_ceil(CHUNK), rows])
        });
    }

    /// Makes new batch row `i` of every layer the old row `indices[i]`.
    pub(crate) fn reorder(&mut self, pass: &mut wgpu::ComputePass<'_>, indices: &[u32]) {
        let indices: Vec<_> = indices.iter().map(|&index| index as usize).collect();
        let row = self.heads * self.tokens * self.dim / 4;
        let params = self.words(wgpu::BufferUsages::UNIFORM, &[row]);
        let list = self.words(wgpu::BufferUsages::STORAGE, &indices);
        self.batch = indices.len();
        pass.set_pipeline(&self.select);
        self.replace(pass, |cache, [old_key, old_value], [new_key, new_value]| {
            let buffers = [old_key, old_value, &list, new_key, new_value, &params];
            (cache.bind(&cache.select, &buffers), [row.div_ceil(CHUNK), cache.batch])
        });
    }

    /// Bytes of K and V that the recorded dispatches write.
    pub(crate) fn bytes_moved(&self) -> u64 {
        self.moved
    }

    /// K and V of a layer, for tests.
    pub(crate) fn layer(&self, layer: usize) -> &[wgpu::Buffer; 2] {
        &self.layers[layer]
    }

    /// Replaces every layer by a new tensor. `prepare` returns the bindings, and the workgroups per row and for all
    /// rows.
    fn replace(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        prepare: impl Fn(&Self, &Layer, &Layer) -> (wgpu::BindGroup, [usize; 2]),
    ) {
        let bytes = self.allocation_bytes(self.tokens);
        for layer in 0..self.layers.len() {
            let fresh = self.take(bytes);
            let (bindings, groups) = prepare(self, &self.layers[layer], &fresh);
            let [x, y] = groups.map(|count| u32::try_from(count).expect("few workgroups"));
            pass.set_bind_group(0, &bindings, &[]);
            pass.dispatch_workgroups(x, y, 1);
            let old = std::mem::replace(&mut self.layers[layer], fresh);
            self.free.push(old);
        }
        self.moved += self.layers.len() as u64 * 2 * self.bytes(self.tokens);
    }

    /// Memory for K and V of a layer. Free memory of other sizes is dropped first.
    fn take(&mut self, bytes: u64) -> Layer {
        self.free.retain(|layer| layer[0].size() == bytes);
        self.free.pop().unwrap_or_else(|| {
            std::array::from_fn(|_| {
                self.gpu.device().create_buffer(&wgpu::BufferDescriptor {
                    label: Some("concat"),
                    size: bytes,
                    usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
                    mapped_at_creation: false,
                })
            })
        })
    }

    /// Bytes of K, and of V, of a layer of `tokens` tokens.
    fn bytes(&self, tokens: usize) -> u64 {
        (self.batch * self.heads * tokens * self.dim * 4) as u64
    }

    fn allocation_bytes(&self, tokens: usize) -> u64 {
        self.bytes(tokens).next_multiple_of(GRANULE)
    }

    fn words(&self, usage: wgpu::BufferUsages, words: &[usize]) -> wgpu::Buffer {
        let words: Vec<_> =
            words.iter().map(|&word| u32::try_from(word).expect("32 bits")).collect();
        let contents = bytemuck::cast_slice(&words);
        let descriptor = BufferInitDescriptor { label: Some("concat"), contents, usage };
        self.gpu.device().create_buffer_init(&descriptor)
    }

    fn bind(&self, pipeline: &wgpu::ComputePipeline, buffers: &[&wgpu::Buffer]) -> wgpu::BindGroup {
        let entries: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry {
                binding,
                resource: buffer.as_entire_binding(),
            })
            .collect();
        self.gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("concat"),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        })
    }
}

fn pipeline(gpu: &Gpu, wgsl: &str) -> wgpu::ComputePipeline {
    let module = gpu.device().create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("concat"),
        source: wgpu::ShaderSource::Wgsl(wgsl.into()),
    });
    gpu.device().create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("concat"),
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: Default::default(),
        cache: None,
    })
}

/// A row is one head of one batch row: its old tokens, then the new one. Each invocation copies four vectors, which are
/// 256 vectors apart.
const APPEND: &str = "
struct Params { old_row: u32, new_row: u32 } // in vectors
@group(0) @binding(0) var<storage, read> old_key: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> old_value: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> key: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> value: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> new_key: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> new_value: array<vec4<u32>>;
@group(0) @binding(6) var<uniform> params: Params;
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) group: vec3<u32>) {
    let old_at = group.y * params.old_row;
    let new_at = group.y * params.new_row;
    let token = group.y * (params.new_row - params.old_row);
    for (var i = 0u; i < 4u; i++) {
        let at = group.x * 1024u + i * 256u + local;
        if at < params.old_row {
            new_key[new_at + at] = old_key[old_at + at];
            new_value[new_at + at] = old_value[old_at + at];
        } else if at < params.new_row {
            new_key[new_at + at] = key[token + at - params.old_row];
            new_value[new_at + at] = value[token + at - params.old_row];
        }
    }
}";

/// A row is all heads of one batch row.
const SELECT: &str = "
@group(0) @binding(0) var<storage, read> old_key: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> old_value: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> indices: array<u32>;
@group(0) @binding(3) var<storage, read_write> new_key: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> new_value: array<vec4<u32>>;
@group(0) @binding(5) var<uniform> row: u32; // in vectors
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) group: vec3<u32>) {
    let old_at = indices[group.y] * row;
    let new_at = group.y * row;
    for (var i = 0u; i < 4u; i++) {
        let at = group.x * 1024u + i * 256u + local;
        if at < row {
            new_key[new_at + at] = old_key[old_at + at];
            new_value[new_at + at] = old_value[old_at + at];
        }
    }
}";
