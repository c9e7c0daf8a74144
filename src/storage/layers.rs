//! The layers of a cache: what all kinds share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::call::Call;
use crate::gpu::ledger::Ledger;
use crate::host::batch::{BatchChange, OwnedChange, changed_batch};
use crate::host::plan;
use crate::host::position::CachePosition;
use crate::host::rows::Cut;
use crate::host::window::Window;
use crate::stats::Stats;
use crate::storage::arrangement::{Arrangement, PageCounts, Staged};
use crate::storage::layer::{Effect, Layer};
use crate::storage::store::Store;
use crate::storage::write::Storing;
use crate::tensor::TensorView;
use crate::view::{LayerView, Owner};

/// Layers under one policy, with their device.
#[derive(Debug)]
pub(crate) struct Layers<L: Arrangement> {
    pub(super) gpu: Gpu,
    pub(super) policy: L::Policy,
    /// Where the number of layers is fixed.
    num_layers: Option<usize>,
    /// The window of each layer, the first layer's first; layers past the last one keep all.
    windows: Vec<Option<Window>>,
    pub(super) storing: Storing,
    /// A roll-back past what a window has kept, since the last reset.
    past_window: Option<Error>,
    /// By index. A layer stands here once an update has named it.
    pub(super) layers: BTreeMap<usize, Layer<L>>,
    pub(super) ledger: Ledger,
    pub(super) prepared: Option<Prepared<L>>,
    /// Whether the batch has been changed since the last reset: layers not written then took no part.
    is_batch_changed: bool,
    dispatches: u64,
    bytes_moved: u64,
    peak_bytes_allocated: u64,
    peak_pages_used: u64,
    pub(super) bytes_read_back: AtomicU64,
}

/// A change of the batch that is ready, and what it was prepared for.
#[derive(Debug)]
pub(super) struct Prepared<L> {
    change: OwnedChange,
    /// One for each layer; `None` where a layer stays as it is.
    staged: Vec<Option<Staged<L>>>,
}

impl<L: Arrangement> Layers<L> {
    pub(crate) fn new(gpu: &Gpu, policy: L::Policy, num_layers: Option<usize>) -> Self {
        Self {
            gpu: gpu.clone(),
            policy,
            num_layers,
            windows: Vec::new(),
            storing: Storing::default(),
            past_window: None,
            layers: BTreeMap::new(),
            ledger: Ledger::default(),
            prepared: None,
            is_batch_changed: false,
            dispatches: 0,
            bytes_moved: 0,
            peak_bytes_allocated: 0,
            peak_pages_used: 0,
            bytes_read_back: AtomicU64::new(0),
        }
    }

    /// The window of each layer, the first layer's first; layers past the last one keep all.
    pub(crate) fn with_windows(mut self, windows: Vec<Option<Window>>) -> Self {
        self.windows = windows;
        self
    }

    pub(crate) fn with_storing(mut self, storing: Storing) -> Self {
        self.storing = storing;
        self
    }

    /// Has the first layers keep their tokens in memory that an engine gave.
    pub(crate) fn with_memory(mut self, stores: Vec<Store>) -> Self {
        for (number, store) in stores.into_iter().enumerate() {
            let mut layer = self.new_layer(number);
            layer.set_store(store);
            self.layers.insert(number, layer);
        }
        self
    }

    /// Tokens that a row holds at most, where that is fixed.
    pub(crate) fn bound(&self) -> Option<usize> {
        L::bound(&self.policy)
    }

    /// Lets go of the bind groups that are kept.
    pub(crate) fn release(&mut self) {
        self.layers.values().filter_map(Layer::store).for_each(|store| store.bind_groups.clear());
    }

    pub(crate) fn reset(&mut self) {
        self.prepared = None;
        self.abandon();
        self.is_batch_changed = false;
        self.past_window = None;
        // Work of before, run or not, no longer matters.
        self.ledger = Ledger::default();
        self.layers.values_mut().for_each(Layer::reset);
    }

    /// Cuts all rows of all layers by a cut that is the same for each. A roll-back past what a window has kept cuts
    /// nothing; every call from then on answers so, until a reset.
    pub(crate) fn cut(&mut self, cut: &Cut) {
        if let Err(error) = self.cut_all(|_| cut.clone()) {
            self.past_window = Some(error);
        }
    }

