//! All layers of a cache of sequences, in groups that share a window. The groups have the same sequences under the
//! same names, since they are asked the same; each has pages and tables of its own.

use std::sync::Arc;

use super::{SequenceLayers, SequenceLimits, shape_of};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::host::sequences::Sequences;
use crate::host::sequences::prefixes::reusable_pages;
use crate::host::window::Window;
use crate::layer_shape::LayerShape;
use crate::sequence::SequenceId;
use crate::stats::Stats;
use crate::storage::step::StepData;
use crate::storage::write::Storing;
use crate::stored::StoredTensor;
use crate::tensor::TensorView;
use crate::view::LayerView;

/// The layers of a cache.
#[derive(Debug)]
pub(crate) struct SequenceGroups {
    limits: SequenceLimits,
    /// Layers without a window first, if there are any.
    pub(super) groups: Vec<SequenceLayers>,
    /// Group and place of each layer.
    places: Vec<(usize, usize)>,
}

/// A planned step: one for each group.
#[derive(Clone, Debug)]
pub(crate) struct GroupSteps(Arc<[StepData]>);

impl GroupSteps {
    /// That of the layers which keep most.
    pub(crate) fn first(&self) -> &StepData {
        &self.0[0]
    }

    /// That of a group. A step of another cache may have other groups.
    pub(super) fn of(&self, group: usize) -> &StepData {
        self.0.get(group).unwrap_or(self.first())
    }
}

impl SequenceGroups {
    pub(crate) fn new(
        gpu: &Gpu,
        layers: &[LayerShape],
        windows: &[Option<Window>],
        (limits, storing): (SequenceLimits, Storing),
    ) -> Result<Self> {
        let window = |layer: usize| windows.get(layer).copied().flatten();
        let mut kinds: Vec<Option<Window>> = (0..layers.len()).map(window).collect();
        // The largest window first, and none before all.
        kinds.sort_by_key(|kind| std::cmp::Reverse(kind.map_or(usize::MAX, |it| it.tokens)));
        kinds.dedup();
        let mut members = vec![Vec::new(); kinds.len()];
        let mut places = Vec::with_capacity(layers.len());
        for (layer, shape) in layers.iter().enumerate() {
            let of_layer = window(layer);
            let group = kinds.iter().position(|kind| *kind == of_layer).unwrap_or_default();
            places.push((group, members[group].len()));
            members[group].push((layer, shape_of(shape, storing)?));
        }
        let cache = Sequences::new(limits.page_tokens).cache();
        let groups = kinds.iter().zip(members).map(|(&kind, members)| {
            let first = members.first().map_or(0, |(layer, _)| *layer);
            let sequences = Sequences::of_group(cache, limits.page_tokens, kind, first);
            SequenceLayers::new(gpu, members, (limits, storing), sequences)
        });
        Ok(Self { limits, groups: groups.collect(), places })
    }

    pub(crate) fn limits(&self) -> SequenceLimits {
        self.limits
    }

    pub(crate) fn layer_count(&self) -> usize {
        self.places.len()
    }

    /// Lets go of the bind groups that are kept.
    pub(crate) fn release(&mut self) {
        self.groups.iter().for_each(SequenceLayers::release);
    }

    /// The sequences of the layers that keep most.
    pub(crate) fn sequences(&self) -> Result<&Sequences> {
        self.groups.iter().try_for_each(|group| group.sequences().map(|_| ()))?;
        self.groups[0].sequences()
    }

    /// Does to the sequences of all groups what is known not to fail, and returns what the first one answers.
    fn each<T>(&mut self, mut change: impl FnMut(&mut Sequences) -> Result<T>) -> Result<T> {
        self.sequences()?;
        let mut answers = self.groups.iter_mut().map(|group| change(group.sequences_mut()?));
        let first = answers.next().expect("a cache has a layer");
        answers.try_for_each(|answer| answer.map(|_| ()))?;
        first
    }

    pub(crate) fn add(&mut self) -> Result<SequenceId> {
        self.each(|sequences| Ok(sequences.add()))
    }

    pub(crate) fn fork(&mut self, id: SequenceId, tokens: usize) -> Result<SequenceId> {
        for group in &self.groups {
            group.check_written(id, tokens)?;
            let sequences = group.sequences()?;
            if tokens <= sequences.len(id)? {
                sequences.check_roll_back(id, tokens)?;
            }
        }
        self.each(|sequences| sequences.fork(id, tokens))
    }

    pub(crate) fn remove(&mut self, id: SequenceId) -> Result<()> {
        self.each(|sequences| sequences.remove(id))
    }

    pub(crate) fn truncate(&mut self, id: SequenceId, length: usize) -> Result<()> {
        for group in &self.groups {
            group.sequences()?.check_roll_back(id, length)?;
        }
        self.each(|sequences| sequences.truncate(id, length))
    }

