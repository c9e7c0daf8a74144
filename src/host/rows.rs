//! The start and length of each batch row. Pure host logic.

use std::ops::Range;
use std::sync::Arc;

use crate::host::plan::cropped;

/// The live tokens of one row: token t lies at slot `start + t`, in a ring modulo its capacity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Span {
    /// Slot of the oldest live token.
    pub(crate) start: usize,
    /// Live tokens.
    pub(crate) len: usize,
}

/// One row of a ragged layer. Behind its live tokens, up to the length of the layer, its slots hold garbage
/// below position `stale` and zeros from there on.
///
/// ```text
/// layer of 8 tokens, span.len 3, stale 5     | 0  1  2 |  x  x | 0  0  0 |
///                                              live      stale   zeros
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) span: Span,
    /// Zero if all of these slots hold zeros.
    stale: usize,
}

impl Row {
    fn new(start: usize, len: usize, stale: usize) -> Self {
        Self { span: Span { start, len }, stale: if stale > len { stale } else { 0 } }
    }
}

/// A cut of all rows, which moves no bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Keeps the latest tokens, up to this length of the layer.
    Crop(usize),
    /// Keeps the first tokens.
    Truncate(usize),
    /// Keeps the latest tokens of each row, up to its own number.
    CropRows(Vec<usize>),
    /// Keeps the first tokens of each row, up to its own number.
    TruncateRows(Vec<usize>),
}

/// Start and length of all rows of a layer: an immutable value, so a clone costs nothing.
///
/// The layer has a length of its own, which `get` pads shorter rows to. A row is never longer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// All rows have this span, and the layer its length.
    Equal(Span),
    Ragged(Arc<Ragged>),
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ragged {
    /// Length of the layer.
    len: usize,
    rows: Vec<Row>,
}

impl Default for Rows {
    fn default() -> Self {
        Self::Equal(Span::default())
    }
}

impl Rows {
    /// Rows of a layer of `len` tokens: equal if they are.
    fn of(len: usize, rows: Vec<Row>) -> Self {
        if len == 0 {
            return Self::default();
        }
        let first = Span { len, ..rows[0].span };
        if rows.iter().all(|row| row.span == first) {
            return Self::Equal(first);
        }
        Self::Ragged(Arc::new(Ragged { len, rows }))
    }

