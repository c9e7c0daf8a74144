//! The devices that tests share. A software adapter compiles the kernels of a device one after the other, so of two tests
//! that run at a time each has devices of its own.

use wgpu_kvcache::Gpu;

/// Devices that are made when they are first used.
#[derive(Default)]
pub(crate) struct Devices {
    /// Of what `KV_DEVICE` asks of the adapter.
    pub(crate) full: Once<Gpu>,
    /// Of WebGPU's default limits and no optional feature.
    pub(crate) plain: Once<Gpu>,
}

/// Nothing of wgpu's leaves its thread in a browser, where all tests run on one.
#[cfg(target_arch = "wasm32")]
type Once<T> = std::cell::OnceCell<T>;
#[cfg(not(target_arch = "wasm32"))]
type Once<T> = std::sync::OnceLock<T>;

#[cfg(target_arch = "wasm32")]
pub(crate) fn with_mine<T>(take: impl FnOnce(&Devices) -> T) -> T {
    std::thread_local! { static DEVICES: Devices = Devices::default() }
    DEVICES.with(take)
}

/// Those of this test, which runs on a thread of its own.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn with_mine<T>(take: impl FnOnce(&Devices) -> T) -> T {
    use std::sync::{Mutex, OnceLock, PoisonError};

    static DEVICES: OnceLock<[Devices; 2]> = OnceLock::new();
    /// How many tests use which.
    static USES: Mutex<[usize; 2]> = Mutex::new([0; 2]);

    struct Mine(usize);
    impl Drop for Mine {
        fn drop(&mut self) {
            USES.lock().unwrap_or_else(PoisonError::into_inner)[self.0] -= 1;
        }
    }
    fn choose() -> Mine {
        let mut uses = USES.lock().unwrap_or_else(PoisonError::into_inner);
        let least = usize::from(uses[1] < uses[0]);
        uses[least] += 1;
        Mine(least)
    }
    std::thread_local! { static MINE: Mine = choose() }
    let devices = DEVICES.get_or_init(Default::default);
    MINE.with(|mine| take(&devices[mine.0]))
}
