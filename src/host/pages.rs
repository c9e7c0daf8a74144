//! Which pages the tokens of each row lie in. Pure host logic: nothing here knows wgpu.

use std::collections::HashSet;
use std::ops::Range;

use crate::host::pool::PagePool;
use crate::host::position::WritePlan;
use crate::host::rows::{Cut, Rows};
use crate::host::words::Words;

/// Words of a row's table that a change of the batch leaves free, so that the next pages need no new table.
const SPARE: usize = 8;

/// The pages of all batch rows of a layer, with their reference counts: a value, of which every change
/// makes a new state. A copy costs nothing, and a write what it changes, however many pages there are.
///
/// Token t of row b is slot `start + t` of the row's pages, in order, with the start of that row. All rows have as
/// many pages: those that the row with the highest start needs for the length of the layer. Rows may name the same
/// page, and such a page is never written: a row that writes into it gets a copy first. That is how vLLM's
/// `PagedAttention` (Kwon et al., 2023) shares prompts and beams.
///
/// ```text
/// pages of 4 tokens, start 1, len 6, two rows that share their first page
///
/// row 0 -> 3, 0      page 3 | .  0  1  2 |    page 0 | 3  4  5  . |
/// row 1 -> 3, 5                               page 5 | 3  4  5  . |
/// ```
#[derive(Clone, Debug)]
pub(crate) struct PageMap {
    /// Tokens of a page: a power of two.
    page_tokens: usize,
    batch: usize,
    /// The pages of each row, oldest tokens first, one row every `stride` words: as they lie on the GPU.
    table: Words,
    stride: usize,
    /// The first word of each row that is in use, and how many are.
    first: usize,
    row_pages: usize,
    /// The references of rows to pages.
    pool: PagePool,
    /// Live tokens of each row; starts are slots of its pages, the least of them in the first page.
    rows: Rows,
    /// Whether no other row names the last page of any: then an append needs no copies. It may be false of
    /// such rows, too.
    has_own_tails: bool,
}

/// Pages that a write needs beside those in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) new: usize,
    /// Copies of pages that several rows name and one of them writes into.
    pub(crate) copies: usize,
}

impl Wanted {
    pub(crate) fn all(self) -> usize {
        self.new.saturating_add(self.copies)
    }
}

/// What a write has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    /// Pages to copy first, (from, to) each, one source after the other.
    pub(crate) copies: Vec<(u32, u32)>,
    /// Runs of words of the table that are new.
    pub(crate) words: Vec<Range<usize>>,
    /// Whether the table was laid out anew: then every word is.
    pub(crate) is_laid_out: bool,
}

impl PageMap {
    /// `batch` rows without a token.
    pub(crate) fn new(page_tokens: usize, batch: usize) -> Self {
        debug_assert!(page_tokens.is_power_of_two());
        Self {
            page_tokens,
            batch,
            table: Words::default(),
            stride: 0,
            first: 0,
            row_pages: 0,
            pool: PagePool::default(),
            rows: Rows::default(),
            has_own_tails: false,
        }
    }

    pub(crate) fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    pub(crate) fn batch(&self) -> usize {
        self.batch
    }

    pub(crate) fn rows(&self) -> &Rows {
        &self.rows
    }

    /// Pages of each row.
    pub(crate) fn row_pages(&self) -> usize {
        self.row_pages
    }

    /// The table, as the GPU reads it.
    pub(crate) fn table(&self) -> &Words {
        &self.table
    }

    /// Words of the table from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// The word of a row's first page.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// The pages of a row.
    #[cfg(feature = "safetensors")]
    pub(crate) fn row(&self, row: usize) -> Vec<u32> {
        (0..self.row_pages).map(|index| self.page(row, index)).collect()
    }

    /// Pages that the pool must have room for.
    pub(crate) fn pool_pages(&self) -> usize {
        self.pool.len()
    }

