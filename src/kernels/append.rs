//! `shaders/append.wgsl`: new tokens into their slots, K and V in one dispatch.

use super::{Dispatch, Kernels, Unit, Variant, WORKGROUP};
use crate::arena::Placed;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::layout::Layout;
use crate::position::Order;
use crate::view::{LayerView, Source};

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache append",
    wgsl: include_str!("../../shaders/append.wgsl"),
    writes: &[false, false, true, true],
    constants: &["tile_units", "tile_rows", "tile_tokens", "has_list", "is_single"],
    layouts: &[Layout::Wrapped, Layout::Paged],
    dtypes: &[],
};

/// As in the shader.
const TOKENS_PER_THREAD: u32 = 4;
/// Vectors of a line of a GPU's cache.
const LINE_UNITS: u32 = 8;
/// WebGPU's `maxComputeWorkgroupSizeZ`.
const MOST_DEEP: u32 = 64;

/// What an append writes, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AppendShape<'a> {
    pub(crate) key: &'a Source,
    pub(crate) value: &'a Source,
    /// New tokens.
    pub(crate) tokens: usize,
    pub(crate) order: &'a Order,
    /// The layer as it will be.
    pub(crate) target: &'a LayerView<'a>,
    /// What the target's pages and the order's list were put into, and where the list begins, in words.
    pub(crate) lists: Option<(&'a Placed, u32)>,
}

impl Kernels {
    /// Binds sources and a layer's buffers for any number of appends.
    pub(crate) fn bind_append(
        &self,
        gpu: &Gpu,
        sources: [wgpu::BufferBinding<'_>; 2],
        key: &wgpu::Buffer,
        value: &wgpu::Buffer,
    ) -> wgpu::BindGroup {
        let [key_source, value_source] = sources;
        let bindings = [key_source, value_source, super::whole(key), super::whole(value)];
        self.append.bind(gpu, &bindings)
    }

    pub(crate) fn append(
        &self,
        gpu: &Gpu,
        bindings: wgpu::BindGroup,
        shape: &AppendShape<'_>,
    ) -> Result<Dispatch> {
        let aligned = shape.key.is_vector_aligned() && shape.value.is_vector_aligned();
        let unit = if aligned { Unit::Vector } else { Unit::Word };
        let tokens = super::narrow(shape.tokens)?;
        let view = shape.target;
        let rows = super::narrow(view.batch.saturating_mul(view.heads))?;
        let entries = shape.order.count(tokens);

        let mut params = Vec::with_capacity(24);
        params.extend(view.layout_words());
        for source in [shape.key, shape.value] {
            params.push(unit.count(source.offset)?);
            for stride in source.strides {
                params.push(unit.count(stride)?);
            }
        }
        let units = [unit.count(shape.key.row_bytes)?, unit.count(shape.value.row_bytes)?];
        let most_units = units[0].max(units[1]);
        // In a (B, T, H, D) source it is the heads of a token that are neighbours, not its successors.
        let is_bthd = shape.key.strides[1] < shape.key.strides[2];
        let limit = gpu.limits().max_compute_workgroups_per_dimension;
        let tile = tile(most_units, if is_bthd { view.heads } else { 1 }, entries, rows > limit);
        let mut tiles = [entries.div_ceil(tile[2] * TOKENS_PER_THREAD), rows.div_ceil(tile[1])];
        if is_bthd {
            tiles.reverse();
        }
        let sides = [tiles[0], tiles[1], most_units.div_ceil(tile[0])].map(u64::from);
        params.extend([units[0], units[1], rows, entries, u32::from(is_bthd)]);
        let (list, list_at) = shape.lists.unzip();
        params.extend(match shape.order {
            Order::Run { first, zeros } => [*first, *zeros, 0, 0],
            Order::List { count, per_row, .. } => {
                [0, 0, list_at.unwrap_or(0), if *per_row { 2 * count } else { 0 }]
            }
        });

        let layout = if view.pages.is_some() { Layout::Paged } else { Layout::Wrapped };
        let has_list = u32::from(matches!(shape.order, Order::List { .. }));
        let variant = Variant {
            unit,
            layout: Some(layout),
            constants: [tile[0], tile[1], tile[2], has_list, u32::from(entries == 1)],
            ..Variant::default()
        };
        self.append.prepare_sides(gpu, variant, bindings, list.cloned(), &params, sides)
    }
}

/// Extents of a workgroup, (units, rows, fours of tokens): wide enough for a head; the rest is given to rows
/// where there are few tokens or very many rows, else to tokens, once the `near` rows that lie side by side
/// are enough for neighbours to read a line of memory together. They hang on no length but on its being
/// more than four: each is a pipeline of its own.
fn tile(units: u32, near: usize, entries: u32, is_high: bool) -> [u32; 3] {
    let wide = units.next_power_of_two().min(WORKGROUP);
    let rest = WORKGROUP / wide;
    let high = if entries <= TOKENS_PER_THREAD || is_high {
        rest
    } else {
        u32::try_from(near).map_or(rest, |near| near.min(LINE_UNITS / wide).clamp(1, rest))
    };
    [wide, high, (rest / high).min(MOST_DEEP)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_within_webgpu_and_never_empty() {
        for units in 1..=600 {
            for near in [1, 2, 3, 8, 9, 129, 300] {
                for (entries, is_high) in [(1, false), (4, false), (5, false), (1000, true)] {
                    let [x, y, z] = tile(units, near, entries, is_high);
                    assert!(x * y * z <= WORKGROUP && x * y * z >= MOST_DEEP, "{units} {entries}");
                    assert!(z <= MOST_DEEP);
                }
            }
        }
    }
}
