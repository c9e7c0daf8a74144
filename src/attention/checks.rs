//! What attention refuses: shapes that do not fit, and outputs that would overwrite what is read or kept.

use std::ops::Range;

use super::AttentionOptions;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::kernels::{MOST_DIM, Rules};
use crate::tensor::{Source, TensorView};
use crate::view::LayerView;

/// K and V as a query must fit them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Live {
    /// (B, H, T, D), of K and of V.
    key: [usize; 4],
    value: [usize; 4],
    /// New tokens of all sequences, if queries are packed.
    packed: Option<usize>,
    /// Whether T counts all live tokens, and not those alone that are to be written.
    is_written: bool,
}

impl Live {
    pub(super) fn of(view: &LayerView) -> Self {
        let (key, value) = (view.key_shape(), view.value_shape());
        let packed = view.step.as_ref().map(|step| step.total);
        Self { key, value, packed, is_written: true }
    }

    /// Before they are written.
    pub(super) fn to_be(key: &TensorView<'_>, value: &TensorView<'_>, is_packed: bool) -> Self {
        let packed = is_packed.then_some(key.shape[2]);
        Self { key: key.shape, value: value.shape, packed, is_written: false }
    }
}

/// Query heads of a K/V head, and new tokens.
pub(super) fn shapes(
    query: &TensorView<'_>,
    live: Live,
    output: &TensorView<'_>,
    options: &AttentionOptions<'_>,
) -> Result<(usize, usize)> {
    let [rows, kv_heads, len, key_dim] = live.key;
    let value_dim = live.value[3];
    let [batch, heads, tokens, dim] = query.shape;
    let refused = |reason, remedy| Error::AttentionShape {
        reason,
        remedy,
        query: query.shape,
        what: "K",
        other: live.key,
    };
    let fit = "hand in a query that fits the view";
    if let Some(total) = live.packed {
        if batch != 1 || tokens != total {
            return Err(refused(
                "the query of a step is packed: (1, Hq, tokens of the step, D)",
                "hand in one query token for each new token of the step, in its order",
            ));
        }
    } else if batch != rows && rows != 1 {
        return Err(refused("the query and the cache differ in batch rows", fit));
    }
    if heads % kv_heads != 0 {
        return Err(refused("the query's heads are no multiple of the cache's", fit));
    }
    if dim != key_dim {
        return Err(refused("the query and K differ in head_dim", fit));
    }
    if output.shape != [batch, heads, tokens, value_dim] {
        return Err(Error::AttentionShape {
            reason: "the output must be (B, Hq, Tq, D of V)",
            remedy: "hand in an output of the query's B, Hq and Tq, and of V's D",
            query: query.shape,
            what: "output",
            other: output.shape,
        });
    }
    for (what, shape) in [("K", live.key), ("V", live.value)] {
        if shape[3] > MOST_DIM {
            return Err(Error::AttentionShape {
                reason: "head_dim is more than the 1024 that this kernel supports",
                remedy: "read the view with an attention shader of your own, joined with its layout's text",
                query: query.shape,
                what,
                other: shape,
            });
        }
    }
    if len == 0 {
        let remedy = "update the layer before attention reads it";
        return Err(refused("the cache holds no token to attend to", remedy));
    }
    if options.is_causal && live.packed.is_none() && tokens > len {
        let (reason, remedy) = match live.is_written {
            true => (
                "causal attention needs every new token in the cache first",
                "write K and V of all of them before attention and take the view of that update, or check the order of the axes (TensorView::bthd)",
            ),
            false => (
                "there are more queries than new tokens",
                "hand in a query for each new token, or for the latest ones alone; check the order of the axes (TensorView::bthd)",
            ),
        };
        return Err(refused(reason, remedy));
    }
    Ok((heads / kv_heads, tokens))
}

/// What queries see and how scores are made, as the kernel takes it.
pub(super) fn rules(options: &AttentionOptions<'_>, dim: usize) -> Result<Rules> {
    let refused = |option, value: String, rule| Err(Error::AttentionOption { option, value, rule });
    let scale = match options.scale {
        Some(scale) if scale.is_finite() => scale,
        Some(scale) => {
            return refused(
                "scale",
                scale.to_string(),
                "it must be finite; None stands for 1/sqrt(head_dim)",
            );
        }
        None => {
            let dim = u16::try_from(dim).expect("the head was checked to have few elements");
            1.0 / f32::from(dim).sqrt()
        }
    };
    if let Some(cap) = options.cap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
        return refused(
            "soft cap",
            cap.to_string(),
            "it must be finite and above zero; None is no cap",
        );
    }
    if options.window == Some(0) {
        return refused(
            "window",
            "0".to_owned(),
            "a query sees its own token at least, which is a window of 1; None is no window",
        );
    }
    let window = options.window.map(|window| [window, options.first_tokens]);
    Ok(Rules { scale, is_causal: options.is_causal, window, cap: options.cap, has: options.has() })
}

