//! Cache positions: the four forms, their checks, and what they mean slot by slot. Pure host logic.

use crate::error::{Error, Result};

/// Where `update` puts its T new tokens, counted from the oldest live token of the layer.
///
/// The length becomes max(old length, highest position + 1). Positions that were never written read
/// as zero. Where one call names a position twice, the later token (the one with the higher index
/// in T) stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePosition<'a> {
    /// Behind the last live token.
    #[default]
    Append,
    /// One token at this position. T must be 1.
    At(u32),
    /// One position a token, the same for every batch row: T numbers.
    PerToken(&'a [u32]),
    /// One list a batch row, one position a token: B lists of T numbers. For rows that have gone
    /// different ways, as in continuous batching.
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

/// An entry whose token is this one writes zeros: the position lies in a gap.
pub(crate) const ZERO: u32 = u32::MAX;
/// An entry whose position is this one writes nothing: it pads a shorter row.
pub(crate) const SKIP: u32 = u32::MAX;

/// Which token goes to which position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Positions `first..first + zeros` become zero, and the T tokens follow in order.
    Run { first: u32, zeros: u32 },
    /// (position, token) pairs; `per_row` entries for each batch row, or one list for all rows.
    List {
        entries: Vec<[u32; 2]>,
        /// Entries a list: the same for every row.
        count: u32,
        per_row: bool,
    },
}

impl Order {
    /// Entries a batch row: how many positions each row visits.
    pub(crate) fn count(&self, tokens: u32) -> u32 {
        match self {
            Self::Run { zeros, .. } => zeros + tokens,
            Self::List { count, .. } => *count,
        }
    }

    /// The list, as a kernel reads it.
    pub(crate) fn list(&self) -> Option<&[u32]> {
        match self {
            Self::Run { .. } => None,
            Self::List { entries, .. } => Some(entries.as_flattened()),
        }
    }

    /// Positions written in all of `batch` rows together.
    pub(crate) fn written(&self, batch: usize, tokens: usize) -> usize {
        match self {
            Self::Run { zeros, .. } => batch * (*zeros as usize + tokens),
            Self::List { entries, per_row: true, .. } => {
                entries.iter().filter(|[position, _]| *position != SKIP).count()
            }
            Self::List { entries, per_row: false, .. } => batch * entries.len(),
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
        return Err(Error::SizeOverflow { what: "sequence length" });
    }
    Ok(len.max(end))
}

/// What goes where, for positions that [`check`] has passed: from `len` live tokens to `new_len`.
pub(crate) fn order(position: CachePosition<'_>, len: usize, new_len: usize) -> Order {
    match position {
        CachePosition::Append => run(len, len),
        CachePosition::At(position) => run(position as usize, len),
        CachePosition::PerToken(positions) => {
            if positions.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1])) {
                return run(positions[0] as usize, len);
            }
            let entries = entries(positions, len, new_len);
            Order::List { count: narrow(entries.len()), entries, per_row: false }
        }
        CachePosition::PerRow(rows) => {
            if rows.windows(2).all(|pair| pair[0] == pair[1]) {
                return order(CachePosition::PerToken(&rows[0]), len, new_len);
            }
            let mut lists: Vec<Vec<[u32; 2]>> =
                rows.iter().map(|positions| entries(positions, len, new_len)).collect();
            let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
            for list in &mut lists {
                list.resize(longest, [SKIP, ZERO]);
            }
            Order::List { entries: lists.concat(), count: narrow(longest), per_row: true }
        }
    }
}

/// Consecutive positions from `first` on, with zeros before them where they leave a gap.
fn run(first: usize, len: usize) -> Order {
    let zeros = first.saturating_sub(len);
    Order::Run { first: narrow(first - zeros), zeros: narrow(zeros) }
}

/// One past the highest of `positions`.
fn end_of(positions: &[u32], bound: Option<usize>) -> Result<usize> {
    let highest = positions.iter().copied().max().unwrap_or(0) as usize;
    match bound {
        Some(bound) if highest >= bound => {
            Err(Error::PositionOutOfBounds { position: highest, bound })
        }
        _ => Ok(highest.saturating_add(1)),
    }
}

/// The entries of one row, by position: of a position named twice only the later token, and zeros for
/// the positions from the old length to the new one that no token is for.
fn entries(positions: &[u32], len: usize, new_len: usize) -> Vec<[u32; 2]> {
    let mut named: Vec<[u32; 2]> =
        (0_u32..).zip(positions).map(|(token, &position)| [position, token]).collect();
    named.sort_unstable();
    // Of equal positions the last in order has the highest token: keep that one.
    let mut entries: Vec<[u32; 2]> = Vec::with_capacity(named.len());
    for entry in named {
        match entries.last_mut() {
            Some(last) if last[0] == entry[0] => *last = entry,
            _ => entries.push(entry),
        }
    }
    let mut is_named = vec![false; new_len - len];
    for [position, _] in &entries {
        if let Some(flag) = (*position as usize).checked_sub(len).and_then(|i| is_named.get_mut(i))
        {
            *flag = true;
        }
    }
    let gap = (len..new_len).zip(is_named).filter(|(_, named)| !named);
    entries.extend(gap.filter_map(|(position, _)| Some([u32::try_from(position).ok()?, ZERO])));
    entries
}

