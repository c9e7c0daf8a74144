//! Writes K and V into a layer: new ones as they come in, and stored ones as they are.

use crate::dtype::DType;
use crate::error::{Error, Result, StoringError};
use crate::format::{Format, Formats, Plane};
use crate::gpu::Gpu;
use crate::gpu::arena::Allocation;
use crate::gpu::bind_groups::Purpose;
use crate::gpu::kernels::{AppendShape, Dispatch, Positions};
use crate::storage::store::{Shape, Store};
use crate::tensor::{Source, TensorView, check_whole_words};
use crate::view::LayerView;

/// How a cache stores what comes in.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Storing {
    pub(crate) formats: Formats,
    /// Whether V is the first elements of each head of K, and not stored.
    pub(crate) is_value_in_key: bool,
}

impl Storing {
    /// The shape of a layer for K and V of `dtype`.
    pub(crate) fn shape(
        &self,
        [batch, heads]: [usize; 2],
        dims: [usize; 2],
        dtype: DType,
    ) -> Shape {
        let mut formats = self.formats.of(dtype);
        if self.is_value_in_key {
            formats[1] = formats[0];
        }
        let [key_dim, value_dim] = dims;
        let is_value_in_key = self.is_value_in_key;
        Shape { batch, heads, key_dim, value_dim, formats, is_value_in_key }
    }

    /// Refuses K and V of a type that would be stored in another way than the layer's.
    pub(crate) fn check_dtype(&self, shape: &Shape, what: &'static str, got: DType) -> Result<()> {
        let own = self.shape([shape.batch, shape.heads], [shape.key_dim, shape.value_dim], got);
        let differs = |side: &usize| own.formats[*side] != shape.formats[*side];
        // Only a side that is stored as it comes in can differ.
        match [0, 1].iter().find(|side| differs(side)).and_then(|&side| shape.formats[side].dtype())
        {
            Some(expected) => Err(Error::WrongDType { what, expected, got }),
            None => Ok(()),
        }
    }
}

/// New K and V of a layer, checked, and how many tokens of each row they are.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    key: &'a TensorView<'a>,
    value: &'a TensorView<'a>,
    sources: [Source; 2],
    pub(super) tokens: usize,
}

/// Where new tokens go.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) store: &'a Store,
    /// The layer as it will be.
    pub(super) view: &'a LayerView,
    pub(super) positions: Positions,
    /// The buffer of the view's page table and records, and of the list of positions.
    pub(super) lists: Option<&'a Allocation>,
}

impl<'a> Inputs<'a> {
    /// Checks K and V, whose shapes are those of the layer, against the device and the layer's own memory.
    pub(super) fn new(
        gpu: &Gpu,
        layer: usize,
        shape: &Shape,
        store: Option<&Store>,
        [key, value]: [&'a TensorView<'a>; 2],
    ) -> Result<Self> {
        let mut sources = [key.source("key", gpu.limits())?, value.source("value", gpu.limits())?];
        for (what, view, dim, format) in [
            ("key", key, shape.key_dim, shape.formats[0]),
            ("value", value, shape.value_dim, shape.formats[1]),
        ] {
            check_stored(what, dim, format)?;
            view.check_device(what, gpu.handle())?;
            // New tokens must not be read from the layer's own buffers, which the kernel binds to write.
            let is_own = |store: &Store| store.ranges().iter().any(|it| it.buffer == *view.buffer);
            if store.is_some_and(is_own) {
                return Err(Error::SourceIsCache { what, layer });
            }
        }
        if shape.is_value_in_key {
            if !value.is_prefix_of(key) {
                let (key, value) = (key.shape, value.shape);
                return Err(StoringError::ValueNotInKey { layer, key, value }.into());
            }
            sources[1] = Source { row_bytes: 0, ..sources[0] };
        }
        Ok(Self { key, value, sources, tokens: key.shape[2] })
    }

    /// The dispatch that writes them.
    pub(super) fn write(&self, gpu: &Gpu, shape: &Shape, target: Target<'_>) -> Result<Dispatch> {
        let Target { store, view, positions, lists } = target;
        let value = if shape.is_value_in_key { self.key } else { self.value };
        let [k, v] = store.bindings();
        let [key_source, value_source] = &self.sources;
        let bindings =
            [key_source.binding(self.key.buffer), value_source.binding(value.buffer), k, v];
        let bind = |bindings: &[_]| gpu.kernels().bind_append(bindings);
        let (bindings, _) = store.bind_groups.get(Purpose::Append, &bindings, bind)?;
        let append = AppendShape {
            sources: &self.sources,
            tokens: self.tokens,
            positions,
            target: view,
            lists,
        };
        let dtype = self.key.dtype;
        let sides = if shape.is_value_in_key { 1 } else { 2 };
        if shape.formats[..sides].iter().any(|&format| format != dtype.into()) {
            return gpu.kernels().append_converted(bindings, &append, dtype);
        }
        gpu.kernels().append(bindings, &append, false)
    }
}

/// The dispatches that write tokens which are stored already: those of `from`, which has room for `count` tokens of
/// each row of `shape` and nothing else.
pub(super) fn write_stored(
    gpu: &Gpu,
    shape: &Shape,
    (from, count): (&Store, usize),
    tokens: usize,
    target: Target<'_>,
) -> Result<Vec<Dispatch>> {
    let Target { store, view, positions, lists } = target;
    let [[key, value], [k, v]] = [from, store].map(Store::bindings);
    let bindings = gpu.kernels().bind_append(&[key, value, k, v])?;
    let planes = shape.planes(shape.batch, count).enumerate();
    let dispatches = planes.map(|(at, Plane { base, row_bytes })| {
        let sources = [0, 1].map(|side| {
            let row = row_bytes[side];
            let head = count as u64 * row;
            let strides = [shape.heads as u64 * head, head, row];
            let window = (0, from.ranges()[side].size);
            Source { offset: base[side], strides, row_bytes: row, window }
        });
        let append = AppendShape { sources: &sources, tokens, positions, target: view, lists };
        gpu.kernels().append(bindings.clone(), &append, at == 1)
    });
    dispatches.collect()
}

/// Refuses tokens that are stored as heads which are not whole words.
pub(crate) fn check_stored(what: &'static str, dim: usize, format: Format) -> Result<()> {
    format.dtype().map_or(Ok(()), |dtype| check_whole_words(what, dim, dtype))
}