    /// Of the latest `count` tokens of a sequence those at `keep` stay, in this order: in all layers or in none.
    pub(crate) fn keep_latest(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        id: SequenceId,
        count: usize,
        keep: &[u32],
    ) -> Result<()> {
        let len = self.sequences()?.len(id)?;
        if let Some(&past) = keep.iter().find(|&&at| at as usize >= count) {
            return Err(Error::PositionOutOfBounds { position: past as usize, bound: count });
        }
        if keep.is_empty() && count <= len {
            return self.truncate(id, len - count);
        }
        let mut ready = Vec::with_capacity(self.groups.len());
        for group in &mut self.groups {
            ready.push(group.stage_keep(pass, id, count, keep)?);
        }
        let mut groups = self.groups.iter_mut().zip(ready);
        groups.try_for_each(|(group, ready)| group.commit_keep(pass, ready))
    }

    pub(crate) fn crop(&mut self, id: SequenceId, length: usize) -> Result<()> {
        self.each(|sequences| sequences.crop(id, length))
    }

    /// Whole pages of these tokens that a sequence can begin with.
    fn cached_pages(&self, tokens: &[u32]) -> Result<usize> {
        self.sequences()?;
        Ok(reusable_pages(self.groups.iter().map(|group| &group.sequences), tokens))
    }

    pub(crate) fn cached_prefix(&self, tokens: &[u32]) -> Result<usize> {
        Ok(self.cached_pages(tokens)? * self.limits.page_tokens)
    }

    pub(crate) fn add_with_prefix(&mut self, tokens: &[u32]) -> Result<(SequenceId, usize)> {
        let pages = self.cached_pages(tokens)?;
        let id = self.each(|sequences| Ok(sequences.add_with_pages(tokens, pages)))?;
        Ok((id, pages * self.limits.page_tokens))
    }

    pub(crate) fn remember_prefix(&mut self, id: SequenceId, tokens: &[u32]) -> Result<()> {
        self.groups.iter().try_for_each(|group| group.check_written(id, tokens.len()))?;
        self.each(|sequences| sequences.remember_prefix(id, tokens))
    }

    pub(crate) fn forget_prefixes(&mut self) -> Result<()> {
        self.each(|sequences| {
            sequences.forget_prefixes();
            Ok(())
        })
    }

    /// Plans a step for all layers. Growth of the pools and copies of shared pages are recorded into `pass`.
    pub(crate) fn plan_step(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        counts: &[(SequenceId, usize)],
    ) -> Result<GroupSteps> {
        self.plan_groups(pass, |_| counts)
    }

    /// The same, with tokens of their own for the layers of each group.
    pub(super) fn plan_groups<'a>(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        counts: impl Fn(usize) -> &'a [(SequenceId, usize)],
    ) -> Result<GroupSteps> {
        let mut ready = Vec::with_capacity(self.groups.len());
        for (at, group) in self.groups.iter_mut().enumerate() {
            ready.push(group.stage_step(pass, counts(at))?);
        }
        let groups = self.groups.iter_mut().zip(ready);
        let steps = groups.map(|(group, ready)| group.commit_step(pass, ready));
        steps.collect::<Result<Vec<_>>>().map(|steps| GroupSteps(steps.into()))
    }

    pub(crate) fn update(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        step: &GroupSteps,
        layer: usize,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
    ) -> Result<LayerView> {
        let (group, at) = self.place(layer)?;
        self.groups[group].update(pass, step.of(group), at, key, value)
    }

    pub(crate) fn view(&self, step: &GroupSteps, layer: usize) -> Result<LayerView> {
        let (group, at) = self.place(layer)?;
        self.groups[group].view(step.of(group), at)
    }

    /// The pages of a sequence's live tokens in a layer.
    pub(crate) fn pages(&self, id: SequenceId, layer: usize) -> Result<&[u32]> {
        let (group, _) = self.place(layer)?;
        Ok(self.groups[group].sequences()?.live(id)?.pages)
    }

    pub(crate) fn cancel_step(&mut self) -> Result<()> {
        self.sequences()?;
        self.groups.iter_mut().try_for_each(SequenceLayers::cancel_step)
    }

    pub(crate) fn get(
        &self,
        id: SequenceId,
        layer: usize,
    ) -> Result<Option<(StoredTensor, StoredTensor)>> {
        let (group, at) = self.place(layer)?;
        self.groups[group].get(id, at)
    }

    pub(crate) async fn get_async(
        &self,
        id: SequenceId,
        layer: usize,
    ) -> Result<Option<(StoredTensor, StoredTensor)>> {
        let (group, at) = self.place(layer)?;
        self.groups[group].get_async(id, at).await
    }

    pub(crate) fn reset(&mut self) {
        self.groups.iter_mut().for_each(SequenceLayers::reset);
    }

    /// Of all groups; pages are those of the group that uses most.
    pub(crate) fn stats(&self) -> Stats {
        let all = self.groups.iter().map(SequenceLayers::stats);
        let most = all.clone().max_by_key(|stats| stats.pages_used).unwrap_or_default();
        let peak = all.clone().map(|stats| stats.peak_pages_used).max().unwrap_or_default();
        let sum = all.fold(Stats::default(), |sum, stats| sum + stats);
        Stats {
            pages_used: most.pages_used,
            pages_shared: most.pages_shared,
            pages_free: most.pages_free,
            peak_pages_used: peak,
            ..sum
        }
    }

    pub(super) fn place(&self, layer: usize) -> Result<(usize, usize)> {
        let num_layers = self.places.len();
        self.places.get(layer).copied().ok_or(Error::LayerOutOfRange { layer, num_layers })
    }
}
