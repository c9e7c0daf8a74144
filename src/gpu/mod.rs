//! The device: an engine's own, or one that is requested without a window.

pub(crate) mod answer;
pub(crate) mod arena;
mod arrivals;
pub(crate) mod bind_groups;
pub(crate) mod call;
pub(crate) mod device;
pub(crate) mod kernels;
pub(crate) mod ledger;
pub(crate) mod memory;
pub(crate) mod own_buffers;
pub(crate) mod range;
pub(crate) mod read;
pub(crate) mod readback;
pub(crate) mod uploads;
pub(crate) mod witness;

use std::sync::Arc;

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::format::Formats;
use crate::gpu::device::DeviceHandle;
use crate::gpu::kernels::{CompileScope, Kernels};
use crate::gpu::uploads::Uploads;
use crate::layer_shape::LayerShape;
use crate::layout::Layout;
use crate::tensor::{Tensor, checked_shape};

/// A device, its queue, and the compiled kernels of this crate. Cheap to clone: clones share all three.
///
/// Caches on one device should share one `Gpu`, so that kernels are compiled once.
///
/// # Examples
///
/// ```
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let gpu = wgpu_kvcache::Gpu::headless()?;
/// println!("{}", gpu.device().adapter_info().name);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Gpu(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    uploads: Arc<Uploads>,
    kernels: Kernels,
}

/// Options of [`Gpu::headless_with`].
#[derive(Clone, Debug)]
#[must_use = "options do nothing until a device is made with them"]
pub struct HeadlessOptions {
    backends: wgpu::Backends,
    features: wgpu::Features,
    limits: Option<wgpu::Limits>,
}

impl Default for HeadlessOptions {
    /// Every backend (narrowed by the environment variable `WGPU_BACKEND`, e.g. `vulkan` or `gl`), immediates if
    /// the adapter supports them, and all limits of the adapter.
    fn default() -> Self {
        Self {
            backends: wgpu::Backends::from_env().unwrap_or_default(),
            features: wgpu::Features::IMMEDIATES,
            limits: None,
        }
    }
}

impl HeadlessOptions {
    /// Backends to search.
    pub fn with_backends(self, backends: wgpu::Backends) -> Self {
        Self { backends, ..self }
    }

    /// Features to enable if the adapter has them; the crate needs none.
    pub fn with_features(self, features: wgpu::Features) -> Self {
        Self { features, ..self }
    }

    /// Limits to request; `None` for all that the adapter offers.
    pub fn with_limits(self, limits: impl Into<Option<wgpu::Limits>>) -> Self {
        Self { limits: limits.into(), ..self }
    }
}

impl Gpu {
    /// Takes an engine's own device and queue. Compiles nothing yet: a kernel is compiled when it is
    /// first used.
    ///
    /// WebGPU's default limits and no optional feature are enough. If the device has
    /// [`wgpu::Features::IMMEDIATES`], parameters of up to `max_immediate_size` bytes are passed as immediates: up to
    /// 128 bytes for the kernels of caches, 164 for attention. `queue` must be the device's own.
    ///
    /// # Errors
    ///
    /// - [`Error::DeviceLimit`] if a limit of the device is lower than the kernels need, for example fewer storage
    ///   buffers per stage than the eight that attention with masks binds.
    /// - [`Error::OtherDevice`] for a queue of another device.
    /// - [`Error::DeviceLost`]; [`Error::OutOfMemory`] or [`Error::Device`] if the device cannot create three buffers
    ///   of 64 KiB.
    pub fn new(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        crate::gpu::kernels::check_limits(&device.limits())?;
        let device = DeviceHandle::new(device, queue)?;
        let uploads = Arc::new(Uploads::new(device)?);
        let kernels = Kernels::new(Arc::clone(&uploads))?;
        Ok(Self(Arc::new(Inner { uploads, kernels })))
    }

    /// Requests an adapter without a window, a GPU in preference to a software adapter, and creates a device.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`], which names a software adapter to install, and [`Error::NoDevice`]. In a browser
    /// [`BrowserError::Blocking`](crate::BrowserError::Blocking): await [`headless_async`](Self::headless_async) there.
    pub fn headless() -> Result<Self> {
        Self::headless_with(&HeadlessOptions::default())
    }

