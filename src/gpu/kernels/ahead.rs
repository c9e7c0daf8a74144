//! Compilation before the first step.

use std::collections::HashSet;
#[cfg(not(target_arch = "wasm32"))]
use std::sync::{Mutex, PoisonError};

use super::attention::combine_variant;
use super::{Kernel, Kernels, Rules, Unit, Variant};
use crate::dtype::DType;
use crate::error::Result;
use crate::format::{Formats, Plane, TokenBytes};
use crate::layer_shape::LayerShape;
use crate::layout::Layout;

/// Which kernels [`Gpu::compile`](crate::Gpu::compile) compiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CompileScope {
    /// The kernels of caches.
    Caches,
    /// The kernels of caches and of [`Attention`](crate::Attention).
    CachesAndAttention,
}

impl Kernels {
    /// Compiles the kernels for layers of these shapes whose views have one of these layouts.
    pub(crate) fn compile(
        &self,
        layers: &[LayerShape],
        formats: Formats,
        layouts: &[Layout],
        scope: CompileScope,
    ) -> Result<()> {
        let mut wanted: HashSet<(usize, Variant)> = HashSet::new();
        let kernels = [
            &self.append,
            &self.gather,
            &self.repeat_interleave,
            &self.collect,
            &self.attention,
            &self.attention_combine,
            &self.append_converted,
            &self.attention_tiles,
        ];
        for layer in layers {
            let dims = [layer.key_dim, layer.value_dim];
            let stored = formats.of(layer.dtype);
            let is_converted = stored != [layer.dtype.into(); 2];
            let planes = TokenBytes::new(stored, dims, false).planes(0);
            for (&layout, Plane { row_bytes, .. }) in
                planes.flat_map(|plane| layouts.iter().map(move |layout| (layout, plane)))
            {
                let unit = Unit::for_rows(row_bytes);
                if is_converted {
                    let converted = super::append_converted::converted_ahead(layer, stored, layout);
                    wanted.extend(converted.map(|it| (6, it)));
                } else {
                    let plain = self.append_ahead(layer, unit, row_bytes, layout)?;
                    wanted.extend(plain.map(|it| (0, it)));
                }
                let moves = super::gather::FORMS.map(|form| super::gather::variant(unit, form));
                wanted.extend(moves.map(|it| (1, it)));
                wanted.insert((2, Variant { unit, ..Variant::default() }));
                if layout.has_table() {
                    let layout = Some(layout);
                    wanted.insert((3, Variant { unit, layout, ..Variant::default() }));
                }
                if scope == CompileScope::CachesAndAttention {
                    let (rules, types) = (Rules::default(), [DType::F32; 2]);
                    let attention = self.attention_ahead(layer, stored, layout, &rules, types);
                    let numbered = |(is_tiled, it)| (if is_tiled { 7 } else { 4 }, it);
                    wanted.extend(attention.into_iter().map(numbered));
                    let is_packed = layout == Layout::RaggedPaged;
                    wanted.insert((5, combine_variant(is_packed, DType::F32)));
                }
            }
        }
        let wanted = wanted.into_iter().map(|(kernel, variant)| (kernels[kernel], variant));
        compile_all(wanted.collect())
    }

    /// Compiles attention over layers of these shapes whose views have one of these layouts, split or not.
    pub(crate) fn compile_attention(
        &self,
        layers: &[LayerShape],
        formats: Formats,
        layouts: &[Layout],
        rules: &Rules,
        types: [DType; 2],
    ) -> Result<()> {
        let mut wanted = HashSet::new();
        for (layer, &layout) in
            layers.iter().flat_map(|layer| layouts.iter().map(move |it| (layer, it)))
        {
            let stored = formats.of(layer.dtype);
            // Into the output, and into partial results.
            for types in [types, [types[0], DType::F32]] {
                let variants = self.attention_ahead(layer, stored, layout, rules, types);
                wanted.extend(variants.into_iter().map(|(is_tiled, it)| (Some(is_tiled), it)));
            }
            wanted.insert((None, combine_variant(layout == Layout::RaggedPaged, types[1])));
        }
        let of = |is_tiled: Option<bool>| match is_tiled {
            Some(is_tiled) => self.attention_kernel(rules, is_tiled),
            None => &self.attention_combine,
        };
        let wanted = wanted.into_iter().map(|(kernel, variant)| (of(kernel), variant));
        compile_all(wanted.collect())
    }
}

/// Compiles on as many threads as there are processors. The first failure is returned.
#[cfg(not(target_arch = "wasm32"))]
fn compile_all(wanted: Vec<(&Kernel, Variant)>) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(wanted.len());
    let wanted = Mutex::new(wanted);
    let next = || wanted.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let work = || {
        while let Some((kernel, variant)) = next() {
            kernel.pipeline(variant)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let own = work();
        threads.into_iter().fold(own, |all, thread| match thread.join() {
            Ok(result) => all.and(result),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

/// A browser compiles on threads of its own.
#[cfg(target_arch = "wasm32")]
fn compile_all(wanted: Vec<(&Kernel, Variant)>) -> Result<()> {
    wanted.into_iter().try_for_each(|(kernel, variant)| kernel.pipeline(variant).map(|_| ()))
}
