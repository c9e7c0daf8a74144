//! Tensors in memory that an engine may free or use again: [`HeldTensor`].

use std::any::Any;
use std::sync::Arc;

use super::TensorView;
use crate::dtype::DType;
use crate::gpu::device::DeviceHandle;

/// What keeps an engine's memory as it is. It is dropped when the work has run, or was lost with its pass.
pub(crate) type Guard = Arc<dyn Any + Send + Sync>;

/// K, V, q or an output in memory that an engine allocates itself, with what keeps this memory from being used for
/// anything else.
///
/// A call reads its inputs and writes its output when the engine submits the pass, not when it is recorded. An
/// engine with its own allocator may free a tensor before that, and give its memory to another: the call would then read
/// what that one holds, without an error. Each call that takes a view of this keeps the guard until the GPU has run the
/// work, or the pass was dropped. The module [`pooled`](crate::pooled) says what else must hold.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use wgpu_kvcache::{wgpu, AxisOrder, CachePosition, DType, DynamicKVCache, Gpu, KVCache, TensorView};
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// # let gpu = Gpu::headless()?;
/// # let memory = gpu.upload(&[1.0_f32; 64], &[1, 1, 1, 64])?;
/// # let (pool, offset) = (memory.buffer(), 0);
/// // What an engine's allocator hands out: a range of a buffer, in use until `handle` is dropped.
/// let handle = Arc::new("the allocator's handle");
/// let binding = wgpu::BufferBinding { buffer: pool, offset, size: None };
/// let key = TensorView::from_binding(binding, DType::F32, AxisOrder::Bthd, &[1, 8, 2, 4])?;
/// let key = key.held_by(Arc::clone(&handle));
///
/// let mut cache = DynamicKVCache::new(&gpu);
/// let mut encoder = gpu.device().create_command_encoder(&Default::default());
/// gpu.encode(&mut encoder, "layer 0", |pass| {
///     cache.update(pass, &key.view(), &key.view(), 0, CachePosition::Append).map(|_| ())
/// })?;
/// drop(key);
/// assert!(Arc::strong_count(&handle) > 1); // the memory is still in use
/// gpu.queue().submit([encoder.finish()]);
/// gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device answers");
/// assert_eq!(Arc::strong_count(&handle), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct HeldTensor {
    buffer: wgpu::Buffer,
    dtype: DType,
    offset: u64,
    shape: [usize; 4],
    strides: [usize; 4],
    begin: u64,
    end: u64,
    device: Option<Arc<DeviceHandle>>,
    guard: Guard,
}

impl TensorView<'_> {
    /// The same tensor with a guard: a handle of the engine's allocator, say. While the guard is not dropped, the memory
    /// must stay what it is.
    pub fn held_by(&self, guard: impl Any + Send + Sync) -> HeldTensor {
        let &Self { buffer, dtype, offset, shape, strides, begin, end, device, .. } = self;
        let (buffer, device, guard) = (buffer.clone(), device.cloned(), Arc::new(guard));
        HeldTensor { buffer, dtype, offset, shape, strides, begin, end, device, guard }
    }
}

impl HeldTensor {
    /// The tensor, as calls take it. What takes it keeps the guard.
    pub fn view(&self) -> TensorView<'_> {
        let &Self { ref buffer, dtype, offset, shape, strides, begin, end, .. } = self;
        let (device, guard) = (self.device.as_ref(), Some(&self.guard));
        TensorView { buffer, dtype, offset, shape, strides, begin, end, device, guard }
    }
}

impl std::fmt::Debug for HeldTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeldTensor").field("view", &self.view()).finish_non_exhaustive()
    }
}
