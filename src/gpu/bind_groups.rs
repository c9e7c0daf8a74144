//! Bind groups kept for engines that hand in the same buffers at every step: one mechanism for all.
//!
//! A bind group keeps its buffers alive. So those that name a layer's buffers are kept with these, and go
//! when the layer grows, is reset or is dropped; and one is only kept for buffers that have come twice: a
//! prompt's large tensors, which come once, are let go.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::error::Result;

/// Bind groups of a kernel kept at most; an engine that alternates between a few sets of buffers is served.
const KEPT: usize = 4;

/// What a bind group is for.
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
    /// Hashes of what has come once, without a hold on the buffers.
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

/// A buffer, and what is bound of it: offset and size.
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
    /// The bind group of these bindings: a kept one, or what `make` makes of them. Says as well whether it
    /// is kept from now on.
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

    /// Lets go of all.
    pub(crate) fn clear(&self) {
        *self.kept() = Default::default();
    }

    /// Lets go of those for attention.
    fn clear_attention(&self) {
        let mut kept = self.kept();
        for purpose in [Purpose::Attention, Purpose::AttentionCombine] {
            kept[purpose as usize] = Kept::default();
        }
    }

    fn kept(&self) -> MutexGuard<'_, [Kept; 4]> {
        // What is kept is whole between any two statements, so a panic elsewhere does not harm it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Whether these bindings have come before; from now on they have.
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

/// The layers that keep bind groups for an `Attention`, without a hold on them. They let go of these when it
/// is dropped.
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
