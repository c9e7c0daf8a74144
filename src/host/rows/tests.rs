//! Rows of different length beside plain lists: every short history, in a ring here and in pages in their tests.

use super::*;
use crate::host::position::{self, CachePosition, WritePlan};

/// What slots hold that nothing has written.
pub(crate) const GARBAGE: u32 = 9_999_999;

/// Memory that rows lie in.
pub(crate) trait Memory {
    fn rows(&self) -> &Rows;

    /// Writes `value(row, token)` and zeros as `plan` says, `tokens` tokens a row.
    fn write(
        &mut self,
        plan: &WritePlan,
        tokens: usize,
        rows: Rows,
        value: &dyn Fn(usize, usize) -> u32,
    );

    fn cut(&mut self, cut: &Cut);

    fn select(&mut self, map: &[u32]);

    /// Live token `token` of row `row`.
    fn read(&self, row: usize, token: usize) -> u32;

    /// What a write to row `row` visits: positions, and the token of each or zero.
    fn visits(plan: &WritePlan, row: usize, tokens: usize) -> Vec<(usize, Option<usize>)> {
        match plan {
            WritePlan::Run { first, zeros } => {
                let (first, zeros) = (*first as usize, *zeros as usize);
                (0..zeros + tokens).map(|entry| (first + entry, entry.checked_sub(zeros))).collect()
            }
            WritePlan::List(list) => {
                let from = if list.per_row { row * list.stride() } else { 0 };
                let pairs = list.words[from + 2..from + list.stride()].chunks(2);
                let named: Vec<(usize, Option<usize>)> = pairs
                    .take_while(|pair| pair[0] != position::SKIP)
                    .map(|pair| (pair[0] as usize, Some(pair[1] as usize)))
                    .collect();
                let is_named = |position: &usize| named.iter().any(|(other, _)| other == position);
                let zeros: Vec<_> = list.gap(row).filter(|position| !is_named(position)).collect();
                assert_eq!(zeros.len(), list.words[from + 1] as usize, "the gap that is counted");
                named.iter().copied().chain(zeros.into_iter().map(|zero| (zero, None))).collect()
            }
        }
    }
}

/// What rows must hold.
#[derive(Clone, Debug)]
struct Model {
    len: usize,
    rows: Vec<Vec<u32>>,
    next: u32,
}

#[derive(Clone, Copy, Debug)]
enum Call {
    Append(usize),
    At(u32),
    /// A token of each row, so far behind its last one.
    Behind([usize; 2]),
    /// Two tokens of each row, at these positions.
    Two([[u32; 2]; 2]),
    Crop(usize),
    Truncate(usize),
    CropRows([usize; 2]),
    TruncateRows([usize; 2]),
    Select([u32; 2]),
}

const CALLS: [Call; 13] = [
    Call::Append(1),
    Call::Append(3),
    Call::At(2),
    Call::Behind([0, 0]),
    Call::Behind([2, 0]),
    Call::Two([[0, 1], [4, 2]]),
    Call::Crop(2),
    Call::Truncate(3),
    Call::CropRows([1, 4]),
    Call::CropRows([3, 0]),
    Call::TruncateRows([1, 9]),
    Call::Select([1, 1]),
    Call::Select([1, 0]),
];

impl Model {
    fn make(&mut self, memory: &mut impl Memory, call: Call) {
        let behind: Vec<Vec<u32>>;
        let two: Vec<Vec<u32>>;
        let (position, tokens) = match call {
            Call::Append(tokens) => (CachePosition::Append, tokens),
            Call::At(position) => (CachePosition::At(position), 1),
            Call::Behind(steps) => {
                let step = |(row, step): (&Vec<u32>, usize)| vec![narrow(row.len() + step)];
                behind = self.rows.iter().zip(steps).map(step).collect();
                (CachePosition::PerRow(&behind), 1)
            }
            Call::Two(lists) => {
                two = lists.map(Vec::from).into();
                (CachePosition::PerRow(&two), 2)
            }
            Call::Crop(len) => return self.cut(memory, &Cut::Crop(len)),
            Call::Truncate(len) => return self.cut(memory, &Cut::Truncate(len)),
            Call::CropRows(lens) => return self.cut(memory, &Cut::CropRows(lens.into())),
            Call::TruncateRows(lens) => return self.cut(memory, &Cut::TruncateRows(lens.into())),
            Call::Select(map) => {
                self.rows = map.iter().map(|&from| self.rows[from as usize].clone()).collect();
                return memory.select(&map);
            }
        };
        let new_len = position::check(position, 2, tokens, self.len, None).unwrap();
        let plan = position::plan_write(position, [2, tokens], memory.rows(), new_len);
        let rows = position::rows_after(position, memory.rows(), new_len);
        let next = self.next;
        let value = |row: usize, token: usize| next + narrow(row * 4 + token);
        memory.write(&plan, tokens, rows, &value);
        self.next += 8;
        for (b, row) in self.rows.iter_mut().enumerate() {
            let positions: Vec<usize> = match position {
                CachePosition::PerRow(lists) => lists[b].iter().map(|&at| at as usize).collect(),
                CachePosition::At(at) => vec![at as usize],
                _ => (self.len..new_len).collect(),
            };
            let end = match position {
                CachePosition::PerRow(_) => positions.iter().max().unwrap() + 1,
                _ => new_len,
            };
            row.resize(row.len().max(end), 0);
            positions.iter().enumerate().for_each(|(t, &at)| row[at] = value(b, t));
        }
        self.len = new_len;
    }

