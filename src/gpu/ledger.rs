//! Counts recorded calls: those that have run, and those that were lost with their pass.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::error::{Error, Result};
use crate::gpu::arena::RegionGuard;
use crate::gpu::device::pass_number;
use crate::gpu::uploads::Uploads;
use crate::gpu::witness::Witness;
use crate::tensor::Guard;

/// The state of the calls that a cache has recorded since its last reset.
///
/// The cache's host state changes when a call is recorded; the GPU's content changes when the engine submits the
/// pass. If the pass is dropped instead, or its submit fails, the two disagree, and every later call returns an
/// error. A dropped pass is known at once. A failed submit is known at the next read-back: see
/// [`crate::gpu::witness`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Calls recorded. Of these, `done` counts those whose pass was submitted and has completed, whether it ran or
    /// failed, and `dropped` those whose pass was dropped.
    recorded: AtomicU64,
    done: AtomicU64,
    dropped: AtomicU64,
    /// Calls that were submitted and are known not to have run.
    failed: AtomicU64,
    /// Calls that the witness must have counted once everything has run.
    due: AtomicU64,
    passes: Mutex<Passes>,
    /// Unset before the first recorded call, and on a device that runs no kernels.
    witness: OnceLock<Witness>,
}

/// The passes with recorded calls that have neither run nor been dropped, each by its number, in the order of their
/// first call.
#[derive(Debug, Default)]
struct Passes(Vec<(u64, Weak<()>)>);

impl Passes {
    fn is_before_the_latest(&self, number: u64) -> bool {
        let mut earlier = self.0.iter().rev().skip(1);
        let is_latest = self.0.last().is_some_and(|(latest, _)| *latest == number);
        !is_latest && earlier.any(|(other, mark)| *other == number && mark.strong_count() > 0)
    }

    /// A mark that is dropped once the calls in the pass have run or were dropped.
    fn mark(&mut self, number: u64) -> Arc<()> {
        if let Some(mark) = self.0.last().filter(|(latest, _)| *latest == number) {
            if let Some(mark) = mark.1.upgrade() {
                return mark;
            }
        }
        self.0.retain(|(_, mark)| mark.strong_count() > 0);
        let mark = Arc::new(());
        self.0.push((number, Arc::downgrade(&mark)));
        #[cfg(target_arch = "wasm32")]
        crate::gpu::memory::destroy::add_pass(&mark);
        mark
    }
}

/// The counts at the start of a read-back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    recorded: u64,
    done: u64,
    due: u64,
}

/// Whether a read-back covers all calls that were recorded before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Whole,
    /// Some calls were submitted after it. Calls that are missing from a second read-back have failed.
    Overtaken,
    /// This many calls are not known to have been submitted.
    Waiting(u64),
}

impl Ledger {
    /// Creates everything that recording needs, so that recording cannot fail.
    pub(crate) fn prepare(&self, uploads: &Uploads) -> Result<()> {
        if uploads.device().runs_kernels && self.0.witness.get().is_none() {
            let witness = uploads.witness()?;
            self.0.witness.get_or_init(|| witness);
        }
        Ok(())
    }

    /// The word that counts the calls that ran, if there is one.
    pub(crate) fn witness(&self) -> Option<&Witness> {
        self.0.witness.get()
    }

    /// Counts one recorded call, and holds `guards` and what the engine has lent until the GPU has run it.
    pub(crate) fn record(
        &self,
        pass: &wgpu::ComputePass<'_>,
        guards: Vec<RegionGuard>,
        lent: Vec<Guard>,
    ) {
        self.0.recorded.fetch_add(1, Ordering::Relaxed);
        let mark = self.passes().mark(pass_number(pass));
        let ticket =
            Ticket { ledger: self.clone(), is_done: false, guards, _lent: lent, _pass: mark };
        pass.on_submitted_work_done(move || ticket.finish());
    }

    /// Adds one call to the count that the witness must reach.
    pub(crate) fn expect(&self) {
        self.0.due.fetch_add(1, Ordering::Relaxed);
    }

    /// Refuses a pass that is not the latest. Passes run one after the other, so a call that is recorded into an
    /// earlier one now would run before calls that were recorded earlier.
    pub(crate) fn check_pass(&self, pass: &wgpu::ComputePass<'_>) -> Result<()> {
        match self.passes().is_before_the_latest(pass_number(pass)) {
            true => Err(Error::EarlierPass),
            false => Ok(()),
        }
    }

    fn passes(&self) -> MutexGuard<'_, Passes> {
        self.0.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns an error if a pass was lost.
    pub(crate) fn check(&self) -> Result<()> {
        let dropped = self.0.dropped.load(Ordering::Acquire);
        match dropped + self.0.failed.load(Ordering::Acquire) {
            0 => Ok(()),
            calls => Err(Error::PassDropped { calls }),
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot {
            done: self.0.done.load(Ordering::Acquire),
            recorded: self.0.recorded.load(Ordering::Acquire),
            due: self.0.due.load(Ordering::Acquire),
        }
    }

    /// Whether a read-back covers what was recorded. To be called when everything that was submitted before the
    /// read-back has run. `ran` is the witness's 32-bit count in that read-back.
    pub(crate) fn verdict(&self, before: Snapshot, ran: Option<u32>) -> Result<Verdict> {
        self.check()?;
        // Negative if a foreign pass has counted in this cache's word: then the content cannot be trusted either.
        let missing = ran.map_or(0, |ran| low_word(before.due).wrapping_sub(ran).cast_signed());
        let missing = missing.unsigned_abs();
        let waiting = before.recorded.saturating_sub(self.0.done.load(Ordering::Acquire));
        if waiting > 0 {
            return Ok(Verdict::Waiting(waiting));
        }
        if missing == 0 {
            return Ok(Verdict::Whole);
        }
        if before.done < before.recorded {
            return Ok(Verdict::Overtaken);
        }
        self.0.failed.fetch_max(u64::from(missing), Ordering::AcqRel);
        self.check().map(|()| Verdict::Whole)
    }
}

/// The low 32 bits of a count.
fn low_word(count: u64) -> u32 {
    u32::try_from(count & u64::from(u32::MAX)).unwrap_or_default()
}

/// Belongs to the callback of a recorded pass, and so detects whether the pass was submitted or dropped.
#[derive(Debug)]
struct Ticket {
    ledger: Ledger,
    is_done: bool,
    guards: Vec<RegionGuard>,
    /// Keeps the engine's tensors as they are: what was dropped with its pass reads them no more.
    _lent: Vec<Guard>,
    /// Keeps the pass among those that may still run.
    _pass: Arc<()>,
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
            // Passes that were recorded before this one may still run and read the same data.
            self.guards.iter().for_each(|guard| guard.abandon());
        }
    }
}
