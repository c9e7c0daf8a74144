//! The model's own compute pipelines, one per file of `../shaders/`, with its dimensions as pipeline constants.
//! Attention is the library's.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use wgpu_kvcache::{Gpu, wgpu};

use crate::config::{Activation, Config, RopePairs};
use crate::format::Format;
use crate::model::Model;
use crate::weights::{Matrix, Part};

/// How a shader uses a binding.
#[derive(Clone, Copy)]
enum Bind {
    Uniform,
    Read,
    Write,
    /// Reads 32-bit words of a texture.
    Words,
    /// Reads numbers of a texture.
    Texels,
    /// Writes numbers into a texture.
    Store,
}
use Bind::{Read, Store, Texels, Uniform, Words, Write};

/// The bindings of the matrix product: first those of `weights.wgsl`, then its own.
const MATMUL_BINDS: &[Bind] = &[Uniform, Words, Words, Uniform, Texels, Write];
/// The bindings of the embedding.
const EMBED_BINDS: &[Bind] = &[Uniform, Words, Words, Read, Write];

/// Vectors of four inputs in a panel: the calls of `weights` per panel.
const QUADS: usize = 8;

/// The resource of a binding.
#[derive(Clone)]
pub(crate) enum Bound<'a> {
    Buffer(wgpu::BufferBinding<'a>),
    Texture(&'a wgpu::TextureView),
}

/// One pipeline and the layout of its bind group.
pub(crate) struct Kernel {
    label: &'static str,
    layout: wgpu::BindGroupLayout,
    pipeline: wgpu::ComputePipeline,
}

impl Kernel {
    /// A bind group in the order of the shader's bindings.
    pub(crate) fn bind(&self, gpu: &Gpu, bound: &[Bound<'_>]) -> wgpu::BindGroup {
        let entries: Vec<_> = (0..)
            .zip(bound)
            .map(|(binding, bound)| wgpu::BindGroupEntry {
                binding,
                resource: match bound {
                    Bound::Buffer(buffer) => wgpu::BindingResource::Buffer(buffer.clone()),
                    Bound::Texture(view) => wgpu::BindingResource::TextureView(view),
                },
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

/// Rows of the input and groups of outputs that an invocation of a matrix product computes.
#[derive(Clone, Copy)]
struct Tile {
    tokens: usize,
    groups: usize,
}

/// The matrix products of one format: for one row of the input, for at most 4, and for 8 at a time.
struct Product {
    tiles: [(Tile, Kernel); 3],
}

/// The matrix products of all formats of a model.
pub(crate) struct MatMul(BTreeMap<Format, Product>);

/// A matrix bound for its products with one input.
pub(crate) struct BoundMatrix(Vec<BoundPart>);

struct BoundPart {
    format: Format,
    groups: usize,
    bindings: wgpu::BindGroup,
}

impl MatMul {
    /// Bind groups for every tile and for both kinds of product: their bind group layouts are equal.
    ///
    /// # Errors
    ///
    /// If the pipelines were compiled for other matrices.
    pub(crate) fn bind(
        &self,
        gpu: &Gpu,
        stage: &Bound<'_>,
        matrix: &Matrix,
        input: &wgpu::TextureView,
        output: &wgpu::Buffer,
    ) -> Result<BoundMatrix> {
        let bind = |part: &Part| -> Result<BoundPart> {
            let product = self.0.get(&part.format).context("a format without a pipeline")?;
            let [shape, output] = [&part.shape, output]
                .map(|buffer| Bound::Buffer(buffer.as_entire_buffer_binding()));
            let [quants, scales, input] = [&part.quants, &part.scales, input].map(Bound::Texture);
            let bound = [shape, quants, scales, stage.clone(), input, output];
            Ok(BoundPart {
                format: part.format,
                groups: part.groups as usize,
                bindings: product.tiles[0].1.bind(gpu, &bound),
            })
        };
        matrix.parts.iter().map(bind).collect::<Result<_>>().map(BoundMatrix)
    }

    /// Records the product of `rows` rows with a matrix.
    pub(crate) fn dispatch(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        matrix: &BoundMatrix,
        rows: u32,
    ) {
        for part in &matrix.0 {
            let Some(Product { tiles }) = self.0.get(&part.format) else { continue };
            let [_, _, most] = tiles;
            let rows = rows as usize;
            let (tile, kernel) = tiles.iter().find(|(tile, _)| tile.tokens >= rows).unwrap_or(most);
            let [x, y] = [part.groups.div_ceil(tile.groups), rows.div_ceil(tile.tokens)];
            let [x, y] = [x, y].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
            kernel.dispatch(pass, &part.bindings, x, y);
        }
    }
}

/// The embedding: a pipeline for each format of its matrix.
pub(crate) struct Embed(BTreeMap<Format, Kernel>);

impl Embed {
    /// Bind groups over the parts of the embedding.
    ///
    /// # Errors
    ///
    /// As for [`MatMul::bind`].
    pub(crate) fn bind(
        &self,
        gpu: &Gpu,
        matrix: &Matrix,
        tokens: &wgpu::Buffer,
        hidden: &wgpu::Buffer,
    ) -> Result<BoundMatrix> {
        let bind = |part: &Part| -> Result<BoundPart> {
            let kernel = self.0.get(&part.format).context("a format without a pipeline")?;
            let [shape, tokens, hidden] = [&part.shape, tokens, hidden]
                .map(|buffer| Bound::Buffer(buffer.as_entire_buffer_binding()));
            let [quants, scales] = [&part.quants, &part.scales].map(Bound::Texture);
            Ok(BoundPart {
                format: part.format,
                groups: part.groups as usize,
                bindings: kernel.bind(gpu, &[shape, quants, scales, tokens, hidden]),
            })
        };
        matrix.parts.iter().map(bind).collect::<Result<_>>().map(BoundMatrix)
    }

    /// Records the embedding of `rows` tokens, of `width` elements each.
    pub(crate) fn dispatch(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        matrix: &BoundMatrix,
        width: u32,
        rows: u32,
    ) {
        for part in &matrix.0 {
            if let Some(kernel) = self.0.get(&part.format) {
                kernel.dispatch(pass, &part.bindings, width.div_ceil(32 * 64), rows);
            }
        }
    }
}

/// The pipelines of one model.
pub(crate) struct Kernels {
    /// The embedding of tokens.
    pub(crate) embed: Embed,
    /// RMS norm of every row.
    pub(crate) norm: Kernel,
    /// RMS norm of the last token of each sequence.
    pub(crate) norm_last: Kernel,
    /// Matrix products.
    pub(crate) matmul: MatMul,
    /// Matrix products that are added to the residual stream.
    pub(crate) matmul_add: MatMul,
    /// RMS norm of the result of attention or of the feed-forward part, added to the residual stream.
    pub(crate) post_norm: Kernel,
    /// RMS norm of each query and key head.
    pub(crate) head_norm: Kernel,
    /// The rotary embedding. It parts the projection into queries, keys and values.
    pub(crate) rope: Kernel,
    /// Copies the output of attention to a texture for the matrix product.
    pub(crate) to_texture: Kernel,
    /// The feed-forward activation.
    pub(crate) gate: Kernel,
    /// The token with the highest logit.
    pub(crate) argmax: Kernel,
}

impl Kernels {
    /// Compiles the pipelines for a model.
    ///
    /// # Errors
    ///
    /// If a dimension is too large for a shader.
    pub(crate) fn new(gpu: &Gpu, model: &Model) -> Result<Self> {
        let config: &Config = &model.config;
        let size = |n: usize| -> Result<f64> { Ok(f64::from(u32::try_from(n)?)) };
        let width = ("WIDTH", size(config.width)?);
        let heads = ("HEADS", size(config.heads)?);
        let kv_heads = ("KV_HEADS", size(config.kv_heads)?);
        let vocabulary = ("VOCABULARY", size(config.vocabulary)?);
        let epsilon = ("EPSILON", config.epsilon);
        let flag = |name, is_set: bool| (name, f64::from(u8::from(is_set)));
        let norm = normalising(include_str!("../shaders/rms_norm.wgsl"));
        let norm_binds = [Read, Read, Read, Store];
        Ok(Self {
            embed: embed(gpu, model, &[width, ("SCALE", config.embedding_scale)]),
            norm: kernel(gpu, "rms norm", &norm, &norm_binds, &[width, epsilon]),
            norm_last: kernel(
                gpu,
                "rms norm, last tokens",
                &norm,
                &norm_binds,
                &[width, epsilon, ("LAST", 1.0)],
            ),
            matmul: matmul(gpu, "matmul", &model.product_matrices(false), 0.0),
            matmul_add: matmul(gpu, "matmul, added", &model.product_matrices(true), 1.0),
            post_norm: kernel(
                gpu,
                "post norm",
                &normalising(include_str!("../shaders/post_norm.wgsl")),
                &[Read, Read, Write],
                &[width, epsilon],
            ),
            head_norm: kernel(
                gpu,
                "head norm",
                &normalising(include_str!("../shaders/head_norm.wgsl")),
                &[Read, Write],
                &[heads, kv_heads, ("HEAD_DIM", size(config.head_dim)?), epsilon],
            ),
            rope: kernel(
                gpu,
                "rope",
                include_str!("../shaders/rope.wgsl"),
                &[Read, Read, Read, Write, Write, Write],
                &[
                    heads,
                    kv_heads,
                    ("PAIRS", size(config.head_dim / 2)?),
                    flag("HALVES", config.rope_pairs == RopePairs::Halves),
                ],
            ),
            to_texture: kernel(
                gpu,
                "to texture",
                include_str!("../shaders/to_texture.wgsl"),
                &[Read, Store],
                &[("WIDTH", size(config.heads * config.head_dim)?)],
            ),
            gate: kernel(
                gpu,
                "gate",
                include_str!("../shaders/gate.wgsl"),
                &[Read, Store],
                &[
                    ("WIDTH", size(config.feed_forward)?),
                    flag("GELU", config.activation == Activation::Gelu),
                ],
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

fn embed(gpu: &Gpu, model: &Model, constants: &[(&str, f64)]) -> Embed {
    let formats = formats(&[&model.embedding]);
    let make = |format| (format, kernel(gpu, "embed", &embed_wgsl(format), EMBED_BINDS, constants));
    Embed(formats.into_iter().map(make).collect())
}

fn matmul(gpu: &Gpu, label: &'static str, matrices: &[&Matrix], add: f64) -> MatMul {
    // A software adapter runs the invocations of a workgroup one after another: to share an output among them only
    // costs time, and with more outputs per invocation the input is read less often. On a GPU an invocation has too
    // few registers for that.
    let on_cpu = gpu.device().adapter_info().device_type == wgpu::DeviceType::Cpu;
    let (split, groups) = if on_cpu { (1.0, [1, 2, 4]) } else { (16.0, [1, 1, 1]) };
    let tiles = [1, 4, 8].into_iter().zip(groups).map(|(tokens, groups)| Tile { tokens, groups });
    let tiles: Vec<Tile> = tiles.collect();
    let constants = [("SPLIT", split), ("ADD", add)];
    let product = |format| {
        let tile = |i: usize| {
            let wgsl = matmul_wgsl(format, tiles[i].tokens, tiles[i].groups);
            (tiles[i], kernel(gpu, label, &wgsl, MATMUL_BINDS, &constants))
        };
        (format, Product { tiles: [tile(0), tile(1), tile(2)] })
    };
    MatMul(formats(matrices).into_iter().map(product).collect())
}

/// The formats of some matrices, each once.
fn formats(matrices: &[&Matrix]) -> BTreeSet<Format> {
    matrices.iter().flat_map(|matrix| &matrix.parts).map(|part| part.format).collect()
}

/// The matrix product over weights of a format.
pub(crate) fn matmul_wgsl(format: Format, tokens: usize, groups: usize) -> String {
    let numbers = [("TOKENS", tokens), ("GROUPS", groups), ("QUADS", QUADS)];
    joined(format, include_str!("../shaders/matmul.wgsl"), &numbers)
}

/// The embedding from a matrix of a format.
pub(crate) fn embed_wgsl(format: Format) -> String {
    joined(format, include_str!("../shaders/embed.wgsl"), &[("QUADS", QUADS)])
}

/// A kernel that normalises rows.
fn normalising(kernel: &str) -> String {
    [include_str!("../shaders/rms.wgsl"), kernel].join("\n")
}

fn joined(format: Format, kernel: &str, numbers: &[(&str, usize)]) -> String {
    let weights = include_str!("../shaders/weights.wgsl");
    [weights, format.wgsl(), &expanded(kernel, numbers)].join("\n")
}

/// Expands a shader's text: `{NAME}` becomes the number of that name, and the lines between `//: each x in NAME` and
/// `//: end` are repeated for each x below it.
fn expanded(text: &str, numbers: &[(&str, usize)]) -> String {
    let mut out = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some((variable, name)) =
            line.trim().strip_prefix("//: each ").and_then(|rest| rest.split_once(" in "))
        else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let mut depth = 1;
        let body: Vec<&str> = lines
            .by_ref()
            .take_while(|line| {
                depth += usize::from(line.trim().starts_with("//: each "));
                depth -= usize::from(line.trim() == "//: end");
                depth > 0
            })
            .collect();
        let count = numbers.iter().find(|(number, _)| *number == name).map_or(0, |&(_, n)| n);
        for i in 0..count {
            let body = body.join("\n").replace(&format!("{{{variable}}}"), &i.to_string());
            out.push_str(&expanded(&body, numbers));
        }
    }
    numbers.iter().fold(out, |out, (name, n)| out.replace(&format!("{{{name}}}"), &n.to_string()))
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
            ty: binding_type(*bind),
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
            // Every kernel writes its workgroup memory before it reads it.
            zero_initialize_workgroup_memory: false,
        },
        cache: None,
    });
    Kernel { label, layout, pipeline }
}

fn binding_type(bind: Bind) -> wgpu::BindingType {
    let buffer =
        |ty| wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None };
    let texture = |sample_type| wgpu::BindingType::Texture {
        sample_type,
        view_dimension: wgpu::TextureViewDimension::D2,
        multisampled: false,
    };
    match bind {
        Uniform => buffer(wgpu::BufferBindingType::Uniform),
        Read => buffer(wgpu::BufferBindingType::Storage { read_only: true }),
        Write => buffer(wgpu::BufferBindingType::Storage { read_only: false }),
        Words => texture(wgpu::TextureSampleType::Uint),
        Texels => texture(wgpu::TextureSampleType::Float { filterable: false }),
        Store => wgpu::BindingType::StorageTexture {
            access: wgpu::StorageTextureAccess::WriteOnly,
            format: wgpu::TextureFormat::Rgba32Float,
            view_dimension: wgpu::TextureViewDimension::D2,
        },
    }
}

#[cfg(test)]
mod tests;
