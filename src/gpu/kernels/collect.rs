//! `shaders/collect.wgsl`: copies live tokens from their pages to contiguous rows, for read-back.

use std::ops::Range;

use super::gather::tiles;
use super::params::params;
use super::{Dispatch, Kernels, Unit, Variant};
use crate::error::Result;
use crate::format::Plane;
use crate::layout::{KvLayout, Layout};
use crate::view::LayerView;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache collect",
    wgsl: include_str!("../../../shaders/collect.wgsl"),
    joined: &[],
    sides: None,
    writes: &[false, false, true, true],
    params_bytes: Params::BYTES,
    constants: &[],
    layouts: &[Layout::Wrapped, Layout::Paged, Layout::RaggedWrapped, Layout::RaggedPaged],
    formats: &[],
};

params! {
    /// `struct Params` of the shader, where each field is described.
    struct Params {
        kv: KvLayout,
        key_units: u32,
        value_units: u32,
        key_base: u32,
        value_base: u32,
        key_target_base: u32,
        value_target_base: u32,
        first: u32,
        rows: u32,
        tiles: u32,
    }
}

impl Kernels {
    /// Copies the live tokens of some batch rows to `targets`, row-major, with zeros behind shorter rows: the elements,
    /// and then, if K or V is quantized, the scales, from where the elements of all these rows end.
    pub(crate) fn collect(
        &self,
        view: &LayerView,
        rows: Range<usize>,
        targets: [wgpu::BufferBinding<'_>; 2],
    ) -> Result<Vec<Dispatch>> {
        let [key, value] = targets;
        let [k, v] = view.bindings();
        let bindings = self.collect.bind(&[k, v, key, value])?;
        let tokens = (rows.len() * view.heads * view.len) as u64;
        let mut bases = [0; 2];
        let mut dispatches = Vec::with_capacity(2);
        for plane in view.planes() {
            let Plane { base, row_bytes } = plane;
            let unit = Unit::for_rows(row_bytes);
            let all = rows.len() * view.heads;
            let tiles = tiles(unit, row_bytes, view.len)?;
            let params = Params {
                kv: view.kv_layout(),
                key_units: unit.count(row_bytes[0])?,
                value_units: unit.count(row_bytes[1])?,
                key_base: unit.count(base[0])?,
                value_base: unit.count(base[1])?,
                key_target_base: unit.count(bases[0])?,
                value_target_base: unit.count(bases[1])?,
                first: super::narrow(rows.start)?,
                rows: super::narrow(all)?,
                tiles,
            };
            let groups = u64::from(tiles) * all as u64;
            let layout = Some(super::append::as_written(view.layout()));
            let variant = Variant { unit, layout, ..Variant::default() };
            let (bindings, table) = (bindings.clone(), view.table().cloned());
            dispatches.push(self.collect.prepare(variant, bindings, table, &params, groups)?);
            bases = [0, 1].map(|side| bases[side] + tokens * row_bytes[side]);
        }
        Ok(dispatches)
    }
}
