//! Everything that runs on a GPU and needs no model, in one binary, so that the kernels are compiled
//! once.
//!
//! The same tests run in a browser: see `../browser.sh`. There the compiler hands them to a runner of this crate.
#![cfg_attr(target_arch = "wasm32", feature(custom_test_frameworks, test))]
#![cfg_attr(target_arch = "wasm32", test_runner(crate::browser::collect))]

#[cfg(target_arch = "wasm32")]
extern crate test;

mod attention;
mod attention_long;
mod attention_options;
mod attention_pooled;
mod attention_refusals;
mod attention_scores;
mod attention_unseen;
mod batch;
#[cfg(target_arch = "wasm32")]
mod browser;
mod devices;
mod encoder_decoder;
#[cfg(not(target_arch = "wasm32"))]
mod failed_submits;
#[cfg(not(target_arch = "wasm32"))]
mod faults;
#[cfg(not(target_arch = "wasm32"))]
mod foreign;
mod formats;
mod given;
mod histories;
mod inputs;
mod keep;
mod kinds;
mod layouts;
#[cfg(not(target_arch = "wasm32"))]
mod limits;
mod messages;
mod model;
mod others;
mod pages;
mod passes;
mod plain_formats;
mod plans;
mod pooled;
mod ragged;
mod ragged_attention;
#[cfg(not(target_arch = "wasm32"))]
mod readbacks;
mod refusals;
#[cfg(not(target_arch = "wasm32"))]
mod refused_calls;
mod refused_views;
mod reserve;
mod rig;
mod room;
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
mod saved;
mod sequence_attention;
mod sequence_refusals;
mod sequences;
mod shapes;
mod surface;
#[cfg(not(target_arch = "wasm32"))]
mod tables;
#[cfg(not(target_arch = "wasm32"))]
mod threads;
mod traces;
mod wait;
mod windows;

use std::sync::OnceLock;

#[cfg(not(target_arch = "wasm32"))]
use wgpu_kvcache::wgpu::{Device, DeviceDescriptor};
use wgpu_kvcache::wgpu::{Features, Limits};
use wgpu_kvcache::{Error, Gpu, HeadlessOptions};

/// What `KV_DEVICE` asks of the adapter, or in its place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Best,
    Immediates,
    Baseline,
    Noop,
}

fn wanted() -> Wanted {
    static WANTED: OnceLock<Wanted> = OnceLock::new();
    if cfg!(target_arch = "wasm32") {
        // What every browser has. The adapter's own limits are larger than memory there.
        return Wanted::Baseline;
    }
    *WANTED.get_or_init(|| match std::env::var("KV_DEVICE").as_deref() {
        Err(_) | Ok("best") => Wanted::Best,
        Ok("immediates") => Wanted::Immediates,
        Ok("baseline") => Wanted::Baseline,
        Ok("noop") => {
            // Straight to the terminal: the test harness holds back what a passing test prints.
            let line =
                "KV_DEVICE=noop: no kernel runs, so the contents of tensors are not compared\n";
            std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("a stderr");
            Wanted::Noop
        }
        Ok(other) => panic!("KV_DEVICE is '{other}', not best, immediates, baseline or noop"),
    })
}

/// Whether kernels run on the devices under test: everywhere but on wgpu's backend without a driver.
fn kernels_run() -> bool {
    wanted() != Wanted::Noop
}

/// A device of its own. No adapter is a failure, and the message says how to get one.
///
/// On the backend without a driver, limits that nobody names are WebGPU's defaults: it has none.
fn open(features: Features, limits: Option<Limits>) -> Gpu {
    try_open(features, limits).unwrap_or_else(|error| panic!("{error}"))
}

#[cfg(target_arch = "wasm32")]
fn try_open(features: Features, limits: Option<Limits>) -> Result<Gpu, Error> {
    let options = HeadlessOptions::default().with_features(features).with_limits(limits);
    wait::wait(Gpu::headless_async(&options))
}

#[cfg(not(target_arch = "wasm32"))]
fn try_open(features: Features, limits: Option<Limits>) -> Result<Gpu, Error> {
    if kernels_run() {
        Gpu::headless_with(&HeadlessOptions::default().with_features(features).with_limits(limits))
    } else {
        let (device, queue) = Device::noop(&DeviceDescriptor {
            required_features: features,
            required_limits: Limits {
                max_immediate_size: if features.contains(Features::IMMEDIATES) { 128 } else { 0 },
                ..limits.unwrap_or_default()
            },
            ..Default::default()
        });
        Gpu::new(device, queue)
    }
}

/// A device that tests share.
///
/// The variable `WGPU_BACKEND` picks the backend, and `KV_DEVICE` what is asked of the adapter: `best`
/// (all that it has, the default), `immediates` (WebGPU's default limits and immediates) or `baseline`
/// (WebGPU's default limits and no feature).
///
/// `KV_DEVICE=noop` takes wgpu's backend without a driver in place of an adapter, for every test in this
/// binary. Buffers and copies are real there, and wgpu checks every call, but dispatches do nothing. So
/// everything holds that the host knows (lengths, views, refusals, statistics, read-backs of the right
/// shape), and only what the tensors contain is not compared: see `rig::same_bits`.
fn gpu() -> Gpu {
    let (features, limits) = match wanted() {
        Wanted::Best | Wanted::Noop => (Features::IMMEDIATES, None),
        Wanted::Immediates => (Features::IMMEDIATES, Some(Limits::default())),
        Wanted::Baseline => (Features::empty(), Some(Limits::default())),
    };
    devices::with_mine(|mine| mine.full.get_or_init(|| open(features, limits)).clone())
}

/// A device of WebGPU's default limits and no optional feature that tests share.
fn shared_plain_gpu() -> Gpu {
    devices::with_mine(|mine| mine.plain.get_or_init(|| rig::plain_gpu(|_| ())).clone())
}

/// How many random histories to run: `usual`, or what `KV_HISTORIES` says.
pub(crate) fn histories(usual: u32) -> u32 {
    #[cfg(target_arch = "wasm32")]
    return browser::histories().unwrap_or(usual);
    #[cfg(not(target_arch = "wasm32"))]
    std::env::var("KV_HISTORIES").map_or(usual, |count| {
        count.parse().unwrap_or_else(|_| panic!("KV_HISTORIES is no number: {count}"))
    })
}

/// How many random cases to run where `usual` are usual. `KV_HISTORIES` scales it, in thousandths: fewer where CI runs
/// the same on another device.
pub(crate) fn cases(usual: usize) -> usize {
    (usual * histories(1000) as usize / 1000).clamp(usual.div_ceil(4), 100 * usual)
}
