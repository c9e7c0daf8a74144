//! The device below the kernels: whatever is made on it goes through here, and a failure is an error.

use std::future::Future;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
#[cfg(not(target_arch = "wasm32"))]
use std::sync::{Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use crate::error::{Error, Result};
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
    /// Whether dispatches do anything: everywhere but on wgpu's backend without a driver.
    pub(crate) runs_kernels: bool,
    /// The buffers that hold the content of caches.
    pub(crate) own_buffers: OwnBuffers,
    /// A buffer that must not be written to.
    probe: wgpu::Buffer,
    /// Whether the device was found to be lost. It stays so.
    is_lost: AtomicBool,
    /// The pass for which that was last looked into.
    last_pass: AtomicU64,
}

impl DeviceHandle {
    /// Shares the register of own buffers with all that were made of the same device.
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
            is_lost: AtomicBool::new(false),
            last_pass: AtomicU64::new(0),
        };
        handle.check_queue()?;
        Ok(register(|others| {
            let same = others.iter().find(|other| handle.is_device_of(other));
            if let Some(other) = same {
                handle.own_buffers = other.own_buffers.clone();
            }
            Arc::new(handle)
        }))
    }

    /// Refuses a queue that is not the device's own.
    fn check_queue(&self) -> Result<()> {
        if cfg!(target_arch = "wasm32") {
            return Ok(());
        }
        // A mistake that is the device's alone: a lost device makes it without a word.
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
        // The same by way of the queue. That of another device has its errors elsewhere; that of another instance
        // does not know the buffer, for which wgpu panics.
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let made = catch_unwind(AssertUnwindSafe(|| self.make_an_error()));
        let is_own = answer_now(scope.pop()).is_some();
        if made.is_err() || !is_own {
            return Err(Error::OtherDevice { what: "the queue" });
        }
        Ok(())
    }

    /// Refuses to go on with a device that is lost.
    ///
    /// wgpu drops calls on a lost device without a word, and the callback that tells of the loss is the engine's
    /// to set. But a device that is not lost checks its calls: so a call is made that is sure to be refused,
    /// and where nothing refuses it the device is lost. It makes nothing, and does not wait. In a browser an
    /// error scope answers later: there this knows nothing.
    pub(crate) fn check_alive(&self) -> Result<()> {
        if cfg!(target_arch = "wasm32") {
            return Ok(());
        }
        self.check_known()?;
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        self.make_an_error();
        if answer_now(scope.pop()).is_none() {
            self.is_lost.store(true, Ordering::Release);
        }
        self.check_known()
    }

    /// As `check_alive`, once for each pass, so that recording stays cheap: the first call in a pass notices,
    /// and what is recorded into a pass that was opened before the loss goes nowhere.
    pub(crate) fn check_alive_for(&self, pass: &wgpu::ComputePass<'_>) -> Result<()> {
        let number = pass_number(pass);
        let last = self.last_pass.swap(number, Ordering::AcqRel);
        if last == number { self.check_known() } else { self.check_alive() }
    }

    /// Refuses to go on with a device that was found to be lost before. Free.
    pub(crate) fn check_known(&self) -> Result<()> {
        if self.is_lost.load(Ordering::Acquire) { Err(Error::DeviceLost) } else { Ok(()) }
    }

    /// Whether both are one device.
    ///
    /// wgpu numbers the devices of each instance from the start, so that those of two instances compare equal.
    /// What tells them apart is where their errors go: an error that is sure to happen to the other device
    /// is caught here only if it is this one.
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

    /// Makes a validation error, as long as the device is not lost, and has no other effect.
    fn make_an_error(&self) {
        self.queue.write_buffer(&self.probe, 0, &[]);
    }

    /// Makes a buffer, and says so where that fails.
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

    /// Makes a buffer of zeros that several threads may write to.
    ///
    /// wgpu clears what was never written of a buffer in the first submit that binds it. What another thread
    /// writes during that submit is put before it, and would be cleared as well. So nothing is left to clear.
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

    /// Writes whole words to a buffer of this device before all that is submitted next, and says so where that
    /// fails.
    pub(crate) fn write(&self, buffer: &wgpu::Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
        self.checked("kvcache upload", bytes.len() as u64, |_| {
            self.queue.write_buffer(buffer, offset, bytes);
        })
    }

    /// Binds buffers, numbered in order, and says so where that fails: where one was destroyed, was never made,
    /// or is of another device.
    ///
    /// The number by which wgpu knows a buffer of another *instance* may be nobody's here, for which wgpu panics.
    /// It may also be that of another buffer, which nothing can tell: tensors and views of this crate know
    /// their device, and are asked before.
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

    /// Makes a part of the device, of so many bytes, and says so where that fails.
    ///
    /// Failures arrive in error scopes. On native backends a scope answers at once. In a browser it answers
    /// later, and nothing here may wait: there no scope is opened, so that a failure reaches the device's
    /// own error handler.
    pub(crate) fn checked<T>(
        &self,
        label: &str,
        bytes: u64,
        make: impl FnOnce(&wgpu::Device) -> T,
    ) -> Result<T> {
        if cfg!(target_arch = "wasm32") {
            return Ok(make(&self.device));
        }
        self.check_alive()?;
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

/// A pass's number, which no other pass of the process has.
pub(crate) fn pass_number(pass: &wgpu::ComputePass<'_>) -> u64 {
    let mut number = Number(0);
    pass.hash(&mut number);
    number.0
}

/// Runs `make` with the handles of all devices in use, and adds what it makes to them.
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

/// In a browser handles do not leave their thread, and each knows its own buffers alone.
#[cfg(target_arch = "wasm32")]
fn register(make: impl FnOnce(&[Arc<DeviceHandle>]) -> Arc<DeviceHandle>) -> Arc<DeviceHandle> {
    make(&[])
}

/// What a pass hashes: its number, which no other pass of the process has.
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

/// The largest buffer that can be made and bound as a whole.
///
/// Less than 4 GiB whatever the device says: Metal binds more, but wgpu hands its shaders the size of a
/// binding in 32 bits, and moves what lies further on into it. So 32 bits count all words and slots, too.
pub(crate) fn binding_limit(limits: &wgpu::Limits) -> u64 {
    let counted = u64::from(u32::MAX) / 16 * 16;
    limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(counted) / 4 * 4
}

/// What an error scope has to say without waiting for it.
pub(crate) fn answer_now(scope: impl Future<Output = Option<wgpu::Error>>) -> Option<wgpu::Error> {
    let mut scope = std::pin::pin!(scope);
    match scope.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(error) => error,
        Poll::Pending => None,
    }
}
