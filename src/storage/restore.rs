//! Restores layers that were saved: into any kind, on any device.

use std::ops::Range;

use crate::error::{Error, Result, StoringError};
use crate::gpu::Gpu;
use crate::gpu::call::Call;
use crate::gpu::device::binding_limit;
use crate::host::position::{self, CachePosition};
use crate::host::rows::{Cut, Rows};
use crate::host::window::Window;
use crate::saved::{SavedLayer, Stretch};
use crate::storage::arrangement::{Arrangement, LayerState, NewTokens, Staged};
use crate::storage::layer::Layer;
use crate::storage::layers::Layers;
use crate::storage::store::{Shape, Store};
use crate::storage::write::{Storing, Target, check_stored, write_stored};

impl<L: Arrangement> Layers<L> {
    /// Records the writing of saved layers into a cache that holds nothing. If that fails, it holds nothing.
    pub(crate) fn restore(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        saved: &[(usize, SavedLayer)],
    ) -> Result<()> {
        self.prepared = None;
        self.check_pass(pass)?;
        self.check_writable()?;
        if self.layers.values().any(|layer| layer.batch().is_some()) {
            let what = "restore() into a cache that holds tokens (reset() it first)";
            return Err(Error::NotSupported { what });
        }
        for (number, layer) in saved {
            self.check_layer(*number)?;
            shape_of(layer, *number, self.storing)?;
        }
        let restored =
            saved.iter().try_for_each(|(at, saved)| self.restore_layer(pass, *at, saved));
        if restored.is_err() {
            self.reset();
        }
        restored
    }

    fn restore_layer(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        number: usize,
        saved: &SavedLayer,
    ) -> Result<()> {
        let shape = shape_of(saved, number, self.storing)?;
        let gpu = self.gpu.clone();
        let first = self.with_layer(number, |layer, policy| {
            let bound = layer.bound(policy).unwrap_or(usize::MAX);
            layer.first_kept(saved, bound)
        });
        for (at, stretch) in saved.stretches(first).iter().enumerate() {
            if at > 0 {
                let staged = self.with_layer(number, |layer, policy| {
                    layer.stage_batch(&gpu, policy, &stretch.parents)
                })?;
                self.record_one(pass, number, staged)?;
            }
            if !stretch.tokens.is_empty() {
                let staged = self.with_layer(number, |layer, policy| {
                    layer.stage_stretch(&gpu, policy, shape, saved, stretch)
                })?;
                self.record_one(pass, number, Some(staged))?;
            }
        }
        self.with_layer(number, |layer, policy| layer.finish_restore(policy, saved, first));
        Ok(())
    }

    /// Makes a change of one layer happen.
    fn record_one(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        number: usize,
        staged: Option<Staged<L>>,
    ) -> Result<()> {
        let Some(mut staged) = staged else { return Ok(()) };
        let mut call = Call::default();
        self.layers[&number].hand_over(&mut staged, &mut call);
        call.record(pass, &self.ledger)?;
        self.commit_one(number, staged);
        Ok(())
    }
}

impl<L: Arrangement> Layer<L> {
    /// The first of the saved tokens of each row that is kept: all, unless the layer has a window that needs fewer, and
    /// the saved layer had none, or more than there may be.
    fn first_kept(&self, saved: &SavedLayer, bound: usize) -> usize {
        let len = saved.len();
        let kept = |window: Window| window.kept_of_saved([saved.let_go, len], bound);
        len - self.window.map_or(len, kept)
    }

