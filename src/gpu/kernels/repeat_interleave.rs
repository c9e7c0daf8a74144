//! `shaders/repeat_interleave.wgsl`: live tokens into fresh buffers, each row as often as asked for.

use super::gather::tiles;
use super::{Dispatch, Kernels, Unit, Variant};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::host::plan::MoveList;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache repeat_interleave",
    wgsl: include_str!("../../../shaders/repeat_interleave.wgsl"),
    common: include_str!("../../../shaders/columns.wgsl"),
    writes: &[false, false, true, true],
    constants: &[],
    layouts: &[],
    dtypes: &[],
};

/// The live part of a layer that is copied, and the ring that it goes to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyShape<'a> {
    /// Bytes of one token of one head, of K and of V.
    pub(crate) row_bytes: [u64; 2],
    pub(crate) heads: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) old_capacity: usize,
    pub(crate) new_capacity: usize,
    pub(crate) copies: &'a MoveList,
}

impl Kernels {
    /// A copy from the old K and V to the new ones.
    pub(crate) fn copy_rows(
        &self,
        gpu: &Gpu,
        [old, new]: [[&wgpu::Buffer; 2]; 2],
        shape: &CopyShape<'_>,
    ) -> Result<Dispatch> {
        let unit = Unit::for_rows(shape.row_bytes);
        let list = gpu.place(&shape.copies.words)?;
        let [key, value] = shape.row_bytes;
        let tiles = tiles(unit, shape.row_bytes, shape.len)?;
        let params = [
            unit.count(key)?,
            unit.count(value)?,
            super::narrow(shape.heads)?,
            tiles,
            super::narrow(shape.start)?,
            super::narrow(shape.len)?,
            super::narrow(shape.old_capacity)?,
            super::narrow(shape.new_capacity)?,
            list.offset / 4,
            super::narrow(shape.copies.words.len())?,
        ];
        let bindings = self
            .repeat_interleave
            .bind(gpu, &[old[0], old[1], new[0], new[1]].map(super::whole))?;
        let groups = u64::from(tiles) * shape.heads as u64;
        self.repeat_interleave.prepare(
            gpu,
            Variant { unit, ..Variant::default() },
            bindings,
            Some(list),
            &params,
            groups,
        )
    }
}
