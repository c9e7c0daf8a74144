//! `shaders/attention.wgsl`, `shaders/attention_tiles.wgsl` and `shaders/attention_combine.wgsl`: attention over a layer's
//! view.

use super::form::{
    CONSTANT_NAMES, Form, PLAIN_CONSTANTS, PLAIN_TILE_CONSTANTS, TILE_CONSTANT_NAMES, masking,
};
use super::params::{Strided, params};
use super::rules::Rules;
use super::spread::{MOST_DIM, ROWS, Spread, Tiles};
use super::variant::constants;
use super::{Dispatch, Elements, Kernel, Kernels, Variant};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::Format;
use crate::gpu::arena::Allocation;
use crate::layer_shape::LayerShape;
use crate::layout::{KvLayout, Layout};
use crate::tensor::Source;
use crate::view::LayerView;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache attention",
    wgsl: include_str!("../../../shaders/attention.wgsl"),
    joined: &[COMMON, QUADS, NO_EXTRAS, PAIRS],
    sides: None,
    writes: &[false, false, false, true],
    params_bytes: Params::BYTES,
    constants: CONSTANT_NAMES.first_chunk::<PLAIN_CONSTANTS>().expect("fewer than all"),
    layouts: Layout::ALL,
    formats: &[
        [Format::F32; 2],
        [Format::F16; 2],
        [Format::BF16; 2],
        [Format::Q8_0; 2],
        [Format::Q8_0, Format::Q4_0],
        [Format::F16, Format::Q8_0],
    ],
};

/// With masks, biases, sinks and row starts, whose bindings follow those of [`SOURCE`].
pub(super) const EXTRAS: super::Source = super::Source {
    label: "kvcache attention with masks",
    wgsl: include_str!("../../../shaders/attention.wgsl"),
    joined: &[COMMON, QUADS, WITH_EXTRAS, PAIRS],
    writes: &[false, false, false, true, false, false, false],
    constants: &CONSTANT_NAMES,
    ..SOURCE
};

/// For many query rows, on a GPU. Its bindings are those of [`SOURCE`].
pub(super) const TILES: super::Source = super::Source {
    label: "kvcache attention in tiles",
    wgsl: include_str!("../../../shaders/attention_tiles.wgsl"),
    constants: TILE_CONSTANT_NAMES.first_chunk::<PLAIN_TILE_CONSTANTS>().expect("fewer than all"),
    ..SOURCE
};

/// As [`EXTRAS`] to [`SOURCE`].
pub(super) const TILES_EXTRAS: super::Source = super::Source {
    label: "kvcache attention in tiles with masks",
    wgsl: TILES.wgsl,
    constants: &TILE_CONSTANT_NAMES,
    ..EXTRAS
};

pub(super) const COMBINE: super::Source = super::Source {
    label: "kvcache attention combine",
    wgsl: include_str!("../../../shaders/attention_combine.wgsl"),
    joined: &[PAIRS],
    sides: None,
    writes: &[false, true],
    params_bytes: CombineParams::BYTES,
    constants: &["is_packed", "output_type"],
    layouts: &[],
    formats: &[],
};

const COMMON: &str = include_str!("../../../shaders/attention/common.wgsl");
const QUADS: &str = include_str!("../../../shaders/attention/quads.wgsl");
const NO_EXTRAS: &str = include_str!("../../../shaders/attention/no_extras.wgsl");
const WITH_EXTRAS: &str = include_str!("../../../shaders/attention/extras.wgsl");
const PAIRS: &str = include_str!("../../../shaders/element/pairs.wgsl");

params! {
    /// `struct Params` of the shader, which says what each field is.
    struct Params {
        kv: KvLayout,
        query: Strided,
        output: Strided,
        key_quads: u32,
        value_quads: u32,
        batch: u32,
        group: u32,
        tokens: u32,
        slices: u32,
        split: u32,
        splits: u32,
        scale: f32,
        is_causal: u32,
        window: u32,
        first_tokens: u32,
        cap: f32,
        items: u32,
        item_count: u32,
        extras: u32,
    }
}

params! {
    /// `struct Params` of the shader that combines splits.
    struct CombineParams {
        output: Strided,
        value_dim: u32,
        heads: u32,
        group: u32,
        tokens: u32,
        splits: u32,
        rows: u32,
        items: u32,
    }
}

