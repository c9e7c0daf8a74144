//! One call of a cache or of attention: its dispatches, recorded together and noted once.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Result};
use crate::gpu::arena::RegionGuard;
use crate::gpu::kernels::Dispatch;
use crate::gpu::ledger::Ledger;

/// What a call will record.
#[derive(Debug, Default)]
pub(crate) struct Call {
    guards: Vec<RegionGuard>,
    dispatches: Vec<Dispatch>,
}

impl Call {
    /// Keeps these in place until the pass has run.
    pub(crate) fn hold(&mut self, guards: Vec<RegionGuard>) {
        self.guards.extend(guards);
    }

    pub(crate) fn add(&mut self, dispatch: Dispatch) {
        self.dispatches.push(dispatch);
    }

    /// Records everything, the last dispatch as such. A call that has nothing to record and nothing to hold goes
    /// unnoted.
    ///
    /// A pass does not tell which device it is of. wgpu panics if it is of another instance, because there the
    /// numbers of the pipelines and bind groups are nobody's. That is an error here, and the cache has not moved
    /// on yet.
    pub(crate) fn record(self, pass: &mut wgpu::ComputePass<'_>, ledger: &Ledger) -> Result<()> {
        let Self { mut guards, dispatches } = self;
        let count = dispatches.len();
        if count == 0 && guards.is_empty() {
            return Ok(());
        }
        let witness = ledger.witness().filter(|_| count > 0);
        let recorded = catch_unwind(AssertUnwindSafe(|| {
            for (at, dispatch) in dispatches.into_iter().enumerate() {
                let witness = witness.filter(|_| at + 1 == count);
                dispatch.record(pass, witness, &mut guards);
            }
            ledger.record(pass, guards);
        }));
        if recorded.is_err() {
            return Err(Error::OtherDevice { what: "the pass" });
        }
        if witness.is_some() {
            ledger.expect();
        }
        Ok(())
    }
}