    /// Cuts each layer by a cut of its own: all layers, or none.
    fn cut_all(&mut self, cut: impl Fn(&Layer<L>) -> Cut) -> Result<()> {
        self.prepared = None;
        self.layers.values().try_for_each(|layer| layer.check_cut(&cut(layer)))?;
        for layer in self.layers.values_mut() {
            let cut = cut(layer);
            layer.cut(&mut self.policy, &cut);
        }
        Ok(())
    }

    /// Cuts each row to a length of its own, in all layers or in none.
    pub(crate) fn cut_rows(&mut self, cut: &Cut) -> Result<()> {
        self.prepared = None;
        self.check_memory()?;
        let (Cut::CropRows(lens) | Cut::TruncateRows(lens)) = cut else {
            unreachable!("a cut of rows")
        };
        for (&layer, held) in &self.layers {
            if let Some(batch) = held.batch().filter(|&batch| batch != lens.len()) {
                return Err(Error::RowCount { got: lens.len(), layer, batch });
            }
        }
        self.cut_all(|_| cut.clone())
    }

    pub(crate) fn drop_latest(&mut self, tokens: usize) -> Result<()> {
        self.cut_all(|layer| Cut::Truncate(layer.whole_len().saturating_sub(tokens)))
    }

    pub(crate) fn update(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
        layer_idx: usize,
        position: CachePosition<'_>,
    ) -> Result<LayerView> {
        self.prepared = None;
        self.check_layer(layer_idx)?;
        self.check_pass(pass)?;
        self.check_writable()?;
        self.check_first_batch(layer_idx, key, value)?;
        // A layer that was never written is only kept where it is written now.
        let is_new = !self.layers.contains_key(&layer_idx);
        let mut fresh = is_new.then(|| self.new_layer(layer_idx));
        let held = self.layers.get_mut(&layer_idx);
        let layer = held.or(fresh.as_mut()).expect("a layer that is held or new");
        let (mut staged, view) =
            layer.stage_update(&self.gpu, &mut self.policy, key, value, position)?;
        let mut call = Call::default();
        call.borrow([key, value]);
        layer.hand_over(&mut staged, &mut call);
        call.record(pass, &self.ledger)?;
        self.layers.extend(fresh.map(|fresh| (layer_idx, fresh)));
        self.commit_one(layer_idx, staged);
        Ok(self.as_shown(layer_idx, view))
    }

    fn new_layer(&self, number: usize) -> Layer<L> {
        Layer::new(number, self.storing, self.window(number))
    }

    fn window(&self, number: usize) -> Option<Window> {
        self.windows.get(number).copied().flatten()
    }

    /// A view of a layer as callers get it: with what it keeps, and whose it is.
    fn as_shown(&self, number: usize, view: LayerView) -> LayerView {
        let window = self.window(number).map(|window| window.tokens);
        LayerView { window, owner: Some(self.owner()), ..view }
    }

    /// A layer, which is there from now on, and what its kind decides.
    #[cfg(feature = "safetensors")]
    pub(super) fn with_layer<T>(
        &mut self,
        number: usize,
        run: impl FnOnce(&mut Layer<L>, &mut L::Policy) -> T,
    ) -> T {
        let new = self.new_layer(number);
        run(self.layers.entry(number).or_insert(new), &mut self.policy)
    }

    /// Commits a change of one layer that was recorded, and counts it.
    pub(super) fn commit_one(&mut self, number: usize, staged: Staged<L>) {
        let allocated = staged.allocated();
        if allocated > 0 {
            self.note_peak(allocated);
        }
        let layer = self.layers.get_mut(&number).expect("the layer was staged just now");
        let Effect { dispatches, moved } = layer.commit(staged);
        self.dispatches += dispatches;
        self.bytes_moved += moved;
        self.peak_pages_used = self.peak_pages_used.max(layer.pages_used());
    }

    /// Prepares a change of the batch, or finds that it is prepared.
    pub(crate) fn prepare_batch(&mut self, change: BatchChange<'_>) -> Result<()> {
        self.gpu.handle().check_alive()?;
        self.ready_batch(change)
    }

    fn ready_batch(&mut self, change: BatchChange<'_>) -> Result<()> {
        let prepared = self.prepared.take().filter(|prepared| prepared.change.is(change));
        self.check_writable()?;
        self.prepared = match prepared {
            Some(prepared) => Some(prepared),
            None => Some(self.stage_batch(change)?),
        };
        Ok(())
    }

