//! Bind groups that are kept for engines that pass the same buffers at every step.
//!
//! A bind group keeps its buffers alive. So bind groups over a layer's buffers are kept with the layer, and are
//! dropped when the layer grows, is reset or is dropped. And a bind group is kept only from the second time on that
//! the same buffers are passed, so that the large tensors of a prompt, which are passed once, are freed.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::error::Result;

/// The most bind groups that are kept for a kernel: an engine may alternate between so many sets of buffers.
const KEPT: usize = 4;

/// The kernel that a bind group is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Append,
    Attention,
    /// Attention that writes partial results.
    AttentionParts,
    AttentionCombine,
}

/// The bind groups that are kept with a layer's memory.
#[derive(Debug, Default)]
pub(crate) struct BindGroups(Mutex<[Kept; 4]>);

#[derive(Debug, Default)]
struct Kept {
    entries: Vec<Entry>,
    /// Hashes of bindings that were passed once; they do not keep the buffers alive.
    seen: [u64; KEPT],
    /// The next index to use in `entries` and in `seen`.
    next_entry: usize,
    next_seen: usize,
}

#[derive(Debug)]
struct Entry {
    bound: Vec<Bound>,
    bindings: wgpu::BindGroup,
}

/// A buffer, and the range of it that is bound: offset and size.
#[derive(Debug)]
struct Bound {
    buffer: wgpu::Buffer,
    window: (u64, Option<wgpu::BufferSize>),
}

impl Entry {
    fn is_of(&self, bindings: &[wgpu::BufferBinding<'_>]) -> bool {
        self.bound.len() == bindings.len()
            && self.bound.iter().zip(bindings).all(|(bound, binding)| {
                bound.window == (binding.offset, binding.size) && bound.buffer == *binding.buffer
            })
    }
}

impl BindGroups {
    /// The bind group of these bindings: a kept one, or a new one from `make`. The flag is true if the bind group is
    /// new and kept from now on.
    pub(crate) fn get<'a>(
        &self,
        purpose: Purpose,
        bindings: &[wgpu::BufferBinding<'a>],
        make: impl FnOnce(&[wgpu::BufferBinding<'a>]) -> Result<wgpu::BindGroup>,
    ) -> Result<(wgpu::BindGroup, bool)> {
        let kept = &mut self.kept()[purpose as usize];
        if let Some(entry) = kept.entries.iter().find(|entry| entry.is_of(bindings)) {
            return Ok((entry.bindings.clone(), false));
        }
        let made = make(bindings)?;
        let is_kept = kept.has_seen(bindings);
        if is_kept {
            kept.keep(bindings, &made);
        }
        Ok((made, is_kept))
    }

    /// Drops all bind groups.
    pub(crate) fn clear(&self) {
        *self.kept() = Default::default();
    }

    /// Drops the bind groups for attention.
    fn clear_attention(&self) {
        let mut kept = self.kept();
        for purpose in [Purpose::Attention, Purpose::AttentionParts, Purpose::AttentionCombine] {
            kept[purpose as usize] = Kept::default();
        }
    }

    fn kept(&self) -> MutexGuard<'_, [Kept; 4]> {
        // The lists are consistent after every statement, so a panic of another holder does no harm.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Whether these bindings were passed before. Remembers them.
    fn has_seen(&mut self, bindings: &[wgpu::BufferBinding<'_>]) -> bool {
        let mut hasher = BuildHasherDefault::<DefaultHasher>::default().build_hasher();
        for binding in bindings {
            (binding.buffer, binding.offset, binding.size).hash(&mut hasher);
        }
        let hash = hasher.finish();
        let has_seen = self.seen.contains(&hash);
        if !has_seen {
            self.seen[self.next_seen] = hash;
            self.next_seen = (self.next_seen + 1) % KEPT;
        }
        has_seen
    }

    fn keep(&mut self, bindings: &[wgpu::BufferBinding<'_>], made: &wgpu::BindGroup) {
        let bound = bindings.iter().map(|binding| Bound {
            buffer: binding.buffer.clone(),
            window: (binding.offset, binding.size),
        });
        let entry = Entry { bound: bound.collect(), bindings: made.clone() };
        if self.entries.len() < KEPT {
            self.entries.push(entry);
        } else {
            self.entries[self.next_entry] = entry;
            self.next_entry = (self.next_entry + 1) % KEPT;
        }
    }
}

/// Weak references to the layers that keep bind groups for an `Attention`. When it is dropped, the layers drop these
/// bind groups.
#[derive(Debug, Default)]
pub(crate) struct Keepers(Vec<Weak<BindGroups>>);

impl Keepers {
    pub(crate) fn add(&mut self, keeper: &Arc<BindGroups>) {
        if !self.0.iter().any(|known| known.as_ptr() == Arc::as_ptr(keeper)) {
            self.0.retain(|known| known.strong_count() > 0);
            self.0.push(Arc::downgrade(keeper));
        }
    }

    pub(crate) fn release(&mut self) {
        for keeper in self.0.drain(..).filter_map(|keeper| keeper.upgrade()) {
            keeper.clear_attention();
        }
    }
}

impl Drop for Keepers {
    fn drop(&mut self) {
        self.release();
    }
}
