//! Tensors at the edge of the crate: [`TensorView`] goes in, [`LayerView`] is what attention reads,
//! [`HostTensor`] is what comes back.

use std::sync::Arc;

use crate::arena::Placed;
use crate::bind_groups::BindGroups;
use crate::device::binding_limit;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::layout::Layout;
use crate::ledger::Ledger;

/// Where new K or V lies on the GPU: a buffer, a byte offset, a (B, H, T, D) shape, and strides.
///
/// Engines hand out pieces of pooled buffers, and a projection's output is often (B, T, H, D) or a
/// part of one fused QKV tensor. All of these go in as they lie. What must hold: the elements of a
/// head are adjacent (stride 1 along D), everything falls on 32-bit words, and the buffer has
/// [`wgpu::BufferUsages::STORAGE`].
///
/// # Examples
///
/// Q, K and V of 8 query heads and 2 K/V heads, of 64 elements each, in one (B, T, 12, 64) tensor:
///
/// ```
/// # use wgpu_kvcache::{wgpu, DType, Error, TensorView};
/// # fn views(qkv: &wgpu::Buffer, batch: usize, tokens: usize) -> Result<(), Error> {
/// let row = 12 * 64;
/// let strides = [tokens * row, 64, row, 1];
/// let shape = [batch, 2, tokens, 64];
/// let key = TensorView::new(qkv, DType::F32, &shape)?.with_offset(8 * 64 * 4).with_strides(strides);
/// let value = TensorView::new(qkv, DType::F32, &shape)?.with_offset(10 * 64 * 4).with_strides(strides);
/// # let _ = (key, value);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    pub(crate) buffer: &'a wgpu::Buffer,
    pub(crate) dtype: DType,
    pub(crate) offset: u64,
    pub(crate) shape: [usize; 4],
    pub(crate) strides: [usize; 4],
    /// The device, where it is known.
    pub(crate) gpu: Option<&'a Gpu>,
}

impl<'a> TensorView<'a> {
    /// A row-major [B, H, T, D] tensor from the buffer's first byte on; D is the fastest axis.
    ///
    /// # Errors
    ///
    /// [`Error::WrongRank`] and [`Error::ZeroExtent`]. Whether the buffer suits is checked by the call
    /// that the view is handed to.
    pub fn new(buffer: &'a wgpu::Buffer, dtype: DType, shape: &[usize]) -> Result<Self> {
        let shape = checked_shape(shape)?;
        let [_, h, t, d] = shape;
        let strides = [h.saturating_mul(t).saturating_mul(d), t.saturating_mul(d), d, 1];
        Ok(Self { buffer, dtype, offset: 0, shape, strides, gpu: None })
    }

    /// A row-major [B, T, H, D] tensor, as a projection writes it. `shape` is given in that order; the
    /// view's own [`shape`](Self::shape), and every message, is in the order (B, H, T, D) again.
    ///
    /// # Errors
    ///
    /// As for [`TensorView::new`].
    pub fn bthd(buffer: &'a wgpu::Buffer, dtype: DType, shape: &[usize]) -> Result<Self> {
        let [b, t, h, d] = checked_shape(shape)?;
        let strides = [t.saturating_mul(h).saturating_mul(d), d, h.saturating_mul(d), 1];
        Ok(Self { buffer, dtype, offset: 0, shape: [b, h, t, d], strides, gpu: None })
    }

    /// The same view with its first element at byte `offset` of the buffer: a multiple of 4.
    #[must_use]
    pub fn with_offset(self, offset: u64) -> Self {
        Self { offset, ..self }
    }

    /// The same view with other strides, in elements, for (B, H, T, D). D's stride must be 1; for
    /// 16-bit types the others must be even. A stride of zero repeats one slice along its axis.
    #[must_use]
    pub fn with_strides(self, strides: [usize; 4]) -> Self {
        Self { strides, ..self }
    }

