//! Everything that runs on a GPU and needs no model, in one binary, so that the kernels are compiled
//! once.

mod batch;
mod encoder_decoder;
mod faults;
mod histories;
mod inputs;
mod kinds;
mod model;
mod passes;
mod refusals;
mod refused_calls;
mod refused_views;
mod rig;
mod room;
mod shapes;
mod threads;
mod traces;

use std::sync::OnceLock;

use wgpu_kvcache::wgpu::{Features, Limits};
use wgpu_kvcache::{Gpu, HeadlessOptions};

/// The device that the tests share. No adapter is a failure, and the message says how to get one.
///
/// The variable `WGPU_BACKEND` picks the backend, and `KV_DEVICE` what is asked of the adapter: `best`
/// (all that it has, the default), `immediates` (WebGPU's default limits and immediates) or `baseline`
/// (WebGPU's default limits and no feature).
fn gpu() -> Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    let device = std::env::var("KV_DEVICE").unwrap_or_else(|_| "best".to_owned());
    let (features, limits) = match device.as_str() {
        "best" => (Features::IMMEDIATES, None),
        "immediates" => (Features::IMMEDIATES, Some(Limits::default())),
        "baseline" => (Features::empty(), Some(Limits::default())),
        other => panic!("KV_DEVICE is '{other}', not best, immediates or baseline"),
    };
    let options = HeadlessOptions { features, limits, ..HeadlessOptions::default() };
    GPU.get_or_init(|| Gpu::headless_with(&options).unwrap_or_else(|error| panic!("{error}")))
        .clone()
}
