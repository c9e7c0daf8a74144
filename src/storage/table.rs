//! Page tables on the GPU: one for all layers that advance together, written word by word.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::arena::{Allocation, RegionGuard};
use crate::gpu::device::binding_limit;
use crate::gpu::kernels::MOST_MOVES;
use crate::host::pages::{PageMap, Written};
use crate::host::plan::{self, MoveList};
use crate::host::position::WritePlan;
use crate::host::rows::{Cut, Rows};
use crate::host::words::Words;
use crate::storage::records::{self, Records, word};
use crate::view::{PageTable, RowTable};

/// Changes that are remembered: enough for an engine that runs a few steps of a layer before the next.
const REMEMBERED: usize = 4;
/// Pages up to which debug builds recount them after every change.
const RECOUNTED: usize = 4096;
/// Bytes of a table that is laid out at once for the longest rows that there may be.
const SMALL_BYTES: usize = 256 << 10;
/// Words of a table that take as long to write as a write of its own.
const WORDS_A_WRITE: usize = 256;

/// The pages of a layer's rows, on the host and on the GPU: a value that never changes.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(crate) map: PageMap,
    /// `None` where no row ever had a page.
    region: Option<Arc<Region>>,
    /// Of ragged rows.
    records: Records,
}

/// Where tables lie that have grown out of one another. Each word is written once: so the tables of before,
/// which recorded passes may read, stay as they are, and a new page is a word behind them.
#[derive(Debug)]
struct Region {
    allocation: Allocation,
    written: Mutex<RegionWords>,
}

/// What was written into a region.
#[derive(Debug)]
struct RegionWords {
    words: Words,
    /// How many words of each row are written.
    end: usize,
}

/// A change of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    Write { plan: WritePlan, count: usize, rows: Rows },
    Select(Vec<u32>),
    Reserve(usize),
    Cut(Cut),
}

/// A change that was made of a table.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    from: Arc<Table>,
    change: Change,
    pub(crate) to: Arc<Table>,
    /// Pages to copy first.
    pub(crate) copies: Arc<[MoveList]>,
    /// Word of the list of positions, in the buffer of the table.
    pub(crate) list_at: u32,
}

/// Tables of one page size, and their latest changes.
///
/// A change of a table is worked out once: the next layer with the same table and the same change finds it
/// here. So layers that advance together share one table, on the host and on the GPU, and a layer that goes its
/// own way simply has another.
#[derive(Debug)]
pub(crate) struct Tables {
    /// Tokens of a page: a power of two.
    page_tokens: usize,
    /// The most pages of a row, where that is fixed.
    most_row_pages: Option<usize>,
    /// The table of a layer that was never written.
    empty: Option<Arc<Table>>,
    /// The latest last.
    steps: VecDeque<Step>,
}

impl Tables {
    pub(crate) fn new(page_tokens: usize, most_row_pages: Option<usize>) -> Self {
        Self { page_tokens, most_row_pages, empty: None, steps: VecDeque::new() }
    }

    pub(crate) fn empty(&mut self, batch: usize) -> Arc<Table> {
        if let Some(empty) = self.empty.as_ref().filter(|empty| empty.map.batch() == batch) {
            return Arc::clone(empty);
        }
        let map = PageMap::new(self.page_tokens, batch);
        Arc::clone(self.empty.insert(Arc::new(Table {
            map,
            region: None,
            records: Records::default(),
        })))
    }

    /// Makes `change` of the table `from`, or finds that it was made.
    fn step<E>(
        &mut self,
        from: &Arc<Table>,
        change: Change,
        make: impl FnOnce(&mut Table) -> Result<(Arc<[MoveList]>, u32), E>,
    ) -> Result<Step, E> {
        let is_it = |step: &&Step| Arc::ptr_eq(&step.from, from) && step.change == change;
        if let Some(step) = self.steps.iter().rev().find(is_it) {
            return Ok(step.clone());
        }
        let mut to = Table { records: Records::default(), ..Table::clone(from) };
        let (copies, list_at) = make(&mut to)?;
        debug_assert!(
            to.map.pool_pages().max(to.map.table().len()) > RECOUNTED || to.map.is_sound(),
            "a recount of the pages agrees: {:?}",
            to.map
        );
        if self.steps.len() == REMEMBERED {
            self.steps.pop_front();
        }
        let step = Step { from: Arc::clone(from), change, to: Arc::new(to), copies, list_at };
        self.steps.push_back(step.clone());
        Ok(step)
    }

