//! What attention reads: [`LayerView`].

use std::sync::{Arc, Mutex};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::{Format, Plane, TokenBytes};
use crate::gpu::arena::Allocation;
use crate::gpu::bind_groups::BindGroups;
use crate::gpu::device::DeviceHandle;
use crate::gpu::ledger::Ledger;
use crate::gpu::memory::Memory;
use crate::gpu::range::BufferRange;
use crate::host::rows::Span;
use crate::host::work::{StepRow, WorkLimits};
use crate::layout::{KvLayout, Layout};
use crate::tensor::{Guard, TensorView};

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
/// 16-bit elements lie two in a 32-bit word, the lower index in the lower half. How quantized elements lie, and their
/// scales, is told in [`Format`]; [`Format::key_wgsl`] reads elements of any format.
///
/// The rows of a ragged view ([`is_ragged`](Self::is_ragged)) have their own start and length
/// ([`row_start`](Self::row_start), [`row_len`](Self::row_len)): after updates at
/// [`CachePosition::PerRow`](crate::CachePosition::PerRow), [`truncate_rows`](crate::Cache::truncate_rows) and
/// [`crop_rows`](crate::Cache::crop_rows). The view is as long as its longest row, or longer if that was selected
/// away. What lies behind the live tokens of a shorter row is undefined; `kv_len` of the layout's text is the length
/// of a row. Start and length of each row lie on the GPU, in the buffer of the page table
/// ([`page_table`](Self::page_table)), which a ring has for this alone.
///
/// The buffers stay the same until the layer grows or its batch outgrows them, so a bind group made
/// from a view can be kept as long as `key()` and `value()` compare equal. Take offsets, start and
/// length from a fresh view at every step.
#[derive(Clone, Debug)]
pub struct LayerView {
    pub(crate) key: BufferRange,
    pub(crate) value: BufferRange,
    /// Keeps the buffers of a cache from being destroyed; `None` for a view [of rings](Self::of_rings).
    pub(crate) memory: Option<Arc<Memory>>,
    /// How K and V are stored.
    pub(crate) formats: [Format; 2],
    /// Slots of one head that the buffers have room for, after which the scales of quantized formats begin.
    pub(crate) scale_slots: u64,
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) capacity: usize,
    pub(crate) pages: Option<PageTable>,
    /// Of a ragged view. In the buffer of the page table, if there is one.
    pub(crate) rows: Option<RowTable>,
    /// Of a step's view.
    pub(crate) step: Option<Arc<StepWork>>,
    /// Tokens that a query looks back on at most, its own included, since the layer keeps no more for it.
    pub(crate) window: Option<usize>,
    /// Bind groups that are kept with the buffers.
    pub(crate) bind_groups: Arc<BindGroups>,
    /// Whose layer it is.
    pub(crate) owner: Option<Owner>,
}

/// A layer that a cache of one's own keeps as rings, for [`LayerView::of_rings`]: K and V are one buffer each,
/// row-major [B, H, capacity, D], from the first byte on.
#[derive(Clone, Debug)]
pub struct Rings {
    /// The buffer of K, with [`wgpu::BufferUsages::STORAGE`].
    pub key: wgpu::Buffer,
    /// The buffer of V, likewise.
    pub value: wgpu::Buffer,
    /// How K is stored. In quantized formats the scales of all slots follow the elements of all slots: see [`Format`].
    pub key_format: Format,
    /// How V is stored; as K, if it is in the buffer of K.
    pub value_format: Format,
    /// Batch rows.
    pub batch: usize,
    /// K/V heads.
    pub heads: usize,
    /// Elements a head of K.
    pub key_dim: usize,
    /// Elements a head of V.
    pub value_dim: usize,
    /// Slots of each row and head, in tokens.
    pub capacity: usize,
    /// Slot of the oldest live token.
    pub start: usize,
    /// Live tokens.
    pub len: usize,
}

