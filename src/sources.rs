//! Bind groups of an append, kept for engines that hand in the same buffers again.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

use crate::error::Result;
use crate::gpu::Gpu;
use crate::view::{Source, TensorView};

/// A view of new K or V, with what its check has found.
pub(crate) type BoundView<'a> = (&'a TensorView<'a>, &'a Source);

/// Bind groups kept at most; an engine that alternates between a few sets of buffers is served.
const KEPT: usize = 4;

/// The buffers and windows that K and V are read from.
#[derive(Debug, Hash)]
struct Identity {
    buffers: [wgpu::Buffer; 2],
    windows: [(u64, u64); 2],
}

/// The bind groups of one layer's appends.
///
/// A bind group keeps its buffers alive, so one is only kept for sources that have come twice: a
/// prompt's large tensors, which come once, are let go.
#[derive(Debug, Default)]
pub(crate) struct BoundSources {
    kept: Vec<(Identity, wgpu::BindGroup)>,
    /// Hashes of identities that have come once, without a hold on their buffers.
    seen: [u64; KEPT],
    /// The next place to use in `kept` and in `seen`.
    next_kept: usize,
    next_seen: usize,
}

impl BoundSources {
    /// Binds the sources of K and V with the layer's buffers.
    pub(crate) fn bind(
        &mut self,
        gpu: &Gpu,
        views: [BoundView<'_>; 2],
        key: &wgpu::Buffer,
        value: &wgpu::Buffer,
    ) -> Result<wgpu::BindGroup> {
        let windows = views.map(|(_, source)| source.window);
        let is_same = |identity: &Identity| {
            identity.windows == windows
                && identity.buffers.iter().zip(views).all(|(kept, (view, _))| kept == view.buffer)
        };
        if let Some((_, bindings)) = self.kept.iter().find(|(identity, _)| is_same(identity)) {
            return Ok(bindings.clone());
        }
        let sources = views.map(|(view, source)| source.binding(view.buffer));
        let bindings = gpu.kernels().bind_append(gpu, sources, key, value)?;
        let identity = Identity { buffers: views.map(|(view, _)| view.buffer.clone()), windows };
        self.keep_if_seen(identity, &bindings);
        Ok(bindings)
    }

    fn keep_if_seen(&mut self, identity: Identity, bindings: &wgpu::BindGroup) {
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(&identity);
        if !self.seen.contains(&hash) {
            self.seen[self.next_seen] = hash;
            self.next_seen = (self.next_seen + 1) % KEPT;
            return;
        }
        let entry = (identity, bindings.clone());
        if self.kept.len() < KEPT {
            self.kept.push(entry);
        } else {
            self.kept[self.next_kept] = entry;
            self.next_kept = (self.next_kept + 1) % KEPT;
        }
    }
}