    /// Makes room for new tokens: `count` of each row, after which rows are as `rows` says.
    pub(crate) fn write(
        &mut self,
        gpu: &Gpu,
        from: &Arc<Table>,
        plan: &WritePlan,
        count: usize,
        rows: Rows,
    ) -> Result<Step> {
        let list = plan.list().unwrap_or_default();
        let spare = records::beside(&rows, 0, list).len();
        let stride = self.stride(gpu, &from.map, rows.len(), spare)?;
        let change = Change::Write { plan: plan.clone(), count, rows: rows.clone() };
        self.step(from, change, |table| {
            let written = table.map.write(plan, count, rows.clone(), stride);
            let words = records::beside(&rows, table.map.stride(), list);
            let at = table.upload(gpu, &written, &words)?;
            table.records = table.records_at(at, &rows);
            let list_at = at + word(words.len() - list.len());
            Ok((plan::list_copies(&written.copies, MOST_MOVES).into(), list_at))
        })
    }

    /// Lays the table out for rows of `new_len` tokens, so that appends up to that length need no other.
    pub(crate) fn reserve(
        &mut self,
        gpu: &Gpu,
        from: &Arc<Table>,
        new_len: usize,
    ) -> Result<Arc<Table>> {
        let stride = self.stride(gpu, &from.map, new_len, 0)?;
        if from.map.first() + from.map.pages_of(new_len) <= from.map.stride() {
            return Ok(Arc::clone(from));
        }
        let step = self.step(from, Change::Reserve(new_len), |table| {
            table.map.lay_out(stride);
            table.put(gpu, 0)?;
            Ok::<_, Error>((Arc::new([]), 0))
        });
        step.map(|step| step.to)
    }

    /// New row `i` becomes old row `rows[i]`.
    pub(crate) fn select(
        &mut self,
        gpu: &Gpu,
        from: &Arc<Table>,
        rows: &[u32],
    ) -> Result<Arc<Table>> {
        let step = self.step(from, Change::Select(rows.to_vec()), |table| {
            table.map.select(rows);
            if table.map.row_pages() > 0 {
                table.put(gpu, 0)?;
            }
            Ok::<_, Error>((Arc::new([]), 0))
        });
        step.map(|step| step.to)
    }

    /// Cuts all rows. The GPU's table stays as it is, and may be entered further on.
    pub(crate) fn cut(&mut self, from: &Arc<Table>, cut: &Cut) -> Arc<Table> {
        let Ok(step) = self.step::<Infallible>(from, Change::Cut(cut.clone()), |table| {
            table.map.cut(cut);
            Ok((Arc::new([]), 0))
        });
        step.to
    }

    /// Words of a row for a table that has to hold rows of `new_len` tokens, and has room for more of them, so
    /// that it is laid out anew seldom. Refuses one that is more than can be bound, with a list of `list` words.
    fn stride(&self, gpu: &Gpu, map: &PageMap, new_len: usize, list: usize) -> Result<usize> {
        let (batch, pages) = (map.batch(), map.pages_of(new_len));
        let fits = check_table(gpu, batch, pages, list)? / batch;
        let most = self.most_row_pages.unwrap_or(usize::MAX);
        let is_small = batch.saturating_mul(most).saturating_mul(4) <= SMALL_BYTES;
        let roomy = pages.saturating_mul(2).max(if is_small { most } else { 8 });
        Ok(roomy.min(fits).max(pages))
    }
}

/// Refuses a table of `pages` pages a row, with a list of `list` words behind it, that cannot be bound. Returns
/// how many words the table may have.
pub(crate) fn check_table(gpu: &Gpu, batch: usize, pages: usize, list: usize) -> Result<usize> {
    let limit = binding_limit(gpu.limits());
    // The list begins at an aligned offset, and what is behind it is aligned as well.
    let spare = if list == 0 { 0 } else { 4 * list as u64 + 512 };
    let room = limit.saturating_sub(spare);
    // A row that has no page yet gets one with its next token.
    let bytes = (batch as u64).saturating_mul(pages.max(1) as u64).saturating_mul(4);
    if bytes > room {
        return Err(Error::ListTooLarge {
            what: "the table of the pages of all rows",
            bytes: bytes.saturating_add(spare),
            limit,
            remedy: "use fewer rows, shorter ones, or larger pages",
        });
    }
    Ok(usize::try_from(room / 4).unwrap_or(usize::MAX))
}

impl Table {
    /// The table as a view shows it.
    pub(crate) fn page_table(&self) -> Option<PageTable> {
        let region = self.region.as_deref()?;
        Some(PageTable {
            allocation: region.allocation.clone(),
            at: region.allocation.offset / 4 + word(self.map.first()),
            stride: word(self.map.stride()),
        })
    }

