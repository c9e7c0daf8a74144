//! A shader of one's own, joined with the exported text of a layout, reads what `get` reads.

use wgpu_kvcache::wgpu::{
    BindGroup, BindGroupDescriptor, BindGroupEntry, Buffer, BufferUsages, ComputePass,
    ComputePipeline, ComputePipelineDescriptor, ShaderModuleDescriptor, ShaderSource,
};
use wgpu_kvcache::{CachePosition, Gpu, LayerView, Layout};

use crate::gpu;
use crate::rig::{Rig, buffer, read_buffer, same_bits};

const APPEND: CachePosition<'_> = CachePosition::Append;

/// Writes all live elements, row-major (B, H, T, D), through nothing but `kv_len`, `kv_slot` and `KvLayout`. Behind
/// shorter rows it leaves the zeros that are there.
const SHADER: &str = "
@group(0) @binding(0) var<uniform> kv: KvLayout;
@group(0) @binding(1) var<storage, read> key: array<u32>;
@group(0) @binding(2) var<storage, read> value: array<u32>;
@group(0) @binding(3) var<storage, read> pages: array<u32>;
@group(0) @binding(4) var<storage, read_write> keys: array<u32>;
@group(0) @binding(5) var<storage, read_write> values: array<u32>;

fn kv_table(i: u32) -> u32 {
    return pages[i];
}

// A workgroup a token of a row and head.
@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) id: vec3<u32>) {
    let b = id.y / kv.heads;
    if id.x >= kv_len(kv, b) {
        return;
    }
    let slot = kv_slot(kv, b, id.y % kv.heads, id.x);
    let at = id.y * kv.len + id.x;
    for (var d = 0u; d < kv.key_dim; d++) {
        keys[at * kv.key_dim + d] = key[slot * kv.key_dim + d];
    }
    for (var d = 0u; d < kv.value_dim; d++) {
        values[at * kv.value_dim + d] = value[slot * kv.value_dim + d];
    }
    // An unused binding would not be in the pipeline's layout.
    _ = pages[0];
}
";

/// The same through the text that reads elements, as f32, for every format.
const QUADS: &str = "
@group(0) @binding(0) var<uniform> kv: KvLayout;
@group(0) @binding(1) var<storage, read> key: array<KeyUnit>;
@group(0) @binding(2) var<storage, read> value: array<ValueUnit>;
@group(0) @binding(3) var<storage, read> pages: array<u32>;
@group(0) @binding(4) var<storage, read_write> keys: array<f32>;
@group(0) @binding(5) var<storage, read_write> values: array<f32>;

fn kv_table(i: u32) -> u32 {
    return pages[i];
}

fn kv_key_unit(i: u32) -> KeyUnit {
    return key[i];
}

fn kv_value_unit(i: u32) -> ValueUnit {
    return value[i];
}

@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) id: vec3<u32>) {
    let b = id.y / kv.heads;
    if id.x >= kv_len(kv, b) {
        return;
    }
    let slot = kv_slot(kv, b, id.y % kv.heads, id.x);
    let at = id.y * kv.len + id.x;
    for (var d = 0u; d < kv.key_dim; d++) {
        keys[at * kv.key_dim + d] = kv_key_quad(kv, slot, d / 4u)[d % 4u];
    }
    for (var d = 0u; d < kv.value_dim; d++) {
        values[at * kv.value_dim + d] = kv_value_quad(kv, slot, d / 4u)[d % 4u];
    }
    _ = pages[0];
}
";

/// The shader over a view, bound and ready to be recorded.
pub(crate) struct Reader {
    gpu: Gpu,
    pipeline: ComputePipeline,
    bindings: BindGroup,
    /// What it has read: K and V.
    read: [Buffer; 2],
    workgroups: [u32; 2],
}

impl Reader {
    pub(crate) fn new(gpu: &Gpu, view: &LayerView) -> Self {
        Self::of(gpu, view, format!("{SHADER}{}", view.layout().wgsl()))
    }

    /// Through the text that reads elements.
    pub(crate) fn of_elements(gpu: &Gpu, view: &LayerView) -> Self {
        let key = view.key_format().key_wgsl(view.key_shape()[3]);
        let value = view.value_format().value_wgsl(view.value_strides()[2]);
        Self::of(gpu, view, [QUADS, view.layout().wgsl(), &key, &value].join("\n"))
    }

