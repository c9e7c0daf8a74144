//! One layer: its memory, what it holds, and the changes that a cache asks for.
//!
//! A change is staged first: everything is checked, allocated and prepared, and nothing is altered. A
//! staged change cannot fail any more; committing it records its dispatches and moves the layer on.
//!
//! Kinds differ in how the tokens lie in the memory: see [`Arrangement`](crate::storage::arrangement::Arrangement).

use crate::error::{Error, Result, WindowError};
use crate::gpu::Gpu;
use crate::gpu::arena::RegionGuard;
use crate::gpu::call::Call;
use crate::gpu::kernels::{Dispatch, Positions};
use crate::host::position::{self, CachePosition, WritePlan};
use crate::host::rows::{Cut, Rows};
use crate::host::window::{Window, gone_after_crop};
#[cfg(feature = "safetensors")]
use crate::storage::arrangement::PagesToSave;
use crate::storage::arrangement::{
    Arrangement, LayerState, NewTokens, PageCounts, Staged, StagedWrite,
};
use crate::storage::store::{Shape, Store};
use crate::storage::write::{Inputs, Storing, Target};
use crate::tensor::TensorView;
use crate::view::LayerView;

/// One layer of a cache.
#[derive(Debug)]
pub(crate) struct Layer<L> {
    pub(super) index: usize,
    /// Kept by a reset, for reuse.
    pub(super) store: Option<Store>,
    /// `None` until the first update, and after a reset.
    pub(super) arrangement: Option<L>,
    storing: Storing,
    /// What it keeps, if not all.
    pub(super) window: Option<Window>,
    /// Tokens before the live ones that are gone since the last reset: dropped by crops, or let go for the window.
    cropped: usize,
    /// Those of them that would be live in a layer without a window: the latest.
    pub(super) let_go: usize,
    /// What views before cuts have shown, until a pass is recorded behind all that may read it.
    retired: Vec<RegionGuard>,
}

/// What a committed change did, for the statistics.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Effect {
    pub(crate) dispatches: u64,
    pub(crate) moved: u64,
}

impl<L: Arrangement> Layer<L> {
    pub(crate) fn new(index: usize, storing: Storing, window: Option<Window>) -> Self {
        let (store, arrangement, retired) = (None, None, Vec::new());
        Self { index, store, arrangement, storing, window, cropped: 0, let_go: 0, retired }
    }

    /// Live tokens of the longest row, or more if that was selected away.
    pub(crate) fn len(&self) -> usize {
        self.arrangement.as_ref().map_or(0, |arrangement| arrangement.rows().len())
    }

    /// Tokens before the live ones that are gone.
    pub(crate) fn cropped(&self) -> usize {
        self.cropped
    }

    /// What is gone before the live tokens: all that is, and the part that a window has let go.
    #[cfg(feature = "safetensors")]
    pub(super) fn set_gone(&mut self, cropped: usize, let_go: usize) {
        (self.cropped, self.let_go) = (cropped, let_go);
    }

    /// The pages in use, if there are pages.
    #[cfg(feature = "safetensors")]
    pub(super) fn pages_to_save(&self, gpu: &Gpu) -> Result<Option<PagesToSave>> {
        match self.arrangement.as_ref().zip(self.store.as_ref()) {
            Some((arrangement, store)) => arrangement.pages_to_save(gpu, store),
            None => Ok(None),
        }
    }

    /// Live tokens at most, where that is fixed.
    pub(super) fn bound(&self, policy: &L::Policy) -> Option<usize> {
        let whole = L::bound(policy)?;
        Some(self.window.map_or(whole, |window| window.bound(whole)))
    }

    /// Batch rows, or `None` for a layer never written.
    pub(crate) fn batch(&self) -> Option<usize> {
        self.arrangement.as_ref().map(|arrangement| arrangement.shape().batch)
    }

    /// Buffers and bytes that the layer has allocated.
    pub(crate) fn memory(&self) -> (u64, u64) {
        self.store.as_ref().map_or((0, 0), |store| (store.count(), store.bytes().iter().sum()))
    }

    pub(crate) fn pages_used(&self) -> u64 {
        self.arrangement.as_ref().map_or(0, L::pages_used)
    }

    pub(crate) fn pages(&self) -> PageCounts {
        self.arrangement.as_ref().map_or(PageCounts::default(), L::pages)
    }

