//! Pure host logic: the order of row moves, growth, and ranges of live slots. Nothing here knows wgpu.

use std::ops::Range;

/// Stands for the one temporary register of a thread in a [`RowMove`].
pub(crate) const HELD: u32 = u32::MAX;

/// One step of an in-place gather: row `from` is copied to row `to`; either may be [`HELD`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowMove {
    pub(crate) to: u32,
    pub(crate) from: u32,
}

/// Orders the moves that make new row `i` hold old row `map[i]`, in place.
///
/// This is the parallel-move problem of register allocation: a row may be overwritten once nothing
/// reads its old content any more. Rows that no one waits for go first; what is left are cycles, each
/// broken through one temporary. A row that stays costs nothing. `from` is only named where `from`
/// still holds its old content. Rows at and beyond `map.len()` are left as they are.
///
/// `rows` is the number of rows that hold content before the call; every `map[i] < rows`.
pub(crate) fn order_row_moves(map: &[u32], rows: usize) -> Vec<RowMove> {
    let row = |index: usize| u32::try_from(index).expect("row counts are checked to fit 32 bits");
    let at = |row: u32| row as usize;

    // readers[r]: pending moves that read row r's old content.
    let mut readers = vec![0_usize; rows.max(map.len())];
    for (to, &from) in map.iter().enumerate() {
        if row(to) != from {
            readers[at(from)] += 1;
        }
    }
    let is_target = |r: u32| at(r) < map.len() && map[at(r)] != r;

    let mut moves = Vec::with_capacity(map.len());
    let mut done = vec![false; map.len()];
    let mut ready: Vec<u32> =
        (0..map.len()).rev().map(row).filter(|&to| is_target(to) && readers[at(to)] == 0).collect();
    while let Some(to) = ready.pop() {
        let from = map[at(to)];
        moves.push(RowMove { to, from });
        done[at(to)] = true;
        readers[at(from)] -= 1;
        if readers[at(from)] == 0 && is_target(from) {
            ready.push(from);
        }
    }

    // Every row left is read exactly once, by another row left: disjoint cycles.
    for first in 0..map.len() {
        if done[first] || !is_target(row(first)) {
            continue;
        }
        moves.push(RowMove { to: HELD, from: row(first) });
        let mut to = row(first);
        loop {
            done[at(to)] = true;
            let from = map[at(to)];
            if from == row(first) {
                moves.push(RowMove { to, from: HELD });
                break;
            }
            moves.push(RowMove { to, from });
            to = from;
        }
    }
    moves
}

/// Lists copies into fresh rows, `map[i]` to `i`, grouped by source so that each source is read once.
pub(crate) fn group_by_source(map: &[u32]) -> Vec<RowMove> {
    let mut moves: Vec<RowMove> =
        (0_u32..).zip(map).map(|(to, &from)| RowMove { to, from }).collect();
    moves.sort_by_key(|step| (step.from, step.to));
    moves
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

/// The capacity, in tokens, for a layer that holds `capacity` now and has to hold `needed`.
///
/// Doubles, so that a token is copied at most twice on average however long the row gets; stops at
/// `limit`, the most that the device can bind. `None` where even that is too little.
pub(crate) fn grown_capacity(capacity: usize, needed: usize, limit: usize) -> Option<usize> {
    /// A first allocation this small still leaves room for a few steps.
    const LEAST: usize = 64;
    if needed > limit {
        return None;
    }
    let doubled = capacity.saturating_mul(2).max(LEAST);
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

    /// What a thread does with a column: runs the moves one by one.
    fn run(moves: &[RowMove], rows: &mut [u32]) {
        let mut held = None;
        for step in moves {
            let value = if step.from == HELD {
                held.expect("something is held before it is used")
            } else {
                rows[step.from as usize]
            };
            if step.to == HELD {
                held = Some(value);
            } else {
                rows[step.to as usize] = value;
            }
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
                    // Each row that changes is written once; each cycle costs one move more.
                    let changed = (0..).zip(&map).filter(|&(i, &from)| i != from).count();
                    let written = moves.iter().filter(|step| step.to != HELD).count();
                    assert_eq!(written, changed, "map {map:?}, moves {moves:?}");
                }
            }
        }
    }

    #[test]
    fn grouped_copies_name_every_row_once_and_each_source_in_one_run() {
        let moves = group_by_source(&[2, 0, 2, 1, 0]);
        let from: Vec<u32> = moves.iter().map(|step| step.from).collect();
        assert_eq!(from, [0, 0, 1, 2, 2]);
        let mut rows: Vec<u32> = moves.iter().map(|step| step.to).collect();
        rows.sort_unstable();
        assert_eq!(rows, [0, 1, 2, 3, 4]);
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
        assert_eq!(grown_capacity(0, 1, 1000), Some(64));
        assert_eq!(grown_capacity(64, 65, 1000), Some(128));
        assert_eq!(grown_capacity(64, 500, 1000), Some(512));
        assert_eq!(grown_capacity(600, 601, 1000), Some(1000));
        assert_eq!(grown_capacity(0, 3, 3), Some(3));
        assert_eq!(grown_capacity(3, 4, 3), None);
        assert_eq!(grown_capacity(100, 7, 1000), Some(100));
        for capacity in 0..=12 {
            for needed in 1..=12 {
                for limit in 1..=12 {
                    match grown_capacity(capacity, needed, limit) {
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