    /// As [`Gpu::headless`], with a choice of backends, features and limits.
    ///
    /// # Errors
    ///
    /// As for [`Gpu::headless`].
    pub fn headless_with(options: &HeadlessOptions) -> Result<Self> {
        #[cfg(target_arch = "wasm32")]
        {
            let _ = options;
            Err(crate::error::BrowserError::blocking("Gpu::headless()", "Gpu::headless_async()"))
        }
        #[cfg(not(target_arch = "wasm32"))]
        pollster::block_on(Self::headless_async(options))
    }

    /// As [`Gpu::headless_with`], without blocking: for a browser.
    ///
    /// # Errors
    ///
    /// As for [`Gpu::headless`].
    pub async fn headless_async(options: &HeadlessOptions) -> Result<Self> {
        let adapter = find_adapter(options.backends).await?;
        let features = adapter.features() & options.features;
        let mut limits = options.limits.clone().unwrap_or_else(|| adapter.limits());
        if features.contains(wgpu::Features::IMMEDIATES) {
            limits.max_immediate_size = adapter.limits().max_immediate_size;
        }
        let (device, queue) = adapter
            .request_device(&wgpu::DeviceDescriptor {
                label: Some("kvcache"),
                required_features: features,
                required_limits: limits,
                ..Default::default()
            })
            .await
            .map_err(|error| Error::NoDevice {
                adapter: adapter.get_info().name,
                reason: error.to_string().into(),
            })?;
        Self::new(device, queue)
    }

    /// Compiles the kernels that caches need, before the first step and on several threads: for layers of these
    /// shapes, stored in these formats, whose views have one of these layouts, for one new token and for many. Kernels for rare cases (positions
    /// as a list, inputs that are not aligned to 16 bytes, q and output in one buffer) are compiled when they are
    /// first used.
    ///
    /// Blocks until everything is compiled. Some drivers, llvmpipe among them, do a part of the work at a kernel's
    /// first dispatch.
    ///
    /// # Examples
    ///
    /// ```
    /// use wgpu_kvcache::{CompileScope, DType, Formats, Gpu, LayerShape, Layout};
    ///
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// let gpu = Gpu::headless()?;
    /// let layer = LayerShape { dtype: DType::F16, heads: 8, key_dim: 128, value_dim: 128 };
    /// let formats = Formats::default(); // stored as they come in
    /// gpu.compile(&[layer], formats, &[Layout::Paged], CompileScope::CachesAndAttention)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::DeviceLost`]; [`Error::Device`] for a kernel that does not compile; [`Error::SizeOverflow`] for a
    /// shape that cannot be counted.
    pub fn compile(
        &self,
        layers: &[LayerShape],
        formats: Formats,
        layouts: &[Layout],
        scope: CompileScope,
    ) -> Result<()> {
        self.kernels().compile(layers, formats, layouts, scope)
    }

    /// Compiles from now on with an engine's pipeline cache, so that a later run of the program compiles faster. The
    /// device must have [`wgpu::Features::PIPELINE_CACHE`], and the cache must be of this device. The engine loads and
    /// stores it; [`compile`](Self::compile) then fills it before the first step.
    pub fn set_pipeline_cache(&self, cache: wgpu::PipelineCache) {
        self.kernels().set_pipeline_cache(cache);
    }

    /// The device.
    pub fn device(&self) -> &wgpu::Device {
        &self.handle().device
    }

