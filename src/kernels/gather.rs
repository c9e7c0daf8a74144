//! `shaders/gather.wgsl`: batch rows change places, in place.

use super::{Dispatch, Kernels, Unit, Variant, WORKGROUP};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::plan::MoveList;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache gather",
    wgsl: include_str!("../../shaders/gather.wgsl"),
    writes: &[true, true],
    constants: &[],
    layouts: &[],
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
    ) -> wgpu::BindGroup {
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
        let params = [
            unit.count(key)?,
            unit.count(value)?,
            super::narrow(shape.heads)?,
            super::narrow(shape.start)?,
            super::narrow(shape.len)?,
            super::narrow(shape.capacity)?,
            shape.moves.copies,
            shape.moves.cycles,
            list.offset / 4,
        ];
        let groups = tiles(gpu, unit, shape.row_bytes, shape.len, shape.heads);
        self.gather.prepare(
            gpu,
            Variant { unit, ..Variant::default() },
            bindings,
            Some(list),
            &params,
            groups,
        )
    }
}

/// Columns of a thread, as in the shaders.
const COLUMNS_PER_THREAD: u32 = 4;

/// Workgroups for a kernel whose threads take a few units of the live tokens of a head; a workgroup takes
/// several tiles or heads where there are more than a dispatch starts workgroups.
pub(super) fn tiles(
    gpu: &Gpu,
    unit: Unit,
    row_bytes: [u64; 2],
    len: usize,
    heads: usize,
) -> [u64; 3] {
    let units = row_bytes[0].max(row_bytes[1]) / unit.bytes() * len as u64;
    let most = u64::from(gpu.limits().max_compute_workgroups_per_dimension);
    [
        units.div_ceil(u64::from(WORKGROUP * COLUMNS_PER_THREAD)).min(most),
        (heads as u64).min(most),
        1,
    ]
}
