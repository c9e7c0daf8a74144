//! Element types of K and V.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

/// The type of one element of K or V as it comes in, or is read back.
///
/// A cache that is given no [`Format`](crate::Format) moves bits, never numbers, so every value is read back exactly as it
/// was written: NaN payloads, infinities and negative zero included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 single precision, 4 bytes.
    F32,
    /// IEEE 754 half precision, 2 bytes. Needs an even `head_dim`.
    F16,
    /// bfloat16, 2 bytes. Needs an even `head_dim`.
    BF16,
}

impl DType {
    /// Bits per element.
    pub const fn bits(self) -> usize {
        8 * self.size()
    }

    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The name as it is written on a command line: `f32`, `f16` or `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is not the name of a [`DType`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown element type '{0}'; use f32, f16 or bf16")]
pub struct UnknownDType(pub String);

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(name: &str) -> Result<Self, UnknownDType> {
        [Self::F32, Self::F16, Self::BF16]
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| UnknownDType(name.to_owned()))
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A host type that K and V can be uploaded from and read back into: `f32`, [`half::f16`], [`half::bf16`].
pub trait Element: bytemuck::Pod + sealed::Sealed {
    /// The matching [`DType`].
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_ones_are_refused() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            assert_eq!(dtype.to_string().parse::<DType>(), Ok(dtype));
        }
        let error = "f64".parse::<DType>().unwrap_err();
        assert!(error.to_string().contains("f64"));
    }
}
