//! `shaders/append.wgsl`: new tokens into their slots, K and V in one dispatch.

use super::{Dispatch, Kernels, Unit, WORKGROUP};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::position::Order;
use crate::view::Source;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache append",
    wgsl: include_str!("../../shaders/append.wgsl"),
    writes: &[false, false, true, true],
};

/// As in the shader.
const TOKENS_PER_THREAD: u32 = 4;
/// WebGPU's `maxComputeWorkgroupSizeZ`.
const MOST_ROWS: u32 = 64;

/// What an append writes, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AppendShape<'a> {
    pub(crate) key: &'a Source,
    pub(crate) value: &'a Source,
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) tokens: usize,
    pub(crate) start: usize,
    pub(crate) capacity: usize,
    pub(crate) order: &'a Order,
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
        let heads = super::narrow(shape.heads)?;
        let rows = super::narrow(shape.batch.saturating_mul(shape.heads))?;
        let entries = shape.order.count(tokens);

        let mut params = Vec::with_capacity(20);
        for source in [shape.key, shape.value] {
            params.push(unit.count(source.offset)?);
            for stride in source.strides {
                params.push(unit.count(stride)?);
            }
        }
        let units = [unit.count(shape.key.row_bytes)?, unit.count(shape.value.row_bytes)?];
        let (start, capacity) = (super::narrow(shape.start)?, super::narrow(shape.capacity)?);
        params.extend([units[0], units[1], heads, rows, start, capacity, entries]);
        let list = match shape.order {
            Order::Run { first, zeros } => {
                params.extend([*first, *zeros, 0, 0, 0]);
                None
            }
            Order::List { entries: pairs, count, per_row } => {
                let placed = gpu.place(pairs.as_flattened())?;
                let stride = if *per_row { 2 * count } else { 0 };
                params.extend([0, 0, 1, placed.offset / 4, stride]);
                Some(placed)
            }
        };

        let tile = tile(units[0].max(units[1]), entries);
        let groups = [
            u64::from(units[0].max(units[1]).div_ceil(tile[0])),
            u64::from(entries.div_ceil(tile[1] * TOKENS_PER_THREAD)),
            // A workgroup takes several rows where there are more than a dispatch starts.
            u64::from(
                rows.div_ceil(tile[2]).min(gpu.limits().max_compute_workgroups_per_dimension),
            ),
        ];
        self.append.prepare(gpu, (unit, Some(tile)), bindings, list, &params, groups)
    }
}

/// Extents of a workgroup, (units, tokens, rows): wide enough for a head, the rest given to tokens
/// where there are many, else to rows.
fn tile(units: u32, entries: u32) -> [u32; 3] {
    let wide = units.next_power_of_two().min(WORKGROUP);
    let rest = WORKGROUP / wide;
    if entries <= TOKENS_PER_THREAD { [wide, 1, rest.min(MOST_ROWS)] } else { [wide, rest, 1] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_within_webgpu_and_never_empty() {
        for units in 1..=600 {
            for entries in [1, 4, 5, 1000] {
                let [x, y, z] = tile(units, entries);
                assert!(x * y * z <= WORKGROUP && x * y * z >= MOST_ROWS, "{units} {entries}");
                assert!(z <= MOST_ROWS);
            }
        }
    }
}
