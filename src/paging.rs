//! Tokens in pages that rows share: one table for all layers that advance together.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use crate::arena::{Lease, Placed};
use crate::device::binding_limit;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::kernels::{CopyShape, GatherShape, MOST_MOVES};
use crate::layer::{Held, NewTokens, PageCounts, Place, Room, Staged};
use crate::pages::{OutOfPages, PageMap};
use crate::plan::{self, MoveList};
use crate::position::Order;
use crate::ring::LEAST_TOKENS;
use crate::store::{Shape, Store};
use crate::view::{LayerView, PageTable};

/// Changes that are remembered: enough for an engine that runs a few steps of a layer before the next.
const REMEMBERED: usize = 4;

/// What a paged cache decides about its layers, and the latest changes of its tables.
///
/// A table is a value that never changes, and a change of it is worked out once: the next layer with the
/// same table and the same change finds it here. So layers that advance together share one table, on the
/// host and on the GPU, and a layer that goes its own way simply has another.
#[derive(Debug)]
pub(crate) struct Paging {
    /// Tokens of a page: a power of two.
    page_tokens: usize,
    most_pages: Option<usize>,
    most_tokens: Option<usize>,
    /// The table of a layer that was never written.
    empty: Option<Arc<Table>>,
    /// The latest last.
    steps: VecDeque<Step>,
}

/// The pages of a layer's rows, on the host and on the GPU.
#[derive(Clone, Debug)]
struct Table {
    map: PageMap,
    /// `None` where no row ever had a page.
    placed: Option<PlacedTable>,
}

#[derive(Clone, Debug)]
struct PlacedTable {
    placed: Placed,
    /// Word of row 0's first page, and from one row to the next.
    at: u32,
    stride: u32,
}

/// A change of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    Write { order: Order, count: usize, new_len: usize },
    Select(Vec<u32>),
    Crop(usize),
    Truncate(usize),
}

/// A change that was made of a table.
#[derive(Clone, Debug)]
struct Step {
    from: Arc<Table>,
    change: Change,
    to: Arc<Table>,
    taken: Taken,
}

/// What a change of a table takes on the GPU.
#[derive(Clone, Debug, Default)]
struct Taken {
    /// Pages to copy first.
    copies: Arc<[MoveList]>,
    /// Word of the list of positions, behind the table.
    list_at: u32,
}

impl Paging {
    pub(crate) fn new(
        page_tokens: usize,
        most_pages: Option<usize>,
        most_tokens: Option<usize>,
    ) -> Self {
        Self { page_tokens, most_pages, most_tokens, empty: None, steps: VecDeque::new() }
    }

    fn empty(&mut self, batch: usize) -> Arc<Table> {
        if let Some(empty) = self.empty.as_ref().filter(|empty| empty.map.batch() == batch) {
            return Arc::clone(empty);
        }
        let map = PageMap::new(self.page_tokens, batch);
        Arc::clone(self.empty.insert(Arc::new(Table { map, placed: None })))
    }

    /// Makes `change` of the table `from`, or finds that it was made.
    fn step<E>(
        &mut self,
        from: &Arc<Table>,
        change: Change,
        make: impl FnOnce(&Self, &mut Table) -> Result<Taken, E>,
    ) -> Result<Step, E> {
        let is_it = |step: &&Step| Arc::ptr_eq(&step.from, from) && step.change == change;
        if let Some(step) = self.steps.iter().rev().find(is_it) {
            return Ok(step.clone());
        }
        let mut to = Table::clone(from);
        let taken = make(self, &mut to)?;
        debug_assert!(to.map.is_sound(), "a recount of the pages agrees: {:?}", to.map);
        if self.steps.len() == REMEMBERED {
            self.steps.pop_front();
        }
        let step = Step { from: Arc::clone(from), change, to: Arc::new(to), taken };
        self.steps.push_back(step.clone());
        Ok(step)
    }

    /// Makes room for new tokens.
    fn write(
        &mut self,
        gpu: &Gpu,
        from: &Arc<Table>,
        order: &Order,
        tokens: NewTokens<'_>,
    ) -> Result<Step> {
        let (count, new_len) = (tokens.count, tokens.new_len);
        let change = Change::Write { order: order.clone(), count, new_len };
        self.step(from, change, |paging, table| {
            let most = paging.most_pages.unwrap_or(usize::MAX);
            let copies = table
                .map
                .write(order, count, new_len, most)
                .map_err(|out| paging.out_of_pages(&from.map, out))?;
            let is_same = copies.is_empty() && table.map.row_pages() == from.map.row_pages();
            let mut list_at = 0;
            if !is_same || order.list().is_some() || table.placed.is_none() {
                list_at = table.place(gpu, order.list().unwrap_or(&[]))?;
            }
            Ok(Taken { copies: plan::list_copies(&copies, MOST_MOVES).into(), list_at })
        })
    }

    /// New row `i` becomes old row `rows[i]`.
    fn select(&mut self, gpu: &Gpu, from: &Arc<Table>, rows: &[u32]) -> Result<Step> {
        self.step(from, Change::Select(rows.to_vec()), |_, table| {
            table.map.select(rows);
            if table.map.row_pages() > 0 {
                table.place(gpu, &[])?;
            }
            Ok(Taken::default())
        })
    }

