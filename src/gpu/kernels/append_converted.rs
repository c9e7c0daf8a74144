//! `shaders/append_converted.wgsl`: new tokens into their slots in the layer's formats, K and V in one dispatch.

use super::append::{COMMON, Params, SOURCE, as_written, strided};
use super::variant::constants;
use super::{AppendShape, Dispatch, Kernels, Positions, Unit, Variant};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::Format;
use crate::layer_shape::LayerShape;
use crate::layout::Layout;

pub(super) const CONVERTED: super::Source = super::Source {
    label: "kvcache append converted",
    wgsl: include_str!("../../../shaders/append_converted.wgsl"),
    joined: &[
        COMMON,
        include_str!("../../../shaders/append/convert.wgsl"),
        include_str!("../../../shaders/element/pairs.wgsl"),
    ],
    sides: Some([
        [SIDE, include_str!("../../../shaders/append/side_vectors.wgsl")],
        [SIDE, include_str!("../../../shaders/append/side_words.wgsl")],
    ]),
    constants: &[
        "source_type",
        "key_format",
        "value_format",
        "is_bthd",
        "position_form",
        "threads",
    ],
    ..SOURCE
};

const SIDE: &str = include_str!("../../../shaders/append/side.wgsl");

/// Elements that an invocation converts, as in the shader.
const PIECE: usize = 64;

/// Invocations a workgroup for a step, and for a prompt. A step has few pieces: in large workgroups most processors
/// would have none.
const THREADS: [u32; 2] = [8, 64];
/// The most invocations that are a step's.
const MOST_OF_STEP: u64 = 1024;

impl Kernels {
    /// Writes new tokens of `dtype` in the formats of the target.
    pub(crate) fn append_converted(
        &self,
        bindings: wgpu::BindGroup,
        shape: &AppendShape<'_>,
        dtype: DType,
    ) -> Result<Dispatch> {
        let ([key, value], view) = (shape.sources, shape.target);
        let is_packed = matches!(shape.positions, Positions::Packed { .. });
        let batch = if is_packed { 1 } else { view.batch };
        let entries = shape.positions.entries(super::narrow(shape.tokens)?);
        let pieces = view.key_dim.max(view.value_dim).div_ceil(PIECE);
        let stored = [true, value.row_bytes > 0];
        let dims = [view.key_dim, view.value_dim];
        let units = [0, 1].map(|side| {
            let bytes = view.formats[side].plane_bytes(dims[side])[0];
            Unit::Word.count(if stored[side] { bytes } else { 0 })
        });
        let [key_units, value_units] = units;
        let has_zeros = match shape.positions {
            Positions::Run { zeros, .. } => zeros > 0,
            Positions::List { .. } => true,
            Positions::Packed { .. } => false,
        };
        let are_aligned = key.is_vector_aligned() && value.is_vector_aligned();
        let unit = if are_aligned && !has_zeros { unit_of(dims) } else { Unit::Word };
        let [first, zeros, list_at, list_stride] = shape.positions.words();
        let params = Params {
            kv: view.kv_layout(),
            key: strided(key, unit)?,
            value: strided(value, unit)?,
            key_units: key_units?,
            value_units: value_units?,
            entries,
            tiles: super::narrow(pieces)?,
            first,
            zeros,
            list_at,
            list_stride,
        };
        let rows = pieces as u64 * batch as u64 * view.heads as u64;
        let threads = rows.saturating_mul(u64::from(entries));
        if threads > u64::from(u32::MAX) {
            return Err(Error::too_many("number of invocations of an append", threads));
        }
        let is_bthd = key.strides[1] < key.strides[2];
        let form = shape.positions.form();
        let a_group = THREADS[usize::from(threads > MOST_OF_STEP)];
        let variant = variant(unit, view.layout(), dtype, view.formats, is_bthd, form, a_group);
        let (lists, groups) = (shape.lists.cloned(), threads.div_ceil(u64::from(a_group)));
        self.append_converted.prepare(variant, bindings, lists, &params, groups)
    }
}

/// The variants that convert K and V of a layer, (B, H, T, D) or (B, T, H, D), of a step and of a prompt.
pub(super) fn converted_ahead(
    layer: &LayerShape,
    formats: [Format; 2],
    layout: Layout,
) -> [Variant; 4] {
    let form = if layout == Layout::RaggedPaged { 2 } else { 0 };
    let unit = unit_of([layer.key_dim, layer.value_dim]);
    let [step, prompt] = THREADS;
    [(false, step), (false, prompt), (true, step), (true, prompt)].map(|(is_bthd, threads)| {
        variant(unit, layout, layer.dtype, formats, is_bthd, form, threads)
    })
}

fn variant(
    unit: Unit,
    layout: Layout,
    dtype: DType,
    formats: [Format; 2],
    is_bthd: bool,
    form: u32,
    threads: u32,
) -> Variant {
    let [key, value] = formats.map(Format::number);
    let source = Format::from(dtype).number();
    let constants = constants([source, key, value, u32::from(is_bthd), form, threads]);
    Variant { unit, layout: Some(as_written(layout)), constants, ..Variant::default() }
}

/// How sources are read that are aligned to 16 bytes, for heads of these many elements.
fn unit_of(dims: [usize; 2]) -> Unit {
    let are_whole = dims.iter().all(|dim| dim.is_multiple_of(PIECE));
    if are_whole { Unit::Vector } else { Unit::Word }
}
