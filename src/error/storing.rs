//! What caches refuse to store, to store in, or to restore: [`StoringError`].

use super::Reason;

/// What a cache refuses of what it is to store, of memory that it is given to store it in, or of a saved cache: the cause of an
/// [`Error::Storing`](crate::Error::Storing).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoringError {
    /// V of a layer that stores it as the first elements of K is not there.
    #[error(
        "value {value:?} of layer {layer} must be the first elements of each head of key {key:?}, in the same memory, since the cache was made to store K alone (CacheOptions::with_value_in_key); pass TensorView::with_head_dim of the key"
    )]
    ValueNotInKey {
        /// The layer.
        layer: usize,
        /// Shape of K, (B, H, T, D).
        key: [usize; 4],
        /// Shape of V, (B, H, T, D).
        value: [usize; 4],
    },

    /// A layer whose rows do not fit the memory that the engine gave for it ([`LayerMemory`](crate::LayerMemory)).
    #[error(
        "layer {layer} needs {needed} bytes of {side} for {batch} rows of {heads} heads and {tokens} tokens, but the memory that was given for it has {given}; give more of it (CachePlan::bytes_of_layers tells how much), or use fewer rows or a smaller max_cache_len"
    )]
    MemoryTooShort {
        /// The layer.
        layer: usize,
        /// "K" or "V".
        side: &'static str,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes that were given, as far as the device binds them.
        given: u64,
        /// Batch rows.
        batch: usize,
        /// Tokens of each row.
        tokens: usize,
        /// K/V heads.
        heads: usize,
    },

    /// Memory that is given to a layer and that a kernel cannot bind.
    #[error(
        "the memory given for {side} of layer {layer}, {size} bytes from byte {offset} of a buffer of {buffer}, must lie inside the buffer and begin at a multiple of {alignment}"
    )]
    MemoryRange {
        /// The layer.
        layer: usize,
        /// "K" or "V".
        side: &'static str,
        /// First byte.
        offset: u64,
        /// Bytes.
        size: u64,
        /// Bytes of the buffer.
        buffer: u64,
        /// The device's `min_storage_buffer_offset_alignment`, and 16 at least.
        alignment: u64,
    },

    /// Memory that is given twice.
    #[error(
        "the memory given for {} of layer {} and that for {} of layer {} have bytes in common; give each its own range", sides[0], layers[0], sides[1], layers[1]
    )]
    MemoryOverlaps {
        /// "K" or "V".
        sides: [&'static str; 2],
        /// The layers.
        layers: [usize; 2],
    },

    /// Memory for V of a cache that stores K alone, or none for V of one that stores both.
    #[error(
        "layer {layer} is given memory for {given}, but the cache stores {stored} (CacheOptions::with_value_in_key); use {remedy}"
    )]
    MemorySides {
        /// The layer.
        layer: usize,
        /// What was given.
        given: &'static str,
        /// What the cache stores.
        stored: &'static str,
        /// What to give.
        remedy: &'static str,
    },

    /// Memory of another number of layers than the cache is made for.
    #[error(
        "memory for {given} layers is given to a cache of {num_layers}; give memory for each layer"
    )]
    MemoryCount {
        /// Layers that memory was given for.
        given: usize,
        /// Layers of the cache.
        num_layers: usize,
    },

    /// Bytes that are no saved cache, or one that this cache cannot hold.
    #[error("the saved cache cannot be restored: {reason}")]
    BadSave {
        /// What is wrong.
        reason: Reason,
    },
}
