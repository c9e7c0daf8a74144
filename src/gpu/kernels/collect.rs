//! `shaders/collect.wgsl`: copies live tokens from their pages to contiguous rows, for read-back.

use std::ops::Range;

use super::gather::tiles;
use super::params::params;
use super::{Dispatch, Kernels, Unit, Variant};
use crate::error::Result;
use crate::layout::{KvLayout, Layout};
use crate::view::LayerView;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache collect",
    wgsl: include_str!("../../../shaders/collect.wgsl"),
    joined: &[],
    writes: &[false, false, true, true],
    params_bytes: Params::BYTES,
    constants: &[],
    layouts: &[Layout::Paged, Layout::RaggedWrapped, Layout::RaggedPaged],
    dtypes: &[],
};

params! {
    /// `struct Params` of the shader, where each field is described.
    struct Params {
        kv: KvLayout,
        key_units: u32,
        value_units: u32,
        first: u32,
        rows: u32,
        tiles: u32,
    }
}

impl Kernels {
    /// Copies the live tokens of some batch rows of a paged or ragged view to `targets`, row-major, with zeros behind shorter rows.
    pub(crate) fn collect(
        &self,
        view: &LayerView,
        rows: Range<usize>,
        targets: [&wgpu::Buffer; 2],
    ) -> Result<Dispatch> {
        let size = view.dtype.size() as u64;
        let row_bytes = [view.key_dim, view.value_dim].map(|dim| dim as u64 * size);
        let unit = Unit::for_rows(row_bytes);
        let all = rows.len() * view.heads;
        let tiles = tiles(unit, row_bytes, view.len)?;
        let params = Params {
            kv: view.kv_layout(),
            key_units: unit.count(row_bytes[0])?,
            value_units: unit.count(row_bytes[1])?,
            first: super::narrow(rows.start)?,
            rows: super::narrow(all)?,
            tiles,
        };
        let [key, value] = targets;
        let bindings =
            self.collect.bind(&[&view.key, &view.value, key, value].map(super::whole))?;
        let groups = u64::from(tiles) * all as u64;
        let variant = Variant { unit, layout: Some(view.layout()), ..Variant::default() };
        let table = view.table().cloned();
        self.collect.prepare(variant, bindings, table, &params, groups)
    }
}
