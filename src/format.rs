//! How K and V are stored: [`Format`], [`Formats`], and the planes of a buffer.

use std::fmt;
use std::str::FromStr;

use crate::dtype::DType;

/// How one token of one head is stored, of K or of V.
///
/// The quantized formats are those of GGUF: blocks of 32 consecutive elements of a head, each with one f16 scale. A head
/// whose length is no multiple of 32 fills its last block with zeros. An element reads back as its scale times a small
/// integer:
///
/// | format | an element | bytes for a head of 128 |
/// | --- | --- | --- |
/// | [`F32`](Self::F32) | itself | 512 |
/// | [`F16`](Self::F16), [`BF16`](Self::BF16) | itself, rounded | 256 |
/// | [`Q8_0`](Self::Q8_0) | scale × an integer of -127 to 127 | 136 |
/// | [`Q4_0`](Self::Q4_0) | scale × an integer of -8 to 7 | 72 |
///
/// # Conversion
///
/// Values are rounded to the nearest that the format has, to even if two are equally near. To f16, values from 65520 on
/// become infinity; a NaN stays a NaN. The scale of a block is its largest magnitude / 127 for `Q8_0`, and the element of
/// the largest magnitude (the first, if there are several) / -8 for `Q4_0`, rounded to f16; then each element is divided
/// by the scale as it is stored, rounded, and clamped to the format's integers. A block whose scale no finite f16 can
/// hold reads back as NaN, all 32 elements of it: a block with an infinity, a NaN, or a scale from 65520 on. So what
/// cannot be stored shows, and never passes for a value.
///
/// # Memory
///
/// The buffer of K, or of V, has the elements of all slots first: a slot's row is a whole number of 32-bit words. In
/// quantized formats a row has 32 bytes a block (`Q8_0`, one signed byte an element) or 16 (`Q4_0`: byte j has element j
/// in its lower half and element j + 16 in its upper one, each plus 8). The scales follow in a plane of their own, two in
/// a word, the lower block in the lower half; a row with an odd number of blocks ends in an unused half.
/// [`key_wgsl`](Self::key_wgsl) and [`value_wgsl`](Self::value_wgsl) are texts that read elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision. Needs an even `head_dim`.
    F16,
    /// bfloat16. Needs an even `head_dim`.
    BF16,
    /// 8 bits an element, and a scale for each 32.
    Q8_0,
    /// 4 bits an element, and a scale for each 32.
    Q4_0,
}

impl Format {
    /// All formats.
    pub const ALL: &'static [Self] = &[Self::F32, Self::F16, Self::BF16, Self::Q8_0, Self::Q4_0];

    /// Elements of a block of the quantized formats.
    pub const BLOCK: usize = 32;

    /// The name as it is written on a command line: `f32`, `f16`, `bf16`, `q8_0` or `q4_0`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }

