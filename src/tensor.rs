//! Tensors of the public interface: [`TensorView`] is an input, [`HostTensor`] a result.

mod held;

use std::ops::Range;
use std::sync::Arc;

pub(crate) use held::Guard;
pub use held::HeldTensor;

use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::gpu::device::{DeviceHandle, binding_limit};

/// New K or V on the GPU: a buffer, a byte offset, a (B, H, T, D) shape, and strides.
///
/// Engines use ranges of pooled buffers, and a projection's output is often (B, T, H, D) or a part of one fused QKV
/// tensor. All of these are read in place. Three conditions: the elements of a head are contiguous (stride 1 along
/// D), the offset and the other strides are multiples of 4 bytes, and the buffer has
/// [`wgpu::BufferUsages::STORAGE`].
///
/// A view must stay true until its work has run: what it shows must not be freed, or reused for something else, before.
/// An engine that allocates from pools of its own hands in a [`HeldTensor`], which sees to that; the module
/// [`pooled`](crate::pooled) has the rules.
///
/// # Examples
///
/// Q, K and V of 8 query heads and 2 K/V heads, of 64 elements each, in one (B, T, 12, 64) tensor, which lies somewhere in
/// a pool:
///
/// ```
/// # use wgpu_kvcache::{wgpu, AxisOrder, DType, Error, TensorView};
/// # fn views(qkv: wgpu::BufferBinding<'_>, batch: usize, tokens: usize) -> Result<(), Error> {
/// let qkv = TensorView::from_binding(qkv, DType::F32, AxisOrder::Bthd, &[batch, tokens, 12, 64])?;
/// let query = qkv.with_heads(0..8)?;
/// let key = qkv.with_heads(8..10)?;
/// let value = qkv.with_heads(10..12)?;
/// assert_eq!(key.shape(), [batch, 2, tokens, 64]);
/// # let _ = (query, value);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    pub(crate) buffer: &'a wgpu::Buffer,
    pub(crate) dtype: DType,
    /// Bytes from the buffer's start.
    pub(crate) offset: u64,
    pub(crate) shape: [usize; 4],
    pub(crate) strides: [usize; 4],
    /// The bytes of the buffer that are the tensor's to lie in; `end` may lie past the buffer's.
    begin: u64,
    end: u64,
    /// The device, if it is known.
    pub(crate) device: Option<&'a Arc<DeviceHandle>>,
    /// What is kept until the work has run.
    pub(crate) guard: Option<&'a Guard>,
}

/// In which order the axes of a tensor lie in memory, the slowest first; elements of a head are next to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AxisOrder {
    /// (B, H, T, D).
    #[default]
    Bhtd,
    /// (B, T, H, D), as a projection writes it.
    Bthd,
}

impl AxisOrder {
    /// A shape given in this order as (B, H, T, D), and its strides in that order, in elements.
    fn place(self, shape: [usize; 4]) -> ([usize; 4], [usize; 4]) {
        let product =
            |extents: &[usize]| extents.iter().fold(1, |all: usize, &n| all.saturating_mul(n));
        let [a, b, c, d] = shape;
        let [slow, middle] = [product(&[b, c, d]), product(&[c, d])];
        match self {
            Self::Bhtd => (shape, [slow, middle, d, 1]),
            Self::Bthd => ([a, c, b, d], [slow, d, middle, 1]),
        }
    }
}

impl<'a> TensorView<'a> {
    /// A row-major [B, H, T, D] tensor from the buffer's first byte on; D is the fastest axis.
    ///
    /// # Errors
    ///
    /// [`Error::WrongRank`] and [`Error::ZeroExtent`]. The call that takes the view checks the buffer.
    pub fn new(buffer: &'a wgpu::Buffer, dtype: DType, shape: &[usize]) -> Result<Self> {
        Self::from_binding(whole(buffer), dtype, AxisOrder::Bhtd, shape)
    }

    /// A row-major [B, T, H, D] tensor, as a projection writes it. `shape` is given in that order; the
    /// view's own [`shape`](Self::shape), and every message, is in the order (B, H, T, D) again.
    ///
    /// # Errors
    ///
    /// As for [`TensorView::new`].
    pub fn bthd(buffer: &'a wgpu::Buffer, dtype: DType, shape: &[usize]) -> Result<Self> {
        Self::from_binding(whole(buffer), dtype, AxisOrder::Bthd, shape)
    }

