//! Every kind of bad input gets its own error, which says what was asked, what the limit is and what to
//! do; and after it nothing has changed: not the lengths, not the memory, not a bit of the contents,
//! and the next valid call goes as if the refused one had never been made.

use wgpu_kvcache::wgpu::{Buffer, BufferUsages, ComputePass};
use wgpu_kvcache::{CachePosition, DType, Error, KVCache, Stats, Tensor, TensorView};

use crate::gpu;
use crate::model::Block;
use crate::rig::{Rig, buffer, upload};

const APPEND: CachePosition<'_> = CachePosition::Append;
const BOUND: usize = 12;

/// Whether an error is the one that is due.
pub(crate) type Due = fn(&Error) -> bool;

/// A layer as its view shows it: its buffers, start, length and capacity.
type Shown = Option<([Buffer; 2], [usize; 3])>;

/// All that may be seen of a cache from outside, but for its contents.
fn seen(rig: &Rig) -> (Stats, Vec<Shown>) {
    let stats = Stats { bytes_read_back: 0, ..rig.cache.stats() };
    let shown = |layer| -> Shown {
        let view = rig.cache.view(layer).expect("the layer exists")?;
        let buffers = [view.key().clone(), view.value().clone()];
        Some((buffers, [view.start(), view.len(), view.capacity()]))
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
            let dtype = rig.cache.view(layer).unwrap().unwrap().dtype();
            let [b, h, _, d] = key.shape;
            rig.update_as(dtype, layer, [b, h, 2, d], value.shape[3], APPEND);
        }
        rig.select(&[1, 0]);
        rig.crop(7);
        // Whatever the refused call named, an unwritten layer takes any shape.
        rig.update_as(DType::BF16, 2, [2, 5, 3, 6], 2, CachePosition::PerToken(&[4, 1, 0]));
        rig.check(&format!("{name}: valid calls afterwards"));
    }
    assert_eq!(seen(&rig).0, seen(&twin).0, "{name}: valid calls afterwards");
}

/// Layer 0 in f32 with 9 tokens, layer 1 in f16 with 2, both of 3 rows; layer 2 not written.
fn filled(mut rig: Rig) -> Rig {
    rig.update(0, [3, 2, 10, 4], 6, APPEND);
    rig.crop(4);
    rig.update(0, [3, 2, 5, 4], 6, APPEND);
    rig.update_as(DType::F16, 1, [3, 1, 2, 2], 4, APPEND);
    rig
}

pub(crate) fn dynamic() -> Rig {
    filled(Rig::dynamic(&gpu()))
}

pub(crate) fn fixed() -> Rig {
    filled(Rig::fixed(&gpu(), BOUND, 3))
}

