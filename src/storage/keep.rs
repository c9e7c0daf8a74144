//! Keeps some of the latest tokens: the accepted path of a tree of drafted ones.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::host::position::CachePosition;
use crate::host::rows::Cut;
use crate::storage::arrangement::{Arrangement, LayerState, NewTokens, Staged};
use crate::storage::layer::Layer;
use crate::storage::layers::Layers;
use crate::storage::store::Store;
use crate::storage::write::{Target, write_stored};
use crate::view::LayerView;

impl<L: Arrangement> Layers<L> {
    /// Of the latest `count` tokens of every row and layer that was written, those at `keep` stay, in this order: in all
    /// layers or in none.
    pub(crate) fn keep_latest(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        count: usize,
        keep: &[u32],
    ) -> Result<()> {
        self.prepared = None;
        self.check_pass(pass)?;
        self.check_writable()?;
        if let Some(&past) = keep.iter().find(|&&at| at as usize >= count) {
            return Err(Error::PositionOutOfBounds { position: past as usize, bound: count });
        }
        self.layers.values().try_for_each(|layer| layer.check_keep(count, keep.len()))?;
        if keep.is_empty() {
            return self.drop_latest(count);
        }
        let mut staged = Vec::with_capacity(self.layers.len());
        for layer in self.layers.values() {
            staged.push(layer.stage_keep(&self.gpu, &mut self.policy, count, keep)?);
        }
        self.commit_all(pass, staged)
    }
}

impl<L: Arrangement> Layer<L> {
    /// Refuses to keep `kept` of the latest `count` tokens, if there are not as many, or rows differ.
    pub(crate) fn check_keep(&self, count: usize, kept: usize) -> Result<()> {
        let Some(arrangement) = &self.arrangement else { return Ok(()) };
        let rows = arrangement.rows();
        if rows.spans().is_some() {
            return Err(Error::NotSupported { what: "keep_latest() for rows of different length" });
        }
        let (layer, live) = (self.index, rows.len());
        if count > live {
            return Err(Error::TooFewTokens { layer, live, asked: count });
        }
        let left = self.let_go.saturating_add(live - count + kept);
        let own = [self.let_go, live];
        self.window.map_or(Ok(()), |window| window.check_roll_back(layer, own, left))
    }

    /// Stages that of the latest `count` tokens those at `keep` stay, in this order. The call was checked.
    ///
    /// The latest tokens are copied out, since they may lie in each other's way and in pages that rows share; then
    /// those that stay are appended to what is before them.
    pub(crate) fn stage_keep(
        &self,
        gpu: &Gpu,
        policy: &mut L::Policy,
        count: usize,
        keep: &[u32],
    ) -> Result<Option<Staged<L>>> {
        let (Some(arrangement), Some(store)) = (&self.arrangement, &self.store) else {
            return Ok(None);
        };
        let shape = arrangement.shape();
        let latest = latest(arrangement.view(gpu, store)?, count);
        let bytes = shape.bytes(shape.batch, count)?;
        let copy = Store::new(gpu, self.index, bytes)?;
        let collect = gpu.kernels().collect(&latest, 0..shape.batch, copy.bindings())?;

        let mut trimmed = arrangement.clone();
        trimmed.cut(policy, &Cut::Truncate(arrangement.rows().len() - count));
        let tokens = NewTokens {
            position: CachePosition::Append,
            batch: shape.batch,
            count: keep.len(),
            rows: trimmed.rows(),
            new_len: trimmed.rows().len() + keep.len(),
            kept: Some(keep),
        };
        let state = LayerState {
            gpu,
            layer: self.index,
            store: Some(store),
            arrangement: Some(&trimmed),
            window: self.window,
        };
        let written = L::stage_write(state, policy, shape, tokens)?;
        let kept = keep.len();
        let write = |target: Target<'_>| write_stored(gpu, &shape, (&copy, count), kept, target);
        let (mut change, _) = self.stage_append(gpu, written, shape, kept, write)?;
        change.dispatches.splice(0..0, collect);
        change.moved += bytes.iter().sum::<u64>();
        Ok(Some(change))
    }
}

/// The view of the latest `count` tokens of equal rows.
fn latest(view: LayerView, count: usize) -> LayerView {
    let start = view.start + view.len - count;
    // The slots of a paged row go on from page to page.
    let start = if view.pages.is_some() { start } else { start % view.capacity };
    LayerView { start, len: count, ..view }
}