/// The cache that a view is of: its device, and whether what the view shows is there.
#[derive(Clone)]
pub(crate) struct Owner {
    pub(crate) device: Arc<DeviceHandle>,
    pub(crate) ledger: Ledger,
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner").field("ledger", &self.ledger).finish_non_exhaustive()
    }
}

/// Where the table of a paged view lies.
#[derive(Clone, Debug)]
pub(crate) struct PageTable {
    pub(crate) allocation: Allocation,
    /// Word of row 0's first page, and from one row to the next.
    pub(crate) at: u32,
    pub(crate) stride: u32,
}

/// What attention of packed queries over a step reads beside K and V.
#[derive(Debug)]
pub(crate) struct StepWork {
    /// The sequences of the step, one a batch row of the view.
    pub(crate) rows: Vec<StepRow>,
    /// Packed tokens.
    pub(crate) total: usize,
    /// The records of the rows and their pages, counted from the first word. As they lie in the view's table.
    pub(crate) words: Arc<[u32]>,
    /// Lists of work, and where they lie. Layers of the same geometry share one.
    pub(crate) lists: Mutex<Vec<(WorkLimits, WorkList)>>,
}

/// A list of work on the GPU, in one buffer with the records and the pages of the step.
#[derive(Clone, Debug)]
pub(crate) struct WorkList {
    pub(crate) allocation: Allocation,
    /// First word and number of the items that write to the output, of those that write partial results, and
    /// of those that are merged.
    pub(crate) whole: [u32; 2],
    pub(crate) parts: [u32; 2],
    pub(crate) merged: [u32; 2],
}

/// The records of a ragged view's rows.
#[derive(Clone, Debug)]
pub(crate) struct RowTable {
    pub(crate) allocation: Allocation,
    /// First word of the records, four a row: start, length, first word of the row's pages, zero.
    pub(crate) at: u32,
    pub(crate) rows: Arc<[Span]>,
}

