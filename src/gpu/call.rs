//! One call of a cache or of attention: its dispatches, recorded together and counted once.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Result};
use crate::gpu::arena::RegionGuard;
use crate::gpu::kernels::Dispatch;
use crate::gpu::ledger::Ledger;
use crate::tensor::{Guard, TensorView};

/// The dispatches of a call, ready to be recorded, and the guards that they need.
#[derive(Debug, Default)]
pub(crate) struct Call {
    guards: Vec<RegionGuard>,
    /// What keeps the engine's tensors as they are.
    lent: Vec<Guard>,
    dispatches: Vec<Dispatch>,
}

impl Call {
    /// Holds `guards` until the pass has run.
    pub(crate) fn hold(&mut self, guards: Vec<RegionGuard>) {
        self.guards.extend(guards);
    }

    /// Keeps the guards of the engine's tensors until the pass has run, or was dropped.
    pub(crate) fn borrow<'a>(&mut self, views: impl IntoIterator<Item = &'a TensorView<'a>>) {
        self.lent.extend(views.into_iter().filter_map(|view| view.guard.cloned()));
    }

    /// Keeps what an engine gave until the pass has run, or was dropped.
    pub(crate) fn keep(&mut self, guard: Option<&Guard>) {
        self.lent.extend(guard.cloned());
    }

    pub(crate) fn add(&mut self, dispatch: Dispatch) {
        self.dispatches.push(dispatch);
    }

    /// Records all dispatches; the last one counts the call in the witness. A call without dispatches and guards is
    /// not counted.
    ///
    /// wgpu does not reveal the device of a pass. If the pass is of another instance, in which the ids of the
    /// pipelines and bind groups do not exist, wgpu panics. The panic is caught and returned as an error, before the
    /// cache has changed its state.
    pub(crate) fn record(self, pass: &mut wgpu::ComputePass<'_>, ledger: &Ledger) -> Result<()> {
        let Self { mut guards, lent, dispatches } = self;
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
            ledger.record(pass, guards, lent);
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