    /// The type of its elements; `None` for a quantized format.
    pub const fn dtype(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::BF16 => Some(DType::BF16),
            Self::Q8_0 | Self::Q4_0 => None,
        }
    }

    /// The type that [`get`](crate::KVCache::get) answers in: the elements' own, or f32 for a quantized format.
    pub const fn read_dtype(self) -> DType {
        match self.dtype() {
            Some(dtype) => dtype,
            None => DType::F32,
        }
    }

    /// Whether it stores blocks with scales.
    pub const fn is_quantized(self) -> bool {
        self.dtype().is_none()
    }

    /// Blocks of a head of `head_dim` elements; none if it is not quantized.
    pub const fn blocks(self, head_dim: usize) -> usize {
        if self.is_quantized() { head_dim.div_ceil(Self::BLOCK) } else { 0 }
    }

    /// Bytes of one token of one head of `head_dim` elements, scales included.
    ///
    /// # Examples
    ///
    /// ```
    /// use wgpu_kvcache::Format;
    ///
    /// assert_eq!(Format::F32.token_bytes(64), 256);
    /// assert_eq!(Format::Q8_0.token_bytes(64), 64 + 4);
    /// assert_eq!(Format::Q4_0.token_bytes(64), 32 + 4);
    /// ```
    pub const fn token_bytes(self, head_dim: usize) -> u64 {
        let [elements, scales] = self.plane_bytes(head_dim);
        elements.saturating_add(scales)
    }

    /// WGSL that reads K of this format, of heads of `head_dim` elements: to join to a shader that has a
    /// [`Layout`](crate::Layout)'s text as well.
    ///
    /// The text defines `alias KeyUnit`, which K is bound as an array of, and
    ///
    /// ```wgsl
    /// fn kv_key_quad(kv: KvLayout, slot: u32, quad: u32) -> vec4<f32>
    /// ```
    ///
    /// which reads elements 4 · quad to 4 · quad + 3 of the head at a slot, as `kv_slot` of the layout numbers them. The
    /// quad must begin within the head; elements past the head's end are zero. The shader defines `kv_key_unit`, which
    /// reads unit `i` of the buffer. V may have another format: [`value_wgsl`](Self::value_wgsl).
    ///
    /// # Examples
    ///
    /// A shader that reads the first four elements of every live K of row 0, head 0:
    ///
    /// ```
    /// use wgpu_kvcache::{Format, Layout};
    ///
    /// let shader = "
    ///     @group(0) @binding(0) var<uniform> kv: KvLayout;
    ///     @group(0) @binding(1) var<storage, read> key: array<KeyUnit>;
    ///     @group(0) @binding(2) var<storage, read_write> first: array<vec4<f32>>;
    ///
    ///     fn kv_key_unit(i: u32) -> KeyUnit {
    ///         return key[i];
    ///     }
    ///
    ///     @compute @workgroup_size(64)
    ///     fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    ///         if id.x < kv_len(kv, 0u) {
    ///             first[id.x] = kv_key_quad(kv, kv_slot(kv, 0u, 0u, id.x), 0u);
    ///         }
    ///     }";
    /// for format in Format::ALL {
    ///     let text = [shader, Layout::Wrapped.wgsl(), &format.key_wgsl(64)].join("\n");
    ///     # naga::front::wgsl::parse_str(&text).expect("valid WGSL");
    /// }
    /// ```
    pub fn key_wgsl(self, head_dim: usize) -> String {
        self.side_wgsl("key", by_words(head_dim))
    }

    /// WGSL that reads V of this format: as [`key_wgsl`](Self::key_wgsl), with `ValueUnit`, `kv_value_quad` and
    /// `kv_value_unit`. If V is the first elements of K, `head_dim` is that of K.
    pub fn value_wgsl(self, head_dim: usize) -> String {
        self.side_wgsl("value", by_words(head_dim))
    }

    pub(crate) fn side_wgsl(self, side: &str, by_words: bool) -> String {
        let by = if by_words {
            include_str!("../shaders/element/words.wgsl")
        } else {
            include_str!("../shaders/element/vectors.wgsl")
        };
        let runs = include_str!("../shaders/element/runs.wgsl");
        let text = match self {
            Self::F32 => [include_str!("../shaders/element/f32.wgsl"), by, runs].concat(),
            Self::F16 => [include_str!("../shaders/element/f16.wgsl"), by, runs].concat(),
            Self::BF16 => [include_str!("../shaders/element/bf16.wgsl"), by, runs].concat(),
            Self::Q8_0 => include_str!("../shaders/element/q8_0.wgsl").to_owned(),
            Self::Q4_0 => include_str!("../shaders/element/q4_0.wgsl").to_owned(),
        };
        of_side(&text, side)
    }

    /// Units from one slot to the next, for slots of `stride` elements.
    pub(crate) fn units(self, stride: usize) -> usize {
        if !self.is_quantized() && !by_words(stride) {
            return stride / 4;
        }
        usize::try_from(self.plane_bytes(stride)[0] / 4).unwrap_or(usize::MAX)
    }

    /// Bytes of a block without its scale; none if it is not quantized.
    pub(crate) const fn block_bytes(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 0,
            Self::Q8_0 => Self::BLOCK,
            Self::Q4_0 => Self::BLOCK / 2,
        }
    }

    /// Bytes of one token of one head: its elements, and its scales.
    pub(crate) const fn plane_bytes(self, head_dim: usize) -> [u64; 2] {
        let blocks = self.blocks(head_dim) as u64;
        // Two scales of two bytes a word.
        let scales = 4 * blocks.div_ceil(2);
        let elements = match self {
            Self::F32 => (head_dim as u64).saturating_mul(4),
            Self::F16 | Self::BF16 => (head_dim as u64).saturating_mul(2),
            Self::Q8_0 | Self::Q4_0 => blocks.saturating_mul(self.block_bytes() as u64),
        };
        [elements, scales]
    }

    /// Its number in the shaders.
    pub(crate) const fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::BF16 => 2,
            Self::Q8_0 => 3,
            Self::Q4_0 => 4,
        }
    }
}