/// What attention reads and writes, and how it is split.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape<'a> {
    pub(crate) view: &'a LayerView,
    /// Batch rows of the queries.
    pub(crate) batch: usize,
    /// q and the output, [B, Hq, Tq, D].
    pub(crate) query: &'a Source,
    pub(crate) output: &'a Source,
    /// How the query rows are taken together, if a workgroup shares what it reads.
    pub(crate) tiles: Option<Tiles>,
    /// Query heads of a K/V head.
    pub(crate) group: usize,
    /// New tokens of a batch row.
    pub(crate) tokens: usize,
    /// Tokens of a split, and how many splits there are.
    pub(crate) split: usize,
    pub(crate) splits: usize,
    /// Types of q and of the output.
    pub(crate) types: [DType; 2],
    pub(crate) rules: Rules,
    /// The header of masks and biases, if there are any.
    pub(crate) extras: Option<&'a Allocation>,
    /// Whether it is a CPU that runs the kernel.
    pub(crate) is_cpu: bool,
    /// Whether q is read from the buffer that the kernel writes, in the window of that.
    pub(crate) is_pooled: bool,
    /// The work of packed queries. `splits` is 1 if it writes to the output, and more if it writes partial
    /// results.
    pub(crate) items: Option<Items<'a>>,
}

/// A list of work, eight words an item, in one buffer with the records and pages of the view.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Items<'a> {
    pub(crate) lists: &'a Allocation,
    /// The view's parameters, for this buffer.
    pub(crate) kv: KvLayout,
    /// First word of the items, and their number.
    pub(crate) at: u32,
    pub(crate) count: u32,
}