/// The output must not overwrite a mask of the same call: one buffer cannot be bound for both.
pub(super) fn masks(
    gpu: &Gpu,
    options: &AttentionOptions<'_>,
    output: &TensorView<'_>,
) -> Result<()> {
    let masks = [
        ("the mask", options.mask.map(|it| it.buffer)),
        ("the bit mask", options.bits.map(|it| it.buffer)),
    ];
    for (what, buffer) in masks {
        if buffer == Some(output.buffer) {
            return Err(Error::OutputIsRead { what });
        }
    }
    match options.mask {
        Some(mask) => mask.check_device("mask", gpu.handle()),
        None => Ok(()),
    }
}

/// The output must have a place for each result, and share none with the query or with any cache. Both views
/// are checked to lie in their buffers.
pub(super) fn output(
    gpu: &Gpu,
    (query, from): (&TensorView<'_>, &Source),
    view: &LayerView,
    (output, to): (&TensorView<'_>, &Source),
) -> Result<()> {
    let results = Elements::of(output, to);
    if results.overlap_one_another() {
        return Err(Error::AttentionShape {
            reason: "the output's strides put several results in one place",
            remedy: "give strides with which no two elements of the output share a place",
            query: query.shape,
            what: "output",
            other: output.shape,
        });
    }
    for (what, buffer) in
        [("K", Some(view.key())), ("V", Some(view.value())), ("the page table", view.page_table())]
    {
        if buffer == Some(output.buffer) {
            return Err(Error::OutputIsRead { what });
        }
    }
    if gpu.handle().own_buffers.contains(output.buffer) {
        return Err(Error::OutputIsRead { what: "another layer, or of another cache" });
    }
    if query.buffer == output.buffer {
        let queries = Elements::of(query, from);
        if !queries.are_apart_from(&results) {
            let [query, output] = [queries, results].map(|elements| elements.bytes());
            return Err(Error::OutputOverlapsQuery { query, output });
        }
    }
    Ok(())
}

/// Where the elements of a view lie, in words of 4 bytes: heads of 16-bit types begin and end at whole words.
#[derive(Clone, Copy, Debug)]
struct Elements {
    first: u64,
    /// Extents and strides of B, H and T. An extent of 1 has a stride of zero.
    axes: [(u64, u64); 3],
    /// Words of a head, which are adjacent.
    run: u64,
}

impl Elements {
    fn of(view: &TensorView<'_>, source: &Source) -> Self {
        let axis = |i: usize| (view.shape[i] as u64, source.strides[i] / 4);
        Self { first: view.offset / 4, axes: [0, 1, 2].map(axis), run: source.row_bytes / 4 }
    }

    /// From the first element to one past the last, along the axes that `is_counted` picks.
    fn span(&self, is_counted: impl Fn(u64) -> bool) -> u64 {
        let counted = self.axes.iter().filter(|(_, stride)| is_counted(*stride));
        counted.map(|(extent, stride)| (extent - 1) * stride).sum::<u64>() + self.run
    }

    fn bytes(&self) -> Range<u64> {
        4 * self.first..4 * (self.first + self.span(|_| true))
    }

    /// Whether two elements of different indices lie in one place. Exact for any strides.
    fn overlap_one_another(&self) -> bool {
        let mut axes = self.axes;
        axes.sort_by_key(|&(_, stride)| stride);
        let mut span = self.run;
        let is_nested = axes.iter().all(|&(extent, stride)| {
            let is_outside = extent == 1 || stride >= span;
            span += (extent - 1) * stride;
            is_outside
        });
        if is_nested {
            return false;
        }
        let count = axes.iter().fold(self.run, |all, &(extent, _)| all.saturating_mul(extent));
        if count > self.span(|_| true) {
            return true;
        }
        // Rarely: strides that are not nested. Two heads overlap if their distance is less than a head. Every
        // distance along the two shorter axes is tried, and the third axis solved for: since there are no more
        // elements than places, the two shorter axes have a million steps together at most.
        axes.sort_by_key(|&(extent, _)| extent);
        let [(a, a_stride), (b, b_stride), (c, c_stride)] =
            axes.map(|(extent, stride)| (extent.cast_signed(), stride.cast_signed()));
        let run = self.run.cast_signed();
        let is_overlap = |i: i64, j: i64, k: i64| {
            (i, j, k) != (0, 0, 0)
                && k.abs() < c
                && (i * a_stride + j * b_stride + k * c_stride).abs() < run
        };
        (0..a).any(|i| {
            (1 - b..b).any(|j| {
                let nearest = -(i * a_stride + j * b_stride).div_euclid(c_stride.max(1));
                [nearest - 1, nearest, nearest + 1].iter().any(|&k| is_overlap(i, j, k))
            })
        })
    }

    /// Whether no element lies in a place of the other's: the ranges are apart, or within the rows of one
    /// tensor the columns are. What cannot be told so counts as overlapping.
    fn are_apart_from(&self, other: &Self) -> bool {
        let [a, b] = [self.bytes(), other.bytes()];
        if a.end <= b.start || b.end <= a.start {
            return true;
        }
        self.axes.iter().chain(&other.axes).filter(|(_, row)| *row > 0).any(|&(_, row)| {
            self.columns(row)
                .zip(other.columns(row))
                .is_some_and(|(a, b)| a.end <= b.start || b.end <= a.start)
        })
    }

    /// Which columns the elements take of rows of `row` elements, if they stay within these.
    fn columns(&self, row: u64) -> Option<Range<u64>> {
        let first = self.first % row;
        let last = first + self.span(|stride| stride % row != 0);
        (last <= row).then_some(first..last)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// All small views, with the places of their elements.
    fn all() -> Vec<(Elements, Vec<u64>)> {
        let mut all = Vec::new();
        for extents in [[1, 1, 2], [1, 2, 3], [2, 2, 2], [3, 1, 4], [2, 3, 4]] {
            for code in 0..8 * 8 * 8 {
                let strides =
                    [code % 8, code / 8 % 8, code / 64].map(|i| [1, 2, 3, 4, 5, 6, 9, 12][i]);
                let first = code as u64 % 5;
                let axes = [0, 1, 2].map(|i| {
                    let extent: u64 = extents[i];
                    (extent, if extent > 1 { strides[i] } else { 0 })
                });
                let [b, h, t] = extents;
                for run in [1, 2, 3] {
                    let elements = Elements { first, axes, run };
                    let mut places = Vec::new();
                    for i in 0..b * h * t {
                        let index = [i / (h * t), i / t % h, i % t];
                        let head = (0..3).map(|axis| index[axis] * axes[axis].1).sum::<u64>();
                        places.extend((0..run).map(|d| first + head + d));
                    }
                    all.push((elements, places));
                }
            }
        }
        all
    }

    #[test]
    fn an_overlap_of_elements_is_found_exactly() {
        for (elements, places) in all() {
            let different: HashSet<_> = places.iter().collect();
            let is_overlap = different.len() < places.len();
            assert_eq!(elements.overlap_one_another(), is_overlap, "{elements:?}");
        }
    }

    #[test]
    fn views_that_are_said_to_be_apart_share_no_place() {
        let all = all();
        let mut apart = 0;
        for (i, (elements, places)) in all.iter().enumerate() {
            for (other, others) in all.iter().skip(i % 61).step_by(61) {
                let others = others.iter().map(|place| place + 4).collect::<HashSet<_>>();
                let other = Elements { first: other.first + 4, ..*other };
                if elements.are_apart_from(&other) {
                    apart += 1;
                    assert!(
                        places.iter().all(|place| !others.contains(place)),
                        "{elements:?}, {other:?}"
                    );
                }
            }
        }
        assert!(apart > 1000, "{apart}");
    }

    #[test]
    fn numbers_that_make_no_scores_are_refused() {
        let plain = AttentionOptions::default();
        assert_eq!(rules(&plain, 64).map(|rules| rules.scale), Ok(0.125));
        assert_eq!(rules(&plain.with_scale(-3.0), 64).map(|rules| rules.scale), Ok(-3.0));
        let mut refused =
            vec![plain.with_window(0), plain.with_soft_cap(0.0), plain.with_soft_cap(-1.0)];
        for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            refused.extend([plain.with_scale(number), plain.with_soft_cap(number)]);
        }
        for options in refused {
            let error = rules(&options, 64).expect_err("no scores");
            assert!(matches!(error, Error::AttentionOption { .. }), "{error}");
            assert!(
                error.to_string().contains("must") || error.to_string().contains("at least"),
                "{error}"
            );
        }
    }
}