/// Whether elements of slots of `stride` elements are read by words, and not by four.
pub(crate) fn by_words(stride: usize) -> bool {
    !stride.is_multiple_of(4)
}

/// A text in which `side` stands for `key` or `value`.
pub(crate) fn of_side(text: &str, side: &str) -> String {
    let name = side[..1].to_uppercase() + &side[1..];
    text.replace("SIDE", &side.to_uppercase()).replace("Side", &name).replace("side", side)
}

impl From<DType> for Format {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is not the name of a [`Format`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown format '{0}'; use f32, f16, bf16, q8_0 or q4_0")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        let known = Self::ALL.iter().copied().find(|format| format.name() == name);
        known.ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

/// The formats of a cache's K and V: see [`CacheOptions::with_formats`](crate::CacheOptions::with_formats).
///
/// `None` stores what comes in, bits untouched.
///
/// # Examples
///
/// ```
/// use wgpu_kvcache::{Format, Formats};
///
/// let mixed = Formats { key: Some(Format::Q8_0), value: Some(Format::Q4_0) };
/// let both = Formats::from(Format::F16);
/// # assert_ne!(mixed, both);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Formats {
    /// Of K.
    pub key: Option<Format>,
    /// Of V.
    pub value: Option<Format>,
}

impl Formats {
    /// What K and V are stored as that come in as `dtype`.
    pub(crate) fn of(self, dtype: DType) -> [Format; 2] {
        [self.key, self.value].map(|format| format.unwrap_or(dtype.into()))
    }
}

impl From<Format> for Formats {
    /// Of both K and V.
    fn from(format: Format) -> Self {
        Self { key: Some(format), value: Some(format) }
    }
}

/// A part of the buffers of K and of V that kernels move as a whole: the elements, or the scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plane {
    /// Byte at which it begins, in the buffer of K and of V.
    pub(crate) base: [u64; 2],
    /// Bytes of one token of one head.
    pub(crate) row_bytes: [u64; 2],
}

/// What a token of one head takes, of K and of V. A side that is not stored has no elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TokenBytes {
    sides: [[u64; 2]; 2],
}

impl TokenBytes {
    /// Of K and V of `dims` elements a head; without V if it is the first elements of K.
    pub(crate) fn new(formats: [Format; 2], dims: [usize; 2], is_value_in_key: bool) -> Self {
        let value = if is_value_in_key { [0; 2] } else { formats[1].plane_bytes(dims[1]) };
        Self { sides: [formats[0].plane_bytes(dims[0]), value] }
    }

    /// Bytes of K and of V.
    pub(crate) fn of_sides(self) -> [u64; 2] {
        self.sides.map(|[elements, scales]| elements.saturating_add(scales))
    }

    /// The planes of buffers that have `slots` slots of one head each: the elements, then the scales, if there are any.
    pub(crate) fn planes(self, slots: u64) -> impl Iterator<Item = Plane> {
        let [elements, scales] = [0, 1].map(|plane| self.sides.map(|side| side[plane]));
        let planes = [
            Plane { base: [0; 2], row_bytes: elements },
            Plane { base: elements.map(|row| row.saturating_mul(slots)), row_bytes: scales },
        ];
        planes.into_iter().take(if scales == [0; 2] { 1 } else { 2 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_ones_are_refused() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse::<Format>(), Ok(*format));
        }
        assert!("q5_0".parse::<Format>().unwrap_err().to_string().contains("q5_0"));
    }

    #[test]
    fn quantized_tokens_take_what_their_blocks_take() {
        for (dim, q8, q4) in [(1, 36, 20), (32, 36, 20), (33, 68, 36), (64, 68, 36), (128, 136, 72)]
        {
            assert_eq!([Format::Q8_0, Format::Q4_0].map(|it| it.token_bytes(dim)), [q8, q4]);
        }
    }
}
