//! Refusals of inputs that a kernel cannot read; see `refusals` for what is compared.

use wgpu_kvcache::wgpu::{BufferUsages, ComputePass};
use wgpu_kvcache::{CachePosition, DType, Error, KVCache, TensorView};

use crate::gpu;
use crate::refusals::{Due, all, never_taken, noise, refused};
use crate::rig::buffer;

const APPEND: CachePosition<'_> = CachePosition::Append;

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
    for make in all() {
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