    /// Length of the layer.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Equal(span) => span.len,
            Self::Ragged(ragged) => ragged.len,
        }
    }

    pub(crate) fn span(&self, row: usize) -> Span {
        self.row(row).span
    }

    fn row(&self, row: usize) -> Row {
        match self {
            Self::Equal(span) => Row { span: *span, stale: 0 },
            Self::Ragged(ragged) => ragged.rows[row],
        }
    }

    /// The start that all rows have; `None` if they differ.
    pub(crate) fn start(&self) -> Option<usize> {
        let [least, most] = self.starts();
        (least == most).then_some(least)
    }

    /// The least and the highest start.
    pub(crate) fn starts(&self) -> [usize; 2] {
        match self {
            Self::Equal(span) => [span.start; 2],
            Self::Ragged(ragged) => {
                let starts = || ragged.rows.iter().map(|row| row.span.start);
                [starts().min().unwrap_or(0), starts().max().unwrap_or(0)]
            }
        }
    }

    /// Whether slots behind a row, within the length of the layer, hold garbage.
    pub(crate) fn has_stale(&self) -> bool {
        matches!(self, Self::Ragged(ragged) if ragged.rows.iter().any(|row| row.stale > 0))
    }

    /// The spans of rows that are not equal.
    pub(crate) fn spans(&self) -> Option<Arc<[Span]>> {
        match self {
            Self::Equal(_) => None,
            Self::Ragged(ragged) => Some(ragged.rows.iter().map(|row| row.span).collect()),
        }
    }

    /// The records of rows that are not equal, as `layout/rows_ragged.wgsl` reads them: start, length, first
    /// word of the row's pages (`stride` words a row) and zero. Empty if rows are equal.
    pub(crate) fn records(&self, stride: usize) -> Vec<u32> {
        let Self::Ragged(ragged) = self else { return Vec::new() };
        let narrow = |n: usize| u32::try_from(n).expect("what can be bound is counted in 32 bits");
        let record = |(b, row): (usize, &Row)| {
            [narrow(row.span.start), narrow(row.span.len), narrow(b * stride), 0]
        };
        ragged.rows.iter().enumerate().flat_map(record).collect()
    }

    /// The positions of row `row` that a write turns to zero, if it does not name them. The row is `end` tokens
    /// long afterwards, the layer `new_len`.
    pub(crate) fn gap(&self, row: usize, end: usize, new_len: usize) -> Range<usize> {
        let row = self.row(row);
        // Zeros already lie between a row that is not stale and the end of the layer, and stay the rule behind it.
        if row.stale > 0 { row.span.len..end } else { self.len()..new_len }
    }

    /// The rows after a write, behind which the layer is `new_len` tokens long. `ends` are one past the highest
    /// position that each row names; `None` if all rows become as long as the layer.
    pub(crate) fn written(&self, new_len: usize, ends: Option<&[usize]>) -> Self {
        match (self, ends) {
            (Self::Equal(span), None) => Self::Equal(Span { len: new_len, ..*span }),
            (Self::Equal(span), Some(ends))
                if ends.iter().all(|&end| end.max(span.len) == new_len) =>
            {
                Self::Equal(Span { len: new_len, ..*span })
            }
            (Self::Ragged(ragged), None) => {
                let whole = |row: &Row| Row::new(row.span.start, new_len, 0);
                Self::of(new_len, ragged.rows.iter().map(whole).collect())
            }
            (_, Some(ends)) => {
                let longer = |(row, &end): (usize, &usize)| {
                    let Row { span, stale } = self.row(row);
                    // The write of a stale row ends with the row: what is new of the layer is stale as well.
                    let stale = if stale > 0 && new_len > self.len() { new_len } else { stale };
                    Row::new(span.start, span.len.max(end), stale)
                };
                Self::of(new_len, ends.iter().enumerate().map(longer).collect())
            }
        }
    }

    /// Whether a cut changes anything.
    pub(crate) fn is_changed_by(&self, cut: &Cut) -> bool {
        match cut {
            Cut::Crop(len) | Cut::Truncate(len) => self.len() > *len,
            Cut::CropRows(lens) | Cut::TruncateRows(lens) => {
                let spans = || (0..lens.len()).map(|row| self.span(row).len);
                spans().zip(lens).any(|(len, &most)| len > most)
                    || spans().max() != Some(self.len())
            }
        }
    }

    /// The rows after a cut. Slots count modulo `capacity`.
    pub(crate) fn cut(&self, cut: &Cut, capacity: usize) -> Self {
        let len = self.len();
        match (cut, self) {
            (Cut::Crop(most), Self::Equal(span)) => {
                let (start, len) = cropped(span.start, len, capacity, *most);
                Self::Equal(Span { start, len })
            }
            (Cut::Truncate(most), Self::Equal(span)) => {
                Self::Equal(Span { len: len.min(*most), ..*span })
            }
            (Cut::Crop(most), Self::Ragged(ragged)) => {
                let dropped = len - len.min(*most);
                let crop = |&Row { span, stale }: &Row| {
                    let start = (span.start + dropped) % capacity;
                    let [len, stale] = [span.len, stale].map(|end| end.saturating_sub(dropped));
                    Row::new(start, len, stale)
                };
                Self::of(len - dropped, ragged.rows.iter().map(crop).collect())
            }
            (Cut::Truncate(most), Self::Ragged(ragged)) => {
                let truncate = |&Row { span, stale }: &Row| {
                    Row::new(span.start, span.len.min(*most), stale.min(*most))
                };
                Self::of(len.min(*most), ragged.rows.iter().map(truncate).collect())
            }
            (Cut::TruncateRows(lens), _) => {
                let kept = |row: usize| self.span(row).len.min(lens[row]);
                let new_len = (0..lens.len()).map(kept).max().unwrap_or(0);
                let truncate = |row: usize| {
                    let Row { span, stale } = self.row(row);
                    Row::new(span.start, kept(row), stale.max(span.len).min(new_len))
                };
                Self::of(new_len, (0..lens.len()).map(truncate).collect())
            }
            (Cut::CropRows(lens), _) => {
                let kept = |row: usize| self.span(row).len.min(lens[row]);
                let new_len = (0..lens.len()).map(kept).max().unwrap_or(0);
                let crop = |row: usize| {
                    let Row { span, stale } = self.row(row);
                    let dropped = span.len - kept(row);
                    let start = (span.start + dropped) % capacity;
                    // Of a row that starts later, the end of the layer is where it never was.
                    let is_new = len - dropped < new_len;
                    let stale = if is_new { new_len } else { stale.saturating_sub(dropped) };
                    Row::new(start, kept(row), stale.min(new_len))
                };
                Self::of(new_len, (0..lens.len()).map(crop).collect())
            }
        }
    }

    /// New row `i` is old row `map[i]`. The layer keeps its length.
    pub(crate) fn select(&self, map: &[u32]) -> Self {
        let Self::Ragged(ragged) = self else { return self.clone() };
        let rows = map.iter().map(|&from| ragged.rows[from as usize]).collect();
        Self::of(ragged.len, rows)
    }

    /// The rows with other starts.
    pub(crate) fn moved(&self, start: impl Fn(usize) -> usize) -> Self {
        match self {
            Self::Equal(span) => Self::Equal(Span { start: start(span.start), ..*span }),
            Self::Ragged(ragged) => {
                let moved = |row: &Row| Row::new(start(row.span.start), row.span.len, row.stale);
                Self::of(ragged.len, ragged.rows.iter().map(moved).collect())
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
