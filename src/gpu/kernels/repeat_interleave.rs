//! `shaders/repeat_interleave.wgsl`: copies live tokens to new buffers, each row to one or several rows.

use super::gather::tiles;
use super::params::params;
use super::{Dispatch, Kernels, Unit, Variant};
use crate::error::Result;
use crate::format::Plane;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache repeat_interleave",
    wgsl: include_str!("../../../shaders/repeat_interleave.wgsl"),
    joined: &[include_str!("../../../shaders/columns.wgsl")],
    sides: None,
    writes: &[false, false, true, true],
    params_bytes: Params::BYTES,
    constants: &[],
    layouts: &[],
    formats: &[],
};

params! {
    /// `struct Params` of the shader, where each field is described.
    struct Params {
        key_units: u32,
        value_units: u32,
        key_from_base: u32,
        value_from_base: u32,
        key_base: u32,
        value_base: u32,
        heads: u32,
        tiles: u32,
        start: u32,
        len: u32,
        old_capacity: u32,
        new_capacity: u32,
        list_at: u32,
        list_end: u32,
    }
}

/// The live part of a layer that is copied, and the ring that receives it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyShape<'a> {
    /// What is copied, in the old buffers and in the new ones: rows of the same bytes.
    pub(crate) planes: [Plane; 2],
    pub(crate) heads: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) old_capacity: usize,
    pub(crate) new_capacity: usize,
    /// The copies in order.
    pub(crate) copies: &'a [u32],
}

impl Kernels {
    /// Copies rows from the old K and V to the new ones.
    pub(crate) fn copy_rows(
        &self,
        [old, new]: [[wgpu::BufferBinding<'_>; 2]; 2],
        shape: &CopyShape<'_>,
    ) -> Result<Dispatch> {
        let [from, to] = shape.planes;
        let unit = Unit::for_rows(to.row_bytes);
        let list = self.uploads.upload(shape.copies)?;
        let tiles = tiles(unit, to.row_bytes, shape.len)?;
        let params = Params {
            key_units: unit.count(to.row_bytes[0])?,
            value_units: unit.count(to.row_bytes[1])?,
            key_from_base: unit.count(from.base[0])?,
            value_from_base: unit.count(from.base[1])?,
            key_base: unit.count(to.base[0])?,
            value_base: unit.count(to.base[1])?,
            heads: super::narrow(shape.heads)?,
            tiles,
            start: super::narrow(shape.start)?,
            len: super::narrow(shape.len)?,
            old_capacity: super::narrow(shape.old_capacity)?,
            new_capacity: super::narrow(shape.new_capacity)?,
            list_at: list.offset / 4,
            list_end: super::narrow(shape.copies.len())?,
        };
        let ([k, v], [new_k, new_v]) = (old, new);
        let bindings = self.repeat_interleave.bind(&[k, v, new_k, new_v])?;
        let groups = u64::from(tiles) * shape.heads as u64;
        self.repeat_interleave.prepare(
            Variant { unit, ..Variant::default() },
            bindings,
            Some(list),
            &params,
            groups,
        )
    }
}