    /// The table and the records of ragged rows as a view shows them, in one buffer.
    pub(crate) fn shown(&self, gpu: &Gpu) -> Result<(Option<PageTable>, Option<RowTable>)> {
        let Some(table) = self.page_table() else { return Ok((None, None)) };
        let rows = self.map.rows();
        let upload = || {
            let uploads = gpu.uploads();
            let words = rows.records(self.map.stride());
            if let Some(allocation) = uploads.upload_beside(&table.allocation, &words)? {
                return Ok(allocation);
            }
            // The table cannot stay where it is: a copy of it, behind the records.
            let pages = self.map.table().to_vec();
            let allocation = uploads.reserve(words.len() + pages.len(), 0)?;
            uploads.write_piece(&allocation, 0, &[words, pages].concat())?;
            Ok(allocation)
        };
        let records = self.records.get(rows, upload)?;
        let Some(own) =
            records.as_ref().filter(|it| it.allocation.buffer != table.allocation.buffer)
        else {
            return Ok((Some(table), records));
        };
        let at = own.at + word(rows.records(0).len() + self.map.first());
        let allocation = own.allocation.clone();
        Ok((Some(PageTable { allocation, at, ..table }), records))
    }

    /// Records that a write has put beside the table, at word `at`.
    fn records_at(&self, at: u32, rows: &Rows) -> Records {
        let Some(region) = &self.region else { return Records::default() };
        Records::at(Allocation { offset: 4 * at, ..region.allocation.clone() }, rows)
    }

    /// Where the table and the records lie that views have shown.
    pub(crate) fn guards(&self) -> [Option<&RegionGuard>; 2] {
        [self.region.as_ref().map(|region| &region.allocation.guard), self.records.guard()]
    }

    /// Brings to the GPU what a write has changed, and a list of positions beside it. Returns the word of the
    /// list.
    fn upload(&mut self, gpu: &Gpu, written: &Written, list: &[u32]) -> Result<u32> {
        if !self.extend(gpu, written)? {
            self.put(gpu, list.len())?;
        }
        if list.is_empty() {
            return Ok(0);
        }
        loop {
            let region = self.region.as_ref().expect("a table that was written");
            if let Some(allocation) = gpu.uploads().upload_beside(&region.allocation, list)? {
                return Ok(allocation.offset / 4);
            }
            self.put(gpu, list.len())?;
        }
    }

    /// Writes new words behind those that are there. Whether that was possible: not where the table was laid
    /// out anew, or a word that is there would have to be another.
    fn extend(&self, gpu: &Gpu, changed: &Written) -> Result<bool> {
        let map = &self.map;
        let Some(region) = self.region.as_ref().filter(|_| !changed.is_laid_out) else {
            return Ok(false);
        };
        if changed.words.is_empty() {
            return Ok(true);
        }
        let mut written = region.written.lock().unwrap_or_else(PoisonError::into_inner);
        if !gpu.uploads().is_in_place(&region.allocation) {
            return Ok(false);
        }
        let is_new = |word: usize| word % map.stride() >= written.end;
        let words = || changed.words.iter().flat_map(Clone::clone);
        let is_same = |word: usize| written.words.get(word) == map.table().get(word);
        if words().any(|word| !is_new(word) && !is_same(word)) {
            return Ok(false);
        }
        let end = map.first() + map.row_pages();
        if end > written.end {
            if changed.words.len() * WORDS_A_WRITE > map.table().len() {
                gpu.uploads().write_piece(&region.allocation, 0, &map.table().to_vec())?;
            } else {
                for run in &changed.words {
                    let words: Vec<u32> = run.clone().map(|word| map.table().get(word)).collect();
                    gpu.uploads().write_piece(&region.allocation, run.start, &words)?;
                }
            }
            *written = RegionWords { words: map.table().clone(), end };
        }
        Ok(true)
    }

    /// Puts the table into a region of its own, with room beside it for a list of `spare` words.
    fn put(&mut self, gpu: &Gpu, spare: usize) -> Result<()> {
        let words = self.map.table().to_vec();
        let allocation = gpu.uploads().reserve(words.len(), spare)?;
        gpu.uploads().write_piece(&allocation, 0, &words)?;
        let end = self.map.first() + self.map.row_pages();
        let written = Mutex::new(RegionWords { words: self.map.table().clone(), end });
        self.region = Some(Arc::new(Region { allocation, written }));
        Ok(())
    }
}
