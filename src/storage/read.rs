//! Reads layers back to the host.

use std::sync::atomic::Ordering;

#[cfg(target_arch = "wasm32")]
use crate::error::BrowserError;
use crate::error::Result;
#[cfg(not(target_arch = "wasm32"))]
use crate::gpu::read::read;
use crate::gpu::read::read_async;
use crate::gpu::readback::Readback;
use crate::host::plan;
use crate::storage::arrangement::Arrangement;
use crate::storage::layers::Layers;
use crate::stored::StoredTensor;
use crate::view::LayerView;

impl<L: Arrangement> Layers<L> {
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn get(&self, layer_idx: usize) -> Result<Option<(StoredTensor, StoredTensor)>> {
        let read = read(&self.gpu, &self.ledger, || self.start_readback(layer_idx))?;
        read.map(|(readback, ())| self.finish_readback(&readback)).transpose()
    }

    /// A browser runs nothing else while a call waits, so that no bytes would ever arrive.
    #[cfg(target_arch = "wasm32")]
    pub(crate) fn get(&self, layer_idx: usize) -> Result<Option<(StoredTensor, StoredTensor)>> {
        match self.view(layer_idx)? {
            None => Ok(None),
            Some(_) => Err(BrowserError::blocking("get()", "get_async()")),
        }
    }

    pub(crate) async fn get_async(
        &self,
        layer_idx: usize,
    ) -> Result<Option<(StoredTensor, StoredTensor)>> {
        self.memory_arrives().await?;
        let start = || self.start_readback(layer_idx);
        let read = read_async(&self.gpu, &self.ledger, start).await?;
        read.map(|(readback, ())| self.finish_readback(&readback)).transpose()
    }

    fn start_readback(&self, layer_idx: usize) -> Result<Option<(Readback, ())>> {
        let Some(view) = self.view(layer_idx)? else { return Ok(None) };
        self.gpu.handle().check_alive()?;
        self.read_view(layer_idx, &view).map(|readback| Some((readback, ())))
    }

    /// Starts reading the live tokens of a view back.
    pub(super) fn read_view(&self, layer_idx: usize, view: &LayerView) -> Result<Readback> {
        let (first, second) = if view.layout().has_table() {
            Default::default()
        } else {
            plan::live_slots(view.start(), view.len(), view.capacity())
        };
        Readback::start(&self.gpu, layer_idx, view, [first, second], &self.ledger)
    }

    pub(super) fn finish_readback(
        &self,
        readback: &Readback,
    ) -> Result<(StoredTensor, StoredTensor)> {
        let tensors = readback.finish()?;
        self.bytes_read_back.fetch_add(readback.bytes(), Ordering::Relaxed);
        Ok(tensors)
    }
}
