//! The device: an engine's own, or one that is found without a window.

pub(crate) mod arena;
pub(crate) mod bind_groups;
pub(crate) mod device;
pub(crate) mod kernels;
pub(crate) mod ledger;
pub(crate) mod own_buffers;
pub(crate) mod readback;
pub(crate) mod witness;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::gpu::arena::{Arena, Bound, Placed};
use crate::gpu::device::{DeviceHandle, answer_now};
use crate::gpu::kernels::Kernels;
use crate::gpu::witness::Witness;
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
    handle: DeviceHandle,
    kernels: Kernels,
    arena: Mutex<Arena>,
    /// A list that nothing reads, to bind where a kernel wants none.
    unused_list: Arc<Bound>,
}

/// What [`Gpu::headless_with`] looks for.
#[derive(Clone, Debug)]
pub struct HeadlessOptions {
    /// Backends to look through.
    pub backends: wgpu::Backends,
    /// Features to enable where the adapter has them; the crate needs none.
    pub features: wgpu::Features,
    /// Limits to ask for; `None` for all that the adapter offers.
    pub limits: Option<wgpu::Limits>,
}

impl Default for HeadlessOptions {
    /// Every backend (narrowed by the variable `WGPU_BACKEND`, e.g. `vulkan` or `gl`), immediates
    /// where the adapter has them, and its best limits.
    fn default() -> Self {
        Self {
            backends: wgpu::Backends::from_env().unwrap_or_default(),
            features: wgpu::Features::IMMEDIATES,
            limits: None,
        }
    }
}

impl Gpu {
    /// Takes an engine's own device and queue. Compiles nothing yet: a kernel is compiled when it is
    /// first used.
    ///
    /// WebGPU's default limits and no optional feature suffice. Where the device was made with
    /// [`wgpu::Features::IMMEDIATES`] and at least 128 bytes of them, parameters travel that way.
    /// `queue` must be the device's own.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceLimit`] where the device was made with a limit below what the kernels need, such as fewer
    /// storage buffers a stage than the six that they bind; [`Error::DeviceLost`]; [`Error::OutOfMemory`] or
    /// [`Error::Device`] where it cannot make three buffers of 64 KiB.
    pub fn new(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        crate::gpu::kernels::check_limits(&device.limits())?;
        let handle = DeviceHandle::new(device, queue)?;
        let kernels = Kernels::new(&handle)?;
        let arena = Arena::new(&handle, &kernels.layouts)?;
        let unused_list = Arc::clone(arena.unused_list());
        Ok(Self(Arc::new(Inner { handle, kernels, arena: Mutex::new(arena), unused_list })))
    }

    /// Finds an adapter without a window, a GPU before a software adapter, and makes a device.
    ///
    /// # Errors
    ///
    /// [`Error::NoAdapter`], which says how to get one, and [`Error::NoDevice`].
    pub fn headless() -> Result<Self> {
        Self::headless_with(&HeadlessOptions::default())
    }

    /// As [`Gpu::headless`], with a say in backends, features and limits.
    ///
    /// # Errors
    ///
    /// As for [`Gpu::headless`].
    pub fn headless_with(options: &HeadlessOptions) -> Result<Self> {
        pollster::block_on(Self::headless_async(options))
    }