    fn cut(&mut self, memory: &mut impl Memory, cut: &Cut) {
        let is_changed = memory.rows().is_changed_by(cut);
        let before = (self.len, self.rows.clone());
        let dropped = |len: usize, most: usize| len - len.min(most);
        match cut {
            Cut::Crop(most) => {
                let dropped = dropped(self.len, *most);
                self.len -= dropped;
                self.rows.iter_mut().for_each(|row| drop(row.drain(..dropped.min(row.len()))));
            }
            Cut::Truncate(most) => {
                self.len = self.len.min(*most);
                self.rows.iter_mut().for_each(|row| row.truncate(*most));
            }
            Cut::CropRows(lens) => {
                let rows = self.rows.iter_mut().zip(lens);
                rows.for_each(|(row, &most)| drop(row.drain(..dropped(row.len(), most))));
                self.len = self.rows.iter().map(Vec::len).max().unwrap();
            }
            Cut::TruncateRows(lens) => {
                self.rows.iter_mut().zip(lens).for_each(|(row, &most)| row.truncate(most));
                self.len = self.rows.iter().map(Vec::len).max().unwrap();
            }
        }
        assert_eq!(is_changed, before != (self.len, self.rows.clone()), "{cut:?}");
        // A cut that changes nothing is not made.
        if is_changed {
            memory.cut(cut);
        }
    }

    fn check(&self, memory: &impl Memory, context: &str) {
        let rows = memory.rows();
        assert_eq!(rows.len(), self.len, "{context}");
        let is_equal = self.rows.iter().all(|row| row.len() == self.len);
        assert!(!is_equal || rows.start().is_none() || matches!(rows, Rows::Equal(_)), "{context}");
        for (b, row) in self.rows.iter().enumerate() {
            assert_eq!(rows.span(b).len, row.len(), "{context}: length of row {b}");
            let held: Vec<u32> = (0..row.len()).map(|token| memory.read(b, token)).collect();
            assert_eq!(held, *row, "{context}: row {b}");
        }
    }
}

/// Every history of four calls, on two rows.
pub(crate) fn histories<M: Memory>(make: impl Fn() -> M, check: impl Fn(&M)) {
    for code in 0..CALLS.len().pow(4) {
        let mut memory = make();
        let mut model = Model { len: 0, rows: vec![Vec::new(); 2], next: 1 };
        let mut made = Vec::new();
        for place in 0..4 {
            let call = CALLS[code / CALLS.len().pow(place) % CALLS.len()];
            made.push(call);
            model.make(&mut memory, call);
            check(&memory);
        }
        model.check(&memory, &format!("{made:?}"));
    }
}

pub(crate) fn narrow(n: usize) -> u32 {
    u32::try_from(n).unwrap()
}

struct Ring {
    rows: Rows,
    slots: Vec<Vec<u32>>,
}

/// More than four calls make a row long, so that it wraps after crops alone.
const CAPACITY: usize = 17;

impl Memory for Ring {
    fn rows(&self) -> &Rows {
        &self.rows
    }

    fn write(
        &mut self,
        plan: &WritePlan,
        tokens: usize,
        rows: Rows,
        value: &dyn Fn(usize, usize) -> u32,
    ) {
        self.rows = rows;
        for (b, slots) in self.slots.iter_mut().enumerate() {
            for (position, token) in Self::visits(plan, b, tokens) {
                let slot = (self.rows.span(b).start + position) % CAPACITY;
                slots[slot] = token.map_or(0, |token| value(b, token));
            }
        }
    }

    fn cut(&mut self, cut: &Cut) {
        self.rows = self.rows.cut(cut, CAPACITY);
    }

    fn select(&mut self, map: &[u32]) {
        self.rows = self.rows.select(map);
        self.slots = map.iter().map(|&from| self.slots[from as usize].clone()).collect();
    }

    fn read(&self, row: usize, token: usize) -> u32 {
        self.slots[row][(self.rows.span(row).start + token) % CAPACITY]
    }
}

#[test]
fn every_short_history_of_ragged_rows_in_a_ring() {
    for start in [0, CAPACITY - 2] {
        let make = || Ring {
            rows: Rows::Equal(Span { start, len: 0 }),
            slots: vec![vec![GARBAGE; CAPACITY]; 2],
        };
        histories(make, |ring| {
            let starts = ring.rows.starts();
            assert!(starts[1] < CAPACITY && ring.rows.len() <= CAPACITY);
        });
    }
}

#[test]
fn records_are_four_words_a_row_and_none_if_rows_are_equal() {
    let rows = Rows::Equal(Span { start: 3, len: 5 });
    assert!(rows.records(7).is_empty());
    let rows = rows.cut(&Cut::TruncateRows(vec![9, 2]), 8);
    assert_eq!(rows.records(7), [3, 5, 0, 0, 3, 2, 7, 0]);
    assert!(rows.has_stale());
    // The longer row goes: both have two tokens of a layer of five, which is not what equal rows are.
    let short = rows.select(&[1, 1]);
    assert_eq!((short.len(), short.spans().map(|spans| spans.len())), (5, Some(2)));
    assert_eq!(short.cut(&Cut::Truncate(2), 8), Rows::Equal(Span { start: 3, len: 2 }));
    assert_eq!(rows.cut(&Cut::CropRows(vec![2, 2]), 8).records(0), [6, 2, 0, 0, 3, 2, 0, 0]);
}
