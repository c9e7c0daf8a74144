//! What is decided on the host: positions, row moves, pages. Free of wgpu.

pub(crate) mod batch;
pub(crate) mod capacity;
pub(crate) mod pages;
pub(crate) mod plan;
pub(crate) mod pool;
pub(crate) mod position;
pub(crate) mod prefix;
pub(crate) mod rows;
pub(crate) mod sequences;
pub(crate) mod window;
pub(crate) mod words;
pub(crate) mod work;
