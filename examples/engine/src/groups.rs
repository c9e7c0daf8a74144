//! The engine's bind groups: a model's weights and the working memory, bound for each kernel of a step.

use std::num::NonZeroU64;

use anyhow::Result;
use wgpu_kvcache::{Gpu, wgpu};

use crate::buffers::{Buffers, SLOT};
use crate::kernels::{Bound, BoundMatrix, Kernel, Kernels};
use crate::model::Model;
use crate::weights::Matrix;

/// Bind groups that stay the same in every step.
pub(crate) struct Groups {
    pub(crate) embed: BoundMatrix,
    pub(crate) to_texture: wgpu::BindGroup,
    pub(crate) gate: wgpu::BindGroup,
    pub(crate) norm_last: wgpu::BindGroup,
    pub(crate) head: BoundMatrix,
    pub(crate) argmax: wgpu::BindGroup,
    pub(crate) layers: Vec<LayerGroups>,
}

/// The bind groups of one layer.
pub(crate) struct LayerGroups {
    pub(crate) attention_norm: wgpu::BindGroup,
    pub(crate) qkv: BoundMatrix,
    /// For models that normalise the heads.
    pub(crate) head_norm: Option<wgpu::BindGroup>,
    /// Over the weights of no layer: those of the same rotary base share it.
    pub(crate) rope: wgpu::BindGroup,
    pub(crate) attention_output: Branch,
    pub(crate) feed_forward_norm: wgpu::BindGroup,
    pub(crate) gate_up: BoundMatrix,
    pub(crate) down: Branch,
}

/// The last product of attention or of the feed-forward part, whose result goes onto the residual stream.
pub(crate) enum Branch {
    /// The product adds it.
    Added(BoundMatrix),
    /// A norm of the product adds it.
    Normed { product: BoundMatrix, norm: wgpu::BindGroup },
}

impl Branch {
    /// Records the product of `rows` rows, and its norm.
    pub(crate) fn dispatch(&self, pass: &mut wgpu::ComputePass<'_>, kernels: &Kernels, rows: u32) {
        match self {
            Self::Added(product) => kernels.matmul_add.dispatch(pass, product, rows),
            Self::Normed { product, norm } => {
                kernels.matmul.dispatch(pass, product, rows);
                kernels.post_norm.dispatch(pass, norm, rows, 1);
            }
        }
    }
}

impl Groups {
    /// Creates the bind groups over a model's weights and the buffers.
    ///
    /// # Errors
    ///
    /// If the pipelines were compiled for another model.
    pub(crate) fn new(
        gpu: &Gpu,
        model: &Model,
        kernels: &Kernels,
        buffers: &Buffers,
    ) -> Result<Self> {
        let Buffers { ends, hidden, normed, projected, mixed, mixed_texels, .. } = buffers;
        let Buffers { branch, gate_up, activated, last, logits, chosen, .. } = buffers;
        let (all, head) = (slot(&buffers.stage, 0), slot(&buffers.stage, 1));
        let texels = Bound::Texture;
        let norm = |kernel: &Kernel, weight, output| {
            kernel.bind(gpu, &[whole(ends), whole(weight), whole(hidden), texels(output)])
        };
        let product =
            |matrix: &Matrix, input, output| kernels.matmul.bind(gpu, &all, matrix, input, output);
        let branch = |matrix: &Matrix, input, weight: &Option<wgpu::Buffer>| -> Result<Branch> {
            Ok(match weight {
                None => Branch::Added(kernels.matmul_add.bind(gpu, &all, matrix, input, hidden)?),
                Some(weight) => Branch::Normed {
                    product: product(matrix, input, branch)?,
                    norm: kernels.post_norm.bind(gpu, &[weight, branch, hidden].map(whole)),
                },
            })
        };
        let rope = |turns: &wgpu::Buffer| {
            let Buffers { positions, query, key, value, .. } = buffers;
            let bound = [positions, turns, projected, query, key, value].map(whole);
            kernels.rope.bind(gpu, &bound)
        };
        let global_rope = rope(&buffers.turns);
        let local_rope = buffers.local_turns.as_ref().map(rope);
        let layers = model.layers.iter().enumerate().map(|(layer, weights)| {
            let head_norms = weights.head_norms.as_ref();
            let is_local = model.config.window(layer).is_some();
            Ok(LayerGroups {
                attention_norm: norm(&kernels.norm, &weights.attention_norm, normed),
                qkv: product(&weights.qkv, normed, projected)?,
                head_norm: head_norms
                    .map(|weight| kernels.head_norm.bind(gpu, &[weight, projected].map(whole))),
                rope: local_rope.as_ref().filter(|_| is_local).unwrap_or(&global_rope).clone(),
                attention_output: branch(
                    &weights.attention_output,
                    mixed_texels,
                    &weights.post_attention_norm,
                )?,
                feed_forward_norm: norm(&kernels.norm, &weights.feed_forward_norm, normed),
                gate_up: product(&weights.gate_up, normed, gate_up)?,
                down: branch(&weights.down, activated, &weights.post_feed_forward_norm)?,
            })
        });
        Ok(Self {
            embed: kernels.embed.bind(gpu, &model.embedding, &buffers.tokens, hidden)?,
            to_texture: kernels.to_texture.bind(gpu, &[whole(mixed), texels(mixed_texels)]),
            gate: kernels.gate.bind(gpu, &[whole(gate_up), texels(activated)]),
            norm_last: norm(&kernels.norm_last, &model.output_norm, last),
            head: kernels.matmul.bind(gpu, &head, &model.head, last, logits)?,
            argmax: kernels.argmax.bind(gpu, &[head, whole(logits), whole(chosen)]),
            layers: layers.collect::<Result<_>>()?,
        })
    }
}

/// A whole buffer.
fn whole(buffer: &wgpu::Buffer) -> Bound<'_> {
    Bound::Buffer(buffer.as_entire_buffer_binding())
}

/// One slot of a buffer of parameters.
fn slot(buffer: &wgpu::Buffer, index: usize) -> Bound<'_> {
    let bytes = SLOT as u64;
    let offset = bytes * index as u64;
    Bound::Buffer(wgpu::BufferBinding { buffer, offset, size: NonZeroU64::new(bytes) })
}
