//! Saves one sequence, and restores it: into a cache of sequences or of rows.

use super::SequenceLayers;
use super::groups::SequenceGroups;
#[cfg(target_arch = "wasm32")]
use crate::error::BrowserError;
use crate::error::{Error, Result, StoringError};
use crate::gpu::call::Call;
use crate::gpu::kernels::Positions;
#[cfg(not(target_arch = "wasm32"))]
use crate::gpu::read::read;
use crate::gpu::read::read_async;
use crate::gpu::readback::Readback;
use crate::saved::{SavedLayer, SavedLayers};
use crate::sequence::SequenceId;
use crate::storage::restore::{shape_of, upload};
use crate::storage::step::StepData;
use crate::storage::store::Store;
use crate::storage::write::{Target, write_stored};

impl SequenceGroups {
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn save(&self, id: SequenceId) -> Result<SavedLayers> {
        let mut saved = Vec::new();
        for number in 0..self.layer_count() {
            let (group, at) = self.place(number)?;
            let group = &self.groups[group];
            let read = read(&group.gpu, &group.ledger, || group.start_readback(id, at))?;
            let layer = read.map(|(readback, ())| group.finish_save(id, at, &readback));
            saved.extend(layer.transpose()?.map(|layer| (number, layer)));
        }
        Ok(saved)
    }

    /// A browser runs nothing else while a call waits, so that no bytes would ever arrive.
    #[cfg(target_arch = "wasm32")]
    pub(crate) fn save(&self, id: SequenceId) -> Result<SavedLayers> {
        if self.sequences()?.len(id)? == 0 {
            return Ok(Vec::new());
        }
        Err(BrowserError::blocking("save()", "save_async()"))
    }

    pub(crate) async fn save_async(&self, id: SequenceId) -> Result<SavedLayers> {
        let mut saved = Vec::new();
        for number in 0..self.layer_count() {
            let (group, at) = self.place(number)?;
            let group = &self.groups[group];
            group.memory_arrives().await?;
            let start = || group.start_readback(id, at);
            let read = read_async(&group.gpu, &group.ledger, start).await?;
            let layer = read.map(|(readback, ())| group.finish_save(id, at, &readback));
            saved.extend(layer.transpose()?.map(|layer| (number, layer)));
        }
        Ok(saved)
    }

    /// Records the writing of a saved sequence, under a new name.
    pub(crate) fn restore(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        saved: &SavedLayers,
    ) -> Result<SequenceId> {
        let bad = |reason: String| Err(StoringError::BadSave { reason: reason.into() }.into());
        if self.has_windows {
            let what = "restore() into a SequenceCache whose layers have windows";
            return Err(Error::NotSupported { what });
        }
        let count = self.layer_count();
        if saved.len() != count || saved.iter().enumerate().any(|(at, (number, _))| at != *number) {
            return bad(format!("it does not hold each of the {count} layers of this cache"));
        }
        let (len, dropped) = (saved[0].1.len(), saved[0].1.dropped);
        for (number, layer) in saved {
            if layer.batch() != 1 {
                return bad(format!("layer {number} has {} rows, not one sequence", layer.batch()));
            }
            if [layer.len(), layer.dropped] != [len, dropped] {
                return bad("its layers do not hold the same tokens".to_owned());
            }
            self.groups[0].check_saved(layer, *number)?;
        }
        self.sequences()?;
        let id = self.add()?;
        let restored = self.restore_into(pass, id, saved);
        if restored.is_err() {
            self.remove(id)?;
        }
        restored.map(|()| id)
    }

    fn restore_into(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        id: SequenceId,
        saved: &SavedLayers,
    ) -> Result<()> {
        let stores: Result<Vec<Store>> =
            saved.iter().map(|(at, layer)| self.groups[0].upload_saved(*at, layer)).collect();
        let stores = stores?;
        let (len, dropped) = (saved[0].1.len(), saved[0].1.dropped);
        self.groups[0].sequences_mut()?.set_dropped(id, dropped)?;
        let step = self.plan_step(pass, &[(id, len)])?;
        let mut stores = stores.iter().enumerate();
        let written = stores
            .try_for_each(|(at, store)| self.groups[0].write_saved(pass, step.first(), at, store));
        if written.is_err() {
            self.cancel_step()?;
        }
        written
    }
}

impl SequenceLayers {
    fn finish_save(&self, id: SequenceId, at: usize, readback: &Readback) -> Result<SavedLayer> {
        let (key, value) = self.finish_readback(readback)?;
        let shape = self.shapes[at];
        let live = self.sequences.live(id)?;
        let [dropped, let_go] = self.sequences.gone(id)?;
        let mut layer = SavedLayer {
            heads: shape.heads,
            dims: [shape.key_dim, shape.value_dim],
            formats: shape.formats,
            is_value_in_key: shape.is_value_in_key,
            dropped,
            let_go,
            page_tokens: live.len,
            pages: vec![vec![0]],
            spans: vec![[0, live.len]],
            sides: Default::default(),
        };
        layer.fill(key, value);
        Ok(layer)
    }

    /// Refuses a saved layer that is not of the shape of the cache's.
    fn check_saved(&self, saved: &SavedLayer, number: usize) -> Result<()> {
        let shape = shape_of(saved, number, self.storing)?;
        let own = self.shapes[number];
        if shape == own {
            return Ok(());
        }
        let about = |[heads, key, value]: [usize; 3]| format!("{heads} heads of {key} and {value}");
        let reason = format!(
            "layer {number} has {}, and that of this cache {}, or they are stored as other types",
            about([shape.heads, shape.key_dim, shape.value_dim]),
            about([own.heads, own.key_dim, own.value_dim]),
        );
        Err(StoringError::BadSave { reason: reason.into() }.into())
    }

    /// The tokens of a saved layer in memory of their own.
    fn upload_saved(&self, at: usize, saved: &SavedLayer) -> Result<Store> {
        upload(&self.gpu, at, &self.shapes[at], (saved, &[0]), 0..saved.len())
    }

    fn write_saved(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        step: &StepData,
        at: usize,
        from: &Store,
    ) -> Result<()> {
        let (shape, count) = (self.shapes[at], step.work.total);
        let view = self.step_view(step, at);
        let positions = Positions::Packed { at: step.list_at() };
        let lists = Some(&step.allocation);
        let target = Target { store: &self.stores[at], view: &view, positions, lists };
        let dispatches = write_stored(&self.gpu, &shape, (from, count), count, target)?;
        let mut call = Call::default();
        self.dispatches += dispatches.len() as u64;
        dispatches.into_iter().for_each(|dispatch| call.add(dispatch));
        call.record(pass, &self.ledger)?;
        self.bytes_moved += shape.bytes(1, count)?.iter().sum::<u64>();
        if let Some(latest) = &mut self.latest {
            latest.updated[at] = true;
        }
        Ok(())
    }
}