/// `check` has made sure that every position and count fits.
fn narrow(value: usize) -> u32 {
    u32::try_from(value).expect("positions are checked to fit 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What one row holds after `writes`: `None` a position that was not live and was not written,
    /// otherwise old token (negative), new token, or zero.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Held {
        Stale,
        Old(u32),
        Zero,
        New(u32),
    }

    struct Writes {
        len: usize,
        order: Order,
    }

    fn resolve(
        position: CachePosition<'_>,
        batch: usize,
        tokens: usize,
        len: usize,
        bound: Option<usize>,
    ) -> Result<Writes> {
        let new_len = check(position, batch, tokens, len, bound)?;
        Ok(Writes { len: new_len, order: order(position, len, new_len) })
    }

    fn apply(writes: &Writes, row: usize, tokens: u32, len: usize) -> Vec<Held> {
        let mut held: Vec<Held> = (0..).take(len).map(Held::Old).collect();
        held.resize(writes.len, Held::Stale);
        let entries: Vec<[u32; 2]> = match &writes.order {
            Order::Run { first, zeros } => (0..zeros + tokens)
                .map(|i| [first + i, if i < *zeros { ZERO } else { i - zeros }])
                .collect(),
            Order::List { entries, count, per_row } => {
                let from = if *per_row { row * *count as usize } else { 0 };
                entries[from..from + *count as usize].to_vec()
            }
        };
        let mut written = vec![false; writes.len];
        for [position, token] in entries {
            if position == SKIP {
                continue;
            }
            let position = position as usize;
            assert!(!written[position], "position {position} written twice in one dispatch");
            written[position] = true;
            held[position] = if token == ZERO { Held::Zero } else { Held::New(token) };
        }
        held
    }

    fn expected(positions: &[u32], len: usize, new_len: usize) -> Vec<Held> {
        let mut held: Vec<Held> = (0..).take(len).map(Held::Old).collect();
        held.resize(new_len, Held::Zero);
        for (token, &position) in (0..).zip(positions) {
            held[position as usize] = Held::New(token);
        }
        held
    }

    /// Every list of up to 3 positions below 6, on every length up to 5.
    #[test]
    fn every_small_list_writes_each_position_once_and_right() {
        for tokens in 1..=3_u32 {
            for code in 0..6_u32.pow(tokens) {
                let positions: Vec<u32> = (0..tokens).map(|i| code / 6_u32.pow(i) % 6).collect();
                for len in 0..=5 {
                    let writes = resolve(
                        CachePosition::PerToken(&positions),
                        2,
                        tokens as usize,
                        len,
                        Some(6),
                    )
                    .unwrap();
                    let end = *positions.iter().max().unwrap() as usize + 1;
                    assert_eq!(writes.len, len.max(end));
                    assert_eq!(
                        apply(&writes, 0, tokens, len),
                        expected(&positions, len, writes.len),
                        "positions {positions:?}, len {len}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_small_pair_of_rows_is_right_for_both_rows() {
        for code in 0..5_u32.pow(4) {
            let digit = |i: u32| code / 5_u32.pow(i) % 5;
            let rows = [vec![digit(0), digit(1)], vec![digit(2), digit(3)]];
            for len in 0..=4 {
                let writes = resolve(CachePosition::PerRow(&rows), 2, 2, len, None).unwrap();
                let end = *rows.iter().flatten().max().unwrap() as usize + 1;
                assert_eq!(writes.len, len.max(end));
                for (row, positions) in rows.iter().enumerate() {
                    assert_eq!(
                        apply(&writes, row, 2, len),
                        expected(positions, len, writes.len),
                        "rows {rows:?}, row {row}, len {len}"
                    );
                }
            }
        }
    }

    /// Every append and every single position for lengths and bounds up to 12.
    #[test]
    fn bounds_hold_for_every_small_run() {
        for bound in 1..=12_usize {
            for len in 0..=bound {
                for tokens in 1..=12_usize {
                    let appended = resolve(CachePosition::Append, 1, tokens, len, Some(bound));
                    assert_eq!(appended.is_ok(), len + tokens <= bound);
                    for first in 0..=12_u32 {
                        let list: Vec<u32> = (first..).take(tokens).collect();
                        let at =
                            resolve(CachePosition::PerToken(&list), 1, tokens, len, Some(bound));
                        assert_eq!(at.is_ok(), first as usize + tokens <= bound);
                    }
                }
            }
        }
    }

    #[test]
    fn lists_that_say_the_same_as_a_run_become_one() {
        let run = resolve(CachePosition::PerRow(&[vec![7, 8], vec![7, 8]]), 2, 2, 3, None).unwrap();
        assert_eq!(run.len, 9);
        assert_eq!(run.order, Order::Run { first: 3, zeros: 4 });
    }

    #[test]
    fn wrong_counts_and_far_positions_are_refused() {
        let rows = [vec![0], vec![0]];
        assert!(resolve(CachePosition::At(0), 1, 2, 0, None).is_err());
        assert!(resolve(CachePosition::PerToken(&[0, 1]), 1, 3, 0, None).is_err());
        assert!(resolve(CachePosition::PerToken(&[]), 1, 1, 0, None).is_err());
        assert!(resolve(CachePosition::PerRow(&rows), 3, 1, 0, None).is_err());
        assert!(resolve(CachePosition::PerRow(&rows), 2, 2, 0, None).is_err());
        assert!(resolve(CachePosition::PerRow(&[]), 1, 1, 0, None).is_err());
        assert!(resolve(CachePosition::At(u32::MAX), 1, 1, 0, None).is_err());
        let error = check(CachePosition::At(9), 1, 1, 0, Some(8)).unwrap_err().to_string();
        assert!(error.contains('9') && error.contains('8'), "{error}");
    }
}