    /// Keeps the latest `len` tokens. The GPU's table stays as it is, and is entered further on.
    fn crop(&mut self, from: &Arc<Table>, len: usize) -> Arc<Table> {
        let Ok(step) = self.step::<Infallible>(from, Change::Crop(len), |_, table| {
            let dropped = table.map.crop(len);
            if let Some(placed) = table.placed.as_mut().filter(|_| table.map.row_pages() > 0) {
                placed.at += narrow(dropped);
            }
            Ok(Taken::default())
        });
        step.to
    }

    /// Keeps the first `len` tokens. The GPU's table stays as it is.
    fn truncate(&mut self, from: &Arc<Table>, len: usize) -> Arc<Table> {
        let Ok(step) = self.step::<Infallible>(from, Change::Truncate(len), |_, table| {
            table.map.truncate(len);
            Ok(Taken::default())
        });
        step.to
    }

    fn out_of_pages(&self, map: &PageMap, out: OutOfPages) -> Error {
        Error::OutOfPages {
            used: map.used(),
            shared: map.shared(),
            wanted: out.wanted,
            limit: self.most_pages.unwrap_or(usize::MAX),
            page_tokens: self.page_tokens,
        }
    }

    /// Pages for a pool that has `pool` of them and needs `needed`, where `fits` can be bound.
    fn grown(&self, pool: usize, needed: usize, fits: usize) -> usize {
        match self.most_pages {
            // Made at once, so that the buffers never change.
            Some(most) => most.min(fits),
            None => {
                let least = LEAST_TOKENS.div_ceil(self.page_tokens);
                plan::grown_capacity(pool, needed, fits, least).unwrap_or(needed)
            }
        }
    }
}

impl Table {
    /// Puts the table, and a list behind it, where kernels read them. Returns the word of the list.
    fn place(&mut self, gpu: &Gpu, list: &[u32]) -> Result<u32> {
        let mut words = self.map.table();
        let table_words =
            u32::try_from(words.len()).map_err(|_| Error::SizeOverflow { what: "table" })?;
        words.extend(list);
        let placed = gpu.place(&words)?;
        let at = placed.offset / 4;
        self.placed = Some(PlacedTable { placed, at, stride: narrow(self.map.row_pages()) });
        Ok(at + table_words)
    }
}

/// What a layer holds, and where.
#[derive(Clone, Debug)]
pub(crate) struct Paged {
    shape: Shape,
    /// Pages that the buffers have room for.
    pool: usize,
    table: Arc<Table>,
}

impl Paged {
    fn lease(&self) -> Option<Lease> {
        self.table.placed.as_ref().map(|table| Arc::clone(&table.placed.lease))
    }
}

impl Held for Paged {
    type Policy = Paging;

