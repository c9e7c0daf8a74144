//! Which buffers hold a cache's content: an engine reads them, and must not hand them in to be written.

use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The buffers of a device that hold a cache's content, by identity and without a hold on them.
#[derive(Clone, Debug, Default)]
pub(crate) struct OwnBuffers(Arc<Mutex<HashSet<u64>>>);

impl OwnBuffers {
    /// Counts `buffer` in, for as long as what is returned lives.
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

/// Goes with a buffer that holds a cache's content.
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

/// The same for all clones of a buffer, and for no other buffer of the device.
fn identity(buffer: &wgpu::Buffer) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(buffer)
}