    pub(crate) fn view(&self, gpu: &Gpu) -> Result<Option<LayerView>> {
        let held = self.arrangement.as_ref().zip(self.store.as_ref());
        held.map(|(arrangement, store)| arrangement.view(gpu, store)).transpose()
    }

    /// Has the layer keep its tokens in memory that an engine gave.
    pub(super) fn set_store(&mut self, store: Store) {
        self.store = Some(store);
    }

    /// The buffers, if there are some.
    pub(super) fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    pub(crate) fn reset(&mut self) {
        (self.arrangement, self.cropped, self.let_go) = (None, 0, 0);
        self.retired.clear();
        // Memory that a browser has refused is not used again.
        self.store = self.store.take().filter(|store| store.memory().check().is_ok());
        if let Some(store) = &self.store {
            // Bind groups keep the engine's buffers alive; nothing says that they will be used again.
            store.bind_groups.clear();
        }
    }

    /// What views have shown beside K and V, and passes may still read.
    fn guards(&self) -> impl Iterator<Item = &RegionGuard> {
        let current = self.arrangement.iter().flat_map(|arrangement| arrangement.guards());
        self.retired.iter().chain(current.flatten())
    }

    /// Leaves to those who record passes of their own what a view has shown: no call comes that holds it.
    /// Whether there was such.
    pub(crate) fn abandon(&self) -> bool {
        self.guards().inspect(|guard| guard.abandon()).count() > 0
    }

    /// Hands over what is to be recorded of a change of this layer, and what must stay in place until then.
    pub(crate) fn hand_over(&self, staged: &mut Staged<L>, call: &mut Call) {
        // A change without a dispatch is lost with its pass as well.
        let mut guards = std::mem::take(&mut staged.guards);
        guards.extend(self.guards().cloned());
        call.hold(guards);
        call.keep(self.store.as_ref().and_then(|store| store.memory().guard()));
        staged.recorded = staged.dispatches.len() as u64;
        staged.dispatches.drain(..).for_each(|dispatch| call.add(dispatch));
    }

    /// Live tokens, and those that would be live without a window: what lengths that are kept from the first token on
    /// are counted in, so that layers with a window and those without stay together.
    pub(crate) fn whole_len(&self) -> usize {
        self.let_go.saturating_add(self.len())
    }

    /// Refuses a cut after which the next token would look back on what was let go, and one after which rows would differ
    /// in how much that is: they have one length without the window, and one with it.
    pub(crate) fn check_cut(&self, cut: &Cut) -> Result<()> {
        let Some((window, arrangement)) = self.window.zip(self.arrangement.as_ref()) else {
            return Ok(());
        };
        let check = |live, kept| window.check_roll_back(self.index, [self.let_go, live], kept);
        let rows = arrangement.rows();
        match cut {
            Cut::Truncate(length) => check(rows.len(), *length),
            Cut::TruncateRows(lengths) => {
                let mut rows =
                    lengths.iter().enumerate().map(|(b, &kept)| (rows.span(b).len, kept));
                rows.try_for_each(|(live, kept)| check(live, kept))
            }
            Cut::CropRows(lengths) => {
                let mut kept = lengths.iter().enumerate().map(|(row, &length)| {
                    gone_after_crop([self.let_go, rows.span(row).len], length)
                });
                let first = kept.next().unwrap_or(0);
                let apart = kept.enumerate().find(|(_, other)| *other != first);
                apart.map_or(Ok(()), |(row, other)| {
                    let (layer, window, row) = (self.index, window.tokens, row + 1);
                    Err(WindowError::RowsApart { layer, window, row, let_go: [first, other] }
                        .into())
                })
            }
            Cut::Crop(_) => Ok(()),
        }
    }

    /// A cut of the live tokens alone.
    fn own_cut(&self, cut: &Cut) -> Cut {
        let own = |length: &usize| length.saturating_sub(self.let_go);
        match cut {
            Cut::Truncate(length) => Cut::Truncate(own(length)),
            Cut::TruncateRows(lengths) => Cut::TruncateRows(lengths.iter().map(own).collect()),
            Cut::Crop(_) | Cut::CropRows(_) => cut.clone(),
        }
    }

