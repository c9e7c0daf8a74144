//! Masks, biases, sinks and row starts of a call: checked, and laid out as `shaders/attention/extras.wgsl` reads them.

use super::AttentionOptions;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::arena::Allocation;
use crate::tensor::{Source, TensorView};
use crate::view::LayerView;

/// Words of the header: a mask and a bit mask of five words each, and where three lists lie.
const HEADER: usize = 13;

/// What a call binds beside q, K, V and the output, ready.
pub(super) struct Extras<'a> {
    /// The header, and the values of heads and rows.
    pub(super) values: Allocation,
    mask: Option<(&'a wgpu::Buffer, Source)>,
    bits: Option<(&'a wgpu::Buffer, Source)>,
}

impl<'a> Extras<'a> {
    /// Checks and uploads; `None` if there is nothing. `query` is (B, Hq, Tq, D).
    pub(super) fn new(
        gpu: &Gpu,
        view: &LayerView,
        query: [usize; 4],
        options: &AttentionOptions<'a>,
    ) -> Result<Option<Self>> {
        if !options.has().any() {
            return Ok(None);
        }
        check(view, query, options)?;
        let mut words = vec![0; HEADER];
        let mut describe = |at: usize, source: &Source, tokens: usize| -> Result<()> {
            let [b, h, t] = source.strides;
            for (word, bytes) in words[at..].iter_mut().zip([source.offset, b, h, t]) {
                *word = narrow(bytes / 4)?;
            }
            words[at + 4] = narrow(tokens as u64)?;
            Ok(())
        };
        let mask = match &options.mask {
            Some(mask) => {
                let source = mask.source("mask", gpu.limits())?;
                describe(0, &source, mask.shape[3])?;
                Some((mask.buffer, source))
            }
            None => None,
        };
        let bits = match &options.bits {
            Some(bits) => {
                let [b, h, t, tokens] = bits.shape;
                let shape = [b, h, t, tokens.div_ceil(32)];
                let words = TensorView::new(bits.buffer, crate::DType::F32, &shape)?;
                let source = words.with_offset(bits.offset).source("bit mask", gpu.limits())?;
                describe(5, &source, tokens)?;
                Some((bits.buffer, source))
            }
            None => None,
        };
        let lists = [
            options.slopes.map(bytemuck::cast_slice::<f32, u32>),
            options.sinks.map(bytemuck::cast_slice),
            options.starts,
        ];
        for (at, list) in (HEADER - 3..).zip(lists) {
            words[at] = narrow(words.len() as u64)?;
            words.extend(list.unwrap_or_default());
        }
        let values = gpu.uploads().upload(&words)?;
        Ok(Some(Self { values, mask, bits }))
    }

    /// The bindings after those of q, K, V and the result. `other` stands where there is no mask.
    pub(super) fn bindings<'b>(
        &'b self,
        other: &wgpu::BufferBinding<'b>,
    ) -> [wgpu::BufferBinding<'b>; 3] {
        let of = |mask: &'b Option<(&'a wgpu::Buffer, Source)>| match mask {
            Some((buffer, source)) => source.binding(buffer),
            None => other.clone(),
        };
        [of(&self.mask), of(&self.bits), self.values.buffer.as_entire_buffer_binding()]
    }
}

/// Refuses what does not fit the queries.
fn check(view: &LayerView, query: [usize; 4], options: &AttentionOptions<'_>) -> Result<()> {
    let [batch, heads, tokens, _] = query;
    let refused =
        |what, other, reason, remedy| Error::AttentionShape { reason, remedy, query, what, other };
    let masks = [
        ("mask", options.mask.map(|mask| mask.shape)),
        ("bit mask", options.bits.map(|bits| bits.shape)),
    ];
    for (what, shape) in masks {
        let Some(shape) = shape else { continue };
        let [b, h, t, columns] = shape;
        if ![1, batch].contains(&b) || ![1, heads].contains(&h) || t != tokens || columns == 0 {
            return Err(refused(
                what,
                shape,
                "a mask is (B or 1, Hq or 1, Tq, tokens)",
                "hand in a row of the mask for each query token, of one token or more",
            ));
        }
    }
    if let Some(mask) = options.mask.filter(|mask| mask.dtype != crate::DType::F32) {
        let (what, expected) = ("mask", crate::DType::F32);
        return Err(Error::WrongDType { what, expected, got: mask.dtype });
    }
    for (what, values) in [("ALiBi slopes", options.slopes), ("sink logits", options.sinks)] {
        let Some(values) = values else { continue };
        if values.len() != heads {
            return Err(refused(
                what,
                [1, values.len(), 1, 1],
                "there is one slope or sink logit for each query head",
                "hand in as many numbers as the query has heads",
            ));
        }
        // A sink of minus infinity takes no part, which some checkpoints say so.
        let is_off = |value: f32| what == "sink logits" && value == f32::NEG_INFINITY;
        if let Some(value) = values.iter().find(|value| !value.is_finite() && !is_off(**value)) {
            let rule = "it must be finite";
            return Err(Error::AttentionOption { option: what, value: value.to_string(), rule });
        }
    }
    if let Some(starts) = options.starts {
        let shape = [starts.len(), 1, 1, 1];
        if view.step.is_some() {
            return Err(refused(
                "row starts",
                shape,
                "sequences of a step have starts of their own",
                "crop the sequences instead",
            ));
        }
        if starts.len() != batch {
            return Err(refused(
                "row starts",
                shape,
                "there is one start for each batch row of the query",
                "hand in as many starts as there are batch rows",
            ));
        }
        let past = starts.iter().find(|&&start| start as usize > view.len);
        if let Some(&start) = past {
            return Err(Error::PositionOutOfBounds { position: start as usize, bound: view.len });
        }
    }
    Ok(())
}

fn narrow(count: u64) -> Result<u32> {
    u32::try_from(count).map_err(|_| Error::too_many("count that a kernel takes", count))
}
