//! `shaders/attention.wgsl` and `shaders/attention_combine.wgsl`: attention over a layer's view.

use super::{Dispatch, Kernels, Unit, Variant};
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::layout::Layout;
use crate::view::{LayerView, Source};

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache attention",
    wgsl: include_str!("../../shaders/attention.wgsl"),
    common: "",
    writes: &[false, false, false, true],
    constants: &["threads", "fours", "is_alone"],
    layouts: &Layout::ALL,
    dtypes: &[DType::F32, DType::F16, DType::BF16],
};

pub(super) const COMBINE: super::Source = super::Source {
    label: "kvcache attention combine",
    wgsl: include_str!("../../shaders/attention_combine.wgsl"),
    common: "",
    writes: &[false, true],
    constants: &[],
    layouts: &[],
    dtypes: &[],
};

/// Query rows of a workgroup, as in the shader.
pub(crate) const ROWS: usize = 4;

/// How a head is spread over a workgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spread {
    threads: u32,
    /// Threads along a head.
    slices: u32,
    /// Fours of quads that a thread holds.
    fours: u32,
    /// Whether a thread holds whole heads, and runs of tokens.
    is_alone: bool,
}

impl Spread {
    /// A GPU has registers for a four of quads. A CPU holds more, if they are read as vectors: word by word
    /// the code would be long, and take long to compile.
    fn new(quads: u32, unit: Unit, is_cpu: bool) -> Self {
        if is_cpu && unit == Unit::Vector && quads <= 16 {
            let fours = quads.div_ceil(4).next_power_of_two();
            return Self { threads: 16, slices: 1, fours, is_alone: true };
        }
        let fours = if is_cpu && unit == Unit::Vector { 2 } else { 1 };
        let slices = quads.div_ceil(4 * fours).next_power_of_two();
        Self { threads: 128, slices, fours, is_alone: false }
    }
}

/// Elements a head at most: what leaves four lanes or more for each part of a sum.
pub(crate) const MOST_DIM: usize = 256;

/// What attention reads and writes, and how it is split.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape<'a> {
    pub(crate) view: &'a LayerView<'a>,
    /// q and the output, [B, Hq, Tq, D].
    pub(crate) query: &'a Source,
    pub(crate) output: &'a Source,
    /// Query heads of a K/V head.
    pub(crate) group: usize,
    /// New tokens of a batch row.
    pub(crate) tokens: usize,
    /// Tokens of a split, and how many splits there are.
    pub(crate) split: usize,
    pub(crate) splits: usize,
    pub(crate) scale: f32,
    pub(crate) is_causal: bool,
    /// Whether it is a CPU that runs the kernel.
    pub(crate) is_cpu: bool,
}

impl Kernels {
    /// Binds q, a layer's buffers and the result for any number of calls.
    pub(crate) fn bind_attention(
        &self,
        gpu: &Gpu,
        query: wgpu::BufferBinding<'_>,
        view: &LayerView<'_>,
        result: wgpu::BufferBinding<'_>,
    ) -> Result<wgpu::BindGroup> {
        let bindings = [query, super::whole(view.key), super::whole(view.value), result];
        self.attention.bind(gpu, &bindings)
    }

    /// Binds partial results and the output for any number of calls.
    pub(crate) fn bind_attention_combine(
        &self,
        gpu: &Gpu,
        partial: &wgpu::Buffer,
        output: wgpu::BufferBinding<'_>,
    ) -> Result<wgpu::BindGroup> {
        self.attention_combine.bind(gpu, &[super::whole(partial), output])
    }

    pub(crate) fn attention(
        &self,
        gpu: &Gpu,
        bindings: wgpu::BindGroup,
        shape: &AttentionShape<'_>,
    ) -> Result<Dispatch> {
        let view = shape.view;
        let dims = [view.key_dim, view.value_dim];
        let unit = if dims.iter().all(|dim| dim % 4 == 0) { Unit::Vector } else { Unit::Word };
        let unit_bytes = match unit {
            Unit::Vector => 4 * view.dtype.size(),
            Unit::Word => 4,
        };
        let quads = dims.map(|dim| dim.div_ceil(4));
        let spread = Spread::new(super::narrow(quads[0].max(quads[1]))?, unit, shape.is_cpu);
        let mut params = view.layout_words().to_vec();
        params.extend(rows(shape.query)?);
        params.extend(rows(shape.output)?);
        for count in dims.map(|dim| dim * view.dtype.size() / unit_bytes).into_iter().chain(quads) {
            params.push(super::narrow(count)?);
        }
        for count in [
            shape.group,
            shape.tokens,
            spread.slices as usize,
            shape.split,
            shape.splits,
            view.batch,
        ] {
            params.push(super::narrow(count)?);
        }
        params.extend([shape.scale.to_bits(), u32::from(shape.is_causal)]);
        let variant = Variant {
            unit,
            layout: Some(view.layout()),
            dtype: Some(view.dtype),
            constants: [spread.threads, spread.fours, u32::from(spread.is_alone), 0, 0, 0],
        };
        let tiles = (shape.group * shape.tokens).div_ceil(ROWS);
        // Of a long prompt there are more tiles than a side may have: then they go on along the third.
        let limit = gpu.limits().max_compute_workgroups_per_dimension as usize;
        let layers = tiles.div_ceil(limit);
        let sides = [tiles.div_ceil(layers), view.batch * view.heads, shape.splits * layers];
        let groups = sides.map(|side| side as u64);
        let table = view.pages.map(|pages| pages.placed.clone());
        self.attention.prepare_sides(gpu, variant, bindings, table, &params, groups)
    }

    pub(crate) fn attention_combine(
        &self,
        gpu: &Gpu,
        bindings: wgpu::BindGroup,
        shape: &AttentionShape<'_>,
    ) -> Result<Dispatch> {
        let view = shape.view;
        let all = view.batch * view.heads * shape.group * shape.tokens;
        let mut params = rows(shape.output)?.to_vec();
        for count in [view.value_dim, view.heads, shape.group, shape.tokens, shape.splits, all] {
            params.push(super::narrow(count)?);
        }
        let limit = u64::from(gpu.limits().max_compute_workgroups_per_dimension);
        let groups = [(all as u64).min(limit), 1, 1];
        let variant = Variant::default();
        self.attention_combine.prepare_sides(gpu, variant, bindings, None, &params, groups)
    }
}

/// A checked view of f32 as a kernel reads it: offset and strides along (B, H, T), in elements.
fn rows(source: &Source) -> Result<[u32; 4]> {
    let count = |bytes: u64| Unit::Word.count(bytes);
    let [b, h, t] = source.strides;
    Ok([count(source.offset)?, count(b)?, count(h)?, count(t)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_of_any_size_is_spread_over_whole_parts() {
        for dim in 1..=MOST_DIM {
            for (unit, is_cpu) in
                Unit::ALL.into_iter().flat_map(|unit| [(unit, false), (unit, true)])
            {
                let quads = u32::try_from(dim.div_ceil(4)).expect("few");
                let Spread { threads, slices, fours, is_alone } = Spread::new(quads, unit, is_cpu);
                assert!(4 * fours * slices >= quads && [1, 2, 4].contains(&fours), "{dim}");
                assert!(!is_alone || slices == 1, "{dim}");
                // Each quad that is told has a thread or more to add it up.
                let told = if threads <= 32 { 16 } else { 4 } * slices;
                assert!(threads % told == 0 && slices.is_power_of_two(), "{dim}");
            }
        }
    }
}
