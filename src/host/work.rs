//! How attention over sequences of different length is split into workgroups. Pure host logic.

/// A sequence of a step, as attention reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StepRow {
    /// The first of its packed query tokens, and how many there are.
    pub(crate) first: usize,
    pub(crate) tokens: usize,
    /// Live tokens, the new ones included.
    pub(crate) len: usize,
}

/// Words of an item.
pub(crate) const ITEM_WORDS: usize = 8;

/// What limits the split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct WorkLimits {
    /// Query heads a K/V head, and K/V heads.
    pub(crate) group: usize,
    pub(crate) heads: usize,
    /// Query rows of an item.
    pub(crate) rows: usize,
    /// Workgroups that fill the device.
    pub(crate) wanted: usize,
    /// Tokens of a part at least, so that merging it is worth it, and at most, as a workgroup can go through.
    pub(crate) least: usize,
    pub(crate) most: usize,
    /// Partial results that there is memory for.
    pub(crate) parts: usize,
    pub(crate) is_causal: bool,
    /// Tokens that a query looks back on, its own included, and the first tokens that it sees as well.
    pub(crate) window: Option<[usize; 2]>,
    /// Whether items may write to the output. If not, all write partial results.
    pub(crate) has_whole: bool,
}

/// The items of one call of attention, as `shaders/attention.wgsl` and `shaders/attention_combine.wgsl` read
/// them: four query rows of one sequence, and a range of its tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// Items that write to the output: sequence, first query token, its query tokens, which four rows, first
    /// and end of its walk through the K/V tokens that its rows see, two zeros.
    pub(crate) whole: Vec<u32>,
    /// Items that write partial results; likewise, with the number of the part as the seventh word.
    pub(crate) parts: Vec<u32>,
    /// What is merged of these: first query token, its query tokens, which four rows, first part, number of
    /// parts, three zeros.
    pub(crate) merged: Vec<u32>,
}

impl Work {
    /// Splits each sequence by its own length, into parts of about equal work. `None` if the parts that are
    /// needed at least have no memory.
    ///
    /// The work of an item is the tokens that its rows see. If all items together are fewer than fill the
    /// device, long ones are split; a part is as long as an equal share of the work, so that one long sequence
    /// does not leave the rest of the device idle (flash-decoding: Dao et al., 2023; work of different length:
    /// Ye et al., `FlashInfer`, 2025).
    pub(crate) fn new(rows: &[StepRow], limits: WorkLimits) -> Option<Self> {
        let tiles: Vec<Tile> = tiles(rows, &limits);
        let all: usize = tiles.iter().map(|tile| tile.seen).sum();
        let share = all.saturating_mul(limits.heads).div_ceil(limits.wanted.max(1));
        let mut chunk = share.max(limits.least).clamp(1, limits.most);
        let count = |chunk: usize| {
            let counts = tiles.iter().map(|tile| tile.seen.div_ceil(chunk));
            counts.filter(|&parts| parts > 1 || !limits.has_whole).sum::<usize>()
        };
        while count(chunk) > limits.parts {
            if chunk == limits.most {
                return None;
            }
            chunk = chunk.saturating_mul(2).min(limits.most);
        }
        let mut work = Self::default();
        let mut part = 0_usize;
        for tile in &tiles {
            let StepRow { first, tokens, .. } = rows[tile.row];
            let parts = tile.seen.div_ceil(chunk).max(1);
            let item = |begin: usize, end: usize, part: usize| {
                [tile.row, first, tokens, tile.number, begin, end, part, 0].map(narrow)
            };
            if parts == 1 && limits.has_whole {
                work.whole.extend(item(0, tile.seen, 0));
                continue;
            }
            work.merged.extend([first, tokens, tile.number, part, parts, 0, 0, 0].map(narrow));
            let size = tile.seen.div_ceil(parts);
            for begin in (0..parts).map(|at| at * size) {
                let end = (begin + size).min(tile.seen);
                work.parts.extend(item(begin.min(end), end, part));
                part += 1;
            }
        }
        Some(work)
    }

    /// The number of partial results, each of all K/V heads.
    #[cfg(test)]
    pub(crate) fn part_count(&self) -> usize {
        self.parts.len() / ITEM_WORDS
    }
}

/// Query rows that are computed together.
struct Tile {
    row: usize,
    number: usize,
    /// Tokens that it goes through: all that any of its rows sees.
    seen: usize,
}

/// All tiles, those that see most first: a device that starts them in order ends evenly.
fn tiles(rows: &[StepRow], limits: &WorkLimits) -> Vec<Tile> {
    let mut tiles: Vec<Tile> = Vec::new();
    for (row, &StepRow { tokens, len, .. }) in rows.iter().enumerate() {
        let queries = limits.group * tokens;
        for number in 0..queries.div_ceil(limits.rows) {
            let last = ((number + 1) * limits.rows).min(queries) - 1;
            // A query sees the tokens up to its own; those of later queries it does not.
            let own_end = |query: usize| len.saturating_sub(tokens - 1 - query / limits.group);
            let end = if limits.is_causal { own_end(last) } else { len };
            // Nor those before its window, but for the first ones.
            let skipped = limits.window.map_or(0, |[window, first]| {
                own_end(number * limits.rows).saturating_sub(window).saturating_sub(first)
            });
            tiles.push(Tile { row, number, seen: end.saturating_sub(skipped) });
        }
    }
    tiles.sort_by_key(|tile| std::cmp::Reverse(tile.seen));
    tiles
}

