//! How live tokens lie in a layer's buffers, and the WGSL text that reads them.

/// How the live tokens of a [`LayerView`](crate::LayerView) lie in its buffers.
///
/// Each layout comes with a WGSL text, [`wgsl`](Self::wgsl), that an attention shader is joined with. All
/// texts declare the same `struct KvLayout` of [`Layout::WORDS`] `u32`, which
/// [`LayerView::layout_words`](crate::LayerView::layout_words) fills, and the same functions
///
/// ```wgsl
/// fn kv_len(kv: KvLayout, b: u32) -> u32
/// fn kv_slot(kv: KvLayout, b: u32, h: u32, t: u32) -> u32
/// fn kv_row(kv: KvLayout, b: u32) -> KvLayout
/// fn kv_slot_in_row(row: KvLayout, b: u32, h: u32, t: u32) -> u32
/// ```
///
/// `kv_len` is the number of live tokens of batch row `b`. `kv_slot` is the slot of live token `t` (0 is the
/// oldest) of row `b` and K/V head `h`: element `d` of that token's K is element `kv_slot(..) * key_dim + d` of
/// the buffer of K, and of V likewise. One shader serves every kind of cache, and a contiguous view costs it no
/// more than an addition. If rows differ in length ([`is_ragged`](Self::is_ragged)), `kv_slot` loads the row's
/// record each time; a shader that reads many tokens of one row calls `kv_row` once and then `kv_slot_in_row`.
/// Fields of `KvLayout` that are reserved are zero; do not read them.
///
/// # Examples
///
/// A shader that reads the first element of every live K of row 0, head 0:
///
/// ```
/// use wgpu_kvcache::Layout;
///
/// let shader = "
///     @group(0) @binding(0) var<uniform> kv: KvLayout;
///     @group(0) @binding(1) var<storage, read> key: array<f32>;
///     @group(0) @binding(2) var<storage, read> pages: array<u32>;
///     @group(0) @binding(3) var<storage, read_write> first: array<f32>;
///
///     fn kv_table(i: u32) -> u32 {
///         return pages[i];
///     }
///
///     @compute @workgroup_size(64)
///     fn main(@builtin(global_invocation_id) id: vec3<u32>) {
///         if id.x < kv_len(kv, 0u) {
///             first[id.x] = key[kv_slot(kv, 0u, 0u, id.x) * kv.key_dim];
///         }
///     }";
/// for layout in Layout::ALL {
///     let text = format!("{shader}\n{}", layout.wgsl());
///     # naga::front::wgsl::parse_str(&text).expect("valid WGSL");
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Layout {
    /// [B, H, capacity, D], and the live tokens are one piece of it.
    Contiguous,
    /// [B, H, capacity, D] as a ring: the live tokens may run over its end. Reads contiguous ones too.
    Wrapped,
    /// Pages [page, H, tokens of a page, D] that a table names. The shader must also define
    /// `fn kv_table(i: u32) -> u32`, which reads word `i` of the buffer that the table lies in.
    Paged,
    /// As [`Wrapped`](Self::Wrapped), and each row has its own start and length. They lie in the buffer of the
    /// table, so the shader must define `kv_table` here as well.
    RaggedWrapped,
    /// As [`Paged`](Self::Paged), and each row has its own start, length and number of pages.
    RaggedPaged,
}

impl Layout {
    /// All layouts.
    pub const ALL: &'static [Self] =
        &[Self::Contiguous, Self::Wrapped, Self::Paged, Self::RaggedWrapped, Self::RaggedPaged];

    /// Words of `struct KvLayout`.
    pub const WORDS: usize = 16;

    /// The WGSL text of this layout: `struct KvLayout` and the functions that read it.
    pub fn wgsl(self) -> &'static str {
        macro_rules! text {
            ($rows:literal, $slots:literal) => {
                concat!(
                    include_str!("../shaders/layout/kv_layout.wgsl"),
                    include_str!(concat!("../shaders/layout/rows_", $rows, ".wgsl")),
                    include_str!(concat!("../shaders/layout/", $slots, ".wgsl")),
                )
            };
        }
        match self {
            Self::Contiguous => text!("equal", "contiguous"),
            Self::Wrapped => text!("equal", "wrapped"),
            Self::Paged => text!("equal", "paged"),
            Self::RaggedWrapped => text!("ragged", "wrapped"),
            Self::RaggedPaged => text!("ragged", "paged"),
        }
    }

    /// Whether rows have their own start and length.
    pub fn is_ragged(self) -> bool {
        matches!(self, Self::RaggedWrapped | Self::RaggedPaged)
    }

    /// Whether K and V are pools of pages.
    pub fn is_paged(self) -> bool {
        matches!(self, Self::Paged | Self::RaggedPaged)
    }

    /// Whether the text calls `fn kv_table(i: u32) -> u32`, which the shader defines: it reads word `i` of the
    /// buffer that [`LayerView::page_table`](crate::LayerView::page_table) returns.
    pub fn has_table(self) -> bool {
        self.is_ragged() || self.is_paged()
    }
}

/// `struct KvLayout`, word for word.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct KvLayout {
    pub(crate) heads: u32,
    pub(crate) key_dim: u32,
    pub(crate) value_dim: u32,
    pub(crate) len: u32,
    pub(crate) start: u32,
    pub(crate) capacity: u32,
    pub(crate) table: u32,
    pub(crate) table_stride: u32,
    pub(crate) batch: u32,
    pub(crate) rows: u32,
    pub(crate) key_units: u32,
    pub(crate) value_units: u32,
    pub(crate) key_scales: u32,
    pub(crate) value_scales: u32,
    pub(crate) reserved: [u32; 2],
}
