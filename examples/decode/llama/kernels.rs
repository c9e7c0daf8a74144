//! The compute pipelines, one a file in `../shaders/`, with the model's dimensions as pipeline constants.

use anyhow::Result;
use wgpu_kvcache::{DType, Gpu, wgpu};

use super::model::{Config, Matrix};

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

/// A matrix product in one of its shapes. All shapes take the same bind groups.
pub(crate) struct MatMul {
    kernel: Kernel,
    /// Rows of the input that a thread works on.
    tile: u32,
    /// Outputs that a workgroup works on.
    outputs: u32,
}

/// The matrix products: for one row, for a few, and for many.
pub(crate) struct MatMuls([MatMul; 3]);

impl MatMuls {
    /// A bind group that any of the products takes, added or not: their layouts are equal.
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
        self.0[0].kernel.bind(gpu, &[stage, shape, weight, input, output])
    }

    /// Records the product of `rows` rows with a matrix of `outputs` outputs.
    pub(crate) fn dispatch(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        group: &wgpu::BindGroup,
        outputs: u32,
        rows: u32,
    ) {
        let fitting = self.0.iter().find(|shape| shape.tile >= rows).unwrap_or(&self.0[2]);
        fitting.kernel.dispatch(
            pass,
            group,
            outputs.div_ceil(fitting.outputs),
            rows.div_ceil(fitting.tile),
        );
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
    pub(crate) matmul: MatMuls,
    /// Matrix products added onto the residual stream.
    pub(crate) matmul_add: MatMuls,
    /// Rotary positions, and K and V in the cache's type.
    pub(crate) rope: Kernel,
    /// Attention over the cache.
    pub(crate) attention: Kernel,
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
            matmul: matmuls(gpu, "matmul", 0.0),
            matmul_add: matmuls(gpu, "matmul, added", 1.0),
            rope: kernel(
                gpu,
                "rope",
                include_str!("../shaders/rope.wgsl"),
                &[Uniform, Read, Read, Write, Write, Write],
                &[heads, kv_heads, ("PAIRS", size(config.head_dim / 2)?), dtype],
            ),
            attention: kernel(
                gpu,
                "attention",
                include_str!("../shaders/attention.wgsl"),
                &[Uniform, Read, Read, Read, Write],
                &[heads, kv_heads, ("QUADS", size(config.head_dim / 4)?), dtype],
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

fn matmuls(gpu: &Gpu, label: &'static str, add: f64) -> MatMuls {
    // A software adapter runs a workgroup's threads one after another, so sharing an output among them only costs.
    let on_cpu = gpu.device().adapter_info().device_type == wgpu::DeviceType::Cpu;
    let (outputs, split) = if on_cpu { (64, 1) } else { (8, 16) };
    MatMuls([1, 4, 8].map(|tile: u32| MatMul {
        kernel: kernel(
            gpu,
            label,
            include_str!("../shaders/matmul.wgsl"),
            &[Uniform, Uniform, Read, Read, Write],
            &[
                ("TILE", f64::from(tile)),
                ("SPLIT", f64::from(split)),
                ("OUTPUTS", f64::from(outputs)),
                ("ADD", add),
            ],
        ),
        tile,
        outputs,
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
