//! A layer's memory in its two arrangements, rings and pages, and the changes that are made of it.

pub(crate) mod arrangement;
mod keep;
pub(crate) mod layer;
pub(crate) mod layers;
pub(crate) mod paging;
pub(crate) mod pool;
mod read;
pub(crate) mod records;
#[cfg(feature = "safetensors")]
pub(crate) mod restore;
pub(crate) mod ring;
#[cfg(feature = "safetensors")]
mod save;
pub(crate) mod sequences;
pub(crate) mod step;
pub(crate) mod store;
pub(crate) mod table;
pub(crate) mod write;
