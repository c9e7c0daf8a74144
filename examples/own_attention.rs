//! An attention shader of your own over a view, compared with this crate's `Attention`.
//!
//! `cargo run --release --example own_attention`

use wgpu_kvcache::wgpu::{self, util::DeviceExt};
use wgpu_kvcache::{
    Attention, CachePosition, DType, Gpu, KVCache, Layout, PagedKVCache, TensorView,
};

/// One invocation computes one element of one query head: enough to show how a shader addresses K and V.
const SHADER: &str = "
@group(0) @binding(0) var<uniform> kv: KvLayout;
@group(0) @binding(1) var<storage, read> key: array<f32>;
@group(0) @binding(2) var<storage, read> value: array<f32>;
@group(0) @binding(3) var<storage, read> query: array<f32>;
@group(0) @binding(4) var<storage, read_write> output: array<f32>;
@group(0) @binding(5) var<storage, read> pages: array<u32>;

fn kv_table(i: u32) -> u32 {
    return pages[i];
}

@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) id: vec3<u32>) {
    let d = id.x; let h = id.y; let b = id.z;
    let row = (b * kv.heads + h) * kv.key_dim;
    var total = 0.0;
    var sum = 0.0;
    for (var t = 0u; t < kv_len(kv, b); t++) {
        let slot = kv_slot(kv, b, h, t);
        var score = 0.0;
        for (var i = 0u; i < kv.key_dim; i++) {
            score += query[row + i] * key[slot * kv.key_dim + i];
        }
        let weight = exp(score / sqrt(f32(kv.key_dim)));
        total += weight;
        sum += weight * value[slot * kv.value_dim + d];
    }
    output[(b * kv.heads + h) * kv.value_dim + d] = sum / total;
}
";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let groups = [8_u32, 4, 2];
    let [dim, heads, batch] = groups.map(|n| n as usize);
    let tokens = 37;
    let gpu = Gpu::headless()?; // or Gpu::new(device, queue)? with an engine's own
    let mut cache = PagedKVCache::new(&gpu);
    let noise =
        |n: usize| (0_u16..).take(n).map(|i| (f32::from(i) * 0.7).sin()).collect::<Vec<_>>();
    let prompt = gpu.upload(&noise(batch * heads * tokens * dim), &[batch, heads, tokens, dim])?;
    let query = gpu.upload(&noise(batch * heads * dim), &[batch, heads, 1, dim])?;
    let outputs =
        [(); 2].map(|()| gpu.upload(&vec![0.0_f32; batch * heads * dim], &[batch, heads, 1, dim]));
    let [own, crates] = outputs;
    let (own, crates) = (own?, crates?);
    let view = gpu.submit_pass("prompt", |pass| {
        cache.update(pass, &prompt.view(), &prompt.view(), 0, CachePosition::Append)
    })?;

    // The shader, joined with the text of the view's layout.
    let device = gpu.device();
    let text = format!("{SHADER}{}", view.layout().wgsl());
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("own attention"),
        source: wgpu::ShaderSource::Wgsl(text.into()),
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("own attention"),
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: Default::default(),
        cache: None,
    });
    // A view provides its layout words, its buffers, and the buffer of its page table.
    let words = device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
        label: Some("layout words"),
        contents: bytemuck::cast_slice(&view.layout_words()),
        usage: wgpu::BufferUsages::UNIFORM,
    });
    assert_eq!(view.layout(), Layout::Paged);
    let table = view.page_table().expect("a paged view has a page table");
    let buffers = [&words, view.key(), view.value(), query.buffer(), own.buffer(), table];
    let entries: Vec<_> = (0..)
        .zip(buffers)
        .map(|(binding, buffer)| wgpu::BindGroupEntry {
            binding,
            resource: buffer.as_entire_binding(),
        })
        .collect();
    let bindings = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some("own attention"),
        layout: &pipeline.get_bind_group_layout(0),
        entries: &entries,
    });
    let mut attention = Attention::new(&gpu);
    gpu.submit_pass("attention", |pass| {
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &bindings, &[]);
        pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
        attention.record(pass, &query.view(), &view, &crates.view(), Default::default())
    })?;

    // Both outputs are read back through a cache of one token.
    let read = |tensor: TensorView<'_>| -> Result<Vec<f32>, wgpu_kvcache::Error> {
        let mut cache = wgpu_kvcache::DynamicKVCache::new(&gpu);
        gpu.submit_pass("read", |pass| {
            cache.update(pass, &tensor, &tensor, 0, CachePosition::Append).map(|_| ())
        })?;
        Ok(cache.get(0)?.expect("layer 0 was written").0.to_f32())
    };
    let (own, crates) = (read(own.view())?, read(crates.view())?);
    let difference = own.iter().zip(&crates).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{} elements of {}, largest difference {difference:e}", own.len(), DType::F32);
    assert!(difference < 1e-5);
    Ok(())
}
