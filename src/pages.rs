//! Which pages the tokens of each row lie in. Pure host logic: nothing here knows wgpu.

use crate::position::{Order, SKIP};

/// The pages of all batch rows of a layer, with their reference counts: a value, of which every change
/// makes a new state.
///
/// Token t of row b is slot `start + t` of the row's pages, in order. Rows may name the same page, and
/// such a page is never written: a row that writes into it gets a copy first. That is how vLLM's
/// `PagedAttention` (Kwon et al., 2023) shares prompts and beams.
///
/// ```text
/// pages of 4 tokens, start 1, len 6, two rows that share their first page
///
/// row 0 -> 3, 0      page 3 | .  0  1  2 |    page 0 | 3  4  5  . |
/// row 1 -> 3, 5                               page 5 | 3  4  5  . |
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageMap {
    /// Tokens of a page: a power of two.
    page_tokens: usize,
    /// The pages of each row, oldest tokens first; as many in every row.
    rows: Vec<Vec<u32>>,
    /// How many rows name each page that was ever in use.
    counts: Vec<u32>,
    /// Pages of those that no row names. The last is used first.
    free: Vec<u32>,
    /// Slot of the oldest live token in a row's first page.
    start: usize,
    /// Live tokens.
    len: usize,
}

/// A write that needs more pages than there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfPages {
    /// Pages that the write needs beside those in use: new ones, and copies of shared ones.
    pub(crate) wanted: usize,
}

impl PageMap {
    /// `batch` rows without a token.
    pub(crate) fn new(page_tokens: usize, batch: usize) -> Self {
        debug_assert!(page_tokens.is_power_of_two());
        Self {
            page_tokens,
            rows: vec![Vec::new(); batch],
            counts: Vec::new(),
            free: Vec::new(),
            start: 0,
            len: 0,
        }
    }

    pub(crate) fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    pub(crate) fn batch(&self) -> usize {
        self.rows.len()
    }

