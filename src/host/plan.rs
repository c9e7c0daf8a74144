//! Pure host logic: the order of row moves, growth, and ranges of live slots. Nothing here knows wgpu.

use std::ops::Range;

/// The row moves that every thread of a copying kernel runs, in order, as words that it reads.
///
/// First the copies, a source each: its row, how many rows it goes to, and these. Then the cycles, which
/// only moves in place have: how many rows, and these; each row takes what the next one held, the last
/// what the first one held.
///
/// ```text
///   from 3 to 0, 5    rows 1, 2, 4 change places
///  | 3  2   0  5 |   | 3   1  2  4 |
///                     cycles_at
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MoveList {
    pub(crate) words: Vec<u32>,
    /// Words of the copies: where the cycles begin.
    pub(crate) cycles_at: usize,
    /// Rows that are written.
    pub(crate) written: usize,
}

impl MoveList {
    /// Adds a copy of row `from` to row `to`. The words of copies end where `last` starts: at the number
    /// of rows that the last source goes to.
    fn copy(&mut self, from: u32, to: u32, last: &mut Option<(u32, usize)>) {
        match *last {
            Some((source, count)) if source == from => self.words[count] += 1,
            _ => {
                *last = Some((from, self.words.len() + 1));
                self.words.extend([from, 1]);
            }
        }
        self.words.push(to);
        self.cycles_at = self.words.len();
        self.written += 1;
    }

    /// Adds a cycle: `rows[i]` takes what `rows[i + 1]` held.
    fn cycle(&mut self, rows: &[u32]) {
        self.words.push(narrow(rows.len()));
        self.words.extend(rows);
        self.written += rows.len();
    }
}

/// Orders the moves that make new row `i` hold old row `map[i]`, in place.
///
/// This is the parallel-move problem of register allocation: a row may be overwritten once nothing
/// reads its old content any more. Rows that no one waits for go first; what is left are cycles, each
/// broken through one temporary. A row that stays costs nothing. Rows at and beyond `map.len()` are left
/// as they are.
///
/// `rows` is the number of rows that hold content before the call; every `map[i] < rows`.
pub(crate) fn order_row_moves(map: &[u32], rows: usize) -> MoveList {
    let at = |row: u32| row as usize;

    // readers[r]: pending moves that read row r's old content.
    let mut readers = vec![0_usize; rows.max(map.len())];
    for (to, &from) in map.iter().enumerate() {
        if narrow(to) != from {
            readers[at(from)] += 1;
        }
    }
    let is_target = |r: u32| at(r) < map.len() && map[at(r)] != r;

    let mut moves = MoveList::default();
    let mut last = None;
    let mut done = vec![false; map.len()];
    let mut ready: Vec<u32> = (0..map.len())
        .rev()
        .map(narrow)
        .filter(|&to| is_target(to) && readers[at(to)] == 0)
        .collect();
    while let Some(to) = ready.pop() {
        let from = map[at(to)];
        moves.copy(from, to, &mut last);
        done[at(to)] = true;
        readers[at(from)] -= 1;
        if readers[at(from)] == 0 && is_target(from) {
            ready.push(from);
        }
    }

    // Every row left is read exactly once, by another row left: disjoint cycles.
    let mut cycle = Vec::new();
    for first in (0..map.len()).map(narrow) {
        cycle.clear();
        let mut row = first;
        while !done[at(row)] && is_target(row) {
            done[at(row)] = true;
            cycle.push(row);
            row = map[at(row)];
        }
        if !cycle.is_empty() {
            moves.cycle(&cycle);
        }
    }
    moves
}

/// Copies of rows, (from, to) each, into rows that none of them reads. A source that comes several times
/// in a row is read once. Lists of at most `most` copies each.
pub(crate) fn list_copies(copies: &[(u32, u32)], most: usize) -> Vec<MoveList> {
    copies
        .chunks(most)
        .map(|copies| {
            let mut list = MoveList::default();
            let mut last = None;
            copies.iter().for_each(|&(from, to)| list.copy(from, to, &mut last));
            list
        })
        .collect()
}

/// The copies that make row `i` of fresh memory hold old row `map[i]`, sorted so that each source comes
/// once.
pub(crate) fn copies_of_map(map: &[u32]) -> Vec<(u32, u32)> {
    let mut copies: Vec<(u32, u32)> = map.iter().copied().zip(0..).collect();
    copies.sort_unstable();
    copies
}

