//! The device. Every resource is created through it, and a failure is returned as an error.

use std::future::Future;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
#[cfg(not(target_arch = "wasm32"))]
use std::sync::{Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use crate::error::{Error, Result};
use crate::gpu::answer::Answer;
use crate::gpu::own_buffers::OwnBuffers;

/// A device and its queue.
#[derive(Debug)]
pub(crate) struct DeviceHandle {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    /// The limits that the device was made with, which it enforces.
    pub(crate) limits: wgpu::Limits,
    /// Whether the adapter runs kernels in software.
    pub(crate) is_cpu: bool,
    /// Whether dispatches run. They do on all backends except wgpu's noop backend.
    pub(crate) runs_kernels: bool,
    /// The buffers that hold the content of caches.
    pub(crate) own_buffers: OwnBuffers,
    /// A buffer without the usage `COPY_DST`: a write to it is a validation error.
    probe: wgpu::Buffer,
    /// Whether the device is known to be lost. Never reset.
    is_lost: Arc<AtomicBool>,
    /// The pass for which the device was last checked.
    last_pass: AtomicU64,
}

impl DeviceHandle {
    /// Handles of the same device share the set of buffers that hold caches' content.
    pub(crate) fn new(device: wgpu::Device, queue: wgpu::Queue) -> Result<Arc<Self>> {
        let info = device.adapter_info();
        let probe = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("kvcache probe"),
            size: 4,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        });
        let mut handle = Self {
            limits: device.limits(),
            is_cpu: info.device_type == wgpu::DeviceType::Cpu,
            runs_kernels: info.backend != wgpu::Backend::Noop,
            device,
            queue,
            own_buffers: OwnBuffers::default(),
            probe,
            is_lost: Arc::default(),
            last_pass: AtomicU64::new(0),
        };
        handle.check_queue()?;
        #[cfg(target_arch = "wasm32")]
        handle.listen();
        Ok(register(|others| {
            let same = others.iter().find(|other| handle.is_device_of(other));
            if let Some(other) = same {
                handle.own_buffers = other.own_buffers.clone();
            }
            Arc::new(handle)
        }))
    }

    /// Learns of the loss of the device. In a browser an engine's own callback for it is called as well.
    #[cfg(target_arch = "wasm32")]
    fn listen(&self) {
        let is_lost = Arc::clone(&self.is_lost);
        self.device.set_device_lost_callback(move |_, _| is_lost.store(true, Ordering::Release));
    }

    /// Refuses a queue that is not the device's own.
    fn check_queue(&self) -> Result<()> {
        if cfg!(target_arch = "wasm32") {
            return Ok(());
        }
        // A validation error of the device alone. A lost device reports none.
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let _ = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("kvcache probe"),
            size: 4,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        });
        if answer_now(scope.pop()).is_none() {
            return Err(Error::DeviceLost);
        }
        // A validation error through the queue. A queue of another device reports it to that device's scopes. In
        // another instance the buffer's id does not exist, and wgpu panics.
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let made = catch_unwind(AssertUnwindSafe(|| self.make_an_error()));
        let is_own = answer_now(scope.pop()).is_some();
        if made.is_err() || !is_own {
            return Err(Error::OtherDevice { what: "the queue" });
        }
        Ok(())
    }

    /// Returns an error if the device is lost.
    ///
    /// wgpu ignores calls on a lost device silently, and the callback that reports the loss belongs to the engine.
    /// But a device that is not lost validates its calls. So this makes a call that fails validation: without an
    /// error, the device is lost. It creates nothing and does not wait. In a browser an error scope resolves later, but
    /// several can listen for the loss: there this knows of it one turn of the event loop after it.
    pub(crate) fn check_alive(&self) -> Result<()> {
        self.check_known()?;
        if cfg!(target_arch = "wasm32") {
            return Ok(());
        }
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        self.make_an_error();
        if answer_now(scope.pop()).is_none() {
            self.is_lost.store(true, Ordering::Release);
        }
        self.check_known()
    }

    /// As `check_alive`, but once per pass, so that recording stays cheap. The first call into a pass detects the
    /// loss. Later calls into a pass that was opened before the loss need no check: that pass never runs.
    pub(crate) fn check_alive_for(&self, pass: &wgpu::ComputePass<'_>) -> Result<()> {
        let number = pass_number(pass);
        let last = self.last_pass.swap(number, Ordering::AcqRel);
        if last == number { self.check_known() } else { self.check_alive() }
    }

    /// Returns an error if an earlier check found the device lost. Costs nothing.
    pub(crate) fn check_known(&self) -> Result<()> {
        if self.is_lost.load(Ordering::Acquire) { Err(Error::DeviceLost) } else { Ok(()) }
    }

    /// Whether both are the same device.
    ///
    /// wgpu numbers the devices of each instance from the start, so devices of two instances may compare equal. Their
    /// error scopes differ: a validation error of the other device reaches a scope of this one only if both are the
    /// same.
    pub(crate) fn is_device_of(&self, other: &Self) -> bool {
        if std::ptr::eq(self, other) {
            return true;
        }
        if self.device != other.device || cfg!(target_arch = "wasm32") {
            return self.device == other.device;
        }
        let theirs = other.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let ours = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        other.make_an_error();
        let is_ours = answer_now(ours.pop()).is_some();
        let _ = answer_now(theirs.pop());
        is_ours
    }

    /// Causes a validation error unless the device is lost. Has no other effect.
    fn make_an_error(&self) {
        self.queue.write_buffer(&self.probe, 0, &[]);
    }

    /// Creates a buffer.
    pub(crate) fn create_buffer(
        &self,
        label: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        let limit = self.limits.max_buffer_size;
        if bytes > limit {
            return Err(Error::BufferTooLarge { label: label.to_owned(), bytes, limit });
        }
        self.checked(label, bytes, |device| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size: bytes,
                usage,
                mapped_at_creation: false,
            })
        })
    }

    /// As [`create_buffer`](Self::create_buffer), for memory that must not be lost silently.
    ///
    /// In a browser it is known only later whether there is a buffer.
    pub(crate) fn create_memory(
        &self,
        label: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<(wgpu::Buffer, Answer)> {
        #[cfg(not(target_arch = "wasm32"))]
        return Ok((self.create_buffer(label, bytes, usage)?, Answer));
        #[cfg(target_arch = "wasm32")]
        {
            let filters = [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Validation];
            let [outer, inner] = filters.map(|filter| self.device.push_error_scope(filter));
            let buffer = self.create_buffer(label, bytes, usage);
            let scopes: Vec<std::pin::Pin<Box<dyn Future<Output = _>>>> =
                vec![Box::pin(inner.pop()), Box::pin(outer.pop())];
            Ok((buffer?, Answer::new(label, bytes, scopes)))
        }
    }

    /// Creates a buffer of zeros that several threads may write to.
    ///
    /// wgpu clears the unwritten ranges of a buffer in the first submit that binds it. Data that another thread
    /// writes during that submit is uploaded before it, and would be cleared, too. So the whole buffer is written
    /// here, and nothing is left to clear.
    pub(crate) fn create_shared_buffer(
        &self,
        label: &str,
        bytes: u32,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        let buffer = self.create_buffer(label, u64::from(bytes), usage)?;
        self.write(&buffer, 0, &vec![0; bytes as usize])?;
        Ok(buffer)
    }

    /// Writes whole words to a buffer of this device. The write takes effect before all commands of the next submit.
    pub(crate) fn write(&self, buffer: &wgpu::Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
        self.checked("kvcache upload", bytes.len() as u64, |_| {
            self.queue.write_buffer(buffer, offset, bytes);
        })
    }

    /// Binds buffers, numbered in order. Fails if a buffer was destroyed, was never created, or is of another device.
    ///
    /// The id of a buffer of another *instance* may not exist in this one: then wgpu panics, and the panic is returned
    /// as an error. It may also be the id of another buffer, which cannot be detected here. Tensors and views of this
    /// crate know their device, and are checked before.
    pub(crate) fn bind(
        &self,
        label: &str,
        layout: &wgpu::BindGroupLayout,
        resources: &[wgpu::BufferBinding<'_>],
    ) -> Result<wgpu::BindGroup> {
        let entries: Vec<_> = (0..)
            .zip(resources)
            .map(|(binding, resource)| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(resource.clone()),
            })
            .collect();
        let descriptor =
            wgpu::BindGroupDescriptor { label: Some(label), layout, entries: &entries };
        let bound = self.checked(label, 0, |device| {
            catch_unwind(AssertUnwindSafe(|| device.create_bind_group(&descriptor)))
        })?;
        bound.map_err(|_| Error::Device {
            label: label.to_owned(),
            reason: "a buffer belongs to another wgpu instance".into(),
        })
    }

    /// Creates a resource of `bytes` bytes through `make`, and returns wgpu's failure as an error.
    ///
    /// Failures are reported to error scopes. On native backends a scope resolves at once. In a browser it resolves
    /// later, and no call may wait for it. So no scope is opened there, and a failure reaches the device's own error
    /// handler.
    pub(crate) fn checked<T>(
        &self,
        label: &str,
        bytes: u64,
        make: impl FnOnce(&wgpu::Device) -> T,
    ) -> Result<T> {
        self.check_alive()?;
        if cfg!(target_arch = "wasm32") {
            return Ok(make(&self.device));
        }
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let made = make(&self.device);
        let refused = [answer_now(validation.pop()), answer_now(internal.pop())];
        if answer_now(memory.pop()).is_some() {
            return Err(Error::OutOfMemory { bytes, label: label.to_owned() });
        }
        match refused.into_iter().flatten().next() {
            Some(error) => {
                Err(Error::Device { label: label.to_owned(), reason: error.to_string().into() })
            }
            None => Ok(made),
        }
    }
}

