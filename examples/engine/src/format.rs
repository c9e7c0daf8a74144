//! How GGUF stores numbers, and their layout in the textures that `../shaders/weights.wgsl` reads.
//!
//! Nothing is converted: the bytes of a file's blocks are only reordered, so that the data which four outputs need at
//! a time is in neighbouring texels.

use anyhow::{Result, bail};
use gguf_rs_lib::prelude::GGUFTensorType;
use half::{bf16, f16};

/// Rows of a matrix that form a group: `4 * LANES` in `weights.wgsl`.
pub(crate) const GROUP: usize = 32;
/// Outputs that neighbouring invocations compute.
const LANES: usize = 8;
/// Bytes of a texel: four 32-bit words.
pub(crate) const TEXEL: usize = 16;
/// Inputs of a panel, which an invocation unpacks at a time.
const PANEL: usize = 32;

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
#[expect(missing_docs, reason = "GGUF's own names")]
pub enum Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q8_0,
    Q4K,
    Q6K,
}

/// The parts of one block of a format.
struct Block {
    /// Numbers.
    numbers: usize,
    /// Bytes.
    bytes: usize,
    /// Blocks of a step. Their scales are stored together.
    step: usize,
    /// Bytes of the quantised numbers: first, and one past the last.
    quants: (usize, usize),
    /// Bytes of each kind of scale: first, and one past the last.
    scales: &'static [(usize, usize)],
}

impl Format {
    /// All formats.
    pub const ALL: &[Self] = &[
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q8_0,
        Self::Q4K,
        Self::Q6K,
    ];

    /// The format of a tensor.
    ///
    /// # Errors
    ///
    /// If it is not supported.
    pub fn of(kind: GGUFTensorType) -> Result<Self> {
        Ok(match kind {
            GGUFTensorType::F32 => Self::F32,
            GGUFTensorType::F16 => Self::F16,
            GGUFTensorType::BF16 => Self::BF16,
            GGUFTensorType::Q4_0 => Self::Q4_0,
            GGUFTensorType::Q4_1 => Self::Q4_1,
            GGUFTensorType::Q5_0 => Self::Q5_0,
            GGUFTensorType::Q8_0 => Self::Q8_0,
            GGUFTensorType::Q4_K => Self::Q4K,
            GGUFTensorType::Q6_K => Self::Q6K,
            other => bail!(
                "it is stored as {}, but this engine reads F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q8_0, Q4_K and Q6_K",
                other.name()
            ),
        })
    }

    /// The WGSL that unpacks it.
    pub fn wgsl(self) -> &'static str {
        match self {
            Self::F32 => include_str!("../shaders/format/f32.wgsl"),
            Self::F16 => include_str!("../shaders/format/f16.wgsl"),
            Self::BF16 => include_str!("../shaders/format/bf16.wgsl"),
            Self::Q4_0 => include_str!("../shaders/format/q4_0.wgsl"),
            Self::Q4_1 => include_str!("../shaders/format/q4_1.wgsl"),
            Self::Q5_0 => include_str!("../shaders/format/q5_0.wgsl"),
            Self::Q8_0 => include_str!("../shaders/format/q8_0.wgsl"),
            Self::Q4K => include_str!("../shaders/format/q4_k.wgsl"),
            Self::Q6K => include_str!("../shaders/format/q6_k.wgsl"),
        }
    }

    /// Bytes of a row of `inputs` inputs; `None` if that is not a whole number of blocks.
    pub(crate) fn row_bytes(self, inputs: usize) -> Option<usize> {
        let Block { numbers, bytes, .. } = self.block();
        match self {
            // Stored one by one; their blocks are only panels.
            Self::F32 | Self::F16 | Self::BF16 => inputs.checked_mul(bytes / numbers),
            _ if inputs.is_multiple_of(numbers) => (inputs / numbers).checked_mul(bytes),
            _ => None,
        }
    }

    fn block(self) -> Block {
        let plain = |bytes| Block {
            numbers: PANEL,
            bytes: PANEL * bytes,
            step: 1,
            quants: (0, PANEL * bytes),
            scales: &[],
        };
        let block =
            |numbers, bytes, step, quants, scales| Block { numbers, bytes, step, quants, scales };
        match self {
            Self::F32 => plain(4),
            Self::F16 | Self::BF16 => plain(2),
            Self::Q4_0 => block(32, 18, 2, (2, 18), &[(0, 2)]),
            Self::Q4_1 => block(32, 20, 1, (4, 20), &[(0, 4)]),
            Self::Q5_0 => block(32, 22, 2, (6, 22), &[(0, 2), (2, 6)]),
            Self::Q8_0 => block(32, 34, 2, (2, 34), &[(0, 2)]),
            Self::Q4K => block(256, 144, 1, (16, 144), &[(0, 16)]),
            Self::Q6K => block(256, 210, 1, (0, 192), &[(192, 208), (208, 210)]),
        }
    }

    /// The layout of rows of `inputs` inputs in the textures.
    pub(crate) fn layout(self, inputs: usize) -> Layout {
        let block = self.block();
        let scale_bytes: usize =
            block.scales.iter().map(|(from, to)| (to - from) * block.step).sum();
        Layout {
            steps: inputs.div_ceil(block.numbers * block.step),
            quant_texels: (block.quants.1 - block.quants.0) * block.step / TEXEL,
            scale_words: scale_bytes.div_ceil(4),
            block,
        }
    }
}

