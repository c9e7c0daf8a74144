//! `shaders/append.wgsl`: new tokens into their slots as they come in, K and V in one dispatch.

use super::params::{Strided, params};
use super::variant::constants;
use super::{Dispatch, Kernels, Unit, Variant, WORKGROUP};
use crate::error::Result;
use crate::gpu::arena::Allocation;
use crate::layer_shape::LayerShape;
use crate::layout::{KvLayout, Layout};
use crate::tensor::Source;
use crate::view::LayerView;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache append",
    wgsl: include_str!("../../../shaders/append.wgsl"),
    joined: &[COMMON],
    sides: None,
    writes: &[false, false, true, true],
    params_bytes: Params::BYTES,
    constants: &[
        "tile_units",
        "tile_threads",
        "tile_height",
        "is_bthd",
        "position_form",
        "is_single",
        "is_scales",
    ],
    layouts: &[Layout::Wrapped, Layout::Paged, Layout::RaggedWrapped, Layout::RaggedPaged],
    formats: &[],
};

pub(super) const COMMON: &str = include_str!("../../../shaders/append/common.wgsl");

/// Units that a thread takes, as in the shader.
const UNITS_PER_THREAD: u32 = 4;

params! {
    /// `struct Params` of the shader, which says what each field is.
    struct Params {
        kv: KvLayout,
        key: Strided,
        value: Strided,
        key_units: u32,
        value_units: u32,
        entries: u32,
        tiles: u32,
        first: u32,
        zeros: u32,
        list_at: u32,
        list_stride: u32,
    }
}

/// The positions that an append visits in each batch row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Positions {
    /// From `first` on: `zeros` that become zero, then one for each new token.
    Run { first: u32, zeros: u32 },
    /// `named` (position, token) pairs of a list, then up to `gap` positions that become zero. The list of batch
    /// row b begins at word `at + b * stride`.
    List { named: u32, gap: u32, at: u32, stride: u32 },
    /// Packed tokens, of a source with one batch row: for each, its batch row in the target and its position,
    /// from word `at` of the list on.
    Packed { at: u32 },
}

impl Positions {
    /// Positions that each row visits, of `tokens` new tokens.
    pub(super) fn entries(self, tokens: u32) -> u32 {
        match self {
            Self::Run { zeros, .. } => zeros + tokens,
            Self::List { named, gap, .. } => named + gap,
            Self::Packed { .. } => tokens,
        }
    }

    /// `first`, `zeros`, `list_at` and `list_stride` of the parameters.
    pub(super) fn words(self) -> [u32; 4] {
        match self {
            Self::Run { first, zeros } => [first, zeros, 0, 0],
            Self::List { named, at, stride, .. } => [0, named, at, stride],
            Self::Packed { at } => [0, 0, at, 0],
        }
    }

    /// The pipeline constant.
    pub(super) fn form(self) -> u32 {
        match self {
            Self::Run { .. } => 0,
            Self::List { .. } => 1,
            Self::Packed { .. } => 2,
        }
    }
}

/// What an append writes, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AppendShape<'a> {
    /// K and V.
    pub(crate) sources: &'a [Source; 2],
    /// New tokens.
    pub(crate) tokens: usize,
    pub(crate) positions: Positions,
    /// The layer as it will be.
    pub(crate) target: &'a LayerView,
    /// The buffer of the target's page table and records, and of the list of positions.
    pub(crate) lists: Option<&'a Allocation>,
}

