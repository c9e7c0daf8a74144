//! From GGUF's stored number formats to `f32`.
//!
//! The quantised formats keep blocks of 32 numbers: a scale `d` (and for some a least value `m`),
//! both f16, and then one small integer `q` a number.

use anyhow::{Result, bail};
use gguf_rs_lib::prelude::GGUFTensorType;
use half::{bf16, f16};

/// Turns the bytes of a tensor into numbers, in the order in which they are stored.
///
/// # Errors
///
/// Where the format is not served.
pub(crate) fn dequantise(kind: GGUFTensorType, bytes: &[u8]) -> Result<Vec<f32>> {
    Ok(match kind {
        GGUFTensorType::F32 => blocks(bytes, |&word| [f32::from_le_bytes(word)]),
        GGUFTensorType::F16 => blocks(bytes, |&half| [f16_at(half)]),
        GGUFTensorType::BF16 => blocks(bytes, |&half| [bf16::from_le_bytes(half).to_f32()]),
        GGUFTensorType::Q8_0 => blocks(bytes, q8_0),
        GGUFTensorType::Q4_0 => blocks(bytes, q4_0),
        GGUFTensorType::Q4_1 => blocks(bytes, q4_1),
        other => bail!(
            "it is stored as {}, and this engine reads F32, F16, BF16, Q8_0, Q4_0 and Q4_1",
            other.name()
        ),
    })
}

/// Turns each block of `BYTES` bytes into its `NUMBERS` numbers.
fn blocks<const BYTES: usize, const NUMBERS: usize>(
    bytes: &[u8],
    block: impl Fn(&[u8; BYTES]) -> [f32; NUMBERS],
) -> Vec<f32> {
    let mut numbers = Vec::with_capacity(bytes.len() / BYTES * NUMBERS);
    for bytes in bytes.chunks_exact(BYTES) {
        if let Ok(bytes) = bytes.try_into() {
            numbers.extend(block(bytes));
        }
    }
    numbers
}

/// `d`, then 32 signed bytes: `d * q`.
fn q8_0(block: &[u8; 34]) -> [f32; 32] {
    let d = f16_at([block[0], block[1]]);
    std::array::from_fn(|i| d * f32::from(block[2 + i].cast_signed()))
}

/// `d`, then 32 nibbles: `d * (q - 8)`.
fn q4_0(block: &[u8; 18]) -> [f32; 32] {
    let d = f16_at([block[0], block[1]]);
    std::array::from_fn(|i| d * (nibble(&block[2..], i) - 8.0))
}

/// `d` and `m`, then 32 nibbles: `d * q + m`.
fn q4_1(block: &[u8; 20]) -> [f32; 32] {
    let d = f16_at([block[0], block[1]]);
    let m = f16_at([block[2], block[3]]);
    std::array::from_fn(|i| d * nibble(&block[4..], i) + m)
}

/// Number `i` of 32 in 16 bytes: the low halves hold the first 16 numbers, the high halves the
/// others.
fn nibble(bytes: &[u8], i: usize) -> f32 {
    f32::from(if i < 16 { bytes[i] & 0x0f } else { bytes[i - 16] >> 4 })
}

fn f16_at(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}
