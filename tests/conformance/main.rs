//! Everything that runs on a GPU and needs no model, in one binary, so that the kernels are compiled
//! once.

mod batch;
mod encoder_decoder;
mod histories;
mod inputs;
mod kinds;
mod model;
mod passes;
mod refusals;
mod refused_calls;
mod rig;
mod room;
mod threads;
mod traces;

use std::sync::OnceLock;

use wgpu_kvcache::Gpu;

/// The device that the tests share. No adapter is a failure, and the message says how to get one.
fn gpu() -> Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| Gpu::headless().unwrap_or_else(|error| panic!("{error}"))).clone()
}