    /// The buffer that the elements lie in.
    pub fn buffer(&self) -> &'a wgpu::Buffer {
        self.buffer
    }

    /// Type of an element.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Byte offset of element (0, 0, 0, 0).
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

    /// Refuses a view of which it is known that it is of another device. wgpu refuses others when they are
    /// bound.
    pub(crate) fn check_device(&self, what: &'static str, gpu: &Gpu) -> Result<()> {
        match self.gpu {
            Some(own) if !gpu.is_device_of(own) => Err(Error::OtherDevice { what }),
            _ => Ok(()),
        }
    }

    /// One past the view's last byte, counted from the buffer's start.
    fn end(&self) -> Option<u64> {
        let mut last = 0_usize;
        for (extent, stride) in self.shape.iter().zip(self.strides) {
            last = last.checked_add((extent - 1).checked_mul(stride)?)?;
        }
        let bytes = last.checked_add(1)?.checked_mul(self.dtype.size())?;
        self.offset.checked_add(u64::try_from(bytes).ok()?)
    }

    /// Checks everything that a kernel counts on, and finds the piece of the buffer to bind.
    pub(crate) fn source(&self, what: &'static str, limits: &wgpu::Limits) -> Result<Source> {
        let size = self.dtype.size() as u64;
        let [_, _, _, d] = self.shape;
        if self.strides[3] != 1 && d > 1 {
            return Err(Error::InnerStride { what, stride: self.strides[3] });
        }
        if self.dtype.size() == 2 && d % 2 != 0 {
            return Err(Error::OddHeadDim { what, dtype: self.dtype, head_dim: d });
        }
        let needed = self.end().ok_or_else(|| {
            let Self { offset, shape, strides, .. } = self;
            let asked = format!("{shape:?} with strides {strides:?} from byte {offset} on");
            Error::overflow("extent of a view", asked, u64::MAX)
        })?;
        if !self.offset.is_multiple_of(4) {
            return Err(Error::Misaligned { what, quantity: "an offset", bytes: self.offset });
        }
        let named = ["a batch stride", "a head stride", "a token stride"];
        let mut strides = [0_u64; 3];
        for axis in 0..3 {
            // An axis of extent 1 is never stepped along.
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
        if needed > self.buffer.size() {
            return Err(Error::BufferTooShort {
                what,
                needed,
                size: self.buffer.size(),
                offset: self.offset,
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

    /// The (offset, size) of the buffer to bind: all of it where the device allows, so that views of
    /// one pooled buffer share a bind group, else what the view spans.
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
    /// What is bound of `buffer`, the view's own.
    pub(crate) fn binding<'a>(&self, buffer: &'a wgpu::Buffer) -> wgpu::BufferBinding<'a> {
        let (offset, bytes) = self.window;
        wgpu::BufferBinding { buffer, offset, size: wgpu::BufferSize::new(bytes) }
    }

    /// Whether every row starts and ends on a 16-byte vector.
    pub(crate) fn is_vector_aligned(&self) -> bool {
        let [b, h, t] = self.strides;
        [self.offset, b, h, t, self.row_bytes].iter().all(|bytes| bytes % 16 == 0)
    }
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
    pub(crate) gpu: Gpu,
    pub(crate) buffer: wgpu::Buffer,
    pub(crate) dtype: DType,
    pub(crate) shape: [usize; 4],
}

impl Tensor {
    /// The whole tensor, as an input of `update`.
    pub fn view(&self) -> TensorView<'_> {
        let [_, h, t, d] = self.shape;
        TensorView {
            buffer: &self.buffer,
            dtype: self.dtype,
            offset: 0,
            shape: self.shape,
            strides: [h * t * d, t * d, d, 1],
            gpu: Some(&self.gpu),
        }
    }

    /// The buffer that holds the elements.
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

/// A layer's K and V as they lie on the GPU, for an attention kernel to read in place.
///
/// [`layout`](Self::layout) says how they lie, and its text how a shader finds a token. Of a paged view, K
/// and V are pools of pages, [page, H, capacity, D] with a page's tokens as capacity, and
/// [`page_table`](Self::page_table) names the pages of each row; `start` is the slot of the oldest token in
/// the first of them, the same for every row. Of any other view, K and V are one storage buffer each, [B, H,
/// capacity, D] with D fastest. Live token `t` (0 is the oldest) of row `b` and head `h` lies at slot
/// `(start + t) mod capacity`:
///
/// ```text
/// element = b * strides[0] + h * strides[1] + ((start + t) % capacity) * strides[2] + d
///
///            capacity
///  <----------------------------->
/// | 6  7  .  .  .  .  2  3  4  5 |     start 6, len 6: wrapped, is_contiguous() is false
/// | 0  1  2  3  4  5  .  .  .  . |     start 0, len 6: one piece
/// ```
///
/// 16-bit types lie two in a 32-bit word, the lower index in the lower half.
///
/// The buffers stay the same until the layer grows or its batch outgrows them, so a bind group made
/// from a view can be kept as long as `key()` and `value()` compare equal. Take offsets, start and
/// length from a fresh view at every step.
#[derive(Clone, Copy, Debug)]
pub struct LayerView<'a> {
    pub(crate) key: &'a wgpu::Buffer,
    pub(crate) value: &'a wgpu::Buffer,
    pub(crate) dtype: DType,
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) capacity: usize,
    pub(crate) pages: Option<PageTable<'a>>,
    /// Bind groups that are kept with the buffers.
    pub(crate) bind_groups: &'a Arc<BindGroups>,
    /// Whose layer it is.
    pub(crate) owner: Option<Owner<'a>>,
}

/// The cache that a view is of: its device, and whether what the view shows is there.
#[derive(Clone, Copy)]
pub(crate) struct Owner<'a> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) ledger: &'a Ledger,
}

impl std::fmt::Debug for Owner<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner").field("ledger", self.ledger).finish_non_exhaustive()
    }
}

