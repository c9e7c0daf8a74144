//! Layers of a cache of sequences that share a window: pools of pages under one map, and the steps that write into
//! them. A cache has a group of them for each window: see [`groups`].

mod checks;
pub(crate) mod groups;
mod keep;
mod pools;
#[cfg(feature = "safetensors")]
mod save;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use self::pools::{Growth, bytes_of};
#[cfg(target_arch = "wasm32")]
use crate::error::BrowserError;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::arena::Allocation;
use crate::gpu::call::Call;
use crate::gpu::device::binding_limit;
use crate::gpu::kernels::Positions;
use crate::gpu::ledger::Ledger;
#[cfg(not(target_arch = "wasm32"))]
use crate::gpu::read::read;
use crate::gpu::read::read_async;
use crate::gpu::readback::Readback;
use crate::host::rows::{Rows, Span};
use crate::host::sequences::{Sequences, StagedStep, StepLimits};
use crate::layer_shape::LayerShape;
use crate::sequence::SequenceId;
use crate::stats::Stats;
use crate::storage::step::{RowLists, StepBlock, StepData};
use crate::storage::store::{Shape, Store};
use crate::storage::write::{Inputs, Storing, Target, check_stored};
use crate::stored::StoredTensor;
use crate::tensor::{TensorView, check_whole_words};
use crate::view::{LayerView, Owner, PageTable, RowTable, StepWork};

/// What a cache of sequences is made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SequenceLimits {
    pub(crate) page_tokens: usize,
    pub(crate) most_pages: Option<usize>,
    pub(crate) most_tokens: Option<usize>,
}

/// Layers, their pools, and the sequences in them.
#[derive(Debug)]
pub(crate) struct SequenceLayers {
    gpu: Gpu,
    limits: SequenceLimits,
    storing: Storing,
    shapes: Vec<Shape>,
    /// Which layers of the cache they are.
    numbers: Vec<usize>,
    /// One a layer, or none before the first step.
    stores: Vec<Store>,
    /// Pages that each pool has memory for.
    pool: usize,
    sequences: Sequences,
    latest: Option<Latest>,
    /// Steps planned.
    steps: u64,
    ledger: Ledger,
    dispatches: u64,
    bytes_moved: u64,
    peak_bytes_allocated: u64,
    peak_pages_used: u64,
    bytes_read_back: AtomicU64,
}

/// The step that was planned last.
#[derive(Debug)]
struct Latest {
    number: u64,
    /// Which layers it has updated.
    updated: Vec<bool>,
    /// Its sequences, with their lengths before it.
    before: Vec<(SequenceId, usize)>,
    allocation: Allocation,
}

/// A step that is ready to happen.
struct ReadyStep {
    staged: StagedStep,
    block: StepBlock,
    growth: Option<Growth>,
    allocation: Allocation,
    call: Call,
    dispatches: u64,
    moved: u64,
}

impl SequenceLayers {
    fn new(
        gpu: &Gpu,
        layers: Vec<(usize, Shape)>,
        (limits, storing): (SequenceLimits, Storing),
        sequences: Sequences,
    ) -> Self {
        let (numbers, shapes) = layers.into_iter().unzip();
        Self {
            gpu: gpu.clone(),
            limits,
            storing,
            shapes,
            numbers,
            stores: Vec::new(),
            pool: 0,
            sequences,
            latest: None,
            steps: 0,
            ledger: Ledger::default(),
            dispatches: 0,
            bytes_moved: 0,
            peak_bytes_allocated: 0,
            peak_pages_used: 0,
            bytes_read_back: AtomicU64::new(0),
        }
    }

    /// Refuses what builds on passes that were lost, or on memory that was refused after it was asked for.
    fn check_memory(&self) -> Result<()> {
        self.ledger.check()?;
        self.stores.iter().try_for_each(|store| store.memory().check())
    }