impl Kernels {
    /// Binds new K and V, and a layer's K and V, for any number of appends.
    pub(crate) fn bind_append(
        &self,
        bindings: &[wgpu::BufferBinding<'_>],
    ) -> Result<wgpu::BindGroup> {
        self.append.bind(bindings)
    }

    pub(crate) fn append(
        &self,
        bindings: wgpu::BindGroup,
        shape: &AppendShape<'_>,
        is_scales: bool,
    ) -> Result<Dispatch> {
        let [key, value] = shape.sources;
        let aligned = key.is_vector_aligned() && value.is_vector_aligned();
        let unit = if aligned && !is_scales { Unit::Vector } else { Unit::Word };
        let tokens = super::narrow(shape.tokens)?;
        let view = shape.target;
        let is_packed = matches!(shape.positions, Positions::Packed { .. });
        let batch = if is_packed { 1 } else { super::narrow(view.batch)? };
        let rows = super::narrow(view.heads)?.saturating_mul(batch);
        let entries = shape.positions.entries(tokens);
        let units = [unit.count(key.row_bytes)?, unit.count(value.row_bytes)?];
        let most_units = units[0].max(units[1]);
        let limit = self.uploads.device().limits.max_compute_workgroups_per_dimension;
        // In a (B, T, H, D) source it is the heads of a token that are neighbours, not its successors.
        let is_bthd = key.strides[1] < key.strides[2] && entries <= limit;
        let near = if is_bthd { super::narrow(view.heads)? } else { 1 };
        let tile = Tile::new(most_units, near, entries, rows > limit);
        let heads = super::narrow(view.heads)?;
        let head_tiles = heads.div_ceil(tile.width());
        let [x, y] = if tile.is_bthd {
            [entries.div_ceil(tile.height), batch.saturating_mul(head_tiles)]
        } else {
            [entries.div_ceil(tile.width()), rows.div_ceil(tile.height)]
        };
        let sides = [x, y, most_units.div_ceil(tile.units)].map(u64::from);
        let [first, zeros, list_at, list_stride] = shape.positions.words();
        let params = Params {
            kv: view.kv_layout(),
            key: strided(key, unit)?,
            value: strided(value, unit)?,
            key_units: units[0],
            value_units: units[1],
            entries,
            tiles: head_tiles,
            first,
            zeros,
            list_at,
            list_stride,
        };
        let form = shape.positions.form();
        let variant = variant(unit, view.layout(), tile, form, entries, is_scales);
        self.append.prepare_sides(variant, bindings, shape.lists.cloned(), &params, sides)
    }
}

/// The address of a source, in units.
pub(super) fn strided(source: &Source, unit: Unit) -> Result<Strided> {
    let [b, h, t] = source.strides;
    let [offset, stride_b, stride_h, stride_t] =
        [source.offset, b, h, t].map(|bytes| unit.count(bytes));
    Ok(Strided { offset: offset?, stride_b: stride_b?, stride_h: stride_h?, stride_t: stride_t? })
}

impl Kernels {
    /// The variants for a decode step, a few tokens and a prompt, (B, H, T, D) or (B, T, H, D).
    pub(super) fn append_ahead(
        &self,
        layer: &LayerShape,
        unit: Unit,
        row_bytes: [u64; 2],
        layout: Layout,
    ) -> Result<[Variant; 6]> {
        let units = unit.count(row_bytes[0].max(row_bytes[1]))?;
        let heads = super::narrow(layer.heads)?;
        let forms = [1, UNITS_PER_THREAD, UNITS_PER_THREAD + 1].map(|entries| {
            [1, heads].map(|near| {
                let tile = Tile::new(units, near, entries, false);
                let form = if layout == Layout::RaggedPaged { 2 } else { 0 };
                variant(unit, layout, tile, form, entries, false)
            })
        });
        let [[a, b], [c, d], [e, f]] = forms;
        Ok([a, b, c, d, e, f])
    }
}

fn variant(
    unit: Unit,
    layout: Layout,
    tile: Tile,
    form: u32,
    entries: u32,
    is_scales: bool,
) -> Variant {
    let layout = as_written(layout);
    let [is_bthd, is_single, is_scales] = [tile.is_bthd, entries == 1, is_scales].map(u32::from);
    Variant {
        unit,
        layout: Some(layout),
        constants: constants([
            tile.units,
            tile.threads,
            tile.height,
            is_bthd,
            form,
            is_single,
            is_scales,
        ]),
        ..Variant::default()
    }
}

/// The layout of a layer that is written: a contiguous one is a ring that does not wrap yet.
pub(super) fn as_written(layout: Layout) -> Layout {
    if layout == Layout::Contiguous { Layout::Wrapped } else { layout }
}

/// What a workgroup takes.
#[derive(Clone, Copy, Debug)]
struct Tile {
    /// Units of a head: a power of two.
    units: u32,
    /// Threads along the units of what lies side by side: a multiple of `units`, and a power of two.
    threads: u32,
    /// Rows or, if `is_bthd`, tokens.
    height: u32,
    /// Whether the heads of a token lie side by side, not the tokens of a row.
    is_bthd: bool,
}

impl Tile {
    /// As long as the `near` heads that lie side by side where there are several, else as long as it can be;
    /// of few tokens, or where there are very many rows, as high as it can be. It hangs on no length but on
    /// its being more than four: each is a pipeline of its own.
    fn new(units: u32, near: u32, entries: u32, is_high: bool) -> Self {
        let units = units.next_power_of_two().min(WORKGROUP);
        let is_high = is_high || entries <= UNITS_PER_THREAD;
        let is_bthd = near > 1 && !is_high;
        let threads = if is_high {
            units
        } else if is_bthd {
            let long = near.saturating_mul(units).div_ceil(UNITS_PER_THREAD);
            long.min(WORKGROUP).next_power_of_two().max(units)
        } else {
            WORKGROUP
        };
        Self { units, threads, height: WORKGROUP / threads, is_bthd }
    }

    /// Tokens of a row, or heads of a token.
    fn width(self) -> u32 {
        UNITS_PER_THREAD * self.threads / self.units
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_within_webgpu_and_never_empty() {
        for units in 1..=600 {
            for near in [1, 2, 3, 8, 9, 129, 300] {
                for (entries, is_high) in [(1, false), (4, false), (5, false), (1000, true)] {
                    let tile = Tile::new(units, near, entries, is_high);
                    let context = format!("{units} {near} {entries}: {tile:?}");
                    assert_eq!(tile.threads * tile.height, WORKGROUP, "{context}");
                    assert!(tile.threads.is_multiple_of(tile.units), "{context}");
                    assert!(tile.units >= units.min(WORKGROUP), "{context}");
                }
            }
        }
    }
}
