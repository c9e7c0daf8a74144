//! Every kind of bad input gets its own error, which says what was asked, what the limit is and what to
//! do; and after it nothing has changed: not the lengths, not the memory, not a bit of the contents,
//! and the next valid call goes as if the refused one had never been made.

use wgpu_kvcache::wgpu::{Buffer, ComputePass};
use wgpu_kvcache::{
    CachePosition, DType, Error, Format, KVCache, LayerView, Layout, Stats, Tensor, TensorView,
};

use crate::gpu;
use crate::model::Block;
use crate::rig::{Rig, upload, with_read_back};
use crate::wait::ReadLayer;

const APPEND: CachePosition<'_> = CachePosition::Append;
const BOUND: usize = 12;

/// Whether an error is the one that is due.
pub(crate) type Due = fn(&Error) -> bool;

/// A layer as its view shows it.
#[derive(Debug, PartialEq)]
struct Shown {
    /// Of K, of V, and of the page table where there is one.
    buffers: Vec<Buffer>,
    shapes: [[usize; 4]; 2],
    formats: [Format; 2],
    /// What a shader is told: heads, dims, length, start, capacity, and where the page table lies.
    words: [u32; Layout::WORDS],
}

impl Shown {
    fn new(view: &LayerView) -> Self {
        let table = view.page_table().into_iter();
        Self {
            buffers: [view.key(), view.value()].into_iter().chain(table).cloned().collect(),
            shapes: [view.key_shape(), view.value_shape()],
            formats: [view.key_format(), view.value_format()],
            words: view.layout_words(),
        }
    }

    /// The same but for where it lies, which two caches cannot have in common.
    fn unplaced(mut self) -> Self {
        self.buffers.clear();
        self.words[6] = 0;
        self
    }
}

/// All that may be seen of a cache from outside, the counts of pages included, but for what only `get`
/// shows: the contents, and with them the page numbers that a table holds.
fn seen(rig: &Rig) -> (Stats, Vec<Option<Shown>>) {
    let stats = with_read_back(rig.cache.stats(), 0);
    let shown = |layer| {
        let view = rig.cache.view(layer).expect("the layer exists");
        view.as_ref().map(Shown::new)
    };
    (stats, (0..3).map(shown).collect())
}

/// What a view is, in a failed test's message.
fn described(view: &TensorView<'_>) -> String {
    let (shape, strides) = (view.shape(), view.strides());
    format!("{} {shape:?}, offset {}, strides {strides:?}", view.dtype(), view.offset())
}

