//! `shaders/gather.wgsl`: moves batch rows within their buffers.

use super::params::params;
use super::{Dispatch, Kernels, Unit, Variant, WORKGROUP};
use crate::error::Result;
use crate::format::Plane;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache gather",
    wgsl: include_str!("../../../shaders/gather.wgsl"),
    joined: &[include_str!("../../../shaders/columns.wgsl")],
    sides: None,
    writes: &[true, true],
    params_bytes: Params::BYTES,
    constants: &["has_copies", "has_cycles"],
    layouts: &[],
    formats: &[],
};

params! {
    /// `struct Params` of the shader, where each field is described.
    struct Params {
        key_units: u32,
        value_units: u32,
        key_base: u32,
        value_base: u32,
        heads: u32,
        tiles: u32,
        start: u32,
        len: u32,
        capacity: u32,
        list_at: u32,
        cycles_at: u32,
        list_end: u32,
    }
}

/// The live part of a layer whose rows move.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatherShape<'a> {
    /// What moves of the buffers.
    pub(crate) plane: Plane,
    pub(crate) heads: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) capacity: usize,
    /// The moves in order: copies, then cycles from word `cycles_at` on.
    pub(crate) moves: &'a [u32],
    pub(crate) cycles_at: usize,
}

impl Kernels {
    /// Binds K and V of a layer; one bind group serves all gathers.
    pub(crate) fn bind_gather(
        &self,
        bindings: [wgpu::BufferBinding<'_>; 2],
    ) -> Result<wgpu::BindGroup> {
        self.gather.bind(&bindings)
    }

    pub(crate) fn gather(
        &self,
        bindings: wgpu::BindGroup,
        shape: &GatherShape<'_>,
    ) -> Result<Dispatch> {
        let Plane { base, row_bytes } = shape.plane;
        let unit = Unit::for_rows(row_bytes);
        let list = self.uploads.upload(shape.moves)?;
        let tiles = tiles(unit, row_bytes, shape.len)?;
        let params = Params {
            key_units: unit.count(row_bytes[0])?,
            value_units: unit.count(row_bytes[1])?,
            key_base: unit.count(base[0])?,
            value_base: unit.count(base[1])?,
            heads: super::narrow(shape.heads)?,
            tiles,
            start: super::narrow(shape.start)?,
            len: super::narrow(shape.len)?,
            capacity: super::narrow(shape.capacity)?,
            list_at: list.offset / 4,
            cycles_at: super::narrow(shape.cycles_at)?,
            list_end: super::narrow(shape.moves.len())?,
        };
        let wanted = variant(unit, [shape.cycles_at > 0, shape.cycles_at < shape.moves.len()]);
        if !self.gather.is_compiled(&wanted) {
            // All three at once, so that a beam search compiles nothing in a later step.
            for form in FORMS {
                self.gather.pipeline(variant(unit, form))?;
            }
        }
        self.gather.prepare(
            wanted,
            bindings,
            Some(list),
            &params,
            u64::from(tiles) * shape.heads as u64,
        )
    }
}

/// The variants: whether a list of moves has copies, and whether it has cycles.
pub(super) const FORMS: [[bool; 2]; 3] = [[true, false], [false, true], [true, true]];

pub(super) fn variant(unit: Unit, form: [bool; 2]) -> Variant {
    let [has_copies, has_cycles] = form.map(u32::from);
    Variant {
        unit,
        constants: super::variant::constants([has_copies, has_cycles]),
        ..Variant::default()
    }
}

/// Workgroups for the live tokens of one head, for kernels whose invocations move four units each.
pub(super) fn tiles(unit: Unit, row_bytes: [u64; 2], len: usize) -> Result<u32> {
    let live = unit.count(row_bytes[0].max(row_bytes[1]))?;
    let units = u64::from(live).saturating_mul(len as u64);
    let tiles = units.div_ceil(u64::from(4 * WORKGROUP));
    u32::try_from(tiles).map_err(|_| crate::Error::too_many("number of workgroups a head", tiles))
}
