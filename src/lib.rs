//! A Transformer's K/V cache on the GPU, for inference engines built on [wgpu].
//!
//! A Transformer that generates text keeps the keys and values of all earlier tokens, for each layer. This crate keeps
//! them in GPU storage buffers. An engine passes new K and V as GPU buffers, and its attention kernel reads the cache
//! in place: nothing is copied to the host, and no call waits except `get`.
//!
//! ```
//! use wgpu_kvcache::{Cache, CachePosition, DynamicKVCache, Gpu, KVCache};
//!
//! # fn main() -> Result<(), wgpu_kvcache::Error> {
//! let gpu = Gpu::headless()?; // or Gpu::new(device, queue) with an engine's own
//! let mut cache = DynamicKVCache::new(&gpu);
//! let key = gpu.upload(&[0.5_f32; 2 * 8 * 3 * 64], &[2, 8, 3, 64])?; // (B, H, T, D)
//! let value = gpu.upload(&[1.5_f32; 2 * 8 * 3 * 64], &[2, 8, 3, 64])?;
//! gpu.submit_pass("prompt", |pass| {
//!     let view = cache.update(pass, &key.view(), &value.view(), 0, CachePosition::Append)?;
//!     assert_eq!(view.key_shape(), [2, 8, 3, 64]); // attention would read view.key() here
//!     cache.reorder_cache(pass, &[1, 1]) // both beams continue row 1
//! })?;
//! let (key, _value) = cache.get(0)?.expect("layer 0 was written"); // reads back, for debugging
//! assert_eq!(key.shape(), [2, 8, 3, 64]);
//! # Ok(())
//! # }
//! ```
//!
//! - The contract is in the traits [`Cache`] and [`KVCache`]. Kinds: [`DynamicKVCache`] grows, [`StaticKVCache`] has a
//!   fixed length, the rows of a [`PagedKVCache`] share pages, and an [`EncoderDecoderCache`] is a pair of caches.
//! - [`SequenceCache`] keeps sequences of different length that join, leave and fork, and share prefixes: for
//!   engines that serve several requests at a time.
//! - Inputs are [`TensorView`]s: a buffer, an offset and strides. Attention reads a [`LayerView`]. It is this crate's
//!   [`Attention`], or an engine's own shader, joined with a [`Layout`]'s text.
//! - f32, f16 and bf16 come in ([`DType`]) and are stored as they are, bits untouched, or in a [`Format`] of 32, 16, 8 or
//!   4 bits. WebGPU's default limits and no optional feature are enough.
//! - With the feature `safetensors`, caches are saved to bytes, and restored into any kind.

mod attention;
mod cache;
mod dtype;
mod error;
mod format;
mod gpu;
mod host;
mod layer_shape;
mod layout;
pub mod pooled;
#[cfg(feature = "safetensors")]
mod saved;
mod sequence;
mod stats;
mod storage;
mod stored;
mod tensor;
mod view;

pub use attention::{Attention, AttentionOptions, BitMask};
#[cfg(feature = "safetensors")]
pub use cache::SaveFuture;
pub use cache::attend::LayerTensors;
pub use cache::dynamic::DynamicKVCache;
pub use cache::encoder_decoder::{EncoderDecoderCache, Side};
pub use cache::fixed::StaticKVCache;
pub use cache::layer_memory::LayerMemory;
pub use cache::memory::{CacheKind, CacheLoad, CachePlan};
pub use cache::options::CacheOptions;
pub use cache::paged::PagedKVCache;
pub use cache::sequences::{SequenceCache, Step};
pub use cache::{Cache, GetFuture, KVCache};
pub use dtype::{DType, Element, UnknownDType};
pub use error::{
    BrowserError, Error, ErrorKind, Reason, Result, SequenceError, StoringError, WindowError,
};
pub use format::{Format, Formats, UnknownFormat};
pub use gpu::kernels::CompileScope;
pub use gpu::{Gpu, HeadlessOptions};
pub use host::batch::BatchChange;
pub use host::position::CachePosition;
pub use layer_shape::LayerShape;
pub use layout::Layout;
pub use sequence::SequenceId;
pub use stats::Stats;
pub use stored::StoredTensor;
pub use tensor::{AxisOrder, HeldTensor, HostTensor, Tensor, TensorView};
pub use view::{LayerView, Rings};
pub use wgpu;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
