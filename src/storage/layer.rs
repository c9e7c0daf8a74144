//! One layer: its memory, what it holds, and the changes that a cache asks for.
//!
//! A change is staged first: everything is checked, allocated and prepared, and nothing is altered. A
//! staged change cannot fail any more; committing it records its dispatches and moves the layer on.
//!
//! How the tokens lie in the memory is what kinds differ in: a [`Held`] of theirs.

use std::fmt::Debug;

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::arena::{Lease, Placed};
use crate::gpu::bind_groups::Purpose;
use crate::gpu::call::Call;
use crate::gpu::device::binding_limit;
use crate::gpu::kernels::{AppendShape, Dispatch, Positions};
use crate::host::position::{self, CachePosition, Order};
use crate::storage::store::{Shape, Store};
use crate::tensor::TensorView;
use crate::view::LayerView;

/// What a written layer holds, and where: a ring or pages.
pub(crate) trait Held: Debug + Sized {
    /// What the kind decides about its layers.
    type Policy: Debug;

    /// Tokens that a row holds at most, where that is fixed.
    fn bound(policy: &Self::Policy) -> Option<usize>;

    fn shape(&self) -> Shape;

    /// Live tokens.
    fn len(&self) -> usize;

    fn view<'a>(&'a self, store: &'a Store) -> LayerView;

    fn crop(&mut self, policy: &mut Self::Policy, max_length: usize);

    fn truncate(&mut self, policy: &mut Self::Policy, length: usize);

    /// Where a table lies that views have shown; `None` for a ring.
    fn table(&self) -> Option<&Lease> {
        None
    }

    /// Pages in use, shared and free; nothing for a ring.
    fn pages(&self) -> PageCounts {
        PageCounts::default()
    }

    /// Pages in use alone, which takes no counting.
    fn pages_used(&self) -> u64 {
        0
    }

    /// Finds the room for new tokens: in the memory at hand, in what a reset has left, or in new memory
    /// that the live tokens are copied to.
    fn stage_room(
        place: Place<'_, Self>,
        policy: &mut Self::Policy,
        shape: Shape,
        tokens: NewTokens<'_>,
    ) -> Result<Room<Self>>;

    /// Refuses a change to `batch` rows that has no room, from counts alone.
    fn check_batch(
        &self,
        gpu: &Gpu,
        layer: usize,
        policy: &Self::Policy,
        batch: usize,
    ) -> Result<()>;

    /// Stages a change of the batch: new row `i` becomes old row `map[i]`, which is not the identity.
    fn stage_batch(
        &self,
        gpu: &Gpu,
        layer: usize,
        store: &Store,
        policy: &mut Self::Policy,
        map: &[u32],
    ) -> Result<Staged<Self>>;

    /// Stages room for appends up to `new_len` tokens; `None` where it is there.
    fn stage_reserve(
        &self,
        gpu: &Gpu,
        layer: usize,
        store: &Store,
        policy: &mut Self::Policy,
        new_len: usize,
    ) -> Result<Option<Staged<Self>>>;
}

/// A layer as a change finds it.
#[derive(Debug)]
pub(crate) struct Place<'a, L> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) layer: usize,
    pub(crate) store: Option<&'a Store>,
    pub(crate) held: Option<&'a L>,
}

/// New tokens on their way into a layer: all but their content. Their positions are checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewTokens<'a> {
    pub(crate) position: CachePosition<'a>,
    /// Tokens in each row.
    pub(crate) count: usize,
    /// Live tokens before, and afterwards.
    pub(crate) len: usize,
    pub(crate) new_len: usize,
}

impl NewTokens<'_> {
    /// Which token goes where. As long as the positions that are named: to be asked once there is room for
    /// the tokens. Refuses a list that is more than a kernel can read, before it is made.
    pub(crate) fn order(&self, gpu: &Gpu) -> Result<Order> {
        position::check_list(self.position, binding_limit(gpu.limits()))?;
        Ok(position::order(self.position, self.len, self.new_len))
    }
}

/// Room for new tokens.
#[derive(Debug)]
pub(crate) struct Room<L> {
    /// Memory that takes the place of the layer's own.
    pub(crate) store: Option<Store>,
    /// What the layer will hold.
    pub(crate) held: L,
    pub(crate) order: Order,
    /// What must run before the tokens are written.
    pub(crate) dispatches: Vec<Dispatch>,
    /// Bytes that these write.
    pub(crate) moved: u64,
    /// Where the order's list, and the table of pages, were put; and where the list begins, in words.
    pub(crate) lists: Option<(Placed, u32)>,
    pub(crate) leases: Vec<Lease>,
}

/// Pages of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageCounts {
    /// Referenced by a row at least.
    pub(crate) used: u64,
    /// Referenced by several.
    pub(crate) shared: u64,
    /// In the pool, and referenced by none.
    pub(crate) free: u64,
}

