//! How live tokens lie in a layer's buffers, as a shader is told.

/// How the live tokens of a [`LayerView`](crate::LayerView) lie in its buffers.
///
/// Each layout comes with a WGSL text, [`wgsl`](Self::wgsl), that an attention shader is joined with. All
/// texts declare the same `struct KvLayout` of eight `u32`, which
/// [`LayerView::layout_words`](crate::LayerView::layout_words) fills, and the same function
///
/// ```wgsl
/// fn kv_slot(kv: KvLayout, b: u32, h: u32, t: u32) -> u32
/// ```
///
/// which says at which slot live token `t` (0 is the oldest) of row `b` and K/V head `h` lies. Element `d`
/// of K is element `kv_slot(..) * key_dim + d` of the buffer of K, and of V likewise. So one shader serves
/// every kind of cache, and costs nothing where the tokens lie in one piece.
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
///         if id.x < kv.len {
///             first[id.x] = key[kv_slot(kv, 0u, 0u, id.x) * kv.key_dim];
///         }
///     }";
/// for layout in Layout::ALL {
///     let text = format!("{shader}\n{}", layout.wgsl());
///     # naga::front::wgsl::parse_str(&text).expect("valid WGSL");
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// [B, H, capacity, D], and the live tokens are one piece of it.
    Contiguous,
    /// [B, H, capacity, D] as a ring: the live tokens may run over its end. Reads contiguous ones too.
    Wrapped,
    /// Pages [page, H, tokens of a page, D] that a table names. The shader must also define
    /// `fn kv_table(i: u32) -> u32`, which reads word `i` of the buffer that the table lies in.
    Paged,
}

impl Layout {
    /// All layouts.
    pub const ALL: [Self; 3] = [Self::Contiguous, Self::Wrapped, Self::Paged];

    /// The WGSL text of this layout: `struct KvLayout` and `fn kv_slot`.
    pub fn wgsl(self) -> &'static str {
        match self {
            Self::Contiguous => include_str!("../shaders/layout/contiguous.wgsl"),
            Self::Wrapped => include_str!("../shaders/layout/wrapped.wgsl"),
            Self::Paged => include_str!("../shaders/layout/paged.wgsl"),
        }
    }
}
