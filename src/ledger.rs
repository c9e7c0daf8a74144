//! Keeps count of recorded calls: which have run, and which were dropped with their pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::arena::Lease;
use crate::error::{Error, Result};

/// What has become of the calls that a cache has recorded since its last reset.
///
/// The cache's host side moves on when a call is recorded; the GPU follows when the engine submits the
/// pass. If the pass is dropped instead, the two no longer agree, and from then on every call says so.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    recorded: AtomicU64,
    done: AtomicU64,
    dropped: AtomicU64,
}

impl Ledger {
    /// Notes one recorded call, and holds `leases` until the GPU has run it.
    pub(crate) fn record(&self, pass: &wgpu::ComputePass<'_>, leases: Vec<Lease>) {
        self.0.recorded.fetch_add(1, Ordering::Relaxed);
        let ticket = Ticket { ledger: self.clone(), is_done: false, _leases: leases };
        pass.on_submitted_work_done(move || ticket.finish());
    }

    /// Refuses to go on after a pass was dropped.
    pub(crate) fn check(&self) -> Result<()> {
        match self.0.dropped.load(Ordering::Acquire) {
            0 => Ok(()),
            calls => Err(Error::PassDropped { calls }),
        }
    }

    /// Calls recorded up to now.
    pub(crate) fn recorded(&self) -> u64 {
        self.0.recorded.load(Ordering::Acquire)
    }

    /// Refuses a read-back that has overtaken one of the first `recorded` calls. To be asked when
    /// everything that was submitted has run.
    pub(crate) fn check_submitted(&self, recorded: u64) -> Result<()> {
        self.check()?;
        match recorded.saturating_sub(self.0.done.load(Ordering::Acquire)) {
            0 => Ok(()),
            calls => Err(Error::NotSubmitted { calls }),
        }
    }
}

/// Travels with a recorded pass; learns whether it ran or was dropped.
#[derive(Debug)]
struct Ticket {
    ledger: Ledger,
    is_done: bool,
    _leases: Vec<Lease>,
}

impl Ticket {
    fn finish(mut self) {
        self.is_done = true;
        self.ledger.0.done.fetch_add(1, Ordering::AcqRel);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.is_done {
            self.ledger.0.dropped.fetch_add(1, Ordering::AcqRel);
        }
    }
}