    /// Completes when it is known of all layers whether they have memory.
    async fn memory_arrives(&self) -> Result<()> {
        for store in &self.stores {
            store.memory().arrive().await?;
        }
        Ok(())
    }

    pub(crate) fn sequences(&self) -> Result<&Sequences> {
        self.check_memory()?;
        Ok(&self.sequences)
    }

    pub(crate) fn sequences_mut(&mut self) -> Result<&mut Sequences> {
        self.check_memory()?;
        Ok(&mut self.sequences)
    }

    /// Lets go of the bind groups that are kept.
    fn release(&self) {
        self.stores.iter().for_each(|store| store.bind_groups.clear());
    }

    fn reset(&mut self) {
        self.abandon();
        self.latest = None;
        self.ledger = Ledger::default();
        self.sequences.clear();
        // Memory that a browser has refused is not used again.
        if self.stores.iter().any(|store| store.memory().check().is_err()) {
            (self.stores, self.pool) = (Vec::new(), 0);
        }
        // Bind groups keep the engine's buffers alive; nothing says that they will be used again.
        self.release();
    }

    /// Makes a step ready for all layers: with memory for pools that grow, and copies of shared pages. Changes nothing
    /// that can be seen.
    fn stage_step(
        &mut self,
        pass: &wgpu::ComputePass<'_>,
        counts: &[(SequenceId, usize)],
    ) -> Result<ReadyStep> {
        self.check_pass(pass)?;
        self.check_memory()?;
        self.ledger.prepare(self.gpu.uploads())?;
        self.check_finished()?;
        let limits = self.step_limits();
        let staged = self.sequences.plan(counts, limits)?;
        let block = StepBlock::new(&staged);
        let growth = self.stage_growth(&staged, limits.fits)?;
        let mut call = Call::default();
        let (mut dispatches, mut moved) = (0, 0);
        for layer in 0..self.shapes.len() {
            for (all, bytes) in [
                self.stage_pool_copy(growth.as_ref(), layer)?,
                self.stage_page_copies(growth.as_ref(), layer, &staged)?,
            ] {
                dispatches += all.len() as u64;
                moved += bytes;
                all.into_iter().for_each(|dispatch| call.add(dispatch));
            }
        }
        let allocation = self.gpu.uploads().upload(block.words())?;
        // What was recorded before may read the old step's lists; this pass will read the new one's.
        let old = self.latest.as_ref().map(|latest| Arc::clone(&latest.allocation.guard));
        call.hold(old.into_iter().chain([Arc::clone(&allocation.guard)]).collect());
        Ok(ReadyStep { staged, block, growth, allocation, call, dispatches, moved })
    }

    /// Makes a step happen that is ready.
    fn commit_step(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        step: ReadyStep,
    ) -> Result<StepData> {
        let ReadyStep { staged, block, growth, allocation, call, dispatches, moved } = step;
        call.record(pass, &self.ledger)?;
        self.dispatches += dispatches;
        self.bytes_moved += moved;
        self.commit_growth(growth);
        self.peak_pages_used = self.peak_pages_used.max(staged.used() as u64);
        self.steps += 1;
        let before = staged.rows.iter().map(|row| (row.id, row.before)).collect();
        let updated = vec![false; self.shapes.len()];
        let number = self.steps;
        self.latest = Some(Latest { number, updated, before, allocation: allocation.clone() });
        let step = StepData::new([self.sequences.cache(), number], &staged, block, allocation);
        self.sequences.commit(staged);
        debug_assert!(self.sequences.is_sound(), "a recount of the pages agrees");
        Ok(step)
    }

