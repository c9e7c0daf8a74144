//! Keeps count of recorded calls: which have run, and which were dropped with their pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::arena::Lease;
use crate::error::{Error, Result};
use crate::kernels::Dispatch;

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

/// One call's dispatches on their way into a pass.
#[derive(Debug)]
pub(crate) struct Call<'a, 'pass> {
    pass: &'a mut wgpu::ComputePass<'pass>,
    leases: Vec<Lease>,
    is_empty: bool,
}

impl<'a, 'pass> Call<'a, 'pass> {
    pub(crate) fn new(pass: &'a mut wgpu::ComputePass<'pass>) -> Self {
        Self { pass, leases: Vec::new(), is_empty: true }
    }

    /// Keeps these in place until the pass has run.
    pub(crate) fn hold(&mut self, leases: Vec<Lease>) {
        self.leases.extend(leases);
    }

    pub(crate) fn add(&mut self, dispatch: Dispatch) {
        dispatch.record_part(self.pass, &mut self.leases);
        self.is_empty = false;
    }

    /// Notes the call. One that has nothing to record and nothing to hold goes unnoted.
    pub(crate) fn finish(self, ledger: &Ledger) {
        if !self.is_empty || !self.leases.is_empty() {
            ledger.record(self.pass, self.leases);
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