    /// Pages up to the last one that is in use.
    pub(crate) fn used_prefix(&self) -> usize {
        self.pool.used_prefix()
    }

    pub(crate) fn used(&self) -> usize {
        self.pool.used()
    }

    /// Pages that several rows name.
    pub(crate) fn shared(&self) -> usize {
        self.pool.shared()
    }

    /// Pages of each row of a layer of `len` tokens, the oldest of which lie where they do.
    pub(crate) fn pages_of(&self, len: usize) -> usize {
        let [_, start] = self.rows.starts();
        if len == 0 { 0 } else { start.saturating_add(len).div_ceil(self.page_tokens) }
    }

    /// Pages that the rows need beside those in use to be `new_len` tokens long, copies of shared ones aside.
    pub(crate) fn new_pages(&self, new_len: usize) -> usize {
        self.batch.saturating_mul(self.pages_of(new_len).saturating_sub(self.row_pages))
    }

    /// Tokens that each row can hold with appends where at most `most` pages exist.
    pub(crate) fn tokens_in(&self, most: usize) -> usize {
        let copies = self.copies_of_append(usize::MAX);
        match most.checked_sub(self.used() + copies) {
            Some(left) => {
                let pages = self.row_pages + left / self.batch;
                pages.saturating_mul(self.page_tokens).saturating_sub(self.rows.starts()[1])
            }
            None => self.rows.len(),
        }
    }

    /// Copies of last pages that appends up to `new_len` tokens take: all that name one but the last get their own.
    pub(crate) fn copies_of_append(&self, new_len: usize) -> usize {
        let len = self.rows.len();
        let is_plain = self.rows.start().is_some() && !self.rows.has_stale();
        if self.pool.shared() == 0 || (is_plain && self.has_own_tails) {
            return 0;
        }
        // A row that was cut gets zeros as well.
        let pages = (0..self.batch).flat_map(|row| {
            let first = self.rows.gap(row, len, len).start;
            let slots = (new_len - first).min(self.row_pages * self.page_tokens);
            self.old_pages(self.rows.span(row).start + first, slots)
                .map(move |index| self.page(row, index))
        });
        self.copies(pages)
    }

    /// What a write of `plan` needs, after which `new_len` tokens are live. Changes nothing.
    pub(crate) fn wanted(&self, plan: &WritePlan, tokens: usize, new_len: usize) -> Wanted {
        let new = self.new_pages(new_len);
        if self.is_unshared(plan, tokens) {
            return Wanted { new, copies: 0 };
        }
        let rows = 0..self.batch;
        let touched = rows.flat_map(|row| {
            let indices = self.touched(plan, row, tokens);
            indices.into_iter().map(move |index| self.page(row, index))
        });
        Wanted { new, copies: self.copies(touched) }
    }

    /// Copies that writes into these pages take, one entry for each row that writes into one.
    fn copies(&self, touched: impl Iterator<Item = u32>) -> usize {
        let count = |page: u32| self.pool.count(page);
        let mut shared: Vec<u32> = touched.filter(|&page| count(page) > 1).collect();
        shared.sort_unstable();
        let writers = shared.chunk_by(|a, b| a == b);
        writers.map(|writers| writers.len().min(count(writers[0]) - 1)).sum()
    }

    fn page(&self, row: usize, index: usize) -> u32 {
        self.table.get(self.word(row, index))
    }

    fn word(&self, row: usize, index: usize) -> usize {
        row * self.stride + self.first + index
    }

    /// Whether a write surely goes to no page that rows share, as an append to rows that have all been
    /// appended to.
    fn is_unshared(&self, plan: &WritePlan, tokens: usize) -> bool {
        self.pool.shared() == 0
            || match plan {
                WritePlan::Run { first, zeros } => self.rows.start().is_some_and(|start| {
                    let old = self.old_pages(start + *first as usize, *zeros as usize + tokens);
                    old.is_empty() || (old.start + 1 == self.row_pages && self.has_own_tails)
                }),
                WritePlan::List(_) => false,
            }
    }