    /// Writes packed K and V of a step's tokens into a layer.
    pub(crate) fn update(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        step: &StepData,
        layer: usize,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
    ) -> Result<LayerView> {
        self.check_pass(pass)?;
        self.check_memory()?;
        self.check_step(step)?;
        let shape = self.check_tensors(step, layer, key, value)?;
        let (gpu, store) = (&self.gpu, &self.stores[layer]);
        let inputs = Inputs::new(gpu, self.numbers[layer], &shape, Some(store), [key, value])?;
        let view = self.step_view(step, layer);
        let positions = Positions::Packed { at: step.list_at() };
        let lists = Some(&step.allocation);
        let append = inputs.write(gpu, &shape, Target { store, view: &view, positions, lists })?;
        let mut call = Call::default();
        call.borrow([key, value]);
        call.add(append);
        call.record(pass, &self.ledger)?;
        self.dispatches += 1;
        self.bytes_moved += shape.bytes(1, step.work.total)?.iter().sum::<u64>();
        if let Some(latest) = &mut self.latest {
            latest.updated[layer] = true;
        }
        Ok(view)
    }

    /// A layer as the sequences of a step see it.
    pub(crate) fn view(&self, step: &StepData, layer: usize) -> Result<LayerView> {
        self.check_memory()?;
        self.check_step(step)?;
        self.check_updated(layer)?;
        self.gpu.handle().check_known()?;
        Ok(self.step_view(step, layer))
    }

    /// Takes the tokens of the latest step back.
    pub(crate) fn cancel_step(&mut self) -> Result<()> {
        self.check_memory()?;
        let Some(latest) = &mut self.latest else { return Ok(()) };
        latest.updated.fill(true);
        for (id, len) in std::mem::take(&mut latest.before) {
            // A sequence that was removed since has no tokens to take back.
            if self.sequences.len(id).is_ok_and(|now| now > len) {
                self.sequences.truncate(id, len)?;
            }
        }
        self.steps += 1;
        latest.number = self.steps;
        Ok(())
    }

