//! Cache positions: the four forms, their checks, and what they mean slot by slot. Pure host logic.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::host::rows::Rows;

/// Where `update` puts its T new tokens, counted from the oldest live token of the layer.
///
/// The length becomes max(old length, highest position + 1). Positions that were never written read
/// as zero. Where one call names a position twice, the later token (the one with the higher index
/// in T) stays.
///
/// The length of a layer whose rows differ is that of the longest row, or more if that row was selected away.
/// All forms but [`PerRow`](Self::PerRow) count from it, and make all rows as long as the layer, with zeros behind
/// those that were shorter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CachePosition<'a> {
    /// Behind the last live token.
    #[default]
    Append,
    /// One token at this position. T must be 1.
    At(u32),
    /// One position a token, the same for every batch row: T numbers.
    PerToken(&'a [u32]),
    /// One list a batch row, one position a token: B lists of T numbers. Each row has its own length, which
    /// becomes max(its old length, its highest position + 1): see
    /// [`LayerView::row_len`](crate::LayerView::row_len). [`Attention`](crate::Attention) sees the tokens of a row
    /// and no more, while [`get`](crate::KVCache::get) pads shorter rows with zeros.
    PerRow(&'a [Vec<u32>]),
}

impl From<u32> for CachePosition<'_> {
    fn from(position: u32) -> Self {
        Self::At(position)
    }
}

impl<'a> From<&'a [u32]> for CachePosition<'a> {
    fn from(positions: &'a [u32]) -> Self {
        Self::PerToken(positions)
    }
}

impl<'a> From<&'a [Vec<u32>]> for CachePosition<'a> {
    fn from(positions: &'a [Vec<u32>]) -> Self {
        Self::PerRow(positions)
    }
}

/// The position of a pair that writes nothing: it pads a shorter row.
pub(crate) const SKIP: u32 = u32::MAX;
/// Words of a list before its pairs.
const HEADER: usize = 2;

/// Which token goes to which position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WritePlan {
    /// Positions `first..first + zeros` become zero, and the T tokens follow in order.
    Run {
        first: u32,
        zeros: u32,
    },
    List(PositionList),
}

/// Positions in any order, for each batch row its own or the same for all. The positions of a row's gap that it
/// does not name become zero; the list only counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PositionList {
    /// As a kernel reads it. For each list two words, then `named` pairs (position, token), lowest position first.
    /// The second word is how many positions become zero, the first how many positions below them are not named:
    /// the i-th zero goes to the (first word + i)-th of all positions that are not named.
    pub(crate) words: Vec<u32>,
    /// Pairs a list: the same for every row.
    pub(crate) named: u32,
    /// Positions that become zero, at most.
    pub(crate) gap: u32,
    pub(crate) per_row: bool,
}

impl PositionList {
    /// Words from one list to the next.
    pub(crate) fn stride(&self) -> usize {
        HEADER + 2 * self.named as usize
    }

    fn list(&self, row: usize) -> &[u32] {
        let from = if self.per_row { row * self.stride() } else { 0 };
        &self.words[from..from + self.stride()]
    }

    /// The positions that row `row` names, lowest first.
    pub(crate) fn positions(&self, row: usize) -> impl Iterator<Item = u32> {
        let pairs = self.list(row)[HEADER..].chunks(2);
        pairs.map(|pair| pair[0]).take_while(|&position| position != SKIP)
    }

    /// From the first to the last position of row `row` that becomes zero. Those in between are named, or become
    /// zero as well.
    pub(crate) fn gap(&self, row: usize) -> Range<usize> {
        let [below, zeros] = [0, 1].map(|word| self.list(row)[word] as usize);
        let pairs = self.list(row)[HEADER..].chunks(2);
        // The search of the kernel: pair m, if it is not before the position sought, has more positions below it
        // that are not named.
        let unnamed = |i: usize| {
            let is_behind = |(m, pair): (usize, &[u32])| pair[0] as usize - m > i;
            i + pairs.clone().enumerate().position(is_behind).unwrap_or(self.named as usize)
        };
        if zeros == 0 { 0..0 } else { unnamed(below)..unnamed(below + zeros - 1) + 1 }
    }

    /// Positions written by each list, its gap included.
    fn written(&self) -> impl Iterator<Item = u64> {
        let lists = self.words.chunks(self.stride()).enumerate();
        lists.map(|(row, list)| self.positions(row).count() as u64 + u64::from(list[1]))
    }
}

impl WritePlan {
    /// The list, as a kernel reads it.
    pub(crate) fn list(&self) -> Option<&[u32]> {
        match self {
            Self::Run { .. } => None,
            Self::List(list) => Some(&list.words),
        }
    }

    /// Positions written in all of `batch` rows together.
    pub(crate) fn written(&self, batch: usize, tokens: usize) -> u64 {
        let in_all = |row: u64| (batch as u64).saturating_mul(row);
        match self {
            Self::Run { zeros, .. } => in_all(u64::from(*zeros) + tokens as u64),
            Self::List(list) if list.per_row => list.written().sum(),
            Self::List(list) => in_all(list.written().sum()),
        }
    }
}

