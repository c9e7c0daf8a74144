//! Every small update, beside what each row must hold.

use super::*;
use crate::host::rows::Span;

/// What one row holds after `writes`: `None` a position that was not live and was not written,
/// otherwise old token (negative), new token, or zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Stale,
    Old(u32),
    Zero,
    New(u32),
}

struct Writes {
    len: usize,
    plan: WritePlan,
}

fn resolve(
    position: CachePosition<'_>,
    batch: usize,
    tokens: usize,
    len: usize,
    bound: Option<usize>,
) -> Result<Writes> {
    let new_len = check(position, batch, tokens, len, bound)?;
    let rows = Rows::Equal(Span { start: 0, len });
    Ok(Writes { len: new_len, plan: plan_write(position, [batch, tokens], &rows, new_len) })
}

/// What the threads of a kernel do, one for each position that it visits.
fn apply(writes: &Writes, row: usize, tokens: u32, len: usize) -> Vec<Content> {
    let mut content: Vec<Content> = (0..).take(len).map(Content::Old).collect();
    content.resize(writes.len, Content::Stale);
    let mut written = vec![false; writes.len];
    let mut count = 0;
    let visited_positions = match &writes.plan {
        WritePlan::Run { zeros, .. } => zeros + tokens,
        WritePlan::List(list) => list.named + list.gap,
    };
    for entry in 0..visited_positions {
        let (position, token) = match &writes.plan {
            WritePlan::Run { first, zeros } => (first + entry, entry.checked_sub(*zeros)),
            WritePlan::List(list) => match visited(list, row, entry) {
                Some(pair) => pair,
                None => continue,
            },
        };
        let position = position as usize;
        assert!(!written[position], "position {position} written twice in one dispatch");
        written[position] = true;
        count += 1;
        content[position] = token.map_or(Content::Zero, Content::New);
    }
    if !matches!(&writes.plan, WritePlan::List(list) if list.per_row) {
        assert_eq!(writes.plan.written(2, tokens as usize), 2 * count);
    }
    content
}

/// The position of an entry of a list and the token for it, as `append.wgsl` finds them.
fn visited(list: &PositionList, row: usize, entry: u32) -> Option<(u32, Option<u32>)> {
    let list_at = if list.per_row { row * list.stride() } else { 0 };
    let pair = |index: u32| &list.words[list_at + 2 + 2 * index as usize..][..2];
    if entry < list.named {
        let pair = pair(entry);
        return (pair[0] != SKIP).then_some((pair[0], Some(pair[1])));
    }
    let [below, zeros] = [0, 1].map(|word| list.words[list_at + word]);
    let entry = entry - list.named;
    let unnamed = below + entry;
    let (mut low, mut high) = (0, list.named);
    while low < high {
        let middle = (low + high) / 2;
        if pair(middle)[0] - middle <= unnamed {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    (entry < zeros).then(|| {
        let position = unnamed + low;
        assert!(list.gap(row).contains(&(position as usize)), "row {row}, {list:?}");
        (position, None)
    })
}

fn expected(positions: &[u32], len: usize, new_len: usize) -> Vec<Content> {
    let mut content: Vec<Content> = (0..).take(len).map(Content::Old).collect();
    content.resize(new_len, Content::Zero);
    for (token, &position) in (0..).zip(positions) {
        content[position as usize] = Content::New(token);
    }
    content
}

/// Every list of up to 3 positions below 6, on every length up to 5.
#[test]
fn every_small_list_writes_each_position_once_and_right() {
    for tokens in 1..=3_u32 {
        for code in 0..6_u32.pow(tokens) {
            let positions: Vec<u32> = (0..tokens).map(|i| code / 6_u32.pow(i) % 6).collect();
            for len in 0..=5 {
                let writes =
                    resolve(CachePosition::PerToken(&positions), 2, tokens as usize, len, Some(6))
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
                    let at = resolve(CachePosition::PerToken(&list), 1, tokens, len, Some(bound));
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
    assert_eq!(run.plan, WritePlan::Run { first: 3, zeros: 4 });
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

/// Rows that were cut one by one: zeros between each row's own end and what is written, as the kernel finds them.
#[test]
fn a_row_that_was_cut_gets_zeros_from_its_own_end_on() {
    use crate::host::rows::Cut;
    let rows = Rows::Equal(Span { start: 0, len: 6 }).cut(&Cut::TruncateRows(vec![6, 2]), 9);
    let lists = [vec![6, 7], vec![5, 3]];
    for (position, ends) in [
        (CachePosition::Append, [8, 8]),
        (CachePosition::PerToken(&[6, 7]), [8, 8]),
        (CachePosition::PerRow(&lists), [8, 6]),
    ] {
        let new_len = check(position, 2, 2, 6, None).unwrap();
        let plan = plan_write(position, [2, 2], &rows, new_len);
        let after = rows_after(position, &rows, new_len);
        assert_eq!([0, 1].map(|row| after.span(row).len), ends);
        let writes = Writes { len: new_len, plan };
        let content = apply(&writes, 1, 2, 2);
        let due = match position {
            CachePosition::PerRow(_) => expected(&lists[1], 2, 6),
            _ => expected(&[6, 7], 2, 8),
        };
        assert_eq!(content[..ends[1]], due, "{position:?}");
        assert!(content[ends[1]..].iter().all(|&it| it == Content::Stale), "{position:?}");
        assert_eq!(apply(&writes, 0, 2, 6)[..6], expected(&[], 6, 6), "{position:?}");
        let limit = 2 * (8 + 16);
        assert_eq!(check_list(position, [2, 2], &rows, limit), Ok(()));
        assert!(check_list(position, [2, 2], &rows, limit - 1).is_err());
    }
}