    pub(crate) fn start(&self) -> usize {
        self.start
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Pages of each row.
    pub(crate) fn row_pages(&self) -> usize {
        self.rows.first().map_or(0, Vec::len)
    }

    /// The table: the pages of each row, one row after the other.
    pub(crate) fn table(&self) -> Vec<u32> {
        self.rows.concat()
    }

    /// Pages that the pool must have room for.
    pub(crate) fn pool_pages(&self) -> usize {
        self.counts.len()
    }

    /// Pages up to the last one that is in use.
    pub(crate) fn used_prefix(&self) -> usize {
        self.counts.iter().rposition(|&count| count > 0).map_or(0, |last| last + 1)
    }

    pub(crate) fn used(&self) -> usize {
        self.counts.len() - self.free.len()
    }

    /// Pages that several rows name.
    pub(crate) fn shared(&self) -> usize {
        self.counts.iter().filter(|&&count| count > 1).count()
    }

    /// Pages of a row of `len` tokens, the oldest of which lies where it does.
    fn pages_of(&self, len: usize) -> usize {
        if len == 0 { 0 } else { (self.start + len).div_ceil(self.page_tokens) }
    }

    /// Pages that the rows need beside those in use to be `new_len` tokens long, copies of shared ones aside.
    pub(crate) fn new_pages(&self, new_len: usize) -> usize {
        self.batch().saturating_mul(self.pages_of(new_len).saturating_sub(self.row_pages()))
    }

    /// Tokens that each row can hold with appends where at most `most` pages exist.
    pub(crate) fn tokens_in(&self, most: usize) -> usize {
        let is_part = !(self.start + self.len).is_multiple_of(self.page_tokens);
        let copies = if is_part { self.tail_copies() } else { 0 };
        match most.checked_sub(self.used() + copies) {
            Some(left) => {
                let pages = self.row_pages() + left / self.batch();
                pages.saturating_mul(self.page_tokens).saturating_sub(self.start)
            }
            None => self.len,
        }
    }

    /// Copies of last pages that the next append takes: all that name one but the last get their own.
    fn tail_copies(&self) -> usize {
        let mut tails: Vec<u32> = self.rows.iter().filter_map(|row| row.last().copied()).collect();
        tails.sort_unstable();
        let named = tails.len();
        tails.dedup();
        named - tails.len()
    }

    /// Whether every page is free or named, and named as often as its count says: a recount.
    pub(crate) fn is_sound(&self) -> bool {
        let mut counts = vec![0; self.counts.len()];
        self.rows.iter().flatten().for_each(|&page| counts[page as usize] += 1);
        let mut free = self.free.clone();
        free.sort_unstable();
        let unnamed = (0..).zip(&counts).filter(|(_, count)| **count == 0).map(|(page, _)| page);
        let pages = self.pages_of(self.len);
        counts == self.counts
            && unnamed.eq(free.iter().copied())
            && self.rows.iter().all(|row| row.len() == pages)
            && self.start < self.page_tokens
    }

    /// Makes room for a write of `order`, after which `new_len` tokens are live: new pages behind each
    /// row, and for each page that several rows name and one of them writes into, a page of its own.
    /// Returns the copies to make first, (from, to) each.
    ///
    /// At most `most` pages exist. An error leaves the map in no useful state: work on a copy.
    pub(crate) fn write(
        &mut self,
        order: &Order,
        tokens: usize,
        new_len: usize,
        most: usize,
    ) -> Result<Vec<(u32, u32)>, OutOfPages> {
        let before = self.used();
        let old_pages = self.row_pages();
        let new_pages = self.pages_of(new_len);
        let mut copies = Vec::new();
        for row in 0..self.rows.len() {
            for index in self.touched(order, row, tokens, old_pages) {
                let page = self.rows[row][index];
                if self.counts[page as usize] > 1 {
                    self.counts[page as usize] -= 1;
                    let own = self.take();
                    self.rows[row][index] = own;
                    copies.push((page, own));
                }
            }
            for _ in old_pages..new_pages {
                let page = self.take();
                self.rows[row].push(page);
            }
        }
        self.len = new_len;
        if self.used() > most {
            return Err(OutOfPages { wanted: self.used() - before });
        }
        // One source after the other, so that each is read once.
        copies.sort_unstable();
        Ok(copies)
    }

    /// The pages of a row, of the first `pages`, that a write of `order` goes to: in order, each once.
    fn touched(&self, order: &Order, row: usize, tokens: usize, pages: usize) -> Vec<usize> {
        let page_of = |position: usize| (self.start + position) / self.page_tokens;
        match order {
            Order::Run { first, zeros } => {
                let first = *first as usize;
                let last = first + *zeros as usize + tokens - 1;
                (page_of(first)..=page_of(last)).take_while(|&index| index < pages).collect()
            }
            Order::List { entries, count, per_row } => {
                let count = *count as usize;
                let from = if *per_row { row * count } else { 0 };
                let mut touched: Vec<usize> = entries[from..from + count]
                    .iter()
                    .filter(|[position, _]| *position != SKIP)
                    .map(|[position, _]| page_of(*position as usize))
                    .filter(|&index| index < pages)
                    .collect();
                touched.sort_unstable();
                touched.dedup();
                touched
            }
        }
    }

    /// Keeps the first `len` tokens; whole pages behind them go back.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.keep(0, self.pages_of(self.len));
    }

    /// Keeps the latest `len` tokens; whole pages before them go back. Returns how many of each row.
    pub(crate) fn crop(&mut self, len: usize) -> usize {
        let start = self.start + self.len - self.len.min(len);
        self.len = self.len.min(len);
        let dropped = start / self.page_tokens;
        self.start = start % self.page_tokens;
        if self.len == 0 {
            self.keep(0, 0);
        } else {
            self.keep(dropped, self.row_pages());
        }
        dropped
    }

    /// New row `i` names the pages of old row `map[i]`.
    pub(crate) fn select(&mut self, map: &[u32]) {
        let rows = map.iter().map(|&from| self.rows[from as usize].clone()).collect();
        // First all new references, so that no page is free in between.
        let old = std::mem::replace(&mut self.rows, rows);
        for &page in self.rows.iter().flatten() {
            self.counts[page as usize] += 1;
        }
        old.into_iter().flatten().rev().for_each(|page| self.release(page));
    }

