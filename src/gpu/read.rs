//! Reads again until what has arrived is what was recorded.

use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::ledger::Ledger;
use crate::gpu::readback::Readback;

/// Reads until what has arrived is what was recorded, since calls may be recorded meanwhile: `start` begins a read-back,
/// with what is to be known of it later; `None` if there is nothing to read.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn read<T>(
    gpu: &Gpu,
    ledger: &Ledger,
    mut start: impl FnMut() -> Result<Option<(Readback, T)>>,
) -> Result<Option<(Readback, T)>> {
    loop {
        let Some((readback, about)) = start()? else { return Ok(None) };
        readback.wait(gpu)?;
        if readback.wait_for_calls(ledger)? {
            return Ok(Some((readback, about)));
        }
    }
}

/// As [`read`], without blocking.
pub(crate) async fn read_async<T>(
    gpu: &Gpu,
    ledger: &Ledger,
    mut start: impl FnMut() -> Result<Option<(Readback, T)>>,
) -> Result<Option<(Readback, T)>> {
    loop {
        let Some((readback, about)) = start()? else { return Ok(None) };
        readback.arrive(gpu).await?;
        if readback.settle(gpu, ledger).await? {
            return Ok(Some((readback, about)));
        }
    }
}
