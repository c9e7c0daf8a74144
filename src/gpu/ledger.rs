//! Keeps count of recorded calls: which have run, and which were lost with their pass.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::error::{Error, Result};
use crate::gpu::arena::RegionGuard;
use crate::gpu::device::pass_number;
use crate::gpu::uploads::Uploads;
use crate::gpu::witness::Witness;

/// What has become of the calls that a cache has recorded since its last reset.
///
/// The cache's host side moves on when a call is recorded; the GPU follows when the engine submits the
/// pass. If the pass is dropped instead, or its submit fails, the two no longer agree, and from then on every
/// call says so. A dropped pass is known at once. A submit that failed is known once something is read back:
/// see [`crate::witness`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Calls recorded; of these: those whose pass was submitted and is done with, whether it ran or not, and
    /// those whose pass was dropped.
    recorded: AtomicU64,
    done: AtomicU64,
    dropped: AtomicU64,
    /// Calls that were submitted and did not run, as far as is known.
    failed: AtomicU64,
    /// Calls that the witness is to see.
    due: AtomicU64,
    passes: Mutex<Passes>,
    /// Of a cache without a recorded call, or on a device that runs no kernel, there is none.
    witness: OnceLock<Witness>,
}

/// The passes that calls were recorded into and that have neither run nor been dropped, in order of the first
/// call, each by its number.
#[derive(Debug, Default)]
struct Passes(Vec<(u64, Weak<()>)>);

impl Passes {
    fn is_before_the_latest(&self, number: u64) -> bool {
        let mut earlier = self.0.iter().rev().skip(1);
        let is_latest = self.0.last().is_some_and(|(latest, _)| *latest == number);
        !is_latest && earlier.any(|(other, mark)| *other == number && mark.strong_count() > 0)
    }

    /// A mark that lives as long as the calls in a pass do.
    fn mark(&mut self, number: u64) -> Arc<()> {
        if let Some(mark) = self.0.last().filter(|(latest, _)| *latest == number) {
            if let Some(mark) = mark.1.upgrade() {
                return mark;
            }
        }
        self.0.retain(|(_, mark)| mark.strong_count() > 0);
        let mark = Arc::new(());
        self.0.push((number, Arc::downgrade(&mark)));
        mark
    }
}

/// The counts as a read-back begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    recorded: u64,
    done: u64,
    due: u64,
}

/// Whether a read-back has seen all that was recorded before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Whole,
    /// Something was submitted behind it. What a second one does not see has failed.
    Overtaken,
    /// So many calls are not known to have been submitted.
    Waiting(u64),
}

impl Ledger {
    /// Makes everything that recording needs, so that it cannot fail.
    pub(crate) fn prepare(&self, uploads: &Uploads) -> Result<()> {
        if uploads.device().runs_kernels && self.0.witness.get().is_none() {
            let witness = uploads.witness()?;
            self.0.witness.get_or_init(|| witness);
        }
        Ok(())
    }

    /// The word that counts the calls that ran, where there is one.
    pub(crate) fn witness(&self) -> Option<&Witness> {
        self.0.witness.get()
    }

    /// Notes one recorded call, and holds `guards` until the GPU has run it.
    pub(crate) fn record(&self, pass: &wgpu::ComputePass<'_>, guards: Vec<RegionGuard>) {
        self.0.recorded.fetch_add(1, Ordering::Relaxed);
        let mark = self.passes().mark(pass_number(pass));
        let ticket = Ticket { ledger: self.clone(), is_done: false, guards, _pass: mark };
        pass.on_submitted_work_done(move || ticket.finish());
    }

    /// Notes that the witness is to see one more call.
    pub(crate) fn expect(&self) {
        self.0.due.fetch_add(1, Ordering::Relaxed);
    }

    /// Refuses a pass that is not the latest: passes run one after the other, so what is recorded into an earlier
    /// one now would run before what was recorded last.
    pub(crate) fn check_pass(&self, pass: &wgpu::ComputePass<'_>) -> Result<()> {
        match self.passes().is_before_the_latest(pass_number(pass)) {
            true => Err(Error::EarlierPass),
            false => Ok(()),
        }
    }

    fn passes(&self) -> MutexGuard<'_, Passes> {
        self.0.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses to go on after a pass was lost.
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

    /// What a read-back has seen, to be asked when everything that was submitted before it has run. `ran` is
    /// the witness's count, of 32 bits, as the read-back found it.
    pub(crate) fn verdict(&self, before: Snapshot, ran: Option<u32>) -> Result<Verdict> {
        self.check()?;
        // Negative if a foreign pass has counted in this cache's word: its content cannot be trusted either.
        let missing = ran.map_or(0, |ran| low_word(before.due).wrapping_sub(ran).cast_signed());
        let missing = missing.unsigned_abs();
        let waiting = before.recorded.saturating_sub(self.0.done.load(Ordering::Acquire));
        // A browser calls back in an order of its own, so there the witness alone decides.
        if waiting > 0 && !(cfg!(target_arch = "wasm32") && missing == 0) {
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

/// Travels with a recorded pass; learns whether it was submitted or dropped.
#[derive(Debug)]
struct Ticket {
    ledger: Ledger,
    is_done: bool,
    guards: Vec<RegionGuard>,
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
            // That this pass is gone says nothing about those that were recorded before it.
            self.guards.iter().for_each(|guard| guard.abandon());
        }
    }
}
