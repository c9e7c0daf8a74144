//! The records of ragged rows on the GPU.

use std::sync::OnceLock;

use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::arena::{Allocation, RegionGuard};
use crate::host::rows::Rows;
use crate::view::RowTable;

/// The records of rows that never change, uploaded when a view or a write first needs them: a cut cannot fail.
#[derive(Clone, Debug, Default)]
pub(crate) struct Records(OnceLock<RowTable>);

impl Records {
    /// Records that lie at byte `allocation.offset` already.
    pub(crate) fn at(allocation: Allocation, rows: &Rows) -> Self {
        let records = Self::default();
        if let Some(spans) = rows.spans() {
            let at = allocation.offset / 4;
            let _ = records.0.set(RowTable { allocation, at, rows: spans });
        }
        records
    }

    /// The records of `rows`, uploaded by `upload` if they are not there yet; `None` if rows are equal.
    pub(crate) fn get(
        &self,
        rows: &Rows,
        upload: impl FnOnce() -> Result<Allocation>,
    ) -> Result<Option<RowTable>> {
        let Some(spans) = rows.spans() else { return Ok(None) };
        if let Some(table) = self.0.get() {
            return Ok(Some(table.clone()));
        }
        let allocation = upload()?;
        let at = allocation.offset / 4;
        let table = RowTable { allocation, at, rows: spans };
        // Another thread may have been faster; both tables hold the same.
        Ok(Some(self.0.get_or_init(|| table).clone()))
    }

    pub(crate) fn guard(&self) -> Option<&RegionGuard> {
        self.0.get().map(|table| &table.allocation.guard)
    }
}

/// Uploads the records of ragged rows of a ring and a list of positions as one piece. Returns it, and the word at
/// which the list begins; `None` if there is neither.
pub(crate) fn upload(gpu: &Gpu, rows: &Rows, list: &[u32]) -> Result<Option<(Allocation, u32)>> {
    let words = beside(rows, 0, list);
    if words.is_empty() {
        return Ok(None);
    }
    let allocation = gpu.uploads().upload(&words)?;
    let list_at = allocation.offset / 4 + word(words.len() - list.len());
    Ok(Some((allocation, list_at)))
}

/// Records, and a list of positions behind them.
pub(crate) fn beside(rows: &Rows, stride: usize, list: &[u32]) -> Vec<u32> {
    let mut words = rows.records(stride);
    words.extend(list);
    words
}

/// What was uploaded is counted in 32 bits.
pub(crate) fn word(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