/// Row counts are checked to fit 32 bits before they get here.
fn narrow(count: usize) -> u32 {
    u32::try_from(count).expect("row counts are checked to fit 32 bits")
}

/// The row map of `batch_repeat_interleave`: each of `batch` rows `repeats` times in a row.
///
/// `None` where the new batch does not fit 32 bits.
pub(crate) fn repeat_map(batch: usize, repeats: usize) -> Option<Vec<u32>> {
    let total = u32::try_from(batch.checked_mul(repeats)?).ok()?;
    let repeats = u32::try_from(repeats).ok()?;
    Some((0..total).map(|row| row / repeats).collect())
}

/// Whether a row map leaves a batch of `batch` rows exactly as it is.
pub(crate) fn is_identity(map: &[u32], batch: usize) -> bool {
    map.len() == batch && (0_u32..).zip(map).all(|(row, &from)| row == from)
}

/// The slots of the live tokens, oldest first, as one or two pieces.
///
/// Token `t` lies at slot `(start + t) mod capacity`.
pub(crate) fn live_slots(
    start: usize,
    len: usize,
    capacity: usize,
) -> (Range<usize>, Range<usize>) {
    let first = len.min(capacity - start);
    (start..start + first, 0..len - first)
}

/// The capacity, in tokens or pages, for a layer that has room for `capacity` now and has to hold
/// `needed`; `least` at the first time, so that a few steps fit.
///
/// Doubles, so that a token is copied at most twice on average however long the row gets; stops at
/// `limit`, the most that the device can bind. `None` where even that is too little.
pub(crate) fn grown_capacity(
    capacity: usize,
    needed: usize,
    limit: usize,
    least: usize,
) -> Option<usize> {
    if needed > limit {
        return None;
    }
    let doubled = capacity.saturating_mul(2).max(least);
    let roomy = needed.checked_next_power_of_two().unwrap_or(needed);
    Some(if capacity >= needed { capacity } else { doubled.max(roomy).min(limit) })
}