    fn stage_batch(&mut self, change: BatchChange<'_>) -> Result<Prepared<L>> {
        match change {
            BatchChange::Select([]) => return Err(Error::NoIndices),
            BatchChange::Repeat(0) => return Err(Error::ZeroRepeats),
            BatchChange::Select(indices) => self.check_indices(indices)?,
            BatchChange::Repeat(_) => {}
        }
        // All layers are asked whether they have room before a list is made that is as long as the batch.
        for layer in self.layers.values() {
            if let Some(batch) = layer.batch() {
                let batch = changed_batch(batch, change)?;
                layer.check_batch(&self.gpu, &self.policy, batch)?;
            }
        }
        let mut staged = Vec::with_capacity(self.layers.len());
        for layer in self.layers.values_mut() {
            staged.push(match (layer.batch(), change) {
                (None, _) => None,
                (Some(_), BatchChange::Select(indices)) => {
                    layer.stage_batch(&self.gpu, &mut self.policy, indices)?
                }
                (Some(batch), BatchChange::Repeat(repeats)) => {
                    let map = plan::repeat_map(batch, repeats).expect("the new batch was counted");
                    layer.stage_batch(&self.gpu, &mut self.policy, &map)?
                }
            });
        }
        Ok(Prepared { change: change.into(), staged })
    }

    pub(crate) fn change_batch(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        change: BatchChange<'_>,
    ) -> Result<()> {
        self.check_pass(pass)?;
        self.ready_batch(change)?;
        let staged = self.prepared.take().map(|prepared| prepared.staged).unwrap_or_default();
        let is_changed = staged.iter().any(Option::is_some);
        self.commit_all(pass, staged)?;
        self.is_batch_changed |= is_changed;
        Ok(())
    }

    /// Makes room for `tokens` more tokens a row in every layer that was written: in all or in none.
    pub(crate) fn reserve(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        tokens: usize,
    ) -> Result<()> {
        self.prepared = None;
        self.check_pass(pass)?;
        self.check_writable()?;
        let mut staged = Vec::with_capacity(self.layers.len());
        for layer in self.layers.values_mut() {
            staged.push(layer.stage_reserve(&self.gpu, &mut self.policy, tokens)?);
        }
        self.commit_all(pass, staged)
    }

    /// Makes changes of all layers happen, one for each; `None` where a layer stays as it is.
    pub(super) fn commit_all(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        mut staged: Vec<Option<Staged<L>>>,
    ) -> Result<()> {
        let mut call = Call::default();
        for (layer, staged) in self.layers.values().zip(&mut staged) {
            staged.iter_mut().for_each(|staged| layer.hand_over(staged, &mut call));
        }
        call.record(pass, &self.ledger)?;
        self.note_peak(staged.iter().flatten().map(Staged::allocated).sum());
        for (layer, staged) in self.layers.values_mut().zip(staged) {
            let Some(staged) = staged else { continue };
            let Effect { dispatches, moved } = layer.commit(staged);
            self.dispatches += dispatches;
            self.bytes_moved += moved;
        }
        Ok(())
    }

    pub(crate) fn view(&self, layer_idx: usize) -> Result<Option<LayerView>> {
        let Some(layer) = self.shown(layer_idx)? else { return Ok(None) };
        let view = layer.view(&self.gpu)?;
        Ok(view.map(|view| self.as_shown(layer_idx, view)))
    }

    /// A layer whose content may be shown; `None` if it was never written.
    fn shown(&self, layer_idx: usize) -> Result<Option<&Layer<L>>> {
        self.check_layer(layer_idx)?;
        self.check_whole()?;
        let layer = self.layers.get(&layer_idx).filter(|layer| layer.batch().is_some());
        if layer.is_some() {
            self.gpu.handle().check_known()?;
        }
        Ok(layer)
    }

    pub(crate) fn seq_length(&self, layer_idx: usize) -> Result<usize> {
        Ok(self.shown(layer_idx)?.map_or(0, Layer::len))
    }

    pub(crate) fn next_position(&self, layer_idx: usize) -> Result<usize> {
        Ok(self.shown(layer_idx)?.map_or(0, |layer| layer.cropped() + layer.len()))
    }

    /// Leaves the tables that views have shown to whoever reads them.
    fn abandon(&self) {
        let tables = self.layers.values().filter(|layer| layer.abandon()).count();
        if tables > 0 {
            self.gpu.uploads().replace_abandoned();
        }
    }