    /// The live tokens of a sequence in one layer, (1, H, T, D); `None` if it has none.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn get(
        &self,
        id: SequenceId,
        layer: usize,
    ) -> Result<Option<(StoredTensor, StoredTensor)>> {
        let read = read(&self.gpu, &self.ledger, || self.start_readback(id, layer))?;
        read.map(|(readback, ())| self.finish_readback(&readback)).transpose()
    }

    /// A browser runs nothing else while a call waits, so that no bytes would ever arrive.
    #[cfg(target_arch = "wasm32")]
    pub(crate) fn get(
        &self,
        id: SequenceId,
        layer: usize,
    ) -> Result<Option<(StoredTensor, StoredTensor)>> {
        if self.sequences()?.len(id)? == 0 {
            return Ok(None);
        }
        let _ = layer;
        Err(BrowserError::blocking("get()", "get_async()"))
    }

    pub(crate) async fn get_async(
        &self,
        id: SequenceId,
        layer: usize,
    ) -> Result<Option<(StoredTensor, StoredTensor)>> {
        self.memory_arrives().await?;
        let start = || self.start_readback(id, layer);
        let read = read_async(&self.gpu, &self.ledger, start).await?;
        read.map(|(readback, ())| self.finish_readback(&readback)).transpose()
    }

    fn start_readback(&self, id: SequenceId, layer: usize) -> Result<Option<(Readback, ())>> {
        let live = self.sequences()?.live(id)?;
        if self.latest.as_ref().is_some_and(|latest| latest.before.iter().any(|it| it.0 == id)) {
            self.check_updated(layer)?;
        }
        self.gpu.handle().check_alive()?;
        let Some(store) = self.stores.get(layer).filter(|_| live.len > 0) else { return Ok(None) };
        let records = RowLists::new([(live.start, live.len, live.pages)].into_iter());
        let allocation = self.gpu.uploads().upload(&records.words)?;
        let view = self.shaped_view(layer, (store, self.pool), &records.spans, allocation, None);
        let (gpu, number) = (&self.gpu, self.numbers[layer]);
        Readback::start(gpu, number, &view, Default::default(), &self.ledger)
            .map(|readback| Some((readback, ())))
    }

    fn finish_readback(&self, readback: &Readback) -> Result<(StoredTensor, StoredTensor)> {
        let tensors = readback.finish()?;
        self.bytes_read_back.fetch_add(readback.bytes(), Ordering::Relaxed);
        Ok(tensors)
    }

    pub(crate) fn stats(&self) -> Stats {
        let bytes_allocated = bytes_of(&self.stores);
        let pool = self.sequences.pool();
        Stats {
            dispatches: self.dispatches,
            bytes_moved: self.bytes_moved,
            buffers: self.stores.iter().map(Store::count).sum(),
            bytes_allocated,
            peak_bytes_allocated: self.peak_bytes_allocated.max(bytes_allocated),
            bytes_read_back: self.bytes_read_back.load(Ordering::Relaxed),
            pages_used: pool.used() as u64,
            pages_shared: pool.shared() as u64,
            pages_free: self.pool.saturating_sub(pool.used()) as u64,
            peak_pages_used: self.peak_pages_used,
        }
    }

    fn step_limits(&self) -> StepLimits {
        let SequenceLimits { page_tokens, most_pages: pages, most_tokens: tokens } = self.limits;
        let bytes = binding_limit(self.gpu.limits());
        // Pages have one number in all layers, so the layer with the largest ones decides.
        let fits = self.shapes.iter().map(|shape| shape.tokens_in(1, [bytes; 2]) / page_tokens);
        let least = fits.enumerate().min_by_key(|(_, fits)| *fits).unwrap_or_default();
        let (layer, fits) = (self.numbers[least.0], least.1);
        StepLimits { pages, tokens, layer, fits, bytes }
    }

    fn step_view(&self, step: &StepData, layer: usize) -> LayerView {
        let work = Some(Arc::clone(&step.work));
        self.shaped_view(
            layer,
            (&self.stores[layer], self.pool),
            &step.spans,
            step.allocation.clone(),
            work,
        )
    }

    fn shaped_view(
        &self,
        layer: usize,
        (store, pool): (&Store, usize),
        rows: &Arc<[Span]>,
        allocation: Allocation,
        step: Option<Arc<StepWork>>,
    ) -> LayerView {
        let shape = Shape { batch: rows.len(), ..self.shapes[layer] };
        let at = allocation.offset / 4;
        let pages = PageTable { allocation: allocation.clone(), at, stride: 0 };
        let longest = rows.iter().map(|row| row.len).max().unwrap_or(0);
        let longest = Rows::Equal(Span { start: 0, len: longest });
        let records = RowTable { allocation, at, rows: Arc::clone(rows) };
        let tables = (Some(pages), Some(records));
        let memory = [pool, self.limits.page_tokens];
        let view = shape.view(store, &longest, memory, tables);
        let window = self.sequences.window().map(|window| window.tokens);
        LayerView { step, window, owner: Some(self.owner()), ..view }
    }

    fn owner(&self) -> Owner {
        Owner { device: Arc::clone(self.gpu.handle()), ledger: self.ledger.clone() }
    }

    /// Leaves the lists of the latest step, which views have shown, to whoever reads them.
    fn abandon(&self) {
        if let Some(latest) = &self.latest {
            latest.allocation.guard.abandon();
            self.gpu.uploads().replace_abandoned();
        }
    }
}

impl Drop for SequenceLayers {
    fn drop(&mut self) {
        self.abandon();
    }
}

/// The shape of a page's tokens.
pub(crate) fn shape_of(layer: &LayerShape, storing: Storing) -> Result<Shape> {
    let LayerShape { dtype, heads, key_dim, value_dim } = *layer;
    let extents = [heads, key_dim, value_dim];
    if extents.contains(&0) {
        return Err(Error::ZeroExtent { shape: extents.to_vec() });
    }
    let shape = storing.shape([1, heads], [key_dim, value_dim], dtype);
    for (at, (what, dim)) in [("key", key_dim), ("value", value_dim)].into_iter().enumerate() {
        check_whole_words(what, dim, dtype)?;
        check_stored(what, dim, shape.formats[at])?;
    }
    Ok(shape)
}
