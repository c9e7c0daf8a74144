//! What a step brings to the GPU: lists of its sequences, pages and positions, in one piece.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::gpu::arena::Allocation;
use crate::host::rows::Span;
use crate::host::sequences::StagedStep;
use crate::sequence::SequenceId;
use crate::view::StepWork;

/// Words that an array of a block is aligned to: 256 bytes, as every device can bind it.
const ALIGNMENT: usize = 64;

/// The records and pages of rows, as a shader reads them.
#[derive(Debug)]
pub(crate) struct RowLists {
    /// Four words a row (start, length, first word of its pages, zero), then the pages of all rows.
    pub(crate) words: Vec<u32>,
    pub(crate) spans: Arc<[Span]>,
}

impl RowLists {
    /// Of rows of these starts, lengths and pages.
    pub(crate) fn new<'a>(
        rows: impl ExactSizeIterator<Item = (usize, usize, &'a [u32])> + Clone,
    ) -> Self {
        let mut pages_at = 4 * rows.len();
        let mut words = Vec::with_capacity(pages_at);
        for (start, len, pages) in rows.clone() {
            words.extend([start, len, pages_at, 0].map(narrow));
            pages_at += pages.len();
        }
        rows.clone().for_each(|(_, _, pages)| words.extend(pages));
        let spans = rows.map(|(start, len, _)| Span { start, len }).collect();
        Self { words, spans }
    }
}

/// The lists of a step, as one piece of words, each array aligned.
#[derive(Debug)]
pub(crate) struct StepBlock {
    words: Vec<u32>,
    /// Words of the records and pages, at the beginning.
    records: usize,
    spans: Arc<[Span]>,
    /// Two words a token: its row and its position in the row.
    list: Range<usize>,
    arrays: [Range<usize>; 4],
}

/// An array of a step's block that engines bind.
#[derive(Clone, Copy, Debug)]
pub(crate) enum StepArray {
    /// The absolute position of each token.
    Positions,
    /// The sequence of each token, by its number in the step.
    Sequences,
    /// The first token of each sequence, and the number of tokens.
    Offsets,
    /// Live tokens of each sequence.
    Lengths,
}

impl StepBlock {
    pub(crate) fn new(step: &StagedStep) -> Self {
        let rows = step.rows.iter().map(|row| (row.start(), row.len(), row.pages()));
        let RowLists { mut words, spans } = RowLists::new(rows);
        let records = words.len();
        let mut add = |array: Vec<u32>| {
            words.resize(words.len().next_multiple_of(ALIGNMENT), 0);
            let begin = words.len();
            words.extend(array);
            begin..words.len()
        };
        let (mut list, mut positions, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
        for (number, row) in step.rows.iter().enumerate() {
            for at in 0..row.tokens.len() {
                list.extend([number, row.old_len + at].map(narrow));
                positions.push(narrow(row.position.saturating_add(at)));
                numbers.push(narrow(number));
            }
        }
        let list = add(list);
        let first = step.rows.iter().map(|row| narrow(row.tokens.start));
        let offsets: Vec<u32> = first.chain([narrow(step.total)]).collect();
        let lengths: Vec<u32> = step.rows.iter().map(|row| narrow(row.len())).collect();
        let arrays = [add(positions), add(numbers), add(offsets), add(lengths)];
        Self { words, records, spans, list, arrays }
    }

    pub(crate) fn words(&self) -> &[u32] {
        &self.words
    }
}

/// A step that was planned.
#[derive(Debug)]
pub(crate) struct StepData {
    /// The cache, and which step of it.
    pub(crate) number: [u64; 2],
    pub(crate) ids: Vec<SequenceId>,
    pub(crate) work: Arc<StepWork>,
    pub(crate) spans: Arc<[Span]>,
    pub(crate) allocation: Allocation,
    block: StepBlock,
}

impl StepData {
    pub(crate) fn new(
        number: [u64; 2],
        staged: &StagedStep,
        block: StepBlock,
        allocation: Allocation,
    ) -> Self {
        let work = StepWork {
            rows: staged.rows.iter().map(crate::host::sequences::StagedRow::work).collect(),
            total: staged.total,
            words: block.words[..block.records].into(),
            lists: Mutex::default(),
        };
        let ids = staged.rows.iter().map(|row| row.id).collect();
        let spans = Arc::clone(&block.spans);
        Self { number, ids, work: Arc::new(work), spans, allocation, block }
    }

    /// The word of the list of rows and positions, in its buffer.
    pub(crate) fn list_at(&self) -> u32 {
        self.allocation.offset / 4 + narrow(self.block.list.start)
    }

    /// An array, on the host.
    pub(crate) fn array(&self, array: StepArray) -> &[u32] {
        &self.block.words[self.block.arrays[array as usize].clone()]
    }

    /// An array, on the GPU: byte offset in the allocation's buffer, and bytes.
    pub(crate) fn binding(&self, array: StepArray) -> (u64, u64) {
        let Range { start, end } = &self.block.arrays[array as usize];
        let offset = u64::from(self.allocation.offset) + 4 * *start as u64;
        (offset, 4 * (end - start) as u64)
    }
}

/// Counts of a step are checked to fit 32 bits when it is planned; pages are fewer than a buffer has bytes.
fn narrow(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