/// Checks `position` for an update of `tokens` tokens in `batch` rows onto a layer with `len` live
/// tokens and, where it is fixed, at most `bound` of them. Returns the length after the update.
pub(crate) fn check(
    position: CachePosition<'_>,
    batch: usize,
    tokens: usize,
    len: usize,
    bound: Option<usize>,
) -> Result<usize> {
    let end = match position {
        CachePosition::Append => {
            let end = len.saturating_add(tokens);
            if let Some(bound) = bound.filter(|&bound| end > bound) {
                return Err(Error::SequenceTooLong { len, new_tokens: tokens, bound });
            }
            end
        }
        CachePosition::At(position) => {
            if tokens != 1 {
                return Err(Error::PositionCount {
                    form: "one number",
                    expected: "exactly one new token (T = 1)".into(),
                    got: format!("T = {tokens}"),
                });
            }
            end_of(&[position], bound)?
        }
        CachePosition::PerToken(positions) => {
            if positions.len() != tokens {
                return Err(Error::PositionCount {
                    form: "one list",
                    expected: format!("{tokens} positions, one for each new token"),
                    got: format!("{} positions", positions.len()),
                });
            }
            end_of(positions, bound)?
        }
        CachePosition::PerRow(rows) => {
            if rows.len() != batch {
                return Err(Error::PositionCount {
                    form: "a list for each row",
                    expected: format!("{batch} lists, one for each batch row"),
                    got: format!("{} lists", rows.len()),
                });
            }
            let mut end = 0;
            for (row, positions) in rows.iter().enumerate() {
                if positions.len() != tokens {
                    return Err(Error::PositionCount {
                        form: "a list for each row",
                        expected: format!(
                            "{tokens} positions in each list, one for each new token"
                        ),
                        got: format!("{} in the list of row {row}", positions.len()),
                    });
                }
                end = end.max(end_of(positions, bound)?);
            }
            end
        }
    };
    // The highest 32-bit value is a marker, and slots are counted from start on, up to twice a capacity.
    if end > (u32::MAX / 2) as usize {
        let limit = u64::from(u32::MAX / 2);
        return Err(Error::overflow("length of a row", length_asked(end), limit));
    }
    Ok(len.max(end))
}

/// Refuses positions of `tokens` tokens of `batch` rows whose list is longer than `limit` bytes, before it is
/// made.
pub(crate) fn check_list(
    position: CachePosition<'_>,
    [batch, tokens]: [usize; 2],
    rows: &Rows,
    limit: u64,
) -> Result<()> {
    let has_stale = rows.has_stale();
    let lists = match position {
        _ if has_stale => batch,
        CachePosition::Append | CachePosition::At(_) => return Ok(()),
        CachePosition::PerToken(_) => 1,
        CachePosition::PerRow(_) => batch,
    };
    let bytes = |lists: usize, named: usize| {
        (lists as u64).saturating_mul(8 * named as u64 + 4 * HEADER as u64)
    };
    if bytes(lists, tokens) <= limit || (!has_stale && run_of(position).is_some()) {
        return Ok(());
    }
    // Equal rows have one list, and a position named twice is in it once.
    let bytes = match position {
        _ if has_stale => bytes(lists, tokens),
        CachePosition::PerRow(rows) if !are_equal(rows) => {
            bytes(lists, rows.iter().map(|positions| distinct(positions)).max().unwrap_or(0))
        }
        CachePosition::PerRow(rows) => bytes(1, distinct(&rows[0])),
        CachePosition::PerToken(positions) => bytes(1, distinct(positions)),
        CachePosition::Append | CachePosition::At(_) => 0,
    };
    if bytes <= limit {
        return Ok(());
    }
    Err(Error::ListTooLarge {
        what: "the list of the positions that are named",
        bytes,
        limit,
        remedy: "name fewer positions in one update; consecutive positions that are the same for all rows need no list, unless rows were cut one by one",
    })
}

/// How many positions are named, in little memory: a window of them at a time.
fn distinct(positions: &[u32]) -> usize {
    const WINDOW: u32 = 1 << 23;
    let mut seen = vec![0_u64; WINDOW as usize / 64];
    let last = positions.iter().copied().max().unwrap_or(0) / WINDOW;
    let mut count = 0;
    for window in 0..=last {
        seen.fill(0);
        for position in positions.iter().filter(|&&position| position / WINDOW == window) {
            let place = (position % WINDOW) as usize;
            seen[place / 64] |= 1 << (place % 64);
        }
        count += seen.iter().map(|word| word.count_ones() as usize).sum::<usize>();
    }
    count
}