fn noise(dtype: DType, shape: [usize; 4]) -> Tensor {
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
    for make in [dynamic, fixed] {
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
fn never_taken(
    (key, value): (TensorView<'_>, TensorView<'_>),
    position: CachePosition<'_>,
    due: Due,
    words: &[&str],
) {
    update_refused((key, value), (2, position), due, words);
    let empty: [fn() -> Rig; 2] = [|| Rig::dynamic(&gpu()), || Rig::fixed(&gpu(), BOUND, 3)];
    for make in empty {
        let name = format!("first: K {}, V {}", described(&key), described(&value));
        for layer in [0, 2] {
            let call = |cache: &mut dyn KVCache, pass: &mut ComputePass<'_>| {
                let result = cache.update(pass, &key, &value, layer, position).map(|_| ());
                assert_eq!(cache.stats(), Stats::default(), "{name}");
                assert_eq!(cache.get_seq_length(layer), Ok(0), "{name}");
                assert_eq!(cache.get(layer), Ok(None), "{name}");
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

#[test]
fn odd_heads_in_sixteen_bits() {
    for dtype in [DType::F16, DType::BF16] {
        for (key_dim, value_dim, odd) in [(3, 4, 3), (4, 5, 5), (1, 1, 1)] {
            let key = noise(dtype, [3, 2, 2, key_dim]);
            let value = noise(dtype, [3, 2, 2, value_dim]);
            let due: Due = |error| matches!(error, Error::OddHeadDim { .. });
            let words = [&format!("head_dim {odd}"), dtype.name(), "even head_dim", "pad"];
            never_taken((key.view(), value.view()), APPEND, due, &words);
        }
    }
}

#[test]
fn views_that_a_kernel_cannot_read() {
    let good = noise(DType::F32, [3, 2, 2, 4]);
    let both = |bad: TensorView<'_>, due: Due, words: &[&str]| {
        never_taken((bad, good.view()), APPEND, due, words);
        never_taken((good.view(), bad), APPEND, due, words);
    };
    for stride in [0, 2, 4] {
        both(
            good.view().with_strides([16, 8, 4, stride]),
            |error| matches!(error, Error::InnerStride { .. }),
            &[&format!("stride of {stride}"), "must be 1"],
        );
    }
    // The buffer has 192 bytes.
    let short: Due = |error| matches!(error, Error::BufferTooShort { size: 192, .. });
    let view = good.view();
    both(view.with_offset(4), short, &["needs 196 bytes", "has 192", "offset 4", "larger"]);
    both(view.with_strides([17, 8, 4, 1]), short, &["needs 200 bytes", "[17, 8, 4, 1]"]);
    both(view.with_strides([16, 8, 5, 1]), short, &["needs 196 bytes", "has 192"]);
    both(
        view.with_strides([0, 0, 0, 1]).with_offset(180),
        short,
        &["needs 196 bytes", "offset 180"],
    );
    both(
        TensorView::new(good.buffer(), DType::F32, &[3, 2, 2, 5]).expect("rank 4"),
        |error| matches!(error, Error::BufferTooShort { .. } | Error::KeyValueShape { .. }),
        &[],
    );
    let unbound = buffer(&gpu(), 192, BufferUsages::COPY_DST | BufferUsages::COPY_SRC);
    both(
        TensorView::new(&unbound, DType::F32, &[3, 2, 2, 4]).expect("rank 4"),
        |error| matches!(error, Error::MissingUsage { .. }),
        &["lacks the usage STORAGE", "create it with"],
    );
}

/// Offsets and strides so large that no buffer has them, and that sums of them overflow.
#[test]
fn views_that_no_buffer_can_hold() {
    let good = noise(DType::F32, [3, 2, 2, 4]);
    let due: Due =
        |error| matches!(error, Error::BufferTooShort { .. } | Error::SizeOverflow { .. });
    for bad in [
        good.view().with_offset(u64::MAX - 3),
        good.view().with_offset(u64::MAX - 191),
        good.view().with_strides([usize::MAX / 8 + 1, 8, 4, 1]),
        good.view().with_strides([16, usize::MAX / 16 * 8, 4, 1]),
        good.view().with_strides([usize::MAX / 2, 8, 4, 1]),
        good.view().with_strides([16, 8, usize::MAX, 1]),
    ] {
        never_taken((bad, good.view()), APPEND, due, &[]);
        never_taken((good.view(), bad), APPEND, due, &[]);
    }
}

#[test]
fn views_off_the_words() {
    let due: Due = |error| matches!(error, Error::Misaligned { .. });
    let room = 4096;
    let pool = buffer(&gpu(), room, BufferUsages::STORAGE);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let good = TensorView::new(&pool, dtype, &[2, 2, 2, 4]).expect("rank 4");
        for offset in [1, 2, 3, 6, 1001] {
            let bad = good.with_offset(offset);
            let words = [&format!("{offset} bytes"), "multiple of 4", "align"];
            never_taken((bad, good), APPEND, due, &words);
            never_taken((good, bad), APPEND, due, &words);
        }
        if dtype == DType::F32 {
            continue;
        }
        for axis in 0..3 {
            let mut strides = [16, 8, 4, 1];
            strides[axis] = 21;
            let bad = good.with_strides(strides);
            never_taken((bad, good), APPEND, due, &["42 bytes", "multiple of 4", "align"]);
            never_taken((good, bad), APPEND, due, &["42 bytes", "multiple of 4", "align"]);
        }
    }
}

#[test]
fn a_layer_read_and_written_at_once() {
    for make in [dynamic, fixed] {
        let good = noise(DType::F32, [3, 2, 1, 6]);
        for own in 0..4 {
            let call = |cache: &mut dyn KVCache, pass: &mut ComputePass<'_>| {
                let view = cache.view(0)?.expect("layer 0 was written");
                let buffers = [view.key().clone(), view.value().clone()];
                let of = |buffer, dim| TensorView::new(buffer, DType::F32, &[3, 2, 1, dim]);
                let (other_key, other_value) = (of(good.buffer(), 4)?, of(good.buffer(), 6)?);
                let (key, value) = match own {
                    0 | 1 => (of(&buffers[own], 4)?, other_value),
                    _ => (other_key, of(&buffers[own - 2], 6)?),
                };
                // Positions that are there already, so that nothing has to grow.
                cache.update(pass, &key, &value, 0, CachePosition::At(1)).map(|_| ())
            };
            let due: Due = |error| matches!(error, Error::SourceIsCache { layer: 0, .. });
            refused(make, &format!("own buffer {own}"), call, due, &["layer 0", "copy it"]);
        }
    }
}
