//! The type and sizes of a layer, as they are told before its first K and V.

use crate::dtype::DType;

/// The properties of a layer that select its kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerShape {
    /// Type of an element of K and V as they come in, and as they are stored if no [`Formats`](crate::Formats) say otherwise.
    pub dtype: DType,
    /// K/V heads.
    pub heads: usize,
    /// Elements per head of K.
    pub key_dim: usize,
    /// Elements per head of V.
    pub value_dim: usize,
}
