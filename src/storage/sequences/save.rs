//! Saves one sequence, and restores it: into a cache of sequences or of rows.

use super::SequenceLayers;
use super::groups::SequenceGroups;
#[cfg(target_arch = "wasm32")]
use crate::error::BrowserError;
use crate::error::{Result, StoringError};
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
        let kept = self.kept_of_saved(saved)?;
        self.sequences()?;
        let id = self.add()?;
        let restored = self.restore_into(pass, id, saved, &kept);
        if restored.is_err() {
            self.remove(id)?;
        }
        restored.map(|()| id)
    }

    /// What each group keeps of a saved sequence. Refuses one that was not saved from layers of these shapes, or whose
    /// layers do not hold what those of this cache need.
    fn kept_of_saved(&self, saved: &SavedLayers) -> Result<Vec<Kept>> {
        let bad = |reason: String| Err(StoringError::BadSave { reason: reason.into() }.into());
        let count = self.layer_count();
        if saved.len() != count || saved.iter().enumerate().any(|(at, (number, _))| at != *number) {
            return bad(format!("it does not hold each of the {count} layers of this cache"));
        }
        let window = |number: usize| {
            self.place(number).map(|(group, _)| self.groups[group].sequences.window())
        };
        // Tokens that would be live without windows, where they are known of.
        let whole = |number: usize, layer: &SavedLayer| {
            window(number)
                .map(|window| window.map_or(0, |_| layer.let_go).saturating_add(layer.len()))
        };
        let (mut len, mut kept) = (0, vec![usize::MAX; self.groups.len()]);
        for (number, layer) in saved {
            if layer.batch() != 1 {
                return bad(format!("layer {number} has {} rows, not one sequence", layer.batch()));
            }
            len = len.max(whole(*number, layer)?);
        }
        let position = saved[0].1.next_position();
        let bound = self.limits().most_tokens.unwrap_or(usize::MAX);
        for (number, layer) in saved {
            let (group, at) = self.place(*number)?;
            self.groups[group].check_saved(layer, *number, at)?;
            let (live, window) = (layer.len(), window(*number)?);
            let holds = format!("layer {number} holds the latest {live} of {len} tokens");
            match window {
                None if live < len && layer.let_go > 0 => {
                    let remedy = "give it the window that it was saved with, or a smaller one";
                    return bad(format!("{holds}, and this cache keeps all; {remedy}"));
                }
                Some(window) if live < len.min(window.needed()) => {
                    let (tokens, needed) = (window.tokens, window.needed());
                    let remedy = format!("make it with one of {} tokens at most", live + 1);
                    return bad(format!(
                        "{holds}, and a window of {tokens} needs {needed}; {remedy}"
                    ));
                }
                _ => {}
            }
            if whole(*number, layer)? != len || layer.next_position() != position {
                return bad("its layers do not hold the same tokens".to_owned());
            }
            let own = window.map_or(live, |it| it.kept_of_saved([layer.let_go, live], bound));
            kept[group] = own.min(kept[group]);
        }
        let groups = self.groups.iter().zip(kept);
        let kept = groups.map(|(group, kept)| {
            let let_go = group.sequences.window().map_or(0, |_| len - kept);
            Kept { tokens: kept, gone: [position - kept, let_go] }
        });
        Ok(kept.collect())
    }

    fn restore_into(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        id: SequenceId,
        saved: &SavedLayers,
        kept: &[Kept],
    ) -> Result<()> {
        let mut stores = Vec::with_capacity(saved.len());
        for (number, layer) in saved {
            let (group, at) = self.place(*number)?;
            stores.push(self.groups[group].upload_saved(at, layer, kept[group].tokens)?);
        }
        for (group, kept) in self.groups.iter_mut().zip(kept) {
            group.sequences_mut()?.set_gone(id, kept.gone)?;
        }
        let counts: Vec<_> = kept.iter().map(|kept| [(id, kept.tokens)]).collect();
        let steps = self.plan_groups(pass, |group| &counts[group])?;
        let written = stores.iter().enumerate().try_for_each(|(number, store)| {
            let (group, at) = self.place(number)?;
            self.groups[group].write_saved(pass, steps.of(group), at, store)
        });
        self.groups.iter_mut().for_each(SequenceLayers::settle);
        written
    }
}

/// What the layers of a group keep of a saved sequence.
struct Kept {
    /// The latest tokens.
    tokens: usize,
    /// Tokens before them, and those of them that a window has let go.
    gone: [usize; 2],
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
    fn check_saved(&self, saved: &SavedLayer, number: usize, at: usize) -> Result<()> {
        let shape = shape_of(saved, number, self.storing)?;
        let own = self.shapes[at];
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

    /// The latest tokens of a saved layer in memory of their own.
    fn upload_saved(&self, at: usize, saved: &SavedLayer, tokens: usize) -> Result<Store> {
        let latest = saved.len() - tokens..saved.len();
        upload(&self.gpu, self.numbers[at], &self.shapes[at], (saved, &[0]), latest)
    }

    /// Takes the latest step as done: its tokens are not taken back any more.
    fn settle(&mut self) {
        if let Some(latest) = &mut self.latest {
            latest.updated.fill(true);
            latest.before.clear();
        }
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