/// The state of a layer's ring after `crop(keep)`: (start, len) of the latest `keep` tokens.
pub(crate) fn cropped(start: usize, len: usize, capacity: usize, keep: usize) -> (usize, usize) {
    if len <= keep {
        return (start, len);
    }
    ((start + len - keep) % capacity, keep)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a thread does with a column.
    fn run(moves: &MoveList, rows: &mut [u32]) {
        let words: Vec<usize> = moves.words.iter().map(|&word| word as usize).collect();
        let mut at = 0;
        while at < moves.cycles_at {
            let (value, count) = (rows[words[at]], words[at + 1]);
            assert!(count > 0, "a kernel copies to one row at least");
            words[at + 2..][..count].iter().for_each(|&to| rows[to] = value);
            at += 2 + count;
        }
        assert_eq!(at, moves.cycles_at, "the copies end where the cycles begin");
        while at < words.len() {
            let cycle = &words[at + 1..][..words[at]];
            assert!(cycle.len() > 1, "a kernel turns two rows at least");
            let held = rows[cycle[0]];
            cycle.windows(2).for_each(|pair| rows[pair[0]] = rows[pair[1]]);
            rows[cycle[cycle.len() - 1]] = held;
            at += 1 + cycle.len();
        }
    }

    /// Every map of up to 6 rows onto up to 6.
    #[test]
    fn row_moves_are_right_for_every_small_map() {
        for old in 1..=6_u32 {
            for new in 1..=6_u32 {
                for code in 0..old.pow(new) {
                    let map: Vec<u32> = (0..new).map(|i| code / old.pow(i) % old).collect();
                    let moves = order_row_moves(&map, old as usize);
                    let mut rows: Vec<u32> = (0..old.max(new)).map(|r| 100 + r).collect();
                    run(&moves, &mut rows);
                    for (i, &from) in map.iter().enumerate() {
                        assert_eq!(rows[i], 100 + from, "map {map:?}, moves {moves:?}");
                    }
                    for (row, value) in (0..).zip(&rows).skip(map.len()) {
                        assert_eq!(*value, 100 + row, "rows past the map stay: {map:?}");
                    }
                    // Each row that changes is written once.
                    let changed = (0..).zip(&map).filter(|&(i, &from)| i != from).count();
                    assert_eq!(moves.written, changed, "map {map:?}, moves {moves:?}");
                }
            }
        }
    }

    /// Every map of up to 5 rows onto up to 6, in lists of every length.
    #[test]
    fn copies_are_right_for_every_small_map_and_read_each_source_once() {
        for old in 1..=5_u32 {
            for new in 1..=6_u32 {
                for code in 0..old.pow(new) {
                    let map: Vec<u32> = (0..new).map(|i| code / old.pow(i) % old).collect();
                    for most in 1..=7 {
                        let lists = list_copies(&copies_of_map(&map), most);
                        // Old rows, and fresh ones behind them.
                        let mut rows: Vec<u32> = (0..old).map(|r| 100 + r).collect();
                        rows.resize((old + new) as usize, 0);
                        for list in &lists {
                            assert!(list.written <= most && list.cycles_at == list.words.len());
                            let mut shifted = list.clone();
                            shift_targets(&mut shifted, old);
                            run(&shifted, &mut rows);
                        }
                        let expect: Vec<u32> = map.iter().map(|from| 100 + from).collect();
                        assert_eq!(rows[old as usize..], expect, "map {map:?}, most {most}");
                        if most >= map.len() {
                            let mut sources = map.clone();
                            sources.sort_unstable();
                            sources.dedup();
                            let heads = lists[0].words.len() - map.len();
                            assert_eq!(heads, 2 * sources.len());
                        }
                    }
                }
            }
        }
    }

    fn shift_targets(list: &mut MoveList, by: u32) {
        let mut at = 0;
        while at < list.cycles_at {
            let count = list.words[at + 1] as usize;
            list.words[at + 2..at + 2 + count].iter_mut().for_each(|to| *to += by);
            at += 2 + count;
        }
    }

    /// Every start, length and capacity up to 12.
    #[test]
    fn live_slots_follow_the_modulus_for_every_small_ring() {
        for capacity in 1..=12 {
            for start in 0..capacity {
                for len in 0..=capacity {
                    let (first, second) = live_slots(start, len, capacity);
                    let slots: Vec<usize> = first.chain(second).collect();
                    let expect: Vec<usize> = (0..len).map(|t| (start + t) % capacity).collect();
                    assert_eq!(slots, expect, "start {start}, len {len}, capacity {capacity}");
                    for keep in 0..=12 {
                        let (new_start, new_len) = cropped(start, len, capacity, keep);
                        assert!(new_start < capacity, "a slot of the ring, as kernels expect");
                        let kept: Vec<usize> =
                            (0..new_len).map(|t| (new_start + t) % capacity).collect();
                        assert_eq!(kept, expect[len - len.min(keep)..], "keep {keep}");
                    }
                }
            }
        }
    }

    #[test]
    fn growth_doubles_stops_at_the_limit_and_never_shrinks() {
        assert_eq!(grown_capacity(0, 1, 1000, 64), Some(64));
        assert_eq!(grown_capacity(64, 65, 1000, 64), Some(128));
        assert_eq!(grown_capacity(64, 500, 1000, 64), Some(512));
        assert_eq!(grown_capacity(600, 601, 1000, 64), Some(1000));
        assert_eq!(grown_capacity(0, 3, 3, 64), Some(3));
        assert_eq!(grown_capacity(3, 4, 3, 64), None);
        assert_eq!(grown_capacity(100, 7, 1000, 64), Some(100));
        assert_eq!(grown_capacity(0, 3, 1000, 1), Some(4));
        for capacity in 0..=12 {
            for needed in 1..=12 {
                for limit in 1..=12 {
                    match grown_capacity(capacity, needed, limit, 64) {
                        Some(grown) => {
                            assert!(grown >= needed && grown >= capacity.min(grown));
                            assert!(grown <= limit.max(capacity));
                        }
                        None => assert!(needed > limit),
                    }
                }
            }
        }
    }

    #[test]
    fn repeat_map_repeats_each_row_in_a_row() {
        assert_eq!(repeat_map(2, 3), Some(vec![0, 0, 0, 1, 1, 1]));
        assert_eq!(repeat_map(usize::MAX, 2), None);
        assert!(is_identity(&repeat_map(5, 1).unwrap(), 5));
        assert!(!is_identity(&[0, 1], 3));
    }
}
