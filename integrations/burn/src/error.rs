//! What can go wrong: [`Error`].

use burn::tensor::wgpu::WgpuInitError;

/// Why a call was refused. What burn's tensors cannot be used for is said here; everything else comes from the cache
/// itself, in [`Error::Cache`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The cache or attention refused the call.
    #[error(transparent)]
    Cache(#[from] wgpu_kvcache::Error),

    /// burn's wgpu runtime could not be started.
    #[error(
        "burn's wgpu runtime could not be started: {0}; make the SharedDevice before the first tensor, once in a \
         process, and clone it where it is needed"
    )]
    Setup(#[source] WgpuInitError),

    /// A tensor of another device than the cache's.
    #[error(
        "{what} is on {got}, and the cache is on {expected}; make the tensor on SharedDevice::device(), or move it there \
         with Tensor::to_device"
    )]
    OtherDevice {
        /// Which tensor.
        what: &'static str,
        /// Its device.
        got: String,
        /// The device of the cache.
        expected: String,
    },

    /// A tensor that burn does not keep in a buffer of its wgpu runtime.
    #[error(
        "{what} is not a plain tensor of burn's wgpu runtime: {reason}; take a tensor that autodiff \
         tracks out of it with Tensor::inner, and dequantize a quantized one"
    )]
    Backend {
        /// Which tensor.
        what: &'static str,
        /// What burn says.
        reason: String,
    },

    /// An element type that the cache does not take.
    #[error(
        "{what} has elements of type {got}, and the cache takes F32, F16 and BF16; cast it with Tensor::cast"
    )]
    DType {
        /// Which tensor.
        what: &'static str,
        /// Its element type.
        got: String,
    },

    /// Attention over a layer that holds nothing.
    #[error("layer {layer} was never written; call attend or update with its K and V first")]
    EmptyLayer {
        /// The layer.
        layer: usize,
    },

    /// burn's runtime failed to give the memory of a tensor.
    #[error(
        "burn's runtime did not give the memory of {what}: {reason}; free memory, or make a new device if this one is \
         lost"
    )]
    Memory {
        /// Which tensor.
        what: &'static str,
        /// What the runtime says.
        reason: String,
    },
}

/// The result of this crate's calls.
pub type Result<T> = std::result::Result<T, Error>;
