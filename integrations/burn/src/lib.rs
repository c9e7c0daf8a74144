//! K and V of a Transformer that is written in [burn](https://burn.dev), kept on the GPU by
//! [`wgpu_kvcache`], in place of a `cat` at each step.
//!
//! burn tensors go in, a burn tensor comes out: [`BurnCache::attend`] writes the new tokens of a layer and returns
//! attention over all of them. burn and the cache share one wgpu device ([`SharedDevice`]), so nothing is copied and
//! nothing waits. [`BurnSequenceCache`] does the same for sequences of different length.
#![forbid(unsafe_code)]

mod cache;
mod device;
mod error;
mod options;
mod record;
mod sequences;
mod tensor;

pub use cache::BurnCache;
pub use device::SharedDevice;
pub use error::{Error, Result};
pub use options::AttendOptions;
pub use sequences::BurnSequenceCache;
pub use wgpu_kvcache;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
