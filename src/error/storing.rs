//! What caches refuse to store, or to restore: [`StoringError`].

use super::Reason;

/// What a cache refuses of what it is to store, or of a saved cache: the cause of an
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

    /// Bytes that are no saved cache, or one that this cache cannot hold.
    #[error("the saved cache cannot be restored: {reason}")]
    BadSave {
        /// What is wrong.
        reason: Reason,
    },
}
