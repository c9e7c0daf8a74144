//! Changes of the batch.

use crate::error::{Error, Result};

/// A change of the batch, as [`Cache::prepare_batch`](crate::Cache::prepare_batch) is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BatchChange<'a> {
    /// As [`Cache::batch_select_indices`](crate::Cache::batch_select_indices).
    Select(&'a [u32]),
    /// As [`Cache::batch_repeat_interleave`](crate::Cache::batch_repeat_interleave).
    Repeat(usize),
}

/// A change of the batch that is kept.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum OwnedChange {
    Select(Vec<u32>),
    Repeat(usize),
}

impl OwnedChange {
    pub(crate) fn is(&self, change: BatchChange<'_>) -> bool {
        match (self, change) {
            (Self::Select(own), BatchChange::Select(other)) => own == other,
            (Self::Repeat(own), BatchChange::Repeat(other)) => *own == other,
            _ => false,
        }
    }
}

impl From<BatchChange<'_>> for OwnedChange {
    fn from(change: BatchChange<'_>) -> Self {
        match change {
            BatchChange::Select(indices) => Self::Select(indices.to_vec()),
            BatchChange::Repeat(repeats) => Self::Repeat(repeats),
        }
    }
}

/// The rows that a batch of `batch` rows has after a change.
pub(crate) fn changed_batch(batch: usize, change: BatchChange<'_>) -> Result<usize> {
    let (rows, asked) = match change {
        BatchChange::Select(indices) => (Some(indices.len()), format!("{} rows", indices.len())),
        BatchChange::Repeat(repeats) => {
            (batch.checked_mul(repeats), format!("{repeats} times {batch} rows"))
        }
    };
    rows.filter(|&rows| u32::try_from(rows).is_ok())
        .ok_or_else(|| Error::overflow("batch", asked, u64::from(u32::MAX)))
}