impl LayerView {
    /// A view of a cache of one's own. Nothing is known of its passes: such a view is never refused because of
    /// work that was lost.
    ///
    /// If K and V are the same buffer, V is the first `value_dim` elements of each head of K, which is stored once
    /// (multi-head latent attention: DeepSeek-AI, 2024).
    ///
    /// Bind groups that [`Attention`](crate::Attention) keeps go with the view and its clones. So make a view once for
    /// a pair of buffers, and at each step derive the one to read by [`with_tokens`](Self::with_tokens): then a steady
    /// loop makes none.
    ///
    /// # Examples
    ///
    /// A layer in buffers of an engine's own, of 8 slots, over which one token attends at a time:
    ///
    /// ```
    /// use wgpu_kvcache::{Attention, Format, Gpu, LayerView, Rings};
    ///
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// let gpu = Gpu::headless()?;
    /// // [B 1, H 2, capacity 8, D 4]. What `upload` makes has the usages STORAGE, COPY_DST and COPY_SRC.
    /// let [key, value] = [0.0, 1.0].map(|x| gpu.upload(&[x; 2 * 8 * 4], &[1, 2, 8, 4]));
    /// let (key, value) = (key?, value?);
    /// let layer = LayerView::of_rings(Rings {
    ///     key: key.buffer().clone(),
    ///     value: value.buffer().clone(),
    ///     key_format: Format::F32,
    ///     value_format: Format::F32,
    ///     batch: 1,
    ///     heads: 2,
    ///     key_dim: 4,
    ///     value_dim: 4,
    ///     capacity: 8,
    ///     start: 0,
    ///     len: 0,
    /// })?;
    /// let query = gpu.upload(&[0.5_f32; 2 * 4], &[1, 2, 1, 4])?;
    /// let output = gpu.upload(&[0.0_f32; 2 * 4], &[1, 2, 1, 4])?;
    /// let mut attention = Attention::new(&gpu);
    /// for len in 1..=3 {
    ///     // The engine's own kernels have written token len - 1 before this pass.
    ///     let view = layer.with_tokens(0, len)?;
    ///     gpu.submit_pass("step", |pass| {
    ///         attention.record(pass, &query.view(), &view, &output.view(), Default::default())
    ///     })?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::ZeroExtent`] if one of the counts but `len` and `start` is zero.
    /// - [`Error::BufferTooShort`], [`Error::MissingUsage`], [`Error::OddHeadDim`]; [`Error::AttentionOption`] for V in the
    ///   buffer of K that is longer than K.
    /// - [`Error::PositionOutOfBounds`] for a `start` past the capacity, [`Error::SequenceTooLong`] for a `len` past
    ///   it.
    pub fn of_rings(rings: Rings) -> Result<Self> {
        let Rings { key, value, batch, heads, key_dim, value_dim, capacity, start, len, .. } =
            rings;
        // What a device can bind is checked where the view is bound.
        let limits = wgpu::Limits {
            max_storage_buffer_binding_size: u64::MAX,
            max_buffer_size: u64::MAX,
            ..wgpu::Limits::default()
        };
        let is_value_in_key = key == value;
        if is_value_in_key && value_dim > key_dim {
            let (option, value) = ("value_dim", value_dim.to_string());
            let rule = "V in the buffer of K is the first elements of K's heads, so it must not be longer; give it a buffer of its own";
            return Err(Error::AttentionOption { option, value, rule });
        }
        let mut formats = [rings.key_format, rings.value_format];
        let mut sides = vec![("key", &key, key_dim, formats[0])];
        if is_value_in_key {
            formats[1] = formats[0];
        } else {
            sides.push(("value", &value, value_dim, formats[1]));
        }
        for (what, buffer, dim, format) in sides {
            // Quantized tokens are whole words, scales included.
            let words = usize::try_from(format.token_bytes(dim) / 4).unwrap_or(usize::MAX);
            let (dtype, row) = format.dtype().map_or((DType::F32, words), |dtype| (dtype, dim));
            TensorView::new(buffer, dtype, &[batch, heads, capacity, row])?
                .source(what, &limits)?;
        }
        check_tokens(start, len, capacity)?;
        let (bind_groups, pages, rows, step) = (Arc::default(), None, None, None);
        let (window, owner) = (None, None);
        Ok(Self {
            key: BufferRange::whole(key),
            value: BufferRange::whole(value),
            formats,
            scale_slots: (batch * heads * capacity) as u64,
            batch,
            heads,
            key_dim,
            value_dim,
            start,
            len,
            capacity,
            pages,
            rows,
            step,
            window,
            bind_groups,
            owner,
            memory: None,
        })
    }

    /// The same buffers with other live tokens: `len` of them, the oldest at slot `start`. Bind groups that
    /// [`Attention`](crate::Attention) keeps serve both views.
    ///
    /// # Errors
    ///
    /// [`Error::NotSupported`] for views that are not [of rings](Self::of_rings), since what those show is known to
    /// their cache alone; else as for `of_rings`.
    pub fn with_tokens(&self, start: usize, len: usize) -> Result<Self> {
        if self.owner.is_some() {
            return Err(Error::NotSupported { what: "with_tokens() for a view of a cache" });
        }
        check_tokens(start, len, self.capacity)?;
        Ok(Self { start, len, ..self.clone() })
    }

    /// Refuses what `gpu` cannot read: what was lost with a pass since the view was taken, and the view or a
    /// tensor of another device.
    pub(crate) fn check(
        &self,
        device: &Arc<DeviceHandle>,
        pass: &wgpu::ComputePass<'_>,
        tensors: [(&'static str, &TensorView<'_>); 2],
    ) -> Result<()> {
        device.check_alive_for(pass)?;
        if let Some(Owner { device: own, ledger }) = &self.owner {
            if !device.is_device_of(own) {
                return Err(Error::OtherDevice { what: "the layer" });
            }
            ledger.check()?;
            ledger.check_pass(pass)?;
        }
        tensors.into_iter().try_for_each(|(what, tensor)| tensor.check_device(what, device))
    }