    /// Stages the writing of some saved tokens behind those that are there.
    fn stage_stretch(
        &self,
        gpu: &Gpu,
        policy: &mut L::Policy,
        shape: Shape,
        saved: &SavedLayer,
        stretch: &Stretch,
    ) -> Result<Staged<L>> {
        let (batch, count) = (stretch.rows.len(), stretch.tokens.len());
        let shape = Shape { batch, ..shape };
        let tokens = stretch.tokens.clone();
        let from = upload(gpu, self.index, &shape, (saved, &stretch.rows), tokens)?;
        let empty = Rows::default();
        let rows = self.arrangement.as_ref().map_or(&empty, L::rows);
        let position = CachePosition::Append;
        let new_len = position::check(position, batch, count, rows.len(), self.bound(policy))?;
        let tokens = NewTokens { position, batch, count, rows, new_len, kept: None };
        let state = LayerState {
            gpu,
            layer: self.index,
            store: self.store.as_ref(),
            arrangement: self.arrangement.as_ref(),
            window: self.window,
        };
        let written = L::stage_write(state, policy, shape, tokens)?;
        let write = |target: Target<'_>| write_stored(gpu, &shape, (&from, count), count, target);
        let (change, _) = self.stage_append(gpu, written, shape, count, write)?;
        Ok(change)
    }

    /// Cuts shorter rows, and counts the tokens that were gone.
    fn finish_restore(&mut self, policy: &mut L::Policy, saved: &SavedLayer, first: usize) {
        let lens: Vec<usize> =
            saved.spans.iter().map(|[_, len]| len.saturating_sub(first)).collect();
        if lens.iter().any(|&len| len != lens[0]) {
            self.cut(policy, &Cut::TruncateRows(lens));
        }
        let let_go = if self.window.is_some() { saved.let_go + first } else { 0 };
        self.set_gone(saved.dropped + first, let_go);
    }
}

/// Live tokens of some rows of a saved layer, in memory of their own.
pub(super) fn upload(
    gpu: &Gpu,
    layer: usize,
    shape: &Shape,
    (saved, rows): (&SavedLayer, &[usize]),
    tokens: Range<usize>,
) -> Result<Store> {
    let (batch, count) = (rows.len(), tokens.len());
    let bytes = shape.bytes(batch, count)?;
    let limit = binding_limit(gpu.limits());
    if bytes.iter().any(|&bytes| bytes > limit) {
        let fits = shape.tokens_in(batch, [limit; 2]);
        return Err(Shape { batch, ..*shape }.too_large(limit, layer, Ok(bytes), count, fits));
    }
    let store = Store::new(gpu, layer, bytes)?;
    for (range, bytes) in store.ranges().into_iter().zip(saved.buffers(rows, tokens)) {
        if !bytes.is_empty() {
            gpu.handle().write(&range.buffer, range.offset, &bytes)?;
        }
    }
    Ok(store)
}

/// The shape of a saved layer. Refuses one that the cache was not made for.
pub(super) fn shape_of(saved: &SavedLayer, number: usize, storing: Storing) -> Result<Shape> {
    let SavedLayer { heads, dims: [key_dim, value_dim], formats, is_value_in_key, .. } = *saved;
    let shape = Shape { batch: saved.batch(), heads, key_dim, value_dim, formats, is_value_in_key };
    let made = [storing.formats.key, storing.formats.value];
    let sides = if is_value_in_key { 1 } else { 2 };
    for (at, side) in ["key", "value"].into_iter().enumerate().take(sides) {
        let format = formats[at];
        check_stored(side, saved.dims[at], format)?;
        // A format that is not asked for is that of what comes in, which is not quantized.
        let is_right = made[at].map_or(!format.is_quantized(), |made| made == format);
        if !is_right {
            let made = made[at].map_or("what comes in".to_owned(), |made| made.to_string());
            let reason = format!(
                "layer {number} stores its {side} as {format}, and this cache stores {made}; make it with CacheOptions::with_formats"
            );
            return Err(StoringError::BadSave { reason: reason.into() }.into());
        }
    }
    if is_value_in_key != storing.is_value_in_key {
        let (is, made) = match is_value_in_key {
            true => ("K alone", "both"),
            false => ("K and V", "K alone"),
        };
        let reason = format!(
            "layer {number} stores {is}, and this cache {made}; see CacheOptions::with_value_in_key"
        );
        return Err(StoringError::BadSave { reason: reason.into() }.into());
    }
    Ok(shape)
}