/// The layout of the rows of a matrix in the textures.
pub(crate) struct Layout {
    /// Steps of a row.
    pub(crate) steps: usize,
    /// Texels of quantised numbers per row and step.
    quant_texels: usize,
    /// Words of scales per row and step.
    scale_words: usize,
    block: Block,
}

impl Layout {
    /// Texels of quantised numbers per group of rows.
    pub(crate) fn group_quants(&self) -> usize {
        GROUP * self.steps * self.quant_texels
    }

    /// Texels of scales per group of rows.
    pub(crate) fn group_scales(&self) -> usize {
        LANES * self.steps * self.scale_words
    }

    /// Writes some rows of a group, as the file stores them, in the order that `weights.wgsl` reads. Each row has
    /// `row_bytes` bytes in `rows`; rows that the group lacks stay zero.
    pub(crate) fn write_group(
        &self,
        rows: &[u8],
        row_bytes: usize,
        quants: &mut [u8],
        scales: &mut [u8],
    ) {
        let Self { steps, quant_texels, scale_words, block } = self;
        let step_bytes = block.bytes * block.step;
        let mut row_quants = Vec::with_capacity(quant_texels * TEXEL);
        let mut row_scales = Vec::with_capacity(scale_words * 4);
        for (row, bytes) in rows.chunks_exact(row_bytes).enumerate() {
            let (output, lane) = (row / LANES, row % LANES);
            for (step, bytes) in bytes.chunks(step_bytes).enumerate() {
                self.split_step(bytes, &mut row_quants, &mut row_scales);
                let first = (output * steps + step) * quant_texels;
                for (i, texel) in row_quants.chunks_exact(TEXEL).enumerate() {
                    let at = TEXEL * ((first + i) * LANES + lane);
                    quants[at..at + TEXEL].copy_from_slice(texel);
                }
                for (i, word) in row_scales.chunks_exact(4).enumerate() {
                    let at = TEXEL * ((step * scale_words + i) * LANES + lane) + 4 * output;
                    scales[at..at + 4].copy_from_slice(word);
                }
            }
        }
    }

    /// Splits a step of one row into the quantised numbers of its blocks and its scales, kind by kind. The last step of
    /// a row may be incomplete; the rest is zero.
    fn split_step(&self, bytes: &[u8], quants: &mut Vec<u8>, scales: &mut Vec<u8>) {
        let Block { bytes: block_bytes, step, quants: (from, to), scales: kinds, .. } = self.block;
        quants.clear();
        scales.clear();
        let take = |into: &mut Vec<u8>, block: usize, from: usize, to: usize| {
            let piece = |at: usize| (block * block_bytes + at).min(bytes.len());
            let end = into.len() + to - from;
            into.extend(&bytes[piece(from)..piece(to)]);
            into.resize(end, 0);
        };
        for block in 0..step {
            take(quants, block, from, to);
        }
        for &(from, to) in kinds {
            for block in 0..step {
                take(scales, block, from, to);
            }
        }
        scales.resize(self.scale_words * 4, 0);
    }
}

/// Numbers that are stored one by one.
///
/// # Errors
///
/// If they are stored in blocks.
pub(crate) fn plain_numbers(kind: GGUFTensorType, bytes: &[u8]) -> Result<Vec<f32>> {
    let pairs = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    Ok(match kind {
        GGUFTensorType::F32 => bytes
            .chunks_exact(4)
            .map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect(),
        GGUFTensorType::F16 => pairs().map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
        GGUFTensorType::BF16 => pairs().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        other => bail!(
            "a vector is stored as {}, but this engine reads vectors of F32, F16 and BF16",
            other.name()
        ),
    })
}