    /// The pages that a row has, of those that a run of slots lies in.
    fn old_pages(&self, first: usize, slots: usize) -> Range<usize> {
        let from = first / self.page_tokens;
        let to = (first + slots).div_ceil(self.page_tokens);
        if slots == 0 { 0..0 } else { from..to.min(self.row_pages) }
    }

    /// Makes room for a write of `plan`, after which rows are as `rows` says: new pages behind each row, and for each page that several rows name and one of them writes into, a page of its own.
    /// Where the table has no room for the new pages, it is laid out anew with `stride` words a row.
    pub(crate) fn write(
        &mut self,
        plan: &WritePlan,
        tokens: usize,
        rows: Rows,
        stride: usize,
    ) -> Written {
        let new_len = rows.len();
        let (old_pages, new_pages) = (self.row_pages, self.pages_of(new_len));
        let is_unshared = self.is_unshared(plan, tokens);
        let mut written = Written::default();
        if self.first + new_pages > self.stride {
            self.lay_out(stride.max(new_pages));
            written.is_laid_out = true;
        }
        self.rows = rows;
        if is_unshared && new_pages == old_pages {
            return written;
        }
        for row in 0..self.batch {
            let touched = if is_unshared { Vec::new() } else { self.touched(plan, row, tokens) };
            for index in touched {
                let (word, page) = (self.word(row, index), self.page(row, index));
                if self.pool.count(page) > 1 {
                    self.pool.release(page);
                    let own = self.pool.take();
                    self.table.set(word, own);
                    written.words.push(word..word + 1);
                    written.copies.push((page, own));
                }
            }
            for index in old_pages..new_pages {
                let page = self.pool.take();
                self.table.set(self.word(row, index), page);
            }
            if old_pages < new_pages {
                written.words.push(self.word(row, old_pages)..self.word(row, new_pages));
            }
        }
        self.row_pages = new_pages;
        self.has_own_tails |= new_pages > old_pages || self.reaches_tails(plan, tokens);
        written.copies.sort_unstable();
        written
    }

    /// Whether a write goes into the last page of every row.
    fn reaches_tails(&self, plan: &WritePlan, tokens: usize) -> bool {
        match plan {
            WritePlan::Run { first, zeros } => self.rows.start().is_some_and(|start| {
                let old = self.old_pages(start + *first as usize, *zeros as usize + tokens);
                old.end == self.row_pages && !old.is_empty()
            }),
            WritePlan::List(_) => false,
        }
    }

    /// The pages of a row, of those that it has, that a write of `plan` goes to: in order, each once.
    fn touched(&self, plan: &WritePlan, row: usize, tokens: usize) -> Vec<usize> {
        let start = self.rows.span(row).start;
        match plan {
            WritePlan::Run { first, zeros } => {
                self.old_pages(start + *first as usize, *zeros as usize + tokens).collect()
            }
            WritePlan::List(list) => {
                let gap = list.gap(row);
                let positions = list.positions(row).map(|position| position as usize);
                let pages = positions.flat_map(|position| self.old_pages(start + position, 1));
                let pages = pages.chain(self.old_pages(start + gap.start, gap.len()));
                let mut touched: Vec<usize> = pages.collect();
                touched.sort_unstable();
                touched.dedup();
                touched
            }
        }
    }

    /// Cuts all rows; pages that no row needs go back.
    pub(crate) fn cut(&mut self, cut: &Cut) {
        self.rows = self.rows.cut(cut, usize::MAX);
        self.fit();
    }

    /// Gives the pages back that no row needs.
    fn fit(&mut self) {
        if self.rows.len() == 0 {
            self.rows = Rows::default();
            return self.keep(0, 0);
        }
        let from = self.rows.starts()[0] / self.page_tokens;
        // Rows that were cropped more than others have no pages yet to be as long as the layer. Those that hold
        // no token may even start behind all pages.
        let to = self.pages_of(self.rows.len()).min(self.row_pages);
        self.keep(from.min(to), to);
        if from > 0 {
            self.rows = self.rows.moved(|start| start - from * self.page_tokens);
        }
    }

