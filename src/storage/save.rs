//! Saves layers: their tokens as they are stored, a page that rows share once.

use std::ops::Range;

#[cfg(target_arch = "wasm32")]
use crate::error::BrowserError;
use crate::error::Result;
#[cfg(not(target_arch = "wasm32"))]
use crate::gpu::read::read;
use crate::gpu::read::read_async;
use crate::gpu::readback::Readback;
use crate::saved::{SavedLayer, SavedLayers};
use crate::storage::arrangement::Arrangement;
use crate::storage::layer::Layer;
use crate::storage::layers::Layers;
use crate::stored::StoredTensor;
use crate::view::LayerView;

impl<L: Arrangement> Layers<L> {
    /// The tokens of the layers of a range that hold some.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn save(&self, layers: Range<usize>) -> Result<SavedLayers> {
        let mut saved = Vec::new();
        for number in self.written(layers) {
            let read = read(&self.gpu, &self.ledger, || self.start_save(number))?;
            let layer = read.map(|(readback, outline)| self.finish_save(&readback, outline));
            saved.extend(layer.transpose()?.map(|layer| (number, layer)));
        }
        Ok(saved)
    }

    /// A browser runs nothing else while a call waits, so that no bytes would ever arrive.
    #[cfg(target_arch = "wasm32")]
    pub(crate) fn save(&self, layers: Range<usize>) -> Result<SavedLayers> {
        match self.written(layers).first() {
            None => Ok(Vec::new()),
            Some(_) => Err(BrowserError::blocking("save()", "save_async()")),
        }
    }

    pub(crate) async fn save_async(&self, layers: Range<usize>) -> Result<SavedLayers> {
        self.memory_arrives().await?;
        let mut saved = Vec::new();
        for number in self.written(layers) {
            let start = || self.start_save(number);
            let read = read_async(&self.gpu, &self.ledger, start).await?;
            let layer = read.map(|(readback, outline)| self.finish_save(&readback, outline));
            saved.extend(layer.transpose()?.map(|layer| (number, layer)));
        }
        Ok(saved)
    }

    /// The layers of a range that hold tokens.
    fn written(&self, layers: Range<usize>) -> Vec<usize> {
        let held = self.layers.iter().filter(|(_, layer)| layer.len() > 0);
        held.map(|(&number, _)| number).filter(|number| layers.contains(number)).collect()
    }

    /// Starts reading a layer, with what it is but its tokens.
    fn start_save(&self, number: usize) -> Result<Option<(Readback, SavedLayer)>> {
        let Some(view) = self.view(number)? else { return Ok(None) };
        let gpu = &self.gpu;
        gpu.handle().check_alive()?;
        let layer = &self.layers[&number];
        let (pages, start) = match layer.pages_to_save(gpu)? {
            Some(pages) => {
                (Some(pages.rows), LayerView { owner: view.owner.clone(), ..pages.view })
            }
            None => (None, view.clone()),
        };
        let readback = self.read_view(number, &start)?;
        Ok(Some((readback, layer.outline(&view, pages, start.len()))))
    }

    fn finish_save(&self, readback: &Readback, mut layer: SavedLayer) -> Result<SavedLayer> {
        let (key, value) = self.finish_readback(readback)?;
        layer.fill(key, value);
        Ok(layer)
    }
}

impl<L: Arrangement> Layer<L> {
    /// What a layer is but its tokens: `pages` of `page_tokens` tokens of each row, or of a ring one page a row.
    fn outline(
        &self,
        view: &LayerView,
        pages: Option<Vec<Vec<u32>>>,
        page_tokens: usize,
    ) -> SavedLayer {
        let is_ring = pages.is_none();
        let span = |row| {
            let start = if is_ring { 0 } else { view.row_start(row).unwrap_or(0) };
            [start, view.row_len(row).unwrap_or(0)]
        };
        let batch = view.key_shape()[0];
        let own = (0_u32..).take(batch).map(|row| vec![row]).collect();
        SavedLayer {
            heads: view.key_shape()[1],
            dims: [view.key_shape()[3], view.value_shape()[3]],
            formats: [view.key_format(), view.value_format()],
            is_value_in_key: view.is_value_in_key(),
            dropped: self.cropped(),
            let_go: self.let_go,
            page_tokens,
            pages: pages.unwrap_or(own),
            spans: (0..batch).map(span).collect(),
            sides: Default::default(),
        }
    }
}

impl SavedLayer {
    /// Takes the tokens that were read back.
    pub(super) fn fill(&mut self, key: StoredTensor, value: StoredTensor) {
        let bytes = |tensor: &StoredTensor| {
            [tensor.elements().to_vec(), bytemuck::cast_slice(tensor.scales()).to_vec()]
        };
        self.sides[0] = bytes(&key);
        if !self.is_value_in_key {
            self.sides[1] = bytes(&value);
        }
    }
}
