//! `shaders/collect.wgsl`: live tokens out of their pages, for reading back.

use std::ops::Range;

use super::gather::tiles;
use super::{Dispatch, Kernels, Unit, Variant};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::layout::Layout;
use crate::view::LayerView;

pub(super) const SOURCE: super::Source = super::Source {
    label: "kvcache collect",
    wgsl: include_str!("../../../shaders/collect.wgsl"),
    common: "",
    writes: &[false, false, true, true],
    constants: &[],
    layouts: &[Layout::Paged],
    dtypes: &[],
};

impl Kernels {
    /// A copy of the live tokens of some batch rows of a paged view, straight, into `targets`.
    pub(crate) fn collect(
        &self,
        gpu: &Gpu,
        view: &LayerView<'_>,
        rows: Range<usize>,
        targets: [&wgpu::Buffer; 2],
    ) -> Result<Dispatch> {
        let size = view.dtype.size() as u64;
        let row_bytes = [view.key_dim, view.value_dim].map(|dim| dim as u64 * size);
        let unit = Unit::for_rows(row_bytes);
        let all = rows.len() * view.heads;
        let tiles = tiles(unit, row_bytes, view.len)?;
        let mut params = view.layout_words().to_vec();
        params.extend([
            unit.count(row_bytes[0])?,
            unit.count(row_bytes[1])?,
            super::narrow(rows.start)?,
            super::narrow(all)?,
            tiles,
        ]);
        let [key, value] = targets;
        let bindings =
            self.collect.bind(gpu, &[view.key, view.value, key, value].map(super::whole))?;
        let groups = u64::from(tiles) * all as u64;
        let variant = Variant { unit, layout: Some(Layout::Paged), ..Variant::default() };
        let table = view.pages.map(|pages| pages.placed.clone());
        self.collect.prepare(gpu, variant, bindings, table, &params, groups)
    }
}
