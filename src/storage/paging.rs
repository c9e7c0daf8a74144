//! Tokens in pages that rows share.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::arena::RegionGuard;
use crate::gpu::device::binding_limit;
use crate::host::capacity::{pages_of_window, pool_pages};
use crate::host::pages::{PageMap, Wanted};
#[cfg(feature = "safetensors")]
use crate::host::rows::Span;
use crate::host::rows::{Cut, Rows};
use crate::host::window::Window;
#[cfg(feature = "safetensors")]
use crate::storage::arrangement::PagesToSave;
use crate::storage::arrangement::{
    Arrangement, LayerState, NewTokens, PageCounts, Staged, StagedWrite,
};
use crate::storage::pool::{copy_pages, copy_pool, new_pool};
use crate::storage::store::{Shape, Store};
use crate::storage::table::{Table, Tables, check_table};
use crate::view::LayerView;
#[cfg(feature = "safetensors")]
use crate::view::PageTable;

/// What a paged cache decides about its layers, and the tables of their pages.
#[derive(Debug)]
pub(crate) struct Paging {
    /// Tokens of a page: a power of two.
    page_tokens: usize,
    most_pages: Option<usize>,
    most_tokens: Option<usize>,
    tables: Tables,
}

impl Paging {
    pub(crate) fn new(
        page_tokens: usize,
        most_pages: Option<usize>,
        most_tokens: Option<usize>,
    ) -> Self {
        // The oldest live token may lie in the middle of a page.
        let of_tokens = most_tokens.map(|tokens| tokens.div_ceil(page_tokens).saturating_add(1));
        let most_row_pages = match (most_pages, of_tokens) {
            (Some(pages), Some(tokens)) => Some(pages.min(tokens)),
            (pages, tokens) => pages.or(tokens),
        };
        let tables = Tables::new(page_tokens, most_row_pages);
        Self { page_tokens, most_pages, most_tokens, tables }
    }

    /// Pages that can be bound as a pool of this shape.
    fn fits(&self, gpu: &Gpu, shape: Shape) -> usize {
        shape.tokens_in(1, [binding_limit(gpu.limits()); 2]) / self.page_tokens
    }

    /// Refuses a write after which `new_len` tokens are live that needs more pages than there may be. Returns
    /// how many the pool must have.
    fn check_pages(
        &self,
        (gpu, layer): (&Gpu, usize),
        shape: Shape,
        map: &PageMap,
        wanted: Wanted,
        new_len: usize,
    ) -> Result<usize> {
        let (most, fits) = (self.most_pages.unwrap_or(usize::MAX), self.fits(gpu, shape));
        let without_copies = map.used().saturating_add(wanted.new);
        let needed = map.used().saturating_add(wanted.all());
        if needed > most {
            return Err(Error::OutOfPages {
                used: map.used(),
                shared: map.shared(),
                wanted: wanted.all(),
                limit: most,
                page_tokens: self.page_tokens,
            });
        }
        if without_copies > fits {
            let bytes = shape.bytes(without_copies, self.page_tokens);
            let limit = binding_limit(gpu.limits());
            return Err(shape.too_large(limit, layer, bytes, new_len, map.tokens_in(fits)));
        }
        if needed > fits {
            return Err(Error::PoolTooLarge {
                layer,
                used: map.used(),
                new: wanted.new,
                copies: wanted.copies,
                fits,
                limit: binding_limit(gpu.limits()),
                page_tokens: self.page_tokens,
            });
        }
        Ok(needed.max(map.pool_pages()))
    }

    /// Pages for a pool that has `pool` of them and needs `needed`, for an update of `count` tokens.
    fn grown(
        &self,
        gpu: &Gpu,
        shape: Shape,
        window: Option<Window>,
        count: usize,
        [pool, needed]: [usize; 2],
    ) -> usize {
        let of_window = pages_of_window(window, self.page_tokens, shape.batch, count);
        let fits = self.fits(gpu, shape).min(of_window.max(needed));
        pool_pages(self.most_pages, self.page_tokens, [pool, needed, fits])
    }