/// One layer of a cache.
#[derive(Debug)]
pub(crate) struct Layer<L> {
    index: usize,
    /// Kept by a reset, for reuse.
    store: Option<Store>,
    /// `None` until the first update, and after a reset.
    held: Option<L>,
    /// Tokens before the live ones that crops have dropped since the last reset.
    cropped: usize,
}

/// A change that is ready to happen.
#[derive(Debug)]
#[must_use = "nothing happens until the change is committed"]
pub(crate) struct Staged<L> {
    pub(crate) dispatches: Vec<Dispatch>,
    /// Dispatches that were handed over.
    pub(crate) recorded: u64,
    /// Memory that takes the place of the layer's own.
    pub(crate) store: Option<Store>,
    pub(crate) held: L,
    /// Bytes that the dispatches write.
    pub(crate) moved: u64,
    /// What earlier work and views read, and must find in place until the pass has run.
    pub(crate) leases: Vec<Lease>,
}

/// What a committed change did, for the statistics.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Effect {
    pub(crate) dispatches: u64,
    pub(crate) moved: u64,
}

impl<L> Staged<L> {
    /// A change that moves nothing.
    pub(crate) fn unmoved(held: L) -> Self {
        let (dispatches, leases) = (Vec::new(), Vec::new());
        Self { dispatches, recorded: 0, store: None, held, moved: 0, leases }
    }

    /// Hands over what is to be recorded.
    pub(crate) fn hand_over(&mut self, call: &mut Call) {
        // A change without a dispatch is lost with its pass as well.
        call.hold(std::mem::take(&mut self.leases));
        self.recorded = self.dispatches.len() as u64;
        self.dispatches.drain(..).for_each(|dispatch| call.add(dispatch));
    }

    /// Bytes of new memory.
    pub(crate) fn allocated(&self) -> u64 {
        self.store.as_ref().map_or(0, |store| store.bytes().iter().sum())
    }
}

impl<L: Held> Layer<L> {
    pub(crate) fn new(index: usize) -> Self {
        Self { index, store: None, held: None, cropped: 0 }
    }

    /// Live tokens.
    pub(crate) fn len(&self) -> usize {
        self.held.as_ref().map_or(0, L::len)
    }

    /// Tokens before the live ones that crops have dropped.
    pub(crate) fn cropped(&self) -> usize {
        self.cropped
    }

    /// Batch rows, or `None` for a layer never written.
    pub(crate) fn batch(&self) -> Option<usize> {
        self.held.as_ref().map(|held| held.shape().batch)
    }

    /// Buffers and bytes that the layer has allocated.
    pub(crate) fn memory(&self) -> (u64, u64) {
        self.store.as_ref().map_or((0, 0), |store| (2, store.bytes().iter().sum()))
    }

    pub(crate) fn pages_used(&self) -> u64 {
        self.held.as_ref().map_or(0, L::pages_used)
    }

    pub(crate) fn pages(&self) -> PageCounts {
        self.held.as_ref().map_or(PageCounts::default(), L::pages)
    }

    pub(crate) fn view(&self) -> Option<LayerView> {
        Some(self.held.as_ref()?.view(self.store.as_ref()?))
    }

    pub(crate) fn reset(&mut self) {
        (self.held, self.cropped) = (None, 0);
        if let Some(store) = &mut self.store {
            // Bind groups keep the engine's buffers alive; nothing says that they will be used again.
            store.bind_groups.clear();
        }
    }

    /// Leaves to those who record passes of their own what a view has shown: no call comes that holds it.
    /// Whether there was such.
    pub(crate) fn abandon(&self) -> bool {
        let table = self.held.as_ref().and_then(L::table);
        table.inspect(|table| table.abandon()).is_some()
    }

    pub(crate) fn crop(&mut self, policy: &mut L::Policy, max_length: usize) {
        if let Some(held) = self.held.as_mut().filter(|held| held.len() > max_length) {
            // Each of them was appended in a call of its own or with others: no count of them overflows soon.
            self.cropped = self.cropped.saturating_add(held.len() - max_length);
            held.crop(policy, max_length);
        }
    }

    pub(crate) fn truncate(&mut self, policy: &mut L::Policy, length: usize) {
        if let Some(held) = self.held.as_mut().filter(|held| held.len() > length) {
            held.truncate(policy, length);
        }
    }

