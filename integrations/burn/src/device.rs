//! One wgpu device for burn and the cache: [`SharedDevice`].

use burn::tensor::Device;
use burn::tensor::wgpu::{WgpuOptions, WgpuSetup};
use wgpu_kvcache::Gpu;

use crate::error::{Error, Result};

/// One wgpu device that burn's tensors and the caches of this crate share.
///
/// burn registers a runtime once in a process, and keeps it. So make one `SharedDevice`, before the first tensor, and
/// clone it where it is needed; a clone is the same device.
///
/// # Examples
///
/// ```
/// use burn::tensor::Tensor;
/// use wgpu_kvcache_burn::SharedDevice;
///
/// # fn main() -> Result<(), wgpu_kvcache_burn::Error> {
/// let shared = SharedDevice::new()?;
/// let ones = Tensor::<4>::ones([1, 2, 3, 4], shared.device());
/// assert_eq!(ones.dims(), [1, 2, 3, 4]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct SharedDevice {
    device: Device,
    gpu: Gpu,
}

impl SharedDevice {
    /// Starts burn's wgpu runtime with its default options: what `Device::default()` is afterwards, if burn has no
    /// other runtime.
    ///
    /// # Errors
    ///
    /// [`Error::Setup`] without an adapter, or if the runtime is running already: after a first tensor on the default
    /// device, or a second call. [`Error::Cache`] if the device's limits are too small for the cache.
    pub fn new() -> Result<Self> {
        Self::with_options(Device::wgpu_options())
    }

    /// As [`new`](Self::new), with an adapter, an API, a memory configuration or a number of tasks of one's own.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn with_options(options: WgpuOptions) -> Result<Self> {
        let (device, setup) = options.init_with_setup().map_err(Error::Setup)?;
        Self::from_setup(device, &setup)
    }

    /// Registers an application's own wgpu device with burn.
    ///
    /// # Errors
    ///
    /// [`Error::Setup`] and [`Error::Cache`], as for [`new`](Self::new).
    pub fn register(setup: &WgpuSetup) -> Result<Self> {
        let device = Device::wgpu_options().setup(setup.clone()).init().map_err(Error::Setup)?;
        Self::from_setup(device, setup)
    }

    /// Of a burn device that is running, and the setup that came with it from `init_with_setup`. Both must belong
    /// together: tensors of `device` lie in buffers of the setup's device.
    ///
    /// # Errors
    ///
    /// [`Error::Cache`] if the device's limits are too small for the cache.
    pub fn from_setup(device: Device, setup: &WgpuSetup) -> Result<Self> {
        let gpu = Gpu::new(setup.device.clone(), setup.queue.clone())?;
        Ok(Self { device, gpu })
    }

    /// The device to make tensors and models on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The device to make caches on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}
