//! `shaders/gather.wgsl`: batch rows change places, in place.

use super::{Dispatch, Kernels, Unit, Variant, WORKGROUP};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::host::plan::MoveList;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache gather",
    wgsl: include_str!("../../../shaders/gather.wgsl"),
    common: include_str!("../../../shaders/columns.wgsl"),
    writes: &[true, true],
    constants: &["has_copies", "has_cycles"],
    layouts: &[],
    dtypes: &[],
};

/// The live part of a layer whose rows move.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatherShape<'a> {
    /// Bytes of one token of one head, of K and of V.
    pub(crate) row_bytes: [u64; 2],
    pub(crate) heads: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) capacity: usize,
    pub(crate) moves: &'a MoveList,
}

impl Kernels {
    /// Binds a layer's buffers for any number of gathers.
    pub(crate) fn bind_gather(
        &self,
        gpu: &Gpu,
        key: &wgpu::Buffer,
        value: &wgpu::Buffer,
    ) -> Result<wgpu::BindGroup> {
        self.gather.bind(gpu, &[super::whole(key), super::whole(value)])
    }

    pub(crate) fn gather(
        &self,
        gpu: &Gpu,
        bindings: wgpu::BindGroup,
        shape: &GatherShape<'_>,
    ) -> Result<Dispatch> {
        let unit = Unit::for_rows(shape.row_bytes);
        let list = gpu.place(&shape.moves.words)?;
        let [key, value] = shape.row_bytes;
        let tiles = tiles(unit, shape.row_bytes, shape.len)?;
        let params = [
            unit.count(key)?,
            unit.count(value)?,
            super::narrow(shape.heads)?,
            tiles,
            super::narrow(shape.start)?,
            super::narrow(shape.len)?,
            super::narrow(shape.capacity)?,
            list.offset / 4,
            super::narrow(shape.moves.cycles_at)?,
            super::narrow(shape.moves.words.len())?,
        ];
        let variant = |has_copies: bool, has_cycles: bool| Variant {
            unit,
            constants: [u32::from(has_copies), u32::from(has_cycles), 0, 0, 0, 0],
            ..Variant::default()
        };
        let has_cycles = shape.moves.cycles_at < shape.moves.words.len();
        let wanted = variant(shape.moves.cycles_at > 0, has_cycles);
        if !self.gather.is_compiled(&wanted) {
            // All three at once: a beam search should not compile one in its midst.
            for (has_copies, has_cycles) in [(true, false), (false, true), (true, true)] {
                self.gather.pipeline(gpu, variant(has_copies, has_cycles))?;
            }
        }
        self.gather.prepare(
            gpu,
            wanted,
            bindings,
            Some(list),
            &params,
            u64::from(tiles) * shape.heads as u64,
        )
    }
}

/// Workgroups for the live tokens of a head, for kernels whose threads take four units.
pub(super) fn tiles(unit: Unit, row_bytes: [u64; 2], len: usize) -> Result<u32> {
    let live = unit.count(row_bytes[0].max(row_bytes[1]))?;
    let units = u64::from(live).saturating_mul(len as u64);
    let tiles = units.div_ceil(u64::from(4 * WORKGROUP));
    u32::try_from(tiles).map_err(|_| crate::Error::too_many("number of workgroups a head", tiles))
}
