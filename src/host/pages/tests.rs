//! Pages beside what each row holds, token by token.

use super::*;
use crate::host::position::{self, CachePosition};
use crate::host::rows::Span;
use crate::host::rows::tests::{GARBAGE, Memory, histories};

/// The rows of a map at another length, all of it.
fn long(map: &PageMap, new_len: usize) -> Rows {
    map.rows.written(new_len, None)
}

fn equal(len: usize) -> Rows {
    Rows::Equal(Span { start: 0, len })
}

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
        let slot = self.map.rows.span(row).start + token;
        let page = self.map.page(row, slot / self.map.page_tokens) as usize;
        page * self.map.page_tokens + slot % self.map.page_tokens
    }

    fn write(&mut self, first: usize, tokens: usize) {
        let len = self.map.rows.len();
        let new_len = len.max(first + tokens);
        let zeros = first.saturating_sub(len);
        let narrow = |n: usize| u32::try_from(n).unwrap();
        let plan = WritePlan::Run { first: narrow(first - zeros), zeros: narrow(zeros) };
        let (used, wanted) = (self.map.used(), self.map.wanted(&plan, tokens, new_len));
        let Written { copies, words, .. } = {
            let rows = long(&self.map, new_len);
            self.map.write(&plan, tokens, rows, 4)
        };
        assert_eq!((copies.len(), self.map.used()), (wanted.copies, used + wanted.all()));
        assert!(words.iter().all(|words| words.end <= self.map.table().len()));
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
            assert_eq!(held.len(), self.map.rows.len(), "{context}");
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
        ("append 1", |twin| twin.write(twin.map.rows.len(), 1)),
        ("append 3", |twin| twin.write(twin.map.rows.len(), 3)),
        ("write 1 at 1", |twin| twin.write(1, 1)),
        ("write 2 past a gap", |twin| twin.write(twin.map.rows.len() + 2, 2)),
        ("truncate to 2", |twin| {
            twin.map.cut(&Cut::Truncate(2));
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
    twin.map.cut(&Cut::Crop(len));
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
    let prompt = WritePlan::Run { first: 0, zeros: 0 };
    assert_eq!(map.write(&prompt, 6, equal(6), 2).copies, []);
    map.select(&[0; 3]);
    assert_eq!((map.used(), map.shared()), (2, 2));
    let next = WritePlan::Run { first: 6, zeros: 0 };
    assert_eq!(map.wanted(&next, 1, 7), Wanted { new: 0, copies: 2 });
    assert_eq!(map.write(&next, 1, equal(7), 2).copies, [(1, 2), (1, 3)]);
    assert_eq!((map.used(), map.shared()), (4, 1));
    map.cut(&Cut::Truncate(4));
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
            map.write(&WritePlan::Run { first: 0, zeros: 0 }, len, equal(len), 9);
        }
        map.cut(&Cut::Crop(cropped));
        map.select(&rows);
        for most in map.used()..20 {
            let fit = map.tokens_in(most);
            let append = |new_len: usize| {
                let first = u32::try_from(map.rows.len()).unwrap();
                let wanted = map.wanted(
                    &WritePlan::Run { first, zeros: 0 },
                    new_len - map.rows.len(),
                    new_len,
                );
                map.used() + wanted.all() <= most
            };
            assert!(fit == map.rows.len() || append(fit), "{most} pages, {map:?}");
            assert!(!append(fit + 1), "{most} pages, {map:?}");
        }
    }
}

#[test]
fn a_list_copies_only_the_pages_that_each_row_names() {
    let mut map = PageMap::new(2, 1);
    map.write(&WritePlan::Run { first: 0, zeros: 0 }, 6, equal(6), 9);
    map.select(&[0, 0]);
    // Row 0 writes positions 1 and 4, row 1 position 5.
    let rows = [vec![1, 4], vec![5, 5]];
    let plan = position::plan_write(CachePosition::PerRow(&rows), [2, 2], &equal(6), 6);
    assert_eq!(map.wanted(&plan, 2, 6), Wanted { new: 0, copies: 2 });
    let copies = map.write(&plan, 2, equal(6), 9).copies;
    assert_eq!(copies.iter().map(|copy| copy.0).collect::<Vec<_>>(), [0, 2]);
    assert!(map.is_sound(), "{map:?}");
    assert_eq!(map.shared(), 1);
}