    /// As [`Gpu::headless_with`], for where blocking is not possible: a browser.
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
                reason: error.to_string(),
            })?;
        Self::new(device, queue)
    }

    /// The device.
    pub fn device(&self) -> &wgpu::Device {
        &self.0.handle.device
    }

    /// The device's queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.0.handle.queue
    }

    /// Opens a compute pass, runs `record` in it, and submits it: for those who have no pass of their
    /// own. Does not wait.
    ///
    /// The pass is submitted whatever `record` returns; a call that failed has recorded nothing.
    pub fn submit_pass<R>(
        &self,
        label: &str,
        record: impl FnOnce(&mut wgpu::ComputePass<'_>) -> R,
    ) -> R {
        let descriptor = wgpu::CommandEncoderDescriptor { label: Some(label) };
        let mut encoder = self.device().create_command_encoder(&descriptor);
        let result = {
            let descriptor =
                wgpu::ComputePassDescriptor { label: Some(label), timestamp_writes: None };
            record(&mut encoder.begin_compute_pass(&descriptor))
        };
        self.queue().submit([encoder.finish()]);
        result
    }

    /// Puts a host slice, row-major (B, H, T, D), into a storage buffer of its own.
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
    /// [`Error::DeviceLost`]; [`Error::Device`] for a tensor larger than a buffer may be.
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
        let buffer = self.0.handle.create_buffer("kvcache upload", padded as u64, usage)?;
        let whole = bytes.len() / 4 * 4;
        if whole > 0 {
            self.0.handle.write(&buffer, 0, &bytes[..whole])?;
        }
        if whole < bytes.len() {
            // A single 16-bit element at the end: writes are whole words.
            let last = [bytes[whole], bytes[whole + 1], 0, 0];
            self.0.handle.write(&buffer, whole as u64, &last)?;
        }
        Ok(Tensor { gpu: self.clone(), buffer, dtype: E::DTYPE, shape: four })
    }

    /// Whether the adapter runs kernels in software.
    pub(crate) fn is_cpu(&self) -> bool {
        self.0.handle.is_cpu
    }

    pub(crate) fn limits(&self) -> &wgpu::Limits {
        &self.0.handle.limits
    }

    pub(crate) fn kernels(&self) -> &Kernels {
        &self.0.kernels
    }

    /// The device with what belongs to it, which makes buffers and other parts.
    pub(crate) fn handle(&self) -> &DeviceHandle {
        &self.0.handle
    }

    /// Puts a list or parameters where a dispatch can read them.
    pub(crate) fn place(&self, words: &[u32]) -> Result<Placed> {
        self.arena().place(&self.0.handle, &self.0.kernels.layouts, words)
    }

    /// Reserves a piece that its owner writes bit by bit, with room beside it for a list of `spare` words.
    pub(crate) fn reserve(&self, words: usize, spare: usize) -> Result<Placed> {
        self.arena().reserve(&self.0.handle, &self.0.kernels.layouts, words, spare)
    }

    /// Puts `words` into the buffer of a reserved piece; `None` where the piece has to move first.
    pub(crate) fn place_beside(&self, piece: &Placed, words: &[u32]) -> Result<Option<Placed>> {
        self.arena().place_beside(&self.0.handle, piece, words)
    }

    /// Whether a reserved piece may stay where it is.
    pub(crate) fn is_in_place(&self, piece: &Placed) -> bool {
        self.arena().is_in_place(piece)
    }

    /// Writes words of a reserved piece that nothing has read yet, from its word `at` on.
    pub(crate) fn write_piece(&self, piece: &Placed, at: usize, words: &[u32]) -> Result<()> {
        let offset = u64::from(piece.offset) + 4 * at as u64;
        self.0.handle.write(&piece.buffer, offset, bytemuck::cast_slice(words))
    }

    /// A list that nothing reads, to bind where a kernel wants none.
    pub(crate) fn unused_list(&self) -> &Arc<Bound> {
        &self.0.unused_list
    }

    /// A word that counts what has run.
    pub(crate) fn witness(&self) -> Result<Witness> {
        self.arena().witness(&self.0.handle, &self.0.kernels.layouts)
    }

    /// The buffer that a page of witnesses is.
    pub(crate) fn witness_page(&self, page: usize) -> wgpu::Buffer {
        self.arena().witness_page(page)
    }

    /// To be called once leases were abandoned.
    pub(crate) fn replace_abandoned(&self) {
        // Where that fails, whoever needs a chunk next makes it, and is told.
        let _ = self.arena().replace_abandoned(&self.0.handle, &self.0.kernels.layouts);
    }

    /// Whether dispatches do anything: everywhere but on wgpu's backend without a driver.
    pub(crate) fn runs_kernels(&self) -> bool {
        self.0.handle.runs_kernels
    }

    /// Whether both are one device.
    ///
    /// wgpu numbers the devices of each instance from the start, so that those of two instances compare equal.
    /// What tells them apart is where their errors go: an error that is sure to happen to the other device
    /// is caught here only if it is this one.
    pub(crate) fn is_device_of(&self, other: &Self) -> bool {
        if Arc::ptr_eq(&self.0, &other.0) {
            return true;
        }
        if self.device() != other.device() || cfg!(target_arch = "wasm32") {
            return self.device() == other.device();
        }
        let theirs = other.device().push_error_scope(wgpu::ErrorFilter::Validation);
        let ours = self.device().push_error_scope(wgpu::ErrorFilter::Validation);
        other.handle().make_an_error();
        let is_ours = answer_now(ours.pop()).is_some();
        let _ = answer_now(theirs.pop());
        is_ours
    }

    fn arena(&self) -> MutexGuard<'_, Arena> {
        // The arena is consistent between any two statements, so a panic elsewhere does not harm it.
        self.0.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An adapter of `backends`. GL comes last, and is not even looked at where another backend answers.
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
    Err(Error::NoAdapter { reason })
}