    /// The device's queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.handle().queue
    }

    /// Opens a compute pass, runs `record` in it, and submits it: for callers without a pass of their own. Does not
    /// wait.
    ///
    /// The pass is submitted whatever `record` returns; a call that failed has recorded nothing. In a pass of one's own
    /// mind the `?`: a function that returns early drops its encoder, and what was recorded into it before is lost
    /// ([`Error::PassDropped`]). Finish and submit the encoder first, then return the error.
    pub fn submit_pass<R>(
        &self,
        label: &str,
        record: impl FnOnce(&mut wgpu::ComputePass<'_>) -> R,
    ) -> R {
        let descriptor = wgpu::CommandEncoderDescriptor { label: Some(label) };
        let mut encoder = self.device().create_command_encoder(&descriptor);
        let result = self.encode(&mut encoder, label, record);
        self.queue().submit([encoder.finish()]);
        result
    }

    /// Opens a compute pass in an engine's encoder and runs `record` in it: for engines that do not lend a pass. What was
    /// recorded before into the encoder is seen, as between any two passes.
    ///
    /// # Examples
    ///
    /// See [`HeldTensor`](crate::HeldTensor).
    pub fn encode<R>(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        label: &str,
        record: impl FnOnce(&mut wgpu::ComputePass<'_>) -> R,
    ) -> R {
        let descriptor = wgpu::ComputePassDescriptor { label: Some(label), timestamp_writes: None };
        record(&mut encoder.begin_compute_pass(&descriptor))
    }

    /// Uploads a host slice, row-major (B, H, T, D), to a storage buffer of its own.
    ///
    /// # Examples
    ///
    /// ```
    /// # fn main() -> Result<(), wgpu_kvcache::Error> {
    /// # let gpu = wgpu_kvcache::Gpu::headless()?;
    /// let key = gpu.upload(&[0.5_f32; 2 * 3 * 1 * 64], &[2, 3, 1, 64])?;
    /// assert_eq!(key.view().shape(), [2, 3, 1, 64]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::WrongRank`], [`Error::ZeroExtent`], [`Error::SliceLength`], [`Error::OutOfMemory`] and
    /// [`Error::DeviceLost`]; [`Error::BufferTooLarge`] for a tensor larger than the device's `max_buffer_size`;
    /// [`Error::SizeOverflow`] for a shape whose elements cannot be counted.
    pub fn upload<E: Element>(&self, data: &[E], shape: &[usize]) -> Result<Tensor> {
        let four = checked_shape(shape)?;
        let expected = four
            .iter()
            .try_fold(1_usize, |product, &extent| product.checked_mul(extent))
            .ok_or_else(|| {
                let asked = format!("the product of {shape:?}");
                Error::overflow("number of elements of a tensor", asked, usize::MAX as u64)
            })?;
        if expected != data.len() {
            return Err(Error::SliceLength { shape: shape.to_vec(), expected, got: data.len() });
        }
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let padded = bytes.len().next_multiple_of(4);
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_DST
            | wgpu::BufferUsages::COPY_SRC;
        let buffer = self.handle().create_buffer("kvcache upload", padded as u64, usage)?;
        let whole = bytes.len() / 4 * 4;
        if whole > 0 {
            self.handle().write(&buffer, 0, &bytes[..whole])?;
        }
        if whole < bytes.len() {
            // A single 16-bit element at the end: writes are whole words.
            let last = [bytes[whole], bytes[whole + 1], 0, 0];
            self.handle().write(&buffer, whole as u64, &last)?;
        }
        let device = Arc::clone(self.handle());
        Ok(Tensor { device, buffer, dtype: E::DTYPE, shape: four })
    }

    /// Whether the adapter runs kernels in software.
    pub(crate) fn is_cpu(&self) -> bool {
        self.handle().is_cpu
    }

    pub(crate) fn limits(&self) -> &wgpu::Limits {
        &self.handle().limits
    }

    pub(crate) fn kernels(&self) -> &Kernels {
        &self.0.kernels
    }

    /// The device, which creates buffers and other resources.
    pub(crate) fn handle(&self) -> &Arc<DeviceHandle> {
        self.0.uploads.device()
    }

    /// The small data that dispatches read.
    pub(crate) fn uploads(&self) -> &Uploads {
        &self.0.uploads
    }
}

/// An adapter of `backends`. GL is only searched if no other backend has an adapter.
async fn find_adapter(backends: wgpu::Backends) -> Result<wgpu::Adapter> {
    let mut reason = format!("this build has none of the backends {backends:?}");
    let last = wgpu::Backends::GL;
    for backends in [backends - last, backends & last] {
        let backends = backends & wgpu::Instance::enabled_backend_features();
        if backends.is_empty() {
            continue;
        }
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
        descriptor.backends = backends;
        let request = wgpu::RequestAdapterOptions {
            power_preference: wgpu::PowerPreference::HighPerformance,
            ..Default::default()
        };
        match wgpu::Instance::new(descriptor).request_adapter(&request).await {
            Ok(adapter) => return Ok(adapter),
            Err(error) => reason = error.to_string(),
        }
    }
    Err(Error::NoAdapter { reason: reason.into() })
}