    /// A tensor in a range of a buffer: of a pool, say. `shape` is given in the order in which the axes lie there. The view
    /// ends where the binding does, whatever the buffer holds behind it; a binding without a size ends with the buffer.
    ///
    /// # Errors
    ///
    /// As for [`TensorView::new`]. The call that takes the view checks that the tensor fits the binding.
    pub fn from_binding(
        binding: wgpu::BufferBinding<'a>,
        dtype: DType,
        order: AxisOrder,
        shape: &[usize],
    ) -> Result<Self> {
        let (shape, strides) = order.place(checked_shape(shape)?);
        let wgpu::BufferBinding { buffer, offset, size } = binding;
        let end = size.map_or(buffer.size(), |size| offset.saturating_add(size.get()));
        let (begin, device, guard) = (offset, None, None);
        Ok(Self { buffer, dtype, offset, shape, strides, begin, end, device, guard })
    }

    /// Packed tokens [T, H, D], as a projection of the tokens of several sequences writes them: one batch row,
    /// (1, H, T, D) in the view's own [`shape`](Self::shape) and in every message.
    ///
    /// # Errors
    ///
    /// As for [`TensorView::new`].
    pub fn packed(buffer: &'a wgpu::Buffer, dtype: DType, shape: [usize; 3]) -> Result<Self> {
        let [tokens, heads, dim] = shape;
        Self::bthd(buffer, dtype, &[1, tokens, heads, dim])
    }

    /// The same view with its first element at byte `offset` of the buffer, or of the binding: a multiple of 4.
    #[must_use]
    pub fn with_offset(self, offset: u64) -> Self {
        Self { offset: self.begin.saturating_add(offset), ..self }
    }

    /// The same view with other strides, in elements, for (B, H, T, D). D's stride must be 1; for
    /// 16-bit types the others must be even. A stride of zero repeats one slice along its axis.
    #[must_use]
    pub fn with_strides(self, strides: [usize; 4]) -> Self {
        Self { strides, ..self }
    }

    /// The same view of the first `head_dim` elements of each head.
    #[must_use]
    pub fn with_head_dim(self, head_dim: usize) -> Self {
        let [b, h, t, _] = self.shape;
        Self { shape: [b, h, t, head_dim], ..self }
    }

    /// The same view of some of the heads: K of a fused tensor of q, K and V, say.
    ///
    /// # Errors
    ///
    /// [`Error::SizeOverflow`] for heads that the view does not have, and [`Error::ZeroExtent`] for none.
    ///
    /// # Examples
    ///
    /// See [`TensorView`].
    pub fn with_heads(self, heads: Range<usize>) -> Result<Self> {
        let [b, all, t, d] = self.shape;
        if heads.end > all {
            let asked = format!("{heads:?}");
            return Err(Error::overflow("end of a range of heads", asked, all as u64));
        }
        let shape = checked_shape(&[b, heads.len(), t, d])?;
        let first = heads.start.saturating_mul(self.strides[1]).saturating_mul(self.dtype.size());
        Ok(Self { offset: self.offset.saturating_add(first as u64), shape, ..self })
    }

    /// Whether it is the first elements of each head of `whole`, in the same memory.
    pub(crate) fn is_prefix_of(&self, whole: &Self) -> bool {
        let are_strides_same =
            (0..3).all(|axis| self.shape[axis] == 1 || self.strides[axis] == whole.strides[axis]);
        self.buffer == whole.buffer
            && self.offset == whole.offset
            && self.dtype == whole.dtype
            && self.shape[..3] == whole.shape[..3]
            && self.shape[3] <= whole.shape[3]
            && are_strides_same
    }