    /// Stages the writing of new tokens.
    pub(crate) fn stage_update(
        &mut self,
        gpu: &Gpu,
        policy: &mut L::Policy,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
        position: CachePosition<'_>,
    ) -> Result<Staged<L>> {
        let shape = self.check_shapes(key, value)?;
        let sources = [key.source("key", gpu.limits())?, value.source("value", gpu.limits())?];
        key.check_device("key", gpu.handle())?;
        value.check_device("value", gpu.handle())?;
        self.check_alias(key, value)?;
        let (count, len) = (key.shape[2], self.len());
        let new_len = position::check(position, shape.batch, count, len, L::bound(policy))?;
        let tokens = NewTokens { position, count, len, new_len };

        let place =
            Place { gpu, layer: self.index, store: self.store.as_ref(), held: self.held.as_ref() };
        let mut room = L::stage_room(place, policy, shape, tokens)?;
        let store = room.store.as_ref().or(self.store.as_ref());
        let store = store.expect("a layer with room has memory");
        let [k, v] = store.buffers().map(wgpu::Buffer::as_entire_buffer_binding);
        let bindings = [sources[0].binding(key.buffer), sources[1].binding(value.buffer), k, v];
        let bind = |bindings: &[_]| gpu.kernels().bind_append(bindings);
        let (bindings, _) = store.bind_groups.get(Purpose::Append, &bindings, bind)?;
        let append = AppendShape {
            key: &sources[0],
            value: &sources[1],
            tokens: count,
            positions: positions(&room.order, room.lists.as_ref().map_or(0, |(_, at)| *at))?,
            target: &room.held.view(store),
            lists: room.lists.as_ref().map(|(placed, _)| placed),
        };
        let append = gpu.kernels().append(bindings, &append)?;
        let written = room.order.written(shape.batch, count).saturating_mul(shape.heads as u64);
        let written = shape.row_bytes().map(|row| row.saturating_mul(written));
        room.dispatches.push(append);
        Ok(Staged {
            dispatches: room.dispatches,
            recorded: 0,
            store: room.store,
            held: room.held,
            moved: room.moved + written.iter().sum::<u64>(),
            leases: room.leases,
        })
    }

    /// Refuses a change to `batch` rows that has no room, from counts alone.
    pub(crate) fn check_batch(&self, gpu: &Gpu, policy: &L::Policy, batch: usize) -> Result<()> {
        self.held.as_ref().map_or(Ok(()), |held| held.check_batch(gpu, self.index, policy, batch))
    }

    /// Stages room for `tokens` more tokens a row; `None` where it is there or nothing was ever written.
    pub(crate) fn stage_reserve(
        &mut self,
        gpu: &Gpu,
        policy: &mut L::Policy,
        tokens: usize,
    ) -> Result<Option<Staged<L>>> {
        let (Some(held), Some(store)) = (&self.held, &self.store) else { return Ok(None) };
        let (batch, append) = (held.shape().batch, CachePosition::Append);
        let new_len = position::check(append, batch, tokens, held.len(), L::bound(policy))?;
        held.stage_reserve(gpu, self.index, store, policy, new_len)
    }

    /// Stages a change of the batch: new row `i` becomes old row `map[i]`. `None` where nothing changes
    /// or nothing was ever written.
    pub(crate) fn stage_batch(
        &mut self,
        gpu: &Gpu,
        policy: &mut L::Policy,
        map: &[u32],
    ) -> Result<Option<Staged<L>>> {
        let (Some(held), Some(store)) = (&self.held, &self.store) else { return Ok(None) };
        if crate::host::plan::is_identity(map, held.shape().batch) {
            return Ok(None);
        }
        held.stage_batch(gpu, self.index, store, policy, map).map(Some)
    }

    /// Makes a staged change happen whose work was recorded. Cannot fail.
    pub(crate) fn commit(&mut self, staged: Staged<L>) -> Effect {
        let effect = Effect { dispatches: staged.recorded, moved: staged.moved };
        if let Some(store) = staged.store {
            self.store = Some(store);
        }
        self.held = Some(staged.held);
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
        let shape = Shape { batch, heads, key_dim, value_dim: value.shape[3], dtype: key.dtype };
        match self.held.as_ref().map(L::shape) {
            Some(held) if held.dtype != shape.dtype => Err(Error::WrongDType {
                what: "the new K and V",
                expected: held.dtype,
                got: shape.dtype,
            }),
            Some(held) if held != shape => Err(Error::LayerShape {
                layer: self.index,
                batch: held.batch,
                heads: held.heads,
                key_dim: held.key_dim,
                value_dim: held.value_dim,
                key: key.shape,
                value: value.shape,
            }),
            _ => Ok(shape),
        }
    }

    /// Refuses to read new tokens from the layer's own memory.
    fn check_alias(&self, key: &TensorView<'_>, value: &TensorView<'_>) -> Result<()> {
        let Some(store) = &self.store else { return Ok(()) };
        for (what, view) in [("key", key), ("value", value)] {
            if store.buffers().contains(&view.buffer) {
                return Err(Error::SourceIsCache { what, layer: self.index });
            }
        }
        Ok(())
    }
}

/// An order as the kernel takes it; its list was put at word `at`.
fn positions(order: &Order, at: u32) -> Result<Positions> {
    Ok(match order {
        Order::Run { first, zeros } => Positions::Run { first: *first, zeros: *zeros },
        Order::List(list) => {
            let stride = if list.per_row { list.stride() } else { 0 };
            let stride = u32::try_from(stride)
                .map_err(|_| Error::too_many("number of positions of a row", stride as u64))?;
            Positions::List { first: list.len, named: list.named, gap: list.gap, at, stride }
        }
    })
}