    /// Cuts all rows, by a cut that was checked: moves no bytes, and cannot fail.
    pub(crate) fn cut(&mut self, policy: &mut L::Policy, cut: &Cut) {
        let cut = &self.own_cut(cut);
        let Some(arrangement) = &mut self.arrangement else { return };
        let before = arrangement.rows().len();
        let is_crop = matches!(cut, Cut::Crop(_) | Cut::CropRows(_));
        match cut {
            Cut::Crop(most) => self.let_go = gone_after_crop([self.let_go, before], *most),
            // As many of all rows, which was checked.
            Cut::CropRows(lengths) => {
                let (live, most) = (arrangement.rows().span(0).len, lengths.first());
                self.let_go = gone_after_crop([self.let_go, live], most.copied().unwrap_or(0));
            }
            Cut::Truncate(_) | Cut::TruncateRows(_) => {}
        }
        if !arrangement.rows().is_changed_by(cut) {
            return;
        }
        let old = arrangement.guards().map(Option::<&_>::cloned);
        arrangement.cut(policy, cut);
        if is_crop {
            // Each of them was appended in a call of its own or with others: no count of them overflows soon.
            self.cropped = self.cropped.saturating_add(before - arrangement.rows().len());
        }
        for guard in old.into_iter().flatten() {
            let is_held = |held: &RegionGuard| std::sync::Arc::ptr_eq(held, &guard);
            let is_shown = arrangement.guards().into_iter().flatten().any(is_held);
            if !is_shown && !self.retired.iter().any(is_held) {
                self.retired.push(guard);
            }
        }
    }

    /// Stages the writing of new tokens. Returns the layer's view afterwards as well.
    pub(crate) fn stage_update(
        &mut self,
        gpu: &Gpu,
        policy: &mut L::Policy,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
        position: CachePosition<'_>,
    ) -> Result<(Staged<L>, LayerView)> {
        let shape = self.check_shapes(key, value)?;
        let inputs = Inputs::new(gpu, self.index, &shape, self.store.as_ref(), [key, value])?;
        let (batch, count) = (shape.batch, key.shape[2]);
        if let Some(window) = self.window {
            window.check_chunk(self.index, count)?;
        }
        let bound = self.bound(policy);
        // An append lets go first of what its first token does not look back on.
        let live = self.len();
        let is_append = matches!(position, CachePosition::Append);
        let kept = self.window.filter(|_| is_append).map(|window| Cut::Crop(window.needed()));
        let trimmed = self.arrangement.as_ref().zip(kept).and_then(|(arrangement, cut)| {
            arrangement.rows().is_changed_by(&cut).then(|| {
                let mut trimmed = arrangement.clone();
                trimmed.cut(policy, &cut);
                trimmed
            })
        });
        let arrangement = trimmed.as_ref().or(self.arrangement.as_ref());
        let empty = Rows::default();
        let rows = arrangement.map_or(&empty, L::rows);
        let let_go = live - rows.len();
        let new_len = position::check(position, batch, count, rows.len(), bound)?;
        let tokens = NewTokens { position, batch, count, rows, new_len, kept: None };

        let state = LayerState {
            gpu,
            layer: self.index,
            store: self.store.as_ref(),
            arrangement,
            // An update at positions lets go of nothing, so memory that grows for it doubles as without a window.
            window: self.window.filter(|_| is_append || L::bound(policy).is_some()),
        };
        let written = L::stage_write(state, policy, shape, tokens)?;
        let write = |target: Target<'_>| Ok(vec![inputs.write(gpu, &shape, target)?]);
        let (mut change, view) = self.stage_append(gpu, written, shape, count, write)?;
        change.let_go = let_go;
        Ok((change, view))
    }