    fn of(gpu: &Gpu, view: &LayerView, text: String) -> Self {
        let (label, device) = (Some("layouts"), gpu.device());
        let source = ShaderSource::Wgsl(text.into());
        let module = device.create_shader_module(ShaderModuleDescriptor { label, source });
        let pipeline = device.create_compute_pipeline(&ComputePipelineDescriptor {
            label,
            layout: None,
            module: &module,
            entry_point: None,
            compilation_options: Default::default(),
            cache: None,
        });
        let words = view.layout_words();
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let uniform = buffer(gpu, bytes.len() as u64, usage);
        gpu.queue().write_buffer(&uniform, 0, bytes);
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
        let none = buffer(gpu, 4, usage);
        let read = [view.key_shape(), view.value_shape()]
            .map(|shape| buffer(gpu, 4 * shape.iter().product::<usize>() as u64, usage));
        let pages = view.page_table().unwrap_or(&none);
        let bound = [&uniform, view.key(), view.value(), pages, &read[0], &read[1]];
        let entries: Vec<_> = (0..)
            .zip(bound)
            .map(|(binding, buffer)| BindGroupEntry {
                binding,
                resource: buffer.as_entire_binding(),
            })
            .collect();
        let layout = pipeline.get_bind_group_layout(0);
        let bindings = device.create_bind_group(&BindGroupDescriptor {
            label,
            layout: &layout,
            entries: &entries,
        });
        let [b, h, t, _] = view.key_shape().map(|side| u32::try_from(side).expect("small"));
        Self { gpu: gpu.clone(), pipeline, bindings, read, workgroups: [t, b * h] }
    }

    pub(crate) fn record(&self, pass: &mut ComputePass<'_>) {
        let [x, y] = self.workgroups;
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bindings, &[]);
        pass.dispatch_workgroups(x, y, 1);
    }

    /// K and V as the shader has read them.
    pub(crate) fn read(&self) -> [Vec<u8>; 2] {
        self.read.each_ref().map(|buffer| read_buffer(&self.gpu, buffer))
    }
}

fn check(rig: &Rig, due: Layout) {
    let view = rig.cache.view(0).expect("it exists").expect("it was written");
    assert_eq!(view.layout(), due);
    let (key, value) = rig.model.get(0).expect("it was written");
    let reader = Reader::new(&rig.gpu, &view);
    rig.gpu.submit_pass("layouts", |pass| reader.record(pass));
    let [keys, values] = reader.read();
    assert!(same_bits(&keys, &key.bytes), "K, {due:?}");
    assert!(same_bits(&values, &value.bytes), "V, {due:?}");
}

#[test]
fn contiguous_and_wrapped() {
    for mut rig in [Rig::dynamic(&gpu()), Rig::fixed(&gpu(), 11, 1)] {
        rig.update(0, [2, 3, 11, 6], 5, APPEND);
        check(&rig, Layout::Contiguous);
        rig.crop(7);
        check(&rig, Layout::Contiguous);
        let room = rig.cache.view(0).expect("it exists").expect("it was written").capacity() - 7;
        rig.update(0, [2, 3, room, 6], 5, APPEND);
        check(&rig, Layout::Wrapped);
    }
}

#[test]
fn pages_that_rows_share() {
    for size in [1, 4, 16] {
        let mut rig = Rig::paged(&gpu(), size);
        rig.update(0, [2, 3, 21, 6], 5, APPEND);
        check(&rig, Layout::Paged);
        rig.crop(18);
        rig.select(&[1, 0, 1]);
        rig.update(0, [3, 3, 2, 6], 5, APPEND);
        check(&rig, Layout::Paged);
    }
}

#[test]
fn rows_of_different_length() {
    let rows = [vec![20_u32], vec![5], vec![18]];
    for mut rig in [Rig::dynamic(&gpu()), Rig::fixed(&gpu(), 24, 1)] {
        rig.update(0, [3, 3, 18, 6], 5, APPEND);
        rig.update(0, [3, 3, 1, 6], 5, CachePosition::PerRow(&rows));
        check(&rig, Layout::RaggedWrapped);
        rig.crop_rows(&[20, 6, 2]);
        check(&rig, Layout::RaggedWrapped);
        // Some rows wrap, and some do not.
        rig.crop(4);
        rig.update(0, [3, 3, 9, 6], 5, APPEND);
        check(&rig, Layout::RaggedWrapped);
        rig.truncate_rows(&[5, 11, 1]);
        check(&rig, Layout::RaggedWrapped);
    }
    for size in [1, 4, 16] {
        let mut rig = Rig::paged(&gpu(), size);
        rig.update(0, [3, 3, 18, 6], 5, APPEND);
        rig.update(0, [3, 3, 1, 6], 5, CachePosition::PerRow(&rows));
        check(&rig, Layout::RaggedPaged);
        rig.crop_rows(&[20, 6, 2]);
        rig.select(&[1, 0, 1, 2]);
        check(&rig, Layout::RaggedPaged);
        rig.update(0, [4, 3, 9, 6], 5, APPEND);
        rig.truncate_rows(&[5, 11, 1, 0]);
        check(&rig, Layout::RaggedPaged);
    }
}