    /// The buffer that holds the elements.
    pub fn buffer(&self) -> &'a wgpu::Buffer {
        self.buffer
    }

    /// Type of an element.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Byte offset of element (0, 0, 0, 0) in the buffer.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// (B, H, T, D).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Strides in elements, for (B, H, T, D).
    pub fn strides(&self) -> [usize; 4] {
        self.strides
    }

    /// Refuses a view that is known to be of another device. wgpu refuses views of unknown devices when they are
    /// bound.
    pub(crate) fn check_device(
        &self,
        what: &'static str,
        device: &Arc<DeviceHandle>,
    ) -> Result<()> {
        match self.device {
            Some(own) if !device.is_device_of(own) => Err(Error::OtherDevice { what }),
            _ => Ok(()),
        }
    }

    /// One past the view's last byte, counted from the buffer's start.
    fn last_byte(&self) -> Option<u64> {
        let mut last = 0_usize;
        for (extent, stride) in self.shape.iter().zip(self.strides) {
            last = last.checked_add((extent - 1).checked_mul(stride)?)?;
        }
        let bytes = last.checked_add(1)?.checked_mul(self.dtype.size())?;
        self.offset.checked_add(u64::try_from(bytes).ok()?)
    }

    /// Checks everything that a kernel relies on, and computes the range of the buffer to bind.
    pub(crate) fn source(&self, what: &'static str, limits: &wgpu::Limits) -> Result<Source> {
        let size = self.dtype.size() as u64;
        let [_, _, _, d] = self.shape;
        if self.strides[3] != 1 && d > 1 {
            return Err(Error::InnerStride { what, stride: self.strides[3] });
        }
        check_whole_words(what, d, self.dtype)?;
        let needed = self.last_byte().ok_or_else(|| {
            let Self { offset, shape, strides, .. } = self;
            let asked = format!("{shape:?} with strides {strides:?} from byte {offset}");
            Error::overflow("extent of a view", asked, u64::MAX)
        })?;
        if !self.offset.is_multiple_of(4) {
            return Err(Error::Misaligned { what, quantity: "an offset", bytes: self.offset });
        }
        let named = ["a batch stride", "a head stride", "a token stride"];
        let mut strides = [0_u64; 3];
        for axis in 0..3 {
            // The stride of an axis of extent 1 is never used.
            if self.shape[axis] > 1 {
                strides[axis] = (self.strides[axis] as u64).saturating_mul(size);
            }
            if !strides[axis].is_multiple_of(4) {
                return Err(Error::Misaligned {
                    what,
                    quantity: named[axis],
                    bytes: strides[axis],
                });
            }
        }
        let end = self.end.min(self.buffer.size());
        if needed > end {
            return Err(Error::BufferTooShort {
                what,
                needed: needed - self.begin,
                size: end.saturating_sub(self.begin),
                offset: self.offset - self.begin,
                shape: self.shape,
                strides: self.strides,
            });
        }
        if !self.buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(Error::MissingUsage { what });
        }
        let window = self.window(what, needed, limits)?;
        Ok(Source { offset: self.offset - window.0, strides, row_bytes: d as u64 * size, window })
    }

    /// The (offset, size) of the buffer to bind: the whole buffer if the device allows it, so that views of one pooled
    /// buffer share a bind group; else the range that the view spans.
    fn window(&self, what: &'static str, end: u64, limits: &wgpu::Limits) -> Result<(u64, u64)> {
        let limit = binding_limit(limits);
        let whole = self.buffer.size() / 4 * 4;
        if whole <= limit {
            return Ok((0, whole));
        }
        let alignment = u64::from(limits.min_storage_buffer_offset_alignment.max(16));
        let begin = self.offset / alignment * alignment;
        let bytes = end - begin;
        if bytes > limit {
            return Err(Error::SourceTooLarge { what, bytes, limit });
        }
        Ok((begin, bytes))
    }
}

/// A checked [`TensorView`], in bytes, as a kernel reads it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    /// From the start of the bound window to element (0, 0, 0, 0).
    pub(crate) offset: u64,
    /// Along (B, H, T); zero along an axis of extent 1.
    pub(crate) strides: [u64; 3],
    /// Bytes of one token of one head.
    pub(crate) row_bytes: u64,
    /// (offset, size) of the buffer to bind.
    pub(crate) window: (u64, u64),
}

impl Source {
    /// The binding of `buffer`, which must be the view's own.
    pub(crate) fn binding<'a>(&self, buffer: &'a wgpu::Buffer) -> wgpu::BufferBinding<'a> {
        let (offset, bytes) = self.window;
        wgpu::BufferBinding { buffer, offset, size: wgpu::BufferSize::new(bytes) }
    }

    /// Whether every row starts and ends at a multiple of 16 bytes.
    pub(crate) fn is_vector_aligned(&self) -> bool {
        let [b, h, t] = self.strides;
        [self.offset, b, h, t, self.row_bytes].iter().all(|bytes| bytes % 16 == 0)
    }
}

/// Refuses heads that are not whole 32-bit words.
pub(crate) fn check_whole_words(what: &'static str, head_dim: usize, dtype: DType) -> Result<()> {
    if dtype.size() == 2 && !head_dim.is_multiple_of(2) {
        return Err(Error::OddHeadDim { what, dtype, head_dim });
    }
    Ok(())
}