/// Where the table of a paged view lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageTable<'a> {
    pub(crate) placed: &'a Placed,
    /// Word of row 0's first page, and from one row to the next.
    pub(crate) at: u32,
    pub(crate) stride: u32,
}

impl<'a> LayerView<'a> {
    /// Refuses what `gpu` cannot read: what was lost with a pass since the view was taken, and the view or a
    /// tensor of another device.
    pub(crate) fn check(
        &self,
        gpu: &Gpu,
        pass: &wgpu::ComputePass<'_>,
        tensors: [(&'static str, &TensorView<'_>); 2],
    ) -> Result<()> {
        gpu.handle().check_alive_for(pass)?;
        if let Some(Owner { gpu: own, ledger }) = self.owner {
            if !gpu.is_device_of(own) {
                return Err(Error::OtherDevice { what: "the layer" });
            }
            ledger.check()?;
        }
        tensors.into_iter().try_for_each(|(what, tensor)| tensor.check_device(what, gpu))
    }

    /// The buffer of K. Bind it read-only.
    pub fn key(&self) -> &'a wgpu::Buffer {
        self.key
    }

    /// The buffer of V. Bind it read-only.
    pub fn value(&self) -> &'a wgpu::Buffer {
        self.value
    }

    /// Byte offset of K's row 0, head 0, slot 0.
    pub fn key_offset(&self) -> u64 {
        0
    }

    /// Byte offset of V's row 0, head 0, slot 0.
    pub fn value_offset(&self) -> u64 {
        0
    }

    /// Shape of the live K, (B, H, T, D).
    pub fn key_shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.len, self.key_dim]
    }

    /// Shape of the live V, (B, H, T, D).
    pub fn value_shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.len, self.value_dim]
    }

    /// Strides of K in elements, for (B, H, slot, D); of a paged view for (page, H, slot, D).
    pub fn key_strides(&self) -> [usize; 4] {
        strides(self.heads, self.capacity, self.key_dim)
    }

    /// Strides of V in elements, for (B, H, slot, D); of a paged view for (page, H, slot, D).
    pub fn value_strides(&self) -> [usize; 4] {
        strides(self.heads, self.capacity, self.value_dim)
    }

    /// Slot of the oldest live token.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Live tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is live.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Slots of each row and head, in tokens; of a paged view, of each page and head.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Type of an element.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether the live slots are one piece, `start..start + len`.
    pub fn is_contiguous(&self) -> bool {
        self.pages.is_none() && self.start + self.len <= self.capacity
    }

    /// How the live tokens lie, and with it the WGSL text that reads them.
    pub fn layout(&self) -> Layout {
        match self.pages {
            Some(_) => Layout::Paged,
            None if self.is_contiguous() => Layout::Contiguous,
            None => Layout::Wrapped,
        }
    }

    /// The eight words of `struct KvLayout` in [`Layout::wgsl`]: `heads`, `key_dim`, `value_dim`, `len`,
    /// `start`, `capacity`, `table`, `table_stride`. For a uniform or immediate data, at every step anew.
    pub fn layout_words(&self) -> [u32; 8] {
        // A layer that can be bound has no count that does not fit.
        let word = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let (table, table_stride) =
            self.pages.map_or((0, 0), |PageTable { at, stride, .. }| (at, stride));
        [
            word(self.heads),
            word(self.key_dim),
            word(self.value_dim),
            word(self.len),
            word(self.start),
            word(self.capacity),
            table,
            table_stride,
        ]
    }

    /// The buffer that the page table lies in; `None` where the layout is not [`Layout::Paged`]. Bind it
    /// whole, read-only, as `array<u32>`: `layout_words` says where the table begins. It stays as it is until
    /// what was recorded up to the cache's next update has run, also if the cache is reset or dropped before;
    /// take it from a fresh view at every step.
    pub fn page_table(&self) -> Option<&'a wgpu::Buffer> {
        self.pages.map(|pages| &pages.placed.buffer)
    }
}

fn strides(heads: usize, capacity: usize, dim: usize) -> [usize; 4] {
    [heads * capacity * dim, capacity * dim, dim, 1]
}

/// K or V read back to the host: row-major [B, H, T, D], live tokens only, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostTensor {
    dtype: DType,
    shape: [usize; 4],
    /// The elements' bytes. Whole words, so that they are aligned for every element type.
    words: Vec<u32>,
}

impl HostTensor {
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
    /// [`Error::SliceType`] where `E` is not the type that the tensor holds.
    pub fn as_slice<E: Element>(&self) -> Result<&[E]> {
        if E::DTYPE != self.dtype {
            return Err(Error::SliceType { held: self.dtype, asked: E::DTYPE });
        }
        Ok(bytemuck::cast_slice(&self.words))
    }

    /// The elements as `f32`, converted where they are 16-bit: every value is exact.
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