    /// Pages that the memory which a reset has left has room for, as far as they are used again: a pool of
    /// fixed size is made anew where it is too small for that.
    fn left(&self, gpu: &Gpu, shape: Shape, store: &Store) -> usize {
        let left = shape.tokens_in(1, store.bytes()) / self.page_tokens;
        match self.most_pages.map(|most| most.min(self.fits(gpu, shape))) {
            Some(most) if left < most => 0,
            Some(most) => most,
            None => left,
        }
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

impl Arrangement for Paged {
    type Policy = Paging;

    fn bound(paging: &Paging) -> Option<usize> {
        paging.most_tokens
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn rows(&self) -> &Rows {
        self.table.map.rows()
    }

    fn view(&self, gpu: &Gpu, store: &Store) -> Result<LayerView> {
        let map = &self.table.map;
        let (pages, records) = self.table.shown(gpu)?;
        let pages = Some(pages.expect("a layer that was written has a table"));
        let memory = [self.pool, map.page_tokens()];
        Ok(self.shape.view(store, map.rows(), memory, (pages, records)))
    }

    fn cut(&mut self, paging: &mut Paging, cut: &Cut) {
        self.table = paging.tables.cut(&self.table, cut);
    }

    fn guards(&self) -> [Option<&RegionGuard>; 2] {
        self.table.guards()
    }

    fn pages(&self) -> PageCounts {
        let map = &self.table.map;
        PageCounts {
            used: map.used() as u64,
            shared: map.shared() as u64,
            free: self.pool.saturating_sub(map.used()) as u64,
        }
    }

    #[cfg(feature = "safetensors")]
    fn pages_to_save(&self, gpu: &Gpu, store: &Store) -> Result<Option<PagesToSave>> {
        let map = &self.table.map;
        let mut pages = Vec::new();
        let mut numbers = std::collections::HashMap::new();
        let rows = (0..map.batch()).map(|row| {
            let number = |page: u32| {
                *numbers.entry(page).or_insert_with(|| {
                    pages.push(page);
                    u32::try_from(pages.len() - 1).expect("fewer pages than 32 bits count")
                })
            };
            map.row(row).into_iter().map(number).collect()
        });
        let rows = rows.collect();
        let allocation = gpu.uploads().upload(&pages)?;
        let view = PageTable { at: allocation.offset / 4, stride: 1, allocation };
        let shape = Shape { batch: pages.len(), ..self.shape };
        let one = Rows::Equal(Span { start: 0, len: map.page_tokens() });
        let memory = [self.pool, map.page_tokens()];
        let view = shape.view(store, &one, memory, (Some(view), None));
        Ok(Some(PagesToSave { view, rows }))
    }

    fn pages_used(&self) -> u64 {
        self.table.map.used() as u64
    }

    fn check_batch(
        &self,
        gpu: &Gpu,
        _layer: usize,
        _store: &Store,
        _paging: &Paging,
        batch: usize,
    ) -> Result<()> {
        check_table(gpu, batch, self.table.map.row_pages(), 0).map(|_| ())
    }

    fn stage_write(
        state: LayerState<'_, Self>,
        paging: &mut Paging,
        shape: Shape,
        tokens: NewTokens<'_>,
    ) -> Result<StagedWrite<Self>> {
        let LayerState { gpu, layer, store, arrangement, window } = state;
        let NewTokens { count, new_len, .. } = tokens;
        let from = arrangement.map_or_else(
            || paging.tables.empty(shape.batch),
            |arrangement| Arc::clone(&arrangement.table),
        );
        // Of a length that a single row could not have, the new pages alone are counted: it is refused before
        // the positions are looked at.
        let alone = Wanted { new: from.map.new_pages(new_len), copies: 0 };
        if paging.most_pages.is_none_or(|most| new_len.div_ceil(paging.page_tokens) > most) {
            paging.check_pages((gpu, layer), shape, &from.map, alone, new_len)?;
        }
        let plan = tokens.plan(gpu)?;
        let wanted = from.map.wanted(&plan, count, new_len);
        let needed = paging.check_pages((gpu, layer), shape, &from.map, wanted, new_len)?;
        let pool = pool_of(gpu, paging, store, arrangement, shape);
        let rows = tokens.rows_after(from.map.rows());
        let step = paging.tables.write(gpu, &from, &plan, count, rows)?;
        let mut change = Staged::unmoved(Self { shape, pool, table: step.to });
        if needed > pool {
            let pages = paging.grown(gpu, shape, window, count, [pool, needed]);
            change = change.arrangement.grow(gpu, layer, store, &from.map, pages)?;
        }
        let target = change.store.as_ref().or(store).expect("a pool that holds what is needed");
        let memory = [change.arrangement.pool, paging.page_tokens];
        let (copies, moved) = copy_pages(gpu, shape, memory, target, &step.copies)?;
        change.dispatches.extend(copies);
        change.moved += moved;
        let table = change
            .arrangement
            .table
            .page_table()
            .expect("a table that was written has a page table");
        let lists = Some((table.allocation.clone(), step.list_at));
        Ok(StagedWrite { change, plan, lists })
    }

    fn stage_batch(
        &self,
        gpu: &Gpu,
        _layer: usize,
        _store: &Store,
        paging: &mut Paging,
        map: &[u32],
    ) -> Result<Staged<Self>> {
        let table = paging.tables.select(gpu, &self.table, map)?;
        let shape = Shape { batch: map.len(), ..self.shape };
        let arrangement = Self { shape, pool: self.pool, table };
        // Views of the new table may be read by what is recorded after this.
        let guards = arrangement.guards().into_iter().flatten().map(Arc::clone).collect();
        Ok(Staged { guards, ..Staged::unmoved(arrangement) })
    }

    fn stage_reserve(
        &self,
        gpu: &Gpu,
        layer: usize,
        store: &Store,
        paging: &mut Paging,
        (new_len, window): (usize, Option<Window>),
    ) -> Result<Option<Staged<Self>>> {
        let (shape, map) = (self.shape, &self.table.map);
        let wanted = Wanted { new: map.new_pages(new_len), copies: map.copies_of_append(new_len) };
        let needed = paging.check_pages((gpu, layer), shape, map, wanted, new_len)?;
        let table = paging.tables.reserve(gpu, &self.table, new_len)?;
        if needed <= self.pool && Arc::ptr_eq(&table, &self.table) {
            return Ok(None);
        }
        let mut staged = Staged::unmoved(self.clone());
        if needed > self.pool {
            let count = new_len.saturating_sub(map.rows().len());
            let pages = paging.grown(gpu, shape, window, count, [self.pool, needed]);
            staged = self.grow(gpu, layer, Some(store), map, pages)?;
        }
        staged.guards = table.guards().into_iter().flatten().map(Arc::clone).collect();
        staged.arrangement.table = table;
        Ok(Some(staged))
    }
}

impl Paged {
    /// Stages a pool of `pages` pages in place of the layer's, and a copy of what is in use.
    fn grow(
        &self,
        gpu: &Gpu,
        layer: usize,
        old: Option<&Store>,
        used: &PageMap,
        pages: usize,
    ) -> Result<Staged<Self>> {
        let (shape, size) = (self.shape, used.page_tokens());
        let new = new_pool(gpu, layer, shape, size, pages)?;
        let mut staged = Staged::unmoved(Self { pool: pages, ..self.clone() });
        if let Some(old) = old {
            let counts = [self.pool, pages, used.used_prefix()];
            (staged.dispatches, staged.moved) = copy_pool(gpu, shape, size, [old, &new], counts)?;
        }
        staged.store = Some(new);
        Ok(staged)
    }
}

/// Pages that a layer's memory has room for.
fn pool_of(
    gpu: &Gpu,
    paging: &Paging,
    store: Option<&Store>,
    arrangement: Option<&Paged>,
    shape: Shape,
) -> usize {
    match (store, arrangement) {
        (_, Some(arrangement)) => arrangement.pool,
        (Some(store), None) => paging.left(gpu, shape, store),
        (None, None) => 0,
    }
}
