//! K and V read back as they are stored: [`StoredTensor`].

use half::f16;

use crate::format::Format;
use crate::tensor::HostTensor;

/// K or V read back as it is stored: live tokens only, oldest first, row-major (B, H, T) with the rows of [`Format`]'s
/// memory.
///
/// # Examples
///
/// ```
/// use wgpu_kvcache::{Cache, CacheOptions, CachePosition, DynamicKVCache, Format, Gpu, KVCache};
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let gpu = Gpu::headless()?;
/// let options = CacheOptions::default().with_formats(Format::Q8_0);
/// let mut cache = DynamicKVCache::with_options(&gpu, options)?;
/// let token = gpu.upload(&[-1.0_f32; 32], &[1, 1, 1, 32])?;
/// gpu.submit_pass("token", |pass| {
///     cache.update(pass, &token.view(), &token.view(), 0, CachePosition::Append).map(|_| ())
/// })?;
/// let (key, _value) = cache.get_stored(0)?.expect("layer 0 was written");
/// assert_eq!(key.elements()[..32], [129; 32]); // -127, one byte an element
/// assert_eq!(key.scales()[0], half::f16::from_f32(1.0 / 127.0));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    format: Format,
    shape: [usize; 4],
    /// Bytes, as words so that they are aligned for every type.
    elements: Vec<u32>,
    scales: Vec<u32>,
}

impl StoredTensor {
    pub(crate) fn new(
        format: Format,
        shape: [usize; 4],
        [elements, scales]: [Vec<u32>; 2],
    ) -> Self {
        let [batch, heads, tokens, dim] = shape;
        let rows = (batch * heads * tokens) as u64;
        let bytes = format.plane_bytes(dim).map(|row| rows * row);
        debug_assert_eq!(bytes, [&elements, &scales].map(|words| 4 * words.len() as u64));
        Self { format, shape, elements, scales }
    }

    /// How it is stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// (B, H, T, D).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The bytes of all elements, without scales.
    pub fn elements(&self) -> &[u8] {
        bytemuck::cast_slice(&self.elements)
    }

    /// The scales of all blocks; nothing if it is not quantized. The row of a token has an even number of them, of
    /// which the last one is unused if its blocks are odd.
    pub fn scales(&self) -> &[f16] {
        bytemuck::cast_slice(&self.scales)
    }

    /// The elements, of quantized formats as f32.
    pub fn into_tensor(self) -> HostTensor {
        if !self.format.is_quantized() {
            return HostTensor::new(self.format.read_dtype(), self.shape, self.elements);
        }
        let all = read_rows(self.format, self.shape[3], self.elements(), self.scales());
        HostTensor::new(self.format.read_dtype(), self.shape, bytemuck::cast_vec(all))
    }

    /// The first `dim` elements of every row.
    pub(crate) fn prefix(&self, dim: usize) -> Self {
        let [batch, heads, tokens, whole] = self.shape;
        let (from, to) = (self.format.plane_bytes(whole), self.format.plane_bytes(dim));
        let cut = |words: &[u32], plane: usize| -> Vec<u32> {
            let count = |bytes: u64| usize::try_from(bytes / 4).unwrap_or(usize::MAX);
            let [from, to] = [from, to].map(|bytes| count(bytes[plane]));
            words.chunks(from.max(1)).flat_map(|row| &row[..to]).copied().collect()
        };
        let planes = [cut(&self.elements, 0), cut(&self.scales, 1)];
        Self::new(self.format, [batch, heads, tokens, dim], planes)
    }
}

/// The elements of K and V.
pub(crate) fn into_tensors((key, value): (StoredTensor, StoredTensor)) -> (HostTensor, HostTensor) {
    (key.into_tensor(), value.into_tensor())
}

/// Elements of one block, from its scale and its bytes.
fn read_block(format: Format, scale: f16, bytes: &[u8], elements: &mut [f32]) {
    let scale = scale.to_f32();
    for (i, element) in elements.iter_mut().enumerate() {
        let number = match format {
            Format::Q4_0 => {
                let byte = bytes[i % 16];
                let half = if i < 16 { byte & 15 } else { byte >> 4 };
                i16::from(half) - 8
            }
            _ => i16::from(bytes[i].cast_signed()),
        };
        // Zero, not minus zero, where the scale or the number is zero.
        *element = scale * f32::from(number) + 0.0;
    }
}

/// Elements of rows of `dim` elements, from planes of their bytes and scales as they lie in a buffer.
fn read_rows(format: Format, dim: usize, bytes: &[u8], scales: &[f16]) -> Vec<f32> {
    let (blocks, block_bytes) = (format.blocks(dim), format.block_bytes());
    let (row, scales_row) = (blocks * block_bytes, blocks.next_multiple_of(2));
    let mut all = vec![0.0; bytes.len() / row.max(1) * dim];
    let rows = all.chunks_mut(dim).zip(bytes.chunks(row)).zip(scales.chunks(scales_row));
    for ((elements, bytes), scales) in rows {
        let blocks = elements.chunks_mut(Format::BLOCK).zip(bytes.chunks(block_bytes)).zip(scales);
        for ((elements, bytes), &scale) in blocks {
            read_block(format, scale, bytes, elements);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_read_as_their_scale_times_their_numbers() {
        let mut elements = [0.0; 32];
        let bytes: Vec<u8> = (0..32).map(|i| (i - 16_i8).cast_unsigned()).collect();
        read_block(Format::Q8_0, f16::from_f32(0.5), &bytes, &mut elements);
        assert!((-16_i8..).zip(&elements).all(|(i, &x)| x == 0.5 * f32::from(i)));
        // Byte j: element j below, element j + 16 above.
        let bytes: Vec<u8> = (0..16).map(|j| j | (15 - j) << 4).collect();
        read_block(Format::Q4_0, f16::from_f32(-2.0), &bytes, &mut elements);
        assert!((-8_i8..).zip(&elements[..16]).all(|(j, &x)| x == -2.0 * f32::from(j)));
        assert!((-7_i8..).zip(&elements[16..]).all(|(j, &x)| x == 2.0 * f32::from(j)));
    }

    #[test]
    fn rows_end_where_heads_end() {
        // Two rows of 33 elements: two blocks each, and two scales.
        let scales = [1.0, 2.0, 3.0, 4.0].map(f16::from_f32);
        let all = read_rows(Format::Q8_0, 33, &[1; 128], &scales);
        let expected = [vec![1.0; 32], vec![2.0], vec![3.0; 32], vec![4.0]].concat();
        assert_eq!(all, expected);
    }
}