    fn bound(paging: &Paging) -> Option<usize> {
        paging.most_tokens
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn len(&self) -> usize {
        self.table.map.len()
    }

    fn view<'a>(&'a self, store: &'a Store) -> LayerView<'a> {
        let map = &self.table.map;
        let table = self.table.placed.as_ref().expect("a layer that was written has a table");
        let pages = PageTable { placed: &table.placed, at: table.at, stride: table.stride };
        self.shape.view(store, [map.start(), map.len(), map.page_tokens()], Some(pages))
    }

    fn crop(&mut self, paging: &mut Paging, max_length: usize) {
        self.table = paging.crop(&self.table, max_length);
    }

    fn truncate(&mut self, paging: &mut Paging, length: usize) {
        self.table = paging.truncate(&self.table, length);
    }

    fn table(&self) -> Option<&Lease> {
        self.table.placed.as_ref().map(|table| &table.placed.lease)
    }

    fn pages(&self) -> PageCounts {
        let map = &self.table.map;
        PageCounts {
            used: map.used() as u64,
            shared: map.shared() as u64,
            free: (self.pool - map.used()) as u64,
        }
    }

    fn pages_used(&self) -> u64 {
        self.table.map.used() as u64
    }

    fn stage_room(
        place: Place<'_, Self>,
        paging: &mut Paging,
        shape: Shape,
        tokens: NewTokens<'_>,
    ) -> Result<Room<Self>> {
        let Place { gpu, layer, store, held } = place;
        let size = paging.page_tokens;
        let from = held.map_or_else(|| paging.empty(shape.batch), |held| Arc::clone(&held.table));
        let fits = shape.tokens_in(1, [binding_limit(gpu.limits()); 2]) / size;
        check_length(gpu, layer, paging, &from.map, shape, tokens.new_len, fits)?;

        let order = tokens.order();
        let step = paging.write(gpu, &from, &order, tokens)?;
        let needed = step.to.map.pool_pages();
        if needed > fits {
            return Err(pool_too_large(
                gpu,
                layer,
                shape,
                &from.map,
                [tokens.new_len, needed, fits],
            ));
        }

        let mut room = Room {
            store: None,
            held: Self { shape, pool: pool_of(store, held, shape, size), table: step.to },
            order,
            dispatches: Vec::new(),
            moved: 0,
            lists: None,
            leases: Vec::new(),
        };
        if needed > room.held.pool {
            room.grow(gpu, layer, store, &from.map, paging.grown(room.held.pool, needed, fits))?;
        }
        let target = room.store.as_ref().or(store).expect("a pool that holds what is needed");
        for moves in step.taken.copies.iter() {
            let copy = GatherShape {
                row_bytes: shape.row_bytes(),
                heads: shape.heads,
                start: 0,
                len: size,
                capacity: size,
                moves,
            };
            room.dispatches.push(gpu.kernels().gather(gpu, target.gather_bindings(gpu)?, &copy)?);
            room.moved += shape.bytes(moves.written, size)?.iter().sum::<u64>();
        }
        let table = room.held.table.placed.as_ref().expect("a table that was written is placed");
        // What was recorded before may read the old table.
        let old = from.placed.as_ref().map(|old| &old.placed.lease);
        room.leases = old
            .filter(|old| !Arc::ptr_eq(old, &table.placed.lease))
            .map(Arc::clone)
            .into_iter()
            .collect();
        room.lists = Some((table.placed.clone(), step.taken.list_at));
        Ok(room)
    }

    fn stage_batch(
        &self,
        gpu: &Gpu,
        _layer: usize,
        _store: &Store,
        paging: &mut Paging,
        map: &[u32],
    ) -> Result<Staged<Self>> {
        let bytes = (map.len() as u64).saturating_mul(4 * self.table.map.row_pages() as u64);
        let limit = binding_limit(gpu.limits());
        if bytes > limit {
            return Err(Error::ListTooLarge { bytes, limit });
        }
        let step = paging.select(gpu, &self.table, map)?;
        let shape = Shape { batch: map.len(), ..self.shape };
        let held = Self { shape, pool: self.pool, table: step.to };
        // Views of the old table may be read by what is recorded before this, of the new one after it.
        let leases = [self.lease(), held.lease()].into_iter().flatten().collect();
        Ok(Staged { leases, ..Staged::unmoved(held) })
    }
}

impl Room<Paged> {
    /// Puts a pool of `pages` pages in place of the layer's, and copies what is in use.
    fn grow(
        &mut self,
        gpu: &Gpu,
        layer: usize,
        old: Option<&Store>,
        used: &PageMap,
        pages: usize,
    ) -> Result<()> {
        let (shape, size) = (self.held.shape, used.page_tokens());
        let new = Store::new(gpu, layer, shape.bytes(pages, size)?)?;
        let prefix = used.used_prefix();
        if let Some(old) = old.filter(|_| prefix > 0) {
            // Pages keep their numbers: the pool's first pages are one row of one long head.
            let page_slots = shape.heads * size;
            let copies = &plan::list_copies(&[(0, 0)], MOST_MOVES)[0];
            let copy = CopyShape {
                row_bytes: shape.row_bytes(),
                heads: 1,
                start: 0,
                len: prefix * page_slots,
                old_capacity: self.held.pool * page_slots,
                new_capacity: pages * page_slots,
                copies,
            };
            let buffers = [old.buffers(), new.buffers()];
            self.dispatches.push(gpu.kernels().copy_rows(gpu, buffers, &copy)?);
            self.moved += shape.bytes(prefix, size)?.iter().sum::<u64>();
        }
        self.held.pool = pages;
        self.store = Some(new);
        Ok(())
    }
}

/// Pages that a layer's memory has room for.
fn pool_of(store: Option<&Store>, held: Option<&Paged>, shape: Shape, size: usize) -> usize {
    match (store, held) {
        (_, Some(held)) => held.pool,
        (Some(store), None) => shape.tokens_in(1, store.bytes()) / size,
        (None, None) => 0,
    }
}

/// Refuses a length that has no chance, before the order of the write is made, which is as long as the gap
/// that it fills: one for which a single row needs more pages than there may be, or all of them more than can
/// be bound.
fn check_length(
    gpu: &Gpu,
    layer: usize,
    paging: &Paging,
    map: &PageMap,
    shape: Shape,
    new_len: usize,
    fits: usize,
) -> Result<()> {
    let wanted = map.new_pages(new_len);
    if paging.most_pages.is_some_and(|most| new_len.div_ceil(paging.page_tokens) > most) {
        return Err(paging.out_of_pages(map, OutOfPages { wanted }));
    }
    let needed = map.used().saturating_add(wanted);
    if needed > fits {
        return Err(pool_too_large(gpu, layer, shape, map, [new_len, needed, fits]));
    }
    Ok(())
}

/// A pool that needs more pages than can be bound at once.
fn pool_too_large(
    gpu: &Gpu,
    layer: usize,
    shape: Shape,
    map: &PageMap,
    [tokens, needed, fits]: [usize; 3],
) -> Error {
    let needed = shape.bytes(needed, map.page_tokens());
    shape.too_large(gpu, layer, needed, tokens, map.tokens_in(fits))
}

/// Page numbers and words of a table are checked to fit 32 bits where the table is placed.
fn narrow(count: usize) -> u32 {
    u32::try_from(count).expect("a table is placed in 32-bit words")
}
