//! One call of a cache or of attention: its dispatches, recorded together and noted once.

use crate::gpu::arena::Lease;
use crate::gpu::kernels::Dispatch;
use crate::gpu::ledger::Ledger;

/// One call's dispatches on their way into a pass.
#[derive(Debug)]
pub(crate) struct Call<'a, 'pass> {
    pass: &'a mut wgpu::ComputePass<'pass>,
    leases: Vec<Lease>,
    /// The latest dispatch, held back because the last one is recorded as such.
    latest: Option<Dispatch>,
}

impl<'a, 'pass> Call<'a, 'pass> {
    pub(crate) fn new(pass: &'a mut wgpu::ComputePass<'pass>) -> Self {
        Self { pass, leases: Vec::new(), latest: None }
    }

    /// Keeps these in place until the pass has run.
    pub(crate) fn hold(&mut self, leases: Vec<Lease>) {
        self.leases.extend(leases);
    }

    pub(crate) fn add(&mut self, dispatch: Dispatch) {
        if let Some(dispatch) = self.latest.replace(dispatch) {
            dispatch.record(self.pass, None, &mut self.leases);
        }
    }

    /// Records what is left. A call that has nothing to record and nothing to hold goes unnoted.
    pub(crate) fn finish(mut self, ledger: &Ledger) {
        if let Some(dispatch) = self.latest.take() {
            let witness = ledger.witness();
            dispatch.record(self.pass, witness, &mut self.leases);
            if witness.is_some() {
                ledger.expect();
            }
        } else if self.leases.is_empty() {
            return;
        }
        ledger.record(self.pass, self.leases);
    }
}