/// What goes where, for positions of `tokens` tokens of `batch` rows that [`check`] has passed: from `rows` to a
/// layer of `new_len` tokens. No longer than the positions that are named, whatever the gap.
pub(crate) fn plan_write(
    position: CachePosition<'_>,
    [batch, tokens]: [usize; 2],
    rows: &Rows,
    new_len: usize,
) -> WritePlan {
    let len = rows.len();
    if rows.has_stale() {
        // Zeros behind each row that was cut, so each has its own list.
        let lists: Vec<_> = (0..batch)
            .map(|row| {
                let positions = match position {
                    CachePosition::Append => (0..).take(tokens).map(|t| narrow(len) + t).collect(),
                    CachePosition::At(position) => vec![position],
                    CachePosition::PerToken(positions) => positions.to_vec(),
                    CachePosition::PerRow(rows) => rows[row].clone(),
                };
                let end = match position {
                    CachePosition::PerRow(_) => rows.span(row).len.max(highest(&positions) + 1),
                    _ => new_len,
                };
                (named(&positions), rows.gap(row, end, new_len))
            })
            .collect();
        return list(lists);
    }
    if let Some(first) = run_of(position) {
        return run(first, len);
    }
    let lists: Vec<Vec<[u32; 2]>> = match position {
        CachePosition::Append => return run(len, len),
        CachePosition::At(position) => return run(position as usize, len),
        CachePosition::PerToken(positions) => vec![named(positions)],
        CachePosition::PerRow(rows) if are_equal(rows) => vec![named(&rows[0])],
        CachePosition::PerRow(rows) => rows.iter().map(|positions| named(positions)).collect(),
    };
    list(lists.into_iter().map(|list| (list, len..new_len)).collect())
}

/// The rows after a write that [`check`] has passed, behind which the layer is `new_len` tokens long.
pub(crate) fn rows_after(position: CachePosition<'_>, rows: &Rows, new_len: usize) -> Rows {
    let CachePosition::PerRow(lists) = position else { return rows.written(new_len, None) };
    let ends: Vec<usize> = lists.iter().map(|positions| highest(positions) + 1).collect();
    rows.written(new_len, Some(&ends))
}

/// The plan of an append of some tokens of a source, `kept` in this order, behind `len` tokens of equal rows.
pub(crate) fn plan_kept(kept: &[u32], len: usize) -> WritePlan {
    let pairs = (narrow(len)..).zip(kept).map(|(position, &token)| [position, token]).collect();
    list(vec![(pairs, 0..0)])
}

/// Named positions and a gap a list, as a kernel reads them.
fn list(lists: Vec<(Vec<[u32; 2]>, Range<usize>)>) -> WritePlan {
    let longest = lists.iter().map(|(list, _)| list.len()).max().unwrap_or(0);
    let mut words = Vec::with_capacity(lists.len() * (HEADER + 2 * longest));
    let mut longest_gap = 0;
    for (list, gap) in &lists {
        let below = |end: usize| list.partition_point(|[position, _]| (*position as usize) < end);
        let before = below(gap.start);
        let zeros = gap.len() - (below(gap.end) - before);
        longest_gap = longest_gap.max(zeros);
        words.extend([gap.start - before, zeros].map(narrow));
        words.extend(list.as_flattened());
        words.extend([SKIP, 0].repeat(longest - list.len()));
    }
    WritePlan::List(PositionList {
        words,
        named: narrow(longest),
        gap: narrow(longest_gap),
        per_row: lists.len() > 1,
    })
}

/// The first of positions that are consecutive, and the same for all rows.
fn run_of(position: CachePosition<'_>) -> Option<usize> {
    let positions = match position {
        CachePosition::PerToken(positions) => positions,
        CachePosition::PerRow(rows) if are_equal(rows) => &rows[0],
        _ => return None,
    };
    let is_run = positions.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1]));
    is_run.then(|| positions[0] as usize)
}

fn are_equal(rows: &[Vec<u32>]) -> bool {
    rows.windows(2).all(|pair| pair[0] == pair[1])
}

/// Consecutive positions from `first` on, with zeros before them where they leave a gap.
fn run(first: usize, len: usize) -> WritePlan {
    let zeros = first.saturating_sub(len);
    WritePlan::Run { first: narrow(first - zeros), zeros: narrow(zeros) }
}

/// One past the highest of `positions`.
fn end_of(positions: &[u32], bound: Option<usize>) -> Result<usize> {
    let highest = highest(positions);
    match bound {
        Some(bound) if highest >= bound => {
            Err(Error::PositionOutOfBounds { position: highest, bound })
        }
        _ => Ok(highest.saturating_add(1)),
    }
}

fn highest(positions: &[u32]) -> usize {
    positions.iter().copied().max().unwrap_or(0) as usize
}

/// The positions that one row names, lowest first, each with its token: of a position named twice the later.
fn named(positions: &[u32]) -> Vec<[u32; 2]> {
    let mut named: Vec<[u32; 2]> =
        (0_u32..).zip(positions).map(|(token, &position)| [position, token]).collect();
    named.sort_unstable();
    // Of equal positions the last in order has the highest token: keep that one.
    named.reverse();
    named.dedup_by_key(|pair| pair[0]);
    named.reverse();
    named
}

/// `check` has made sure that every position and count fits.
fn narrow(value: usize) -> u32 {
    u32::try_from(value).expect("positions are checked to fit 32 bits")
}

fn length_asked(end: usize) -> String {
    match end {
        usize::MAX => format!("more than {} tokens", usize::MAX - 1),
        _ => format!("{end} tokens"),
    }
}

#[cfg(test)]
mod tests;
