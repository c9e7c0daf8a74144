//! What is decided on the host: positions, row moves, pages. Free of wgpu.

pub(crate) mod batch;
pub(crate) mod pages;
pub(crate) mod plan;
pub(crate) mod position;
pub(crate) mod rows;
pub(crate) mod words;
pub(crate) mod work;