    /// Stages the append of `tokens` tokens a row whose places are found, by what `write` makes for them. Returns the
    /// layer's view afterwards as well.
    pub(super) fn stage_append(
        &self,
        gpu: &Gpu,
        written: StagedWrite<L>,
        shape: Shape,
        tokens: usize,
        write: impl FnOnce(Target<'_>) -> Result<Vec<Dispatch>>,
    ) -> Result<(Staged<L>, LayerView)> {
        let StagedWrite { mut change, plan, lists } = written;
        let store = change.store.as_ref().or(self.store.as_ref());
        let store = store.expect("a staged write has memory");
        let view = change.arrangement.view(gpu, store)?;
        let target = Target {
            store,
            view: &view,
            positions: positions(&plan, lists.as_ref().map_or(0, |(_, at)| *at))?,
            lists: lists.as_ref().map(|(allocation, _)| allocation),
        };
        let dispatches = write(target)?;
        let written = plan.written(shape.batch, tokens).saturating_mul(shape.heads as u64);
        let written = shape.row_bytes().map(|row| row.saturating_mul(written));
        change.dispatches.extend(dispatches);
        change.moved += written.iter().sum::<u64>();
        Ok((change, view))
    }

    /// Refuses a change to `batch` rows that has no room, from counts alone.
    pub(crate) fn check_batch(&self, gpu: &Gpu, policy: &L::Policy, batch: usize) -> Result<()> {
        let held = self.arrangement.as_ref().zip(self.store.as_ref());
        held.map_or(Ok(()), |(arrangement, store)| {
            arrangement.check_batch(gpu, self.index, store, policy, batch)
        })
    }

    /// Stages room for `tokens` more tokens a row; `None` where it is there or nothing was ever written.
    pub(crate) fn stage_reserve(
        &mut self,
        gpu: &Gpu,
        policy: &mut L::Policy,
        tokens: usize,
    ) -> Result<Option<Staged<L>>> {
        let (Some(arrangement), Some(store)) = (&self.arrangement, &self.store) else {
            return Ok(None);
        };
        let (batch, append) = (arrangement.shape().batch, CachePosition::Append);
        // Of a window what the appends leave of the live tokens, if they come one by one, or all at once.
        let live = arrangement.rows().len();
        let kept = self.window.map_or(live, |window| live.min(window.needed()));
        let bound = self.bound(policy);
        let most = bound.map_or(usize::MAX, |bound| bound.saturating_sub(kept));
        let tokens = if self.window.is_some() { tokens.min(most) } else { tokens };
        let new_len = position::check(append, batch, tokens, kept, bound)?.max(live);
        arrangement.stage_reserve(gpu, self.index, store, policy, (new_len, self.window))
    }

    /// Stages a change of the batch: new row `i` becomes old row `map[i]`. `None` where nothing changes
    /// or nothing was ever written.
    pub(crate) fn stage_batch(
        &mut self,
        gpu: &Gpu,
        policy: &mut L::Policy,
        map: &[u32],
    ) -> Result<Option<Staged<L>>> {
        let (Some(arrangement), Some(store)) = (&self.arrangement, &self.store) else {
            return Ok(None);
        };
        if crate::host::plan::is_identity(map, arrangement.shape().batch) {
            return Ok(None);
        }
        arrangement.stage_batch(gpu, self.index, store, policy, map).map(Some)
    }

    /// Makes a staged change happen whose work was recorded. Cannot fail.
    pub(crate) fn commit(&mut self, staged: Staged<L>) -> Effect {
        let effect = Effect { dispatches: staged.recorded, moved: staged.moved };
        if let Some(store) = staged.store {
            self.store = Some(store);
        }
        self.arrangement = Some(staged.arrangement);
        self.cropped = self.cropped.saturating_add(staged.let_go);
        self.let_go = self.let_go.saturating_add(staged.let_go);
        // The call that was recorded just now holds them.
        self.retired.clear();
        effect
    }

    /// Checks K against V and both against the layer.
    fn check_shapes(&self, key: &TensorView<'_>, value: &TensorView<'_>) -> Result<Shape> {
        if key.dtype != value.dtype {
            return Err(Error::WrongDType { what: "value", expected: key.dtype, got: value.dtype });
        }
        if key.shape[..3] != value.shape[..3] {
            return Err(Error::KeyValueShape { key: key.shape, value: value.shape });
        }
        let [batch, heads, _, key_dim] = key.shape;
        let dims = [key_dim, value.shape[3]];
        let shape = self.storing.shape([batch, heads], dims, key.dtype);
        let own = self.arrangement.as_ref().map(L::shape);
        if let Some(own) = &own {
            self.storing.check_dtype(own, "the new K and V", key.dtype)?;
        }
        match own {
            Some(own) if own != shape => Err(Error::LayerShape {
                layer: self.index,
                batch: own.batch,
                heads: own.heads,
                key_dim: own.key_dim,
                value_dim: own.value_dim,
                key: key.shape,
                value: value.shape,
            }),
            _ => Ok(shape),
        }
    }
}

/// A plan as the kernel takes it; its list begins at word `at`.
fn positions(plan: &WritePlan, at: u32) -> Result<Positions> {
    Ok(match plan {
        WritePlan::Run { first, zeros } => Positions::Run { first: *first, zeros: *zeros },
        WritePlan::List(list) => {
            let stride = if list.per_row { list.stride() } else { 0 };
            let stride = u32::try_from(stride)
                .map_err(|_| Error::too_many("number of positions of a row", stride as u64))?;
            Positions::List { named: list.named, gap: list.gap, at, stride }
        }
    })
}
