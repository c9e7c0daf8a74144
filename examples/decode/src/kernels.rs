//! The model's own compute pipelines, one a file in `../shaders/`, with its dimensions as pipeline
//! constants. Attention is not among them: it is the library's.

use anyhow::Result;
use wgpu_kvcache::{DType, Gpu, wgpu};

use super::model::{Config, LANES, Matrix};

/// What a shader does with a binding.
#[derive(Clone, Copy)]
enum Bind {
    Uniform,
    Read,
    Write,
}
use Bind::{Read, Uniform, Write};

/// One pipeline and the layout of its bind group.
pub(crate) struct Kernel {
    label: &'static str,
    layout: wgpu::BindGroupLayout,
    pipeline: wgpu::ComputePipeline,
}

impl Kernel {
    /// A bind group over buffers (or parts of buffers) in the order of the shader's bindings.
    pub(crate) fn bind(&self, gpu: &Gpu, buffers: &[wgpu::BufferBinding<'_>]) -> wgpu::BindGroup {
        let entries: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(buffer.clone()),
            })
            .collect();
        gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(self.label),
            layout: &self.layout,
            entries: &entries,
        })
    }

    /// Records one dispatch.
    pub(crate) fn dispatch(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        group: &wgpu::BindGroup,
        x: u32,
        y: u32,
    ) {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, group, &[]);
        pass.dispatch_workgroups(x, y, 1);
    }
}

/// The matrix product in its shapes: for one row, for at most 4, and for 8 at a time.
pub(crate) struct MatMul([(u32, Kernel); 3]);

impl MatMul {
    /// A bind group that every shape takes, added or not: their layouts are equal.
    pub(crate) fn bind(
        &self,
        gpu: &Gpu,
        stage: wgpu::BufferBinding<'_>,
        matrix: &Matrix,
        input: &wgpu::Buffer,
        output: &wgpu::Buffer,
    ) -> wgpu::BindGroup {
        let [shape, weight, input, output] = [&matrix.shape, &matrix.weight, input, output]
            .map(wgpu::Buffer::as_entire_buffer_binding);
        self.0[0].1.bind(gpu, &[stage, shape, weight, input, output])
    }

    /// Records the product of `rows` rows with a matrix of `outputs` outputs.
    pub(crate) fn dispatch(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        group: &wgpu::BindGroup,
        outputs: u32,
        rows: u32,
    ) {
        let [_, _, most] = &self.0;
        let (tile, kernel) = self.0.iter().find(|(tile, _)| *tile >= rows).unwrap_or(most);
        kernel.dispatch(pass, group, outputs.div_ceil(4 * LANES), rows.div_ceil(*tile));
    }
}

/// All pipelines of one model.
pub(crate) struct Kernels {
    /// Tokens to the residual stream.
    pub(crate) embed: Kernel,
    /// RMS norm of every row.
    pub(crate) norm: Kernel,
    /// RMS norm of the last token of each batch row.
    pub(crate) norm_last: Kernel,
    /// Matrix products.
    pub(crate) matmul: MatMul,
    /// Matrix products added onto the residual stream.
    pub(crate) matmul_add: MatMul,
    /// Rotary positions, and K and V in the cache's type.
    pub(crate) rope: Kernel,
    /// The feed-forward activation.
    pub(crate) swiglu: Kernel,
    /// The token with the highest logit.
    pub(crate) argmax: Kernel,
}

impl Kernels {
    /// Compiles the pipelines for a model and a cache of `dtype`.
    ///
    /// # Errors
    ///
    /// Where a dimension is too large for a shader.
    pub(crate) fn new(gpu: &Gpu, config: &Config, dtype: DType) -> Result<Self> {
        let size = |n: usize| -> Result<f64> { Ok(f64::from(u32::try_from(n)?)) };
        let width = ("WIDTH", size(config.width)?);
        let heads = ("HEADS", size(config.heads)?);
        let kv_heads = ("KV_HEADS", size(config.kv_heads)?);
        let vocabulary = ("VOCABULARY", size(config.vocabulary)?);
        let epsilon = ("EPSILON", config.epsilon);
        let dtype = (
            "DTYPE",
            match dtype {
                DType::F32 => 0.0,
                DType::F16 => 1.0,
                DType::BF16 => 2.0,
            },
        );
        let norm = include_str!("../shaders/rms_norm.wgsl");
        let norm_binds = [Uniform, Read, Read, Write];
        Ok(Self {
            embed: kernel(
                gpu,
                "embed",
                include_str!("../shaders/embed.wgsl"),
                &[Read, Read, Write],
                &[width],
            ),
            norm: kernel(gpu, "rms norm", norm, &norm_binds, &[width, epsilon]),
            norm_last: kernel(
                gpu,
                "rms norm, last tokens",
                norm,
                &norm_binds,
                &[width, epsilon, ("LAST", 1.0)],
            ),
            matmul: matmul(gpu, "matmul", 0.0),
            matmul_add: matmul(gpu, "matmul, added", 1.0),
            rope: kernel(
                gpu,
                "rope",
                include_str!("../shaders/rope.wgsl"),
                &[Uniform, Read, Read, Write, Write, Write],
                &[heads, kv_heads, ("PAIRS", size(config.head_dim / 2)?), dtype],
            ),
            swiglu: kernel(
                gpu,
                "swiglu",
                include_str!("../shaders/swiglu.wgsl"),
                &[Read, Write],
                &[("WIDTH", size(config.feed_forward)?)],
            ),
            argmax: kernel(
                gpu,
                "argmax",
                include_str!("../shaders/argmax.wgsl"),
                &[Uniform, Read, Write],
                &[vocabulary],
            ),
        })
    }
}

fn matmul(gpu: &Gpu, label: &'static str, add: f64) -> MatMul {
    // A software adapter runs the threads of a workgroup one after another: sharing an output among
    // them only costs.
    let on_cpu = gpu.device().adapter_info().device_type == wgpu::DeviceType::Cpu;
    let split = if on_cpu { 1.0 } else { 16.0 };
    let source = include_str!("../shaders/matmul.wgsl");
    let binds = [Uniform, Uniform, Read, Read, Write];
    MatMul([1, 4, 8].map(|tile| {
        let constants = [("TILE", f64::from(tile)), ("SPLIT", split), ("ADD", add)];
        (tile, kernel(gpu, label, source, &binds, &constants))
    }))
}

fn kernel(
    gpu: &Gpu,
    label: &'static str,
    source: &str,
    binds: &[Bind],
    constants: &[(&str, f64)],
) -> Kernel {
    let device = gpu.device();
    let entries: Vec<_> = (0..)
        .zip(binds)
        .map(|(binding, bind)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: match bind {
                    Uniform => wgpu::BufferBindingType::Uniform,
                    Read => wgpu::BufferBindingType::Storage { read_only: true },
                    Write => wgpu::BufferBindingType::Storage { read_only: false },
                },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        })
        .collect();
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some(label),
        entries: &entries,
    });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: Some(label),
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some(label),
        source: wgpu::ShaderSource::Wgsl(source.into()),
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(label),
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions {
            constants,
            // Every kernel writes its shared memory before it reads it.
            zero_initialize_workgroup_memory: false,
        },
        cache: None,
    });
    Kernel { label, layout, pipeline }
}