/// The number of a pass, unique in the process.
pub(crate) fn pass_number(pass: &wgpu::ComputePass<'_>) -> u64 {
    let mut number = Number(0);
    pass.hash(&mut number);
    number.0
}

/// Runs `make` with the handles of all devices in use, and adds the new handle to them.
#[cfg(not(target_arch = "wasm32"))]
fn register(make: impl FnOnce(&[Arc<DeviceHandle>]) -> Arc<DeviceHandle>) -> Arc<DeviceHandle> {
    static ALL: Mutex<Vec<Weak<DeviceHandle>>> = Mutex::new(Vec::new());
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|handle| handle.strong_count() > 0);
    let others: Vec<_> = all.iter().filter_map(Weak::upgrade).collect();
    let handle = make(&others);
    all.push(Arc::downgrade(&handle));
    handle
}

/// In a browser handles do not leave their thread, so each handle knows only its own buffers.
#[cfg(target_arch = "wasm32")]
fn register(make: impl FnOnce(&[Arc<DeviceHandle>]) -> Arc<DeviceHandle>) -> Arc<DeviceHandle> {
    make(&[])
}

/// A hasher that returns the number which a pass hashes.
struct Number(u64);

impl Hasher for Number {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }
}

/// The largest buffer that can be created and bound as a whole, in bytes.
///
/// Always less than 4 GiB: Metal binds more, but wgpu passes the size of a binding to its shaders in 32 bits, and
/// clamps accesses to that size. So 32 bits are enough for all words and slots, too.
pub(crate) fn binding_limit(limits: &wgpu::Limits) -> u64 {
    let counted = u64::from(u32::MAX) / 16 * 16;
    limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(counted) / 4 * 4
}

/// The error of a scope, if it resolves without waiting.
pub(crate) fn answer_now(scope: impl Future<Output = Option<wgpu::Error>>) -> Option<wgpu::Error> {
    let mut scope = std::pin::pin!(scope);
    match scope.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(error) => error,
        Poll::Pending => None,
    }
}