fn whole(buffer: &wgpu::Buffer) -> wgpu::BufferBinding<'_> {
    wgpu::BufferBinding { buffer, offset: 0, size: None }
}

/// Checks a shape given as a slice: rank 4, no extent of zero.
pub(crate) fn checked_shape(shape: &[usize]) -> Result<[usize; 4]> {
    let four: [usize; 4] =
        shape.try_into().map_err(|_| Error::WrongRank { shape: shape.to_vec() })?;
    if four.contains(&0) {
        return Err(Error::ZeroExtent { shape: shape.to_vec() });
    }
    Ok(four)
}

/// K or V uploaded from the host: a buffer of its own, row-major [B, H, T, D].
///
/// Made by [`Gpu::upload`](crate::Gpu::upload).
#[derive(Clone, Debug)]
pub struct Tensor {
    pub(crate) device: Arc<DeviceHandle>,
    pub(crate) buffer: wgpu::Buffer,
    pub(crate) dtype: DType,
    pub(crate) shape: [usize; 4],
}

impl Tensor {
    /// The whole tensor, as an input of `update`.
    pub fn view(&self) -> TensorView<'_> {
        let (shape, strides) = AxisOrder::Bhtd.place(self.shape);
        TensorView {
            buffer: &self.buffer,
            dtype: self.dtype,
            offset: 0,
            shape,
            strides,
            begin: 0,
            end: self.buffer.size(),
            device: Some(&self.device),
            guard: None,
        }
    }

    /// The buffer that holds the elements. It has the usages `STORAGE`, `COPY_DST` and `COPY_SRC`: an output of attention is
    /// read back by copying it into a buffer of [`wgpu::BufferUsages::MAP_READ`].
    pub fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// Type of an element.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// (B, H, T, D).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }
}

/// K or V read back to the host: row-major [B, H, T, D], live tokens only, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostTensor {
    dtype: DType,
    shape: [usize; 4],
    /// The elements' bytes, stored as words so that they are aligned for every element type.
    words: Vec<u32>,
}

impl HostTensor {
    /// A tensor of host data, row-major [B, H, T, D], for caches that are implemented outside of this crate.
    ///
    /// # Errors
    ///
    /// [`Error::WrongRank`], [`Error::ZeroExtent`]; [`Error::SliceLength`] if the number of elements differs from that
    /// of the shape; [`Error::OddHeadDim`] for a 16-bit type and an odd D.
    ///
    /// # Examples
    ///
    /// ```
    /// use wgpu_kvcache::HostTensor;
    ///
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// let key = HostTensor::from_slice(&[1.0_f32, 2.0, 3.0, 4.0], &[1, 1, 2, 2])?;
    /// assert_eq!(key.as_slice::<f32>()?[2], 3.0); // element 0 of token 1
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_slice<E: Element>(data: &[E], shape: &[usize]) -> Result<Self> {
        let four = checked_shape(shape)?;
        let expected = four.iter().fold(1_usize, |product, &n| product.saturating_mul(n));
        if expected != data.len() {
            return Err(Error::SliceLength { shape: shape.to_vec(), expected, got: data.len() });
        }
        check_whole_words("host data", four[3], E::DTYPE)?;
        Ok(Self::new(E::DTYPE, four, bytemuck::pod_collect_to_vec(data)))
    }

    pub(crate) fn new(dtype: DType, shape: [usize; 4], words: Vec<u32>) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>() * dtype.size(), words.len() * 4);
        Self { dtype, shape, words }
    }

    /// (B, H, T, D).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Type of an element.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements' bytes, row-major.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    /// The elements, row-major: element (b, h, t, d) is at ((b·H + h)·T + t)·D + d.
    ///
    /// # Errors
    ///
    /// [`Error::SliceType`] if `E` is not the element type of the tensor.
    pub fn as_slice<E: Element>(&self) -> Result<&[E]> {
        if E::DTYPE != self.dtype {
            return Err(Error::SliceType { held: self.dtype, asked: E::DTYPE });
        }
        Ok(bytemuck::cast_slice(&self.words))
    }

    /// The elements as `f32`. 16-bit types are converted; every value is exact.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => bytemuck::cast_slice(&self.words).to_vec(),
            DType::F16 => {
                bytemuck::cast_slice(&self.words).iter().map(|x: &half::f16| x.to_f32()).collect()
            }
            DType::BF16 => {
                bytemuck::cast_slice(&self.words).iter().map(|x: &half::bf16| x.to_f32()).collect()
            }
        }
    }
}