/// A list that names nothing in the partly filled last page, and makes the rows no longer, leaves it shared.
#[test]
fn a_list_leaves_a_last_page_that_it_does_not_name() {
    for (rows, new_len, copied) in
        [([vec![0], vec![1]], 6, 1), ([vec![0], vec![5]], 6, 2), ([vec![0], vec![7]], 8, 2)]
    {
        let mut map = PageMap::new(4, 1);
        map.write(&WritePlan::Run { first: 0, zeros: 0 }, 6, equal(6), 9);
        map.select(&[0, 0]);
        let plan = position::plan_write(CachePosition::PerRow(&rows), [2, 1], &equal(6), new_len);
        assert_eq!(map.wanted(&plan, 1, new_len), Wanted { new: 0, copies: copied }, "{rows:?}");
        assert_eq!(map.write(&plan, 1, equal(new_len), 9).copies.len(), copied, "{rows:?}");
        assert!(map.is_sound(), "{map:?}");
    }
}

/// Pages of ragged rows, and what their slots hold.
struct Paged {
    map: PageMap,
    pool: Vec<u32>,
}

impl Paged {
    fn slot(&self, row: usize, token: usize) -> usize {
        let slot = self.map.rows.span(row).start + token;
        let size = self.map.page_tokens;
        self.map.page(row, slot / size) as usize * size + slot % size
    }
}

impl Memory for Paged {
    fn rows(&self) -> &Rows {
        &self.map.rows
    }

    fn write(
        &mut self,
        plan: &WritePlan,
        tokens: usize,
        rows: Rows,
        value: &dyn Fn(usize, usize) -> u32,
    ) {
        let (used, size) = (self.map.used(), self.map.page_tokens);
        let wanted = self.map.wanted(plan, tokens, rows.len());
        let written = self.map.write(plan, tokens, rows, 4);
        assert_eq!((written.copies.len(), self.map.used()), (wanted.copies, used + wanted.all()));
        self.pool.resize(self.map.pool_pages() * size, GARBAGE);
        for (from, to) in written.copies {
            let (from, to) = (from as usize * size, to as usize * size);
            self.pool.copy_within(from..from + size, to);
        }
        for row in 0..self.map.batch {
            for (position, token) in Self::visits(plan, row, tokens) {
                let slot = self.slot(row, position);
                assert_eq!(
                    self.map.pool.count(u32::try_from(slot / size).expect("few")),
                    1,
                    "a page that rows share is written"
                );
                self.pool[slot] = token.map_or(0, |token| value(row, token));
            }
        }
    }

    fn cut(&mut self, cut: &Cut) {
        self.map.cut(cut);
    }

    fn select(&mut self, map: &[u32]) {
        self.map.select(map);
    }

    fn read(&self, row: usize, token: usize) -> u32 {
        self.pool[self.slot(row, token)]
    }
}

#[test]
fn every_short_history_of_ragged_rows_in_pages() {
    for page_tokens in [1, 2, 4] {
        let make = || Paged { map: PageMap::new(page_tokens, 2), pool: Vec::new() };
        histories(make, |pages| {
            assert!(pages.map.is_sound(), "{:?}", pages.map);
            // What a reserve counts is what the next append takes.
            let (len, rows) = (pages.map.rows.len(), &pages.map.rows);
            let plan = position::plan_write(CachePosition::Append, [2, 1], rows, len + 1);
            let wanted = pages.map.wanted(&plan, 1, len + 1);
            assert_eq!(pages.map.copies_of_append(len + 1), wanted.copies, "{:?}", pages.map);
        });
    }
}