/// Makes a call that must be refused on the cache that `make` gives, and compares that cache, then and
/// after valid calls, with another on which the call is never made.
pub(crate) fn refused(
    make: impl Fn() -> Rig,
    name: &str,
    call: impl Fn(&mut dyn KVCache, &mut ComputePass<'_>) -> Result<(), Error>,
    due: Due,
    words: &[&str],
) {
    let (mut rig, mut twin) = (make(), make());
    let before = seen(&rig);
    let gpu = rig.gpu.clone();
    for _ in 0..2 {
        let result = gpu.submit_pass("refused", |pass| call(rig.cache.as_mut(), pass));
        let Err(error) = result else { panic!("{name}: was not refused") };
        assert!(due(&error), "{name}: {error:?}");
        for word in words {
            assert!(error.to_string().contains(word), "{name}: '{word}' is not in '{error}'");
        }
        assert!(seen(&rig) == before, "{name}: was {before:?}, is {:?}", seen(&rig));
        rig.check(name);
    }
    for rig in [&mut rig, &mut twin] {
        for layer in rig.model.layers() {
            let (key, value) = rig.model.get(layer).expect("a layer that holds something");
            let format = rig.cache.view(layer).unwrap().unwrap().key_format();
            let dtype = format.dtype().expect("it is stored as it comes in");
            let [b, h, _, d] = key.shape;
            rig.update_as(dtype, layer, [b, h, 2, d], value.shape[3], APPEND);
        }
        rig.select(&[1, 0]);
        rig.crop(7);
        // Whatever the refused call named, an unwritten layer takes any shape.
        rig.update_as(DType::BF16, 2, [2, 5, 3, 6], 2, CachePosition::PerToken(&[4, 1, 0]));
        rig.check(&format!("{name}: valid calls afterwards"));
    }
    let [rig, twin] = [rig, twin].map(|rig| {
        let (stats, shown) = seen(&rig);
        (stats, shown.into_iter().map(|shown| shown.map(Shown::unplaced)).collect::<Vec<_>>())
    });
    assert_eq!(rig, twin, "{name}: valid calls afterwards");
}

/// Layer 0 in f32 with 9 tokens, layer 1 in f16 with 2, both of 3 rows; layer 2 not written.
fn filled(mut rig: Rig) -> Rig {
    rig.update(0, [3, 2, 10, 4], 6, APPEND);
    rig.crop(4);
    rig.update(0, [3, 2, 5, 4], 6, APPEND);
    rig.update_as(DType::F16, 1, [3, 1, 2, 2], 4, APPEND);
    rig
}

fn dynamic() -> Rig {
    filled(Rig::dynamic(&gpu()))
}

fn fixed() -> Rig {
    filled(Rig::fixed(&gpu(), BOUND, 3))
}

fn paged<const SIZE: usize>() -> Rig {
    filled(Rig::paged(&gpu(), SIZE))
}

fn paged_fixed<const SIZE: usize>() -> Rig {
    filled(Rig::paged_fixed(&gpu(), SIZE, BOUND, 3))
}

/// Caches that hold something and may grow.
pub(crate) const GROWING: [fn() -> Rig; 4] = [dynamic, paged::<1>, paged::<4>, paged::<16>];
/// Caches that hold something, of 3 layers and at most `BOUND` tokens.
pub(crate) const BOUNDED: [fn() -> Rig; 4] =
    [fixed, paged_fixed::<1>, paged_fixed::<4>, paged_fixed::<16>];

/// A cache of each kind that holds something.
pub(crate) fn all() -> impl Iterator<Item = fn() -> Rig> {
    GROWING.into_iter().chain(BOUNDED)
}

pub(crate) fn noise(dtype: DType, shape: [usize; 4]) -> Tensor {
    upload(&gpu(), dtype, &Block::noise(shape, dtype.size(), 3))
}

/// An update that must be refused, on caches that hold something.
pub(crate) fn update_refused(
    (key, value): (TensorView<'_>, TensorView<'_>),
    (layer, position): (usize, CachePosition<'_>),
    due: Due,
    words: &[&str],
) {
    let name = format!("K {}, V {}", described(&key), described(&value));
    let name = format!("{name}, layer {layer}, {position:?}");
    for make in all() {
        refused(
            make,
            &name,
            |cache, pass| cache.update(pass, &key, &value, layer, position).map(|_| ()),
            due,
            words,
        );
    }
}

/// As `update_refused`, for what is wrong whatever the layer holds: also as the very first call.
pub(crate) fn never_taken(
    (key, value): (TensorView<'_>, TensorView<'_>),
    position: CachePosition<'_>,
    due: Due,
    words: &[&str],
) {
    update_refused((key, value), (2, position), due, words);
    let empty: [fn() -> Rig; 5] = [
        || Rig::dynamic(&gpu()),
        || Rig::fixed(&gpu(), BOUND, 3),
        || Rig::paged(&gpu(), 1),
        || Rig::paged(&gpu(), 4),
        || Rig::paged_fixed(&gpu(), 16, BOUND, 3),
    ];
    for make in empty {
        let name = format!("first: K {}, V {}", described(&key), described(&value));
        for layer in [0, 2] {
            let call = |cache: &mut dyn KVCache, pass: &mut ComputePass<'_>| {
                let result = cache.update(pass, &key, &value, layer, position).map(|_| ());
                assert_eq!(cache.stats(), Stats::default(), "{name}");
                assert_eq!(cache.get_seq_length(layer), Ok(0), "{name}");
                assert_eq!(cache.read(layer), Ok(None), "{name}");
                assert!(matches!(cache.view(layer), Ok(None)), "{name}");
                result
            };
            refused(make, &name, call, due, words);
        }
    }
}

#[test]
fn keys_that_disagree_with_values() {
    let key = noise(DType::F32, [3, 2, 1, 4]);
    for shape in [[2, 2, 1, 6], [3, 1, 1, 6], [3, 2, 2, 6], [1, 1, 1, 4]] {
        let value = noise(DType::F32, shape);
        let due: Due = |error| matches!(error, Error::KeyValueShape { .. });
        let words = ["[3, 2, 1, 4]", &format!("{shape:?}"), "must agree", "(B, H, T)"];
        never_taken((key.view(), value.view()), APPEND, due, &words);
        update_refused((key.view(), value.view()), (0, APPEND), due, &words);
    }
    let value = noise(DType::F16, [3, 2, 1, 6]);
    let due: Due = |error| matches!(error, Error::WrongDType { .. });
    never_taken((key.view(), value.view()), APPEND, due, &["f16", "f32", "convert"]);
    update_refused((key.view(), value.view()), (0, APPEND), due, &["f16", "f32", "convert"]);
}

#[test]
fn tokens_that_do_not_fit_the_layer() {
    for (shape, value_dim) in [
        ([2, 2, 1, 4], 6),
        ([4, 2, 1, 4], 6),
        ([3, 1, 1, 4], 6),
        ([3, 2, 1, 5], 6),
        ([3, 2, 1, 4], 4),
        ([3, 2, 1, 6], 4),
    ] {
        let [b, h, t, _] = shape;
        let value_shape = [b, h, t, value_dim];
        let (key, value) = (noise(DType::F32, shape), noise(DType::F32, value_shape));
        update_refused(
            (key.view(), value.view()),
            (0, APPEND),
            |error| matches!(error, Error::LayerShape { layer: 0, .. }),
            &[
                "layer 0 holds batch 3, heads 2, head_dim 4 (K) and 6 (V)",
                &format!("{shape:?}"),
                &format!("{value_shape:?}"),
                "reset()",
            ],
        );
    }
    for dtype in [DType::F16, DType::BF16] {
        let (key, value) = (noise(dtype, [3, 2, 1, 4]), noise(dtype, [3, 2, 1, 6]));
        let due: Due = |error| matches!(error, Error::WrongDType { expected: DType::F32, .. });
        update_refused((key.view(), value.view()), (0, APPEND), due, &[dtype.name(), "convert"]);
    }
    // Of the same size, and still another type.
    let (key, value) = (noise(DType::BF16, [3, 1, 1, 2]), noise(DType::BF16, [3, 1, 1, 4]));
    update_refused(
        (key.view(), value.view()),
        (1, APPEND),
        |error| matches!(error, Error::WrongDType { expected: DType::F16, got: DType::BF16, .. }),
        &["bf16", "f16", "convert"],
    );
}

#[test]
fn shapes_that_are_none() {
    let gpu = gpu();
    let tensor = noise(DType::F32, [3, 2, 1, 4]);
    for shape in [&[3, 2, 4][..], &[1, 3, 2, 1, 4], &[], &[24]] {
        let uploaded = gpu.upload(&[0.0_f32; 24], shape).err();
        let new = TensorView::new(tensor.buffer(), DType::F32, shape).err();
        let bthd = TensorView::bthd(tensor.buffer(), DType::F32, shape).err();
        for error in [uploaded, new, bthd].map(|error| error.expect("it is refused")) {
            assert_eq!(error, Error::WrongRank { shape: shape.to_vec() });
            let text = error.to_string();
            assert!(
                text.contains("4 dimensions") && text.contains(&format!("{shape:?}")),
                "{text}"
            );
            assert!(text.contains("add axes"), "{text}");
        }
    }
    for axis in 0..4 {
        let mut shape = [3, 2, 1, 4];
        shape[axis] = 0;
        let uploaded = gpu.upload::<f32>(&[], &shape).err();
        let new = TensorView::new(tensor.buffer(), DType::F32, &shape).err();
        let bthd = TensorView::bthd(tensor.buffer(), DType::F32, &shape).err();
        for error in [uploaded, new, bthd].map(|error| error.expect("it is refused")) {
            assert_eq!(error, Error::ZeroExtent { shape: shape.to_vec() });
            let text = error.to_string();
            assert!(text.contains(&format!("{shape:?}")) && text.contains("at least 1"), "{text}");
        }
    }
    for elements in [0, 23, 25] {
        let error = gpu.upload(&vec![0.0_f32; elements], &[3, 2, 1, 4]).expect_err("not 24");
        let due = Error::SliceLength { shape: vec![3, 2, 1, 4], expected: 24, got: elements };
        assert_eq!(error, due);
        let text = error.to_string();
        assert!(text.contains("24 elements") && text.contains(&elements.to_string()), "{text}");
    }
    let error = gpu.upload(&[0.0_f32; 4], &[usize::MAX, 2, 2, 2]).expect_err("too many to count");
    assert!(matches!(error, Error::SizeOverflow { .. }), "{error}");
}