    /// Keeps the pages `from..to` of each row.
    fn keep(&mut self, from: usize, to: usize) {
        if to == 0 {
            self.start = 0;
        }
        for row in (0..self.rows.len()).rev() {
            let behind = self.rows[row].split_off(to);
            let mut kept = std::mem::take(&mut self.rows[row]);
            let before: Vec<u32> = kept.drain(..from).collect();
            self.rows[row] = kept;
            for page in before.into_iter().chain(behind).rev() {
                self.release(page);
            }
        }
    }

    /// A page that no row names, from now on named once.
    fn take(&mut self) -> u32 {
        let page = self.free.pop().unwrap_or_else(|| {
            self.counts.push(0);
            u32::try_from(self.counts.len() - 1).expect("fewer pages than a buffer has bytes")
        });
        self.counts[page as usize] = 1;
        page
    }

    fn release(&mut self, page: u32) {
        let count = &mut self.counts[page as usize];
        *count -= 1;
        if *count == 0 {
            self.free.push(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The map beside what each row holds, token by token: a number for each write.
    #[derive(Clone)]
    struct Twin {
        map: PageMap,
        /// Content of the pool: what each slot holds.
        pool: Vec<u32>,
        rows: Vec<Vec<u32>>,
        next: u32,
    }

    impl Twin {
        fn new(page_tokens: usize, batch: usize) -> Self {
            let map = PageMap::new(page_tokens, batch);
            Self { map, pool: Vec::new(), rows: vec![Vec::new(); batch], next: 1 }
        }

        fn slot(&self, row: usize, token: usize) -> usize {
            let slot = self.map.start + token;
            let page = self.map.rows[row][slot / self.map.page_tokens] as usize;
            page * self.map.page_tokens + slot % self.map.page_tokens
        }

        fn write(&mut self, first: usize, tokens: usize) {
            let len = self.map.len;
            let new_len = len.max(first + tokens);
            let zeros = first.saturating_sub(len);
            let narrow = |n: usize| u32::try_from(n).unwrap();
            let order = Order::Run { first: narrow(first - zeros), zeros: narrow(zeros) };
            let copies = self.map.write(&order, tokens, new_len, usize::MAX).unwrap();
            let size = self.map.page_tokens;
            self.pool.resize(self.map.pool_pages() * size, 0);
            for (from, to) in copies {
                let (from, to) = (from as usize * size, to as usize * size);
                self.pool.copy_within(from..from + size, to);
            }
            for row in 0..self.rows.len() {
                self.rows[row].resize(new_len, 0);
                for position in first - zeros..first + tokens {
                    let value = if position < first { 0 } else { self.next };
                    self.next += u32::from(position >= first);
                    self.rows[row][position] = value;
                    let slot = self.slot(row, position);
                    self.pool[slot] = value;
                }
            }
        }

        fn check(&self, context: &str) {
            for (row, held) in self.rows.iter().enumerate() {
                assert_eq!(held.len(), self.map.len, "{context}");
                for (token, value) in held.iter().enumerate() {
                    assert_eq!(self.pool[self.slot(row, token)], *value, "{context}: row {row}");
                }
            }
            assert!(self.map.is_sound(), "{context}: {:?}", self.map);
        }
    }

    /// Every history of 5 calls out of 10, on pages of 1, 2 and 4 tokens.
    #[test]
    fn every_short_history_keeps_every_row_and_count() {
        type Call = fn(&mut Twin);
        let calls: [(&str, Call); 10] = [
            ("append 1", |twin| twin.write(twin.map.len, 1)),
            ("append 3", |twin| twin.write(twin.map.len, 3)),
            ("write 1 at 1", |twin| twin.write(1, 1)),
            ("write 2 past a gap", |twin| twin.write(twin.map.len + 2, 2)),
            ("truncate to 2", |twin| {
                twin.map.truncate(2);
                twin.rows.iter_mut().for_each(|row| row.truncate(2));
            }),
            ("crop to 3", |twin| crop(twin, 3)),
            ("crop to 0", |twin| crop(twin, 0)),
            ("repeat", |twin| select(twin, |batch| (0..2 * batch).map(|row| row / 2).collect())),
            ("turn", |twin| select(twin, |n| (0..n).map(|row| (row + 1) % n).collect())),
            ("last row twice", |twin| select(twin, |batch| vec![batch - 1; 2])),
        ];
        for page_tokens in [1, 2, 4] {
            for code in 0..10_usize.pow(5) {
                let mut twin = Twin::new(page_tokens, 1);
                let mut names = Vec::new();
                for place in 0..5 {
                    let (name, call) = calls[code / 10_usize.pow(place) % 10];
                    names.push(name);
                    call(&mut twin);
                }
                twin.check(&format!("pages of {page_tokens}: {names:?}"));
            }
        }
    }

    fn crop(twin: &mut Twin, len: usize) {
        twin.map.crop(len);
        for row in &mut twin.rows {
            row.drain(..row.len().saturating_sub(len));
        }
    }

    fn select(twin: &mut Twin, map: impl Fn(u32) -> Vec<u32>) {
        let map = map(u32::try_from(twin.rows.len()).unwrap());
        twin.map.select(&map);
        twin.rows = map.iter().map(|&from| twin.rows[from as usize].clone()).collect();
    }

    #[test]
    fn only_the_shared_tail_is_copied_and_the_last_row_keeps_it() {
        let mut map = PageMap::new(4, 1);
        let prompt = Order::Run { first: 0, zeros: 0 };
        assert_eq!(map.write(&prompt, 6, 6, 2), Ok(vec![]));
        map.select(&[0; 3]);
        assert_eq!((map.used(), map.shared()), (2, 2));
        let next = Order::Run { first: 6, zeros: 0 };
        assert_eq!(map.clone().write(&next, 1, 7, 3), Err(OutOfPages { wanted: 2 }));
        assert_eq!(map.write(&next, 1, 7, 4), Ok(vec![(1, 2), (1, 3)]));
        assert_eq!((map.used(), map.shared()), (4, 1));
        map.truncate(4);
        assert_eq!((map.used(), map.shared(), map.pool_pages()), (1, 1, 4));
    }

    /// What `tokens_in` says fits does, and a token more does not.
    #[test]
    fn as_many_tokens_fit_as_is_said() {
        for (len, cropped, rows) in
            [(0, 0, vec![0]), (6, 6, vec![0]), (6, 5, vec![0, 0, 0]), (8, 6, vec![0; 4])]
        {
            let mut map = PageMap::new(4, 1);
            if len > 0 {
                map.write(&Order::Run { first: 0, zeros: 0 }, len, len, 9).unwrap();
            }
            map.crop(cropped);
            map.select(&rows);
            for most in map.used()..20 {
                let fit = map.tokens_in(most);
                let append = |new_len: usize| {
                    let first = u32::try_from(map.len).unwrap();
                    let tokens = new_len - map.len;
                    map.clone().write(&Order::Run { first, zeros: 0 }, tokens, new_len, most)
                };
                assert!(fit == map.len || append(fit).is_ok(), "{most} pages, {map:?}");
                assert!(append(fit + 1).is_err(), "{most} pages, {map:?}");
            }
        }
    }

    #[test]
    fn a_list_copies_only_the_pages_that_each_row_names() {
        let mut map = PageMap::new(2, 1);
        map.write(&Order::Run { first: 0, zeros: 0 }, 6, 6, 9).unwrap();
        map.select(&[0, 0]);
        // Row 0 writes positions 1 and 4, row 1 position 5.
        let entries = vec![[1, 0], [4, 1], [5, 0], [SKIP, 0]];
        let order = Order::List { entries, count: 2, per_row: true };
        let copies = map.write(&order, 2, 6, 9).unwrap();
        assert_eq!(copies.iter().map(|copy| copy.0).collect::<Vec<_>>(), [0, 2]);
        assert!(map.is_sound(), "{map:?}");
        assert_eq!(map.shared(), 1);
    }
}
