//! The formats, over plain numbers: what a token must read back as, written from their description.

use bytemuck::pod_collect_to_vec as cast;
use half::{bf16, f16};
use wgpu_kvcache::{DType, Format};

use crate::model::Block;

/// The elements of a block, as f32.
pub(crate) fn floats(dtype: DType, block: &Block) -> Vec<f32> {
    match dtype {
        DType::F32 => cast(&block.bytes),
        DType::F16 => cast::<u8, f16>(&block.bytes).into_iter().map(f16::to_f32).collect(),
        DType::BF16 => cast::<u8, bf16>(&block.bytes).into_iter().map(bf16::to_f32).collect(),
        other => unreachable!("no block is of {other}"),
    }
}

/// What a block of `dtype` reads back as, once it was stored in `format`.
pub(crate) fn stored(format: Format, dtype: DType, block: &Block) -> Block {
    if format == dtype.into() {
        return block.clone();
    }
    let all = floats(dtype, block);
    let (element, bytes) = match format {
        Format::F32 => (4, cast(&all)),
        Format::F16 => (2, cast(&all.into_iter().map(f16::from_f32).collect::<Vec<_>>())),
        Format::BF16 => (2, cast(&all.into_iter().map(bf16::from_f32).collect::<Vec<_>>())),
        _ => {
            let rows = all.chunks(block.shape[3]);
            let read: Vec<f32> =
                rows.flat_map(|row| row.chunks(32)).flat_map(|it| read_back(format, it)).collect();
            (4, cast(&read))
        }
    };
    Block { shape: block.shape, element, bytes }
}

/// The scale of a block and its numbers.
pub(crate) fn quantized(format: Format, block: &[f32]) -> (f16, Vec<i32>) {
    let zero = vec![0; block.len()];
    if block.iter().any(|x| !x.is_finite()) {
        return (f16::NAN, zero);
    }
    let mut largest = 0.0_f32;
    for &x in block {
        if x.abs() > largest.abs() {
            largest = x;
        }
    }
    let (scale, range) = match format {
        Format::Q8_0 => (largest.abs() / 127.0, [-127.0, 127.0]),
        Format::Q4_0 => (largest / -8.0, [-8.0, 7.0]),
        other => unreachable!("{other} has no blocks"),
    };
    let scale = f16::from_f32(scale);
    if scale == f16::ZERO || !scale.is_finite() {
        return (if scale.is_finite() { f16::ZERO } else { f16::NAN }, zero);
    }
    // In f64, where the quotient of these numbers is off from no middle of two integers to the other side.
    let number = |x: &f32| f64::from(*x) / scale.to_f64();
    #[expect(clippy::cast_possible_truncation, reason = "within the range")]
    let number = |x: &f32| number(x).round_ties_even().clamp(range[0], range[1]) as i32;
    (scale, block.iter().map(number).collect())
}

fn read_back(format: Format, block: &[f32]) -> Vec<f32> {
    let (scale, numbers) = quantized(format, block);
    #[expect(clippy::cast_precision_loss, reason = "small integers")]
    // Zero is never minus zero.
    let read = |number: &i32| scale.to_f32() * *number as f32 + 0.0;
    numbers.iter().map(read).collect()
}

/// The same bytes with every NaN of one kind: formats keep that an element is none, not which.
pub(crate) fn with_one_nan(format: Format, block: Block) -> Block {
    let dtype = format.read_dtype();
    let mut bytes = block.bytes;
    let size = dtype.size();
    for element in bytes.chunks_mut(size) {
        let is_nan = match dtype {
            DType::F16 => cast::<u8, f16>(element)[0].is_nan(),
            DType::BF16 => cast::<u8, bf16>(element)[0].is_nan(),
            _ => cast::<u8, f32>(element)[0].is_nan(),
        };
        if is_nan {
            element.fill(0xff);
        }
    }
    Block { bytes, ..block }
}