    /// New row `i` names the pages of old row `map[i]`.
    pub(crate) fn select(&mut self, map: &[u32]) {
        let (old, pages) = (self.table.to_vec(), self.row_pages);
        let row_of = |row: usize| &old[row * self.stride + self.first..][..pages];
        let stride = if pages == 0 { 0 } else { pages + SPARE };
        let mut table = Vec::with_capacity(map.len() * stride);
        let mut named = vec![0_u32; self.batch];
        for &from in map {
            named[from as usize] += 1;
            table.extend(row_of(from as usize));
            table.resize(table.len() + stride - pages, 0);
        }
        // First all new references, so that no page is free in between.
        for (row, &named) in named.iter().enumerate().filter(|(_, named)| **named > 1) {
            for &page in row_of(row) {
                (1..named).for_each(|_| self.pool.share(page));
            }
        }
        let gone = named.iter().enumerate().rev().filter(|(_, named)| **named == 0);
        let gone = gone.flat_map(|(row, _)| row_of(row).iter().rev().copied());
        gone.collect::<Vec<u32>>().into_iter().for_each(|page| self.pool.release(page));
        (self.table, self.stride, self.first) = (table.as_slice().into(), stride, 0);
        self.batch = map.len();
        self.has_own_tails = false;
        self.rows = self.rows.select(map);
        self.fit();
    }

    /// Keeps the pages `from..to` of each row.
    fn keep(&mut self, from: usize, to: usize) {
        self.has_own_tails &= to == self.row_pages;
        if to - from == self.row_pages {
            return;
        }
        for row in (0..self.batch).rev() {
            for index in (0..from).chain(to..self.row_pages).rev() {
                self.pool.release(self.page(row, index));
            }
        }
        self.first += from;
        self.row_pages = to - from;
    }

    /// Lays the table out anew, with `stride` words a row.
    pub(crate) fn lay_out(&mut self, stride: usize) {
        let old = self.table.to_vec();
        let mut table = Vec::with_capacity(self.batch * stride);
        for row in 0..self.batch {
            if self.row_pages > 0 {
                table.extend(&old[self.word(row, 0)..][..self.row_pages]);
            }
            table.resize((row + 1) * stride, 0);
        }
        (self.table, self.stride, self.first) = (table.as_slice().into(), stride, 0);
    }

    /// Whether rows have the pages of their live tokens, and none too many.
    fn holds_rows(&self) -> bool {
        let pages = self.pages_of(self.rows.len());
        let spans = (0..self.batch).map(|row| self.rows.span(row)).filter(|span| span.len > 0);
        let last = spans.map(|span| span.start + span.len).max().unwrap_or(0);
        match self.rows {
            Rows::Equal(_) => self.row_pages == pages,
            Rows::Ragged(_) => self.row_pages <= pages && last <= self.row_pages * self.page_tokens,
        }
    }

    /// Whether every page is free or named, and named as often as its count says: a recount.
    pub(crate) fn is_sound(&self) -> bool {
        let words =
            (0..self.batch).flat_map(|row| (0..self.row_pages).map(move |index| (row, index)));
        let pages = words.map(|(row, index)| self.page(row, index));
        let tails = || (0..self.batch).map(|row| self.page(row, self.row_pages - 1));
        self.pool.is_sound(pages)
            && self.holds_rows()
            && self.first + self.row_pages <= self.stride
            && self.table.len() == self.batch * self.stride
            && self.rows.starts()[0] < self.page_tokens
            && (!self.has_own_tails
                || self.row_pages == 0
                || tails().collect::<HashSet<_>>().len() == self.batch)
    }
}

#[cfg(test)]
mod tests;
