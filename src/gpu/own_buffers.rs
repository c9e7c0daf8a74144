//! Which buffers hold a cache's content. An engine may read them, but must not pass them as an output.

use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The buffers of a device that hold a cache's content. They are identified by hash and not kept alive.
#[derive(Clone, Debug, Default)]
pub(crate) struct OwnBuffers(Arc<Mutex<HashSet<u64>>>);

impl OwnBuffers {
    /// Adds `buffer` until the returned value is dropped.
    pub(crate) fn add(&self, buffer: &wgpu::Buffer) -> OwnBuffer {
        let identity = identity(buffer);
        self.all().insert(identity);
        OwnBuffer { identity, all: self.clone() }
    }

    pub(crate) fn contains(&self, buffer: &wgpu::Buffer) -> bool {
        self.all().contains(&identity(buffer))
    }

    fn all(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes its buffer from the set when it is dropped.
#[derive(Debug)]
pub(crate) struct OwnBuffer {
    identity: u64,
    all: OwnBuffers,
}

impl Drop for OwnBuffer {
    fn drop(&mut self) {
        self.all.all().remove(&self.identity);
    }
}

/// Equal for all clones of a buffer, and different for other buffers of the device.
fn identity(buffer: &wgpu::Buffer) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(buffer)
}