/// Counts of a step are checked to fit 32 bits when it is planned.
fn narrow(count: usize) -> u32 {
    u32::try_from(count).expect("counts of a step are checked to fit 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: WorkLimits = WorkLimits {
        group: 3,
        heads: 2,
        rows: 4,
        wanted: 16,
        least: 8,
        most: 1000,
        parts: 100,
        is_causal: true,
        window: None,
        has_whole: true,
    };

    fn row(first: usize, tokens: usize, len: usize) -> StepRow {
        StepRow { first, tokens, len }
    }

    /// Every query row of every sequence, with the tokens that its items go through.
    fn covered(rows: &[StepRow], limits: WorkLimits, work: &Work) {
        let items = |words: &[u32]| -> Vec<[usize; 8]> {
            let items = words.chunks(ITEM_WORDS);
            items.map(|item| std::array::from_fn(|at| item[at] as usize)).collect()
        };
        let mut ranges = std::collections::BTreeMap::<_, Vec<[usize; 2]>>::new();
        for [b, first, tokens, tile, begin, end, ..] in items(&work.whole) {
            assert_eq!((first, tokens), (rows[b].first, rows[b].tokens));
            assert!(ranges.insert((b, tile), vec![[begin, end]]).is_none());
        }
        let parts = items(&work.parts);
        for [first, tokens, tile, part, count, ..] in items(&work.merged) {
            let own = &parts[part..part + count];
            let b = own[0][0];
            assert_eq!((first, tokens), (rows[b].first, rows[b].tokens));
            assert!((part..).zip(own).all(|(at, it)| it[0] == b && it[3] == tile && it[6] == at));
            let own = own.iter().map(|it| [it[4], it[5]]).collect();
            assert!(ranges.insert((b, tile), own).is_none());
        }
        for (b, row) in rows.iter().enumerate() {
            for query in 0..limits.group * row.tokens {
                let later =
                    if limits.is_causal { row.tokens - 1 - query / limits.group } else { 0 };
                let ranges = &ranges[&(b, query / limits.rows)];
                // One after the other, without a gap, and not longer than a workgroup can go through.
                assert!(
                    ranges[0][0] == 0 && ranges.windows(2).all(|pair| pair[0][1] == pair[1][0])
                );
                assert!(ranges.iter().all(|[begin, end]| end - begin <= limits.most));
                assert!(ranges[ranges.len() - 1][1] >= row.len - later, "{rows:?}");
            }
        }
        let tiles = |row: &StepRow| (limits.group * row.tokens).div_ceil(limits.rows);
        assert_eq!(ranges.len(), rows.iter().map(tiles).sum::<usize>());
        assert!(work.part_count() <= limits.parts);
    }

    #[test]
    fn every_query_of_every_sequence_goes_through_the_tokens_that_it_sees() {
        for (is_causal, has_whole) in [(true, true), (false, true), (true, false)] {
            for group in [1, 2, 3, 4, 5] {
                for (wanted, least) in [(1, 1), (16, 8), (512, 1), (64, 300)] {
                    let limits =
                        WorkLimits { group, wanted, least, is_causal, has_whole, ..LIMITS };
                    for long in [1, 7, 40, 999, 3000] {
                        let rows =
                            [row(0, 1, long), row(1, 5, 5), row(6, 1, 1), row(7, 9, 9 + long)];
                        let work = Work::new(&rows, limits).expect("memory for the parts");
                        covered(&rows, limits, &work);
                        assert!(has_whole || work.whole.is_empty());
                    }
                }
            }
        }
    }

    #[test]
    fn a_long_sequence_is_split_and_short_ones_beside_it_are_not() {
        let rows = [row(0, 1, 900), row(1, 1, 10), row(2, 1, 10)];
        let work = Work::new(&rows, LIMITS).expect("memory for the parts");
        assert_eq!((work.whole.len(), work.merged.len()), (2 * ITEM_WORDS, ITEM_WORDS));
        // 920 tokens of two heads over 16 workgroups: parts of 115 tokens.
        assert_eq!(work.part_count(), 8);
    }

    #[test]
    fn parts_are_no_more_than_there_is_memory_for() {
        let rows = [row(0, 1, 900)];
        let tight = WorkLimits { parts: 2, ..LIMITS };
        assert_eq!(Work::new(&rows, tight).expect("two parts").part_count(), 2);
        let none = WorkLimits { parts: 1, most: 500, ..LIMITS };
        assert_eq!(Work::new(&rows, none), None);
    }
}