impl Kernels {
    /// Binds q, K, V and the result for any number of calls. If q is pooled with the result, which is bound
    /// once then, K stands in its place. Masks, bits and the values of heads follow, if there are any.
    pub(crate) fn bind_attention(
        &self,
        bindings: &[wgpu::BufferBinding<'_>],
    ) -> Result<wgpu::BindGroup> {
        let is_plain = bindings.len() == SOURCE.writes.len();
        let kernel = if is_plain { &self.attention } else { &self.attention_extras };
        kernel.bind(bindings)
    }

    /// Binds partial results and the output for any number of calls.
    pub(crate) fn bind_attention_combine(
        &self,
        bindings: &[wgpu::BufferBinding<'_>],
    ) -> Result<wgpu::BindGroup> {
        self.attention_combine.bind(bindings)
    }

    pub(crate) fn attention(
        &self,
        bindings: wgpu::BindGroup,
        shape: &AttentionShape<'_>,
    ) -> Result<Dispatch> {
        let (view, rules) = (shape.view, &shape.rules);
        let window = rules.window_words();
        let spread = Spread::of([view.key_dim, view.value_dim], shape.is_cpu);
        let params = Params {
            kv: shape.items.map_or_else(|| view.kv_layout(), |items| items.kv),
            query: rows(shape.query, shape.types[0])?,
            output: rows(shape.output, shape.types[1])?,
            key_quads: super::narrow(view.key_dim.div_ceil(4))?,
            value_quads: super::narrow(view.value_dim.div_ceil(4))?,
            batch: super::narrow(shape.batch)?,
            group: super::narrow(shape.group)?,
            tokens: super::narrow(shape.tokens)?,
            slices: spread.slices,
            split: super::narrow(shape.split)?,
            splits: super::narrow(shape.splits)?,
            scale: rules.scale,
            is_causal: u32::from(rules.is_causal),
            window: window.map_or(0, |[window, _]| window),
            first_tokens: window.map_or(0, |[_, first]| first),
            cap: rules.cap.unwrap_or(0.0),
            items: shape.items.map_or(0, |items| items.at),
            item_count: shape.items.map_or(0, |items| items.count),
            extras: shape.extras.map_or(0, |extras| extras.offset / 4),
        };
        let form = Form {
            is_pooled: shape.is_pooled,
            is_packed: shape.items.is_some(),
            types: [shape.types[0], if shape.splits == 1 { shape.types[1] } else { DType::F32 }],
            has_window: window.is_some(),
            has_cap: rules.cap.is_some(),
            has: rules.has,
        };
        let strides = [view.key_strides()[2], view.value_strides()[2]];
        let masking = masking(shape.is_cpu, rules.differ(shape.tokens));
        let key_dim = params.kv.key_dim;
        let constants = match shape.tiles {
            Some(tiles) => spread.tile_constants(tiles.tokens, key_dim, form),
            None => spread.constants(masking, key_dim, form),
        };
        let variant = Variant {
            layout: Some(view.layout()),
            elements: Some(Elements::new(view.formats, strides)),
            constants,
            ..Variant::default()
        };
        let (tiles, rows, splits) = match shape.items {
            Some(items) => (items.count as usize, view.heads, 1),
            None => {
                let rows = shape.tiles.map_or(ROWS, |tiles| tiles.rows);
                let tiles = (shape.group * shape.tokens).div_ceil(rows);
                (tiles, shape.batch * view.heads, shape.splits)
            }
        };
        // If there are more tiles than a dimension of the grid may have, they continue along z.
        let limit = self.uploads.device().limits.max_compute_workgroups_per_dimension as usize;
        let layers = tiles.div_ceil(limit);
        let groups = [tiles.div_ceil(layers), rows, splits * layers].map(|side| side as u64);
        let table = match shape.items {
            Some(items) => Some(items.lists.clone()),
            None => view.table().cloned(),
        };
        let kernel = self.attention_kernel(rules, shape.tiles.is_some());
        let mut dispatch = kernel.prepare_sides(variant, bindings, table, &params, groups)?;
        dispatch.reads.extend(shape.extras.map(|extras| extras.guard.clone()));
        Ok(dispatch)
    }

    pub(super) fn attention_kernel(&self, rules: &Rules, is_tiled: bool) -> &Kernel {
        match (is_tiled, rules.has.any()) {
            (false, false) => &self.attention,
            (false, true) => &self.attention_extras,
            (true, false) => &self.attention_tiles,
            (true, true) => &self.attention_tiles_extras,
        }
    }

    pub(crate) fn attention_combine(
        &self,
        bindings: wgpu::BindGroup,
        shape: &AttentionShape<'_>,
    ) -> Result<Dispatch> {
        let view = shape.view;
        let all = match shape.items {
            Some(items) => items.count as usize * view.heads * ROWS,
            None => shape.batch * view.heads * shape.group * shape.tokens,
        };
        let params = CombineParams {
            output: rows(shape.output, shape.types[1])?,
            value_dim: super::narrow(view.value_dim)?,
            heads: super::narrow(view.heads)?,
            group: super::narrow(shape.group)?,
            tokens: super::narrow(shape.tokens)?,
            splits: super::narrow(shape.splits)?,
            rows: super::narrow(all)?,
            items: shape.items.map_or(0, |items| items.at),
        };
        let limit = u64::from(self.uploads.device().limits.max_compute_workgroups_per_dimension);
        let groups = [(all as u64).min(limit), 1, 1];
        let variant = combine_variant(shape.items.is_some(), shape.types[1]);
        let lists = shape.items.map(|items| items.lists.clone());
        self.attention_combine.prepare_sides(variant, bindings, lists, &params, groups)
    }
}

/// The form of the kernel that combines splits.
pub(super) fn combine_variant(is_packed: bool, output: DType) -> Variant {
    let constants = constants([is_packed.into(), Format::from(output).number()]);
    Variant { constants, ..Variant::default() }
}

impl Kernels {
    /// The variants for one new token, for several and for many, of queries and outputs of these types, and whether each
    /// is of the kernel in tiles; none for heads that the kernels do not support. Ragged pages are read with packed queries.
    pub(super) fn attention_ahead(
        &self,
        layer: &LayerShape,
        formats: [Format; 2],
        layout: Layout,
        rules: &Rules,
        types: [DType; 2],
    ) -> Vec<(bool, Variant)> {
        let dims = [layer.key_dim, layer.value_dim];
        let Some(key_dim) = u32::try_from(layer.key_dim).ok() else { return Vec::new() };
        if dims.iter().any(|&dim| dim > MOST_DIM) {
            return Vec::new();
        }
        let device = self.uploads.device();
        let (is_cpu, bytes) = (device.is_cpu, device.limits.max_compute_workgroup_storage_size);
        let spread = Spread::of(dims, is_cpu);
        let form = Form::ahead(layout, rules, types);
        let variant = |constants| Variant {
            layout: Some(layout),
            elements: Some(Elements::new(formats, dims)),
            constants,
            ..Variant::default()
        };
        let mut variants: Vec<(bool, Variant)> = [1, 2]
            .map(|tokens| masking(is_cpu, rules.differ(tokens)))
            .map(|masking| (false, variant(spread.constants(masking, key_dim, form))))
            .into();
        let tiles = Tiles::of(dims, usize::MAX / 2, is_cpu, bytes);
        if let Some(tiles) = tiles.filter(|_| !form.is_packed) {
            variants.push((true, variant(spread.tile_constants(tiles.tokens, key_dim, form))));
        }
        variants
    }
}

/// A checked view as a kernel reads it: offset and strides along (B, H, T), in elements.
fn rows(source: &Source, dtype: DType) -> Result<Strided> {
    let count = |bytes: u64| {
        let elements = bytes / dtype.size() as u64;
        u32::try_from(elements)
            .map_err(|_| Error::too_many("offset or stride, in elements", elements))
    };
    let [b, h, t] = source.strides;
    Ok(Strided {
        offset: count(source.offset)?,
        stride_b: count(b)?,
        stride_h: count(h)?,
        stride_t: count(t)?,
    })
}