    fn owner(&self) -> Owner {
        Owner { device: Arc::clone(self.gpu.handle()), ledger: self.ledger.clone() }
    }

    pub(crate) fn stats(&self) -> Stats {
        let (buffers, bytes_allocated) = self.memory();
        let pages = self.pages();
        Stats {
            dispatches: self.dispatches,
            bytes_moved: self.bytes_moved,
            buffers,
            bytes_allocated,
            peak_bytes_allocated: self.peak_bytes_allocated.max(bytes_allocated),
            bytes_read_back: self.bytes_read_back.load(Ordering::Relaxed),
            pages_used: pages.used,
            pages_shared: pages.shared,
            pages_free: pages.free,
            peak_pages_used: self.peak_pages_used,
        }
    }

    /// Refuses to write on where passes were lost, and makes what recording needs.
    pub(super) fn check_writable(&self) -> Result<()> {
        self.check_whole()?;
        self.ledger.prepare(self.gpu.uploads())
    }

    /// Refuses what would show or build on tokens that are lost, with a pass or by a roll-back past a window.
    fn check_whole(&self) -> Result<()> {
        self.check_memory()?;
        self.past_window.clone().map_or(Ok(()), Err)
    }

    /// Refuses what builds on passes that were lost, or on memory that was refused after it was asked for.
    fn check_memory(&self) -> Result<()> {
        self.ledger.check()?;
        self.layers.values().filter_map(Layer::store).try_for_each(|store| store.memory().check())
    }

    /// Completes when it is known of all layers whether they have memory.
    pub(super) async fn memory_arrives(&self) -> Result<()> {
        for store in self.layers.values().filter_map(Layer::store) {
            store.memory().arrive().await?;
        }
        Ok(())
    }

    /// Refuses a pass of a device that is lost, and one that would run before what was recorded last.
    pub(super) fn check_pass(&self, pass: &wgpu::ComputePass<'_>) -> Result<()> {
        self.gpu.handle().check_alive_for(pass)?;
        self.ledger.check_pass(pass)
    }

    pub(super) fn check_layer(&self, layer: usize) -> Result<()> {
        match self.num_layers {
            Some(num_layers) if layer >= num_layers => {
                Err(Error::LayerOutOfRange { layer, num_layers })
            }
            _ => Ok(()),
        }
    }

    /// The counts of the layer that uses most pages. Layers that advance together have one table.
    fn pages(&self) -> PageCounts {
        self.layers.values().map(Layer::pages).max_by_key(|pages| pages.used).unwrap_or_default()
    }

    /// A layer that was never written takes no part in a change of the batch, so afterwards its rows must be
    /// as many as those of a layer that did.
    fn check_first_batch(
        &self,
        layer: usize,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
    ) -> Result<()> {
        let is_written = self.layers.get(&layer).is_some_and(|layer| layer.batch().is_some());
        if !self.is_batch_changed || is_written || key.shape[..3] != value.shape[..3] {
            return Ok(());
        }
        let got = key.shape[0];
        let mut batches = self.layers.iter().filter_map(|(&at, layer)| Some((at, layer.batch()?)));
        let first = batches.next();
        match first {
            Some((other, batch)) if batch != got && !batches.any(|(_, batch)| batch == got) => {
                Err(Error::BatchChanged { layer, got, other, batch })
            }
            _ => Ok(()),
        }
    }

    /// Every layer's batch must have the rows that `indices` name.
    fn check_indices(&self, indices: &[u32]) -> Result<()> {
        for (&layer, held) in &self.layers {
            let Some(batch) = held.batch() else { continue };
            let past = |&(_, index): &(usize, &u32)| *index as usize >= batch;
            if let Some((place, &index)) = indices.iter().enumerate().find(past) {
                return Err(Error::IndexOutOfRange { index, place, layer, batch });
            }
        }
        Ok(())
    }

    fn memory(&self) -> (u64, u64) {
        self.layers
            .values()
            .map(Layer::memory)
            .fold((0, 0), |(buffers, bytes), (b, n)| (buffers + b, bytes + n))
    }

    /// Old and new memory are held together until a change is committed.
    fn note_peak(&mut self, allocated: u64) {
        self.peak_bytes_allocated = self.peak_bytes_allocated.max(self.memory().1 + allocated);
    }
}

impl<L: Arrangement> Drop for Layers<L> {
    fn drop(&mut self) {
        self.abandon();
    }
}
