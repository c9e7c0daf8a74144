//! `shaders/gather.wgsl`: batch rows change places, in place.

use super::{Dispatch, Kernels, Unit, WORKGROUP};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::plan::RowMove;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache gather",
    wgsl: include_str!("../../shaders/gather.wgsl"),
    writes: &[true, true],
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
    pub(crate) moves: &'a [RowMove],
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
        let list = gpu.place(&super::pairs(shape.moves))?;
        let [key, value] = shape.row_bytes;
        let params = [
            unit.count(key)?,
            unit.count(value)?,
            super::narrow(shape.heads)?,
            super::narrow(shape.start)?,
            super::narrow(shape.len)?,
            super::narrow(shape.capacity)?,
            super::narrow(shape.moves.len())?,
            list.offset / 4,
        ];
        let groups = columns(gpu, unit, shape.row_bytes, shape.len, shape.heads);
        self.gather.prepare(gpu, (unit, None), bindings, Some(list), &params, groups)
    }
}

/// Workgroups for a kernel with a thread for every unit of every live token of a head; a workgroup takes
/// several of either where that is more than a dispatch starts.
pub(super) fn columns(
    gpu: &Gpu,
    unit: Unit,
    row_bytes: [u64; 2],
    len: usize,
    heads: usize,
) -> [u64; 3] {
    let units = row_bytes[0].max(row_bytes[1]) / unit.bytes() * len as u64;
    let most = u64::from(gpu.limits().max_compute_workgroups_per_dimension);
    [units.div_ceil(u64::from(WORKGROUP)).min(most), (heads as u64).min(most), 1]
}