    /// What keeps memory that an engine gave in use.
    pub(crate) fn guard(&self) -> Option<&Guard> {
        self.memory.as_ref()?.guard()
    }

    /// K and V, as kernels bind them.
    pub(crate) fn bindings(&self) -> [wgpu::BufferBinding<'_>; 2] {
        [self.key_binding(), self.value_binding()]
    }

    /// The buffer of K. Of it a shader binds [`key_binding`](Self::key_binding).
    pub fn key(&self) -> &wgpu::Buffer {
        &self.key.buffer
    }

    /// The buffer of V. Of it a shader binds [`value_binding`](Self::value_binding).
    pub fn value(&self) -> &wgpu::Buffer {
        &self.value.buffer
    }

    /// K, to bind read-only: the whole buffer, but for a cache [in memory that the engine gave](crate::LayerMemory). The
    /// layout's text counts from where it begins.
    pub fn key_binding(&self) -> wgpu::BufferBinding<'_> {
        self.key.binding()
    }

    /// V, likewise.
    pub fn value_binding(&self) -> wgpu::BufferBinding<'_> {
        self.value.binding()
    }

    /// Byte of the buffer at which K's row 0, head 0, slot 0 lies.
    pub fn key_offset(&self) -> u64 {
        self.key.offset
    }

    /// Byte of the buffer at which V's row 0, head 0, slot 0 lies.
    pub fn value_offset(&self) -> u64 {
        self.value.offset
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
        let dim = if self.is_value_in_key() { self.key_dim } else { self.value_dim };
        strides(self.heads, self.capacity, dim)
    }

    /// Whether V is the first elements of each head of K, in one buffer with it: see [`of_rings`](Self::of_rings).
    pub fn is_value_in_key(&self) -> bool {
        self.key == self.value
    }

    /// Slot of the oldest live token. If rows differ, see [`row_start`](Self::row_start); this is zero then.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Live tokens, of the longest row of a ragged view, or more if that was selected away.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Slot of the oldest live token of batch row `b`; `None` past the last row.
    pub fn row_start(&self, b: usize) -> Option<usize> {
        self.row(b).map(|row| row.start)
    }

    /// Live tokens of batch row `b`; `None` past the last row.
    pub fn row_len(&self, b: usize) -> Option<usize> {
        self.row(b).map(|row| row.len)
    }

    /// Whether rows have their own start and length.
    pub fn is_ragged(&self) -> bool {
        self.rows.is_some()
    }

    fn row(&self, b: usize) -> Option<Span> {
        match &self.rows {
            Some(table) => table.rows.get(b).copied(),
            None => (b < self.batch).then_some(Span { start: self.start, len: self.len }),
        }
    }

    /// The buffer of the page table and of the records of rows.
    pub(crate) fn table(&self) -> Option<&Allocation> {
        let rows = self.rows.as_ref().map(|rows| &rows.allocation);
        rows.or(self.pages.as_ref().map(|pages| &pages.allocation))
    }

    /// Whether no token is live.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The layer's [window](crate::CacheOptions::with_windows), if it has one: causal
    /// [`Attention`](crate::Attention) lets no query look further back, whatever its options say.
    /// [`unmasked`](crate::AttentionOptions::unmasked) it looks at all that the layer keeps, and of a tree of drafted
    /// tokens a bit mask can say how far back, from each token's depth.
    pub fn window(&self) -> Option<usize> {
        self.window
    }

    /// Slots of each row and head, in tokens; of a paged view, of each page and head.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How K is stored.
    pub fn key_format(&self) -> Format {
        self.formats[0]
    }

    /// How V is stored.
    pub fn value_format(&self) -> Format {
        self.formats[1]
    }

    /// What one token of one head takes in the buffers.
    pub(crate) fn token_bytes(&self) -> TokenBytes {
        TokenBytes::new(self.formats, [self.key_dim, self.value_dim], self.is_value_in_key())
    }

    /// Bytes at which the scales of K and of V begin; zero if they have none.
    fn scales(&self) -> [u64; 2] {
        let dims = [self.key_dim, self.value_strides()[2]];
        [0, 1].map(|side| {
            let [elements, scales] = self.formats[side].plane_bytes(dims[side]);
            if scales > 0 { elements.saturating_mul(self.scale_slots) } else { 0 }
        })
    }

    /// The planes of the buffers.
    pub(crate) fn planes(&self) -> impl Iterator<Item = Plane> {
        self.token_bytes().planes(self.scale_slots)
    }

    /// Whether the live slots are one piece, `start..start + len`.
    pub fn is_contiguous(&self) -> bool {
        self.pages.is_none() && self.rows.is_none() && self.start + self.len <= self.capacity
    }

    /// How the live tokens lie, and with it the WGSL text that reads them.
    pub fn layout(&self) -> Layout {
        match (&self.pages, &self.rows) {
            (Some(_), None) => Layout::Paged,
            (Some(_), Some(_)) => Layout::RaggedPaged,
            (None, Some(_)) => Layout::RaggedWrapped,
            (None, None) if self.is_contiguous() => Layout::Contiguous,
            (None, None) => Layout::Wrapped,
        }
    }

    /// The words of `struct KvLayout` in [`Layout::wgsl`], in its order. For a uniform or immediate data, at
    /// every step anew.
    pub fn layout_words(&self) -> [u32; Layout::WORDS] {
        bytemuck::cast(self.kv_layout())
    }

    pub(crate) fn kv_layout(&self) -> KvLayout {
        // A layer that can be bound has no count that does not fit.
        let word = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let table = self.pages.as_ref();
        let strides = [self.key_strides()[2], self.value_strides()[2]];
        let units = [0, 1].map(|side| word(self.formats[side].units(strides[side])));
        let scales = self.scales().map(|byte| u32::try_from(byte / 4).unwrap_or(u32::MAX));
        KvLayout {
            heads: word(self.heads),
            key_dim: word(self.key_dim),
            value_dim: word(self.value_dim),
            len: word(self.len),
            start: word(self.start),
            capacity: word(self.capacity),
            table: table.map_or(0, |table| table.at),
            table_stride: table.map_or(0, |table| table.stride),
            batch: word(self.batch),
            rows: self.rows.as_ref().map_or(0, |rows| rows.at),
            key_units: units[0],
            value_units: units[1],
            key_scales: scales[0],
            value_scales: scales[1],
            reserved: [0; 2],
        }
    }

    /// The buffer of the page table and of the records of ragged rows; `None` if the layout has neither
    /// ([`Layout::has_table`]). Bind it whole, read-only, as `array<u32>`: `layout_words` says at which word each
    /// begins. What the view reads of it stays as it is until what was recorded up to the cache's next update has
    /// run, also if rows are cut, or the cache is reset or dropped before; take it from a fresh view at every step.
    pub fn page_table(&self) -> Option<&wgpu::Buffer> {
        self.table().map(|table| &table.buffer)
    }
}

fn strides(heads: usize, capacity: usize, dim: usize) -> [usize; 4] {
    [heads * capacity * dim, capacity * dim, dim, 1]
}

/// Refuses live tokens that a ring has no slots for.
fn check_tokens(start: usize, len: usize, capacity: usize) -> Result<()> {
    if start >= capacity {
        return Err(Error::PositionOutOfBounds { position: start, bound: capacity });
    }
    if len > capacity {
        return Err(Error::SequenceTooLong { len: 0, new_tokens: len, bound: capacity });
    }
    Ok(())
}
