//! Keeps some of the latest tokens of a sequence: the accepted path of a tree of drafted ones.

use super::SequenceLayers;
use super::pools::Growth;
use crate::error::{Error, Result};
use crate::gpu::arena::Allocation;
use crate::gpu::call::Call;
use crate::gpu::kernels::Positions;
use crate::host::position::{WritePlan, plan_kept};
use crate::host::rows::Span;
use crate::host::sequences::StagedStep;
use crate::sequence::SequenceId;
use crate::storage::step::RowLists;
use crate::storage::store::Store;
use crate::storage::write::{Target, write_stored};

/// A change of a sequence that is ready to happen.
pub(super) struct ReadyKeep {
    staged: StagedStep,
    growth: Option<Growth>,
    call: Call,
    dispatches: u64,
    moved: u64,
}

impl SequenceLayers {
    /// Makes ready that of the latest `count` tokens of a sequence those at `keep` stay, in this order; some do.
    /// Changes nothing that can be seen.
    ///
    /// As in a cache of rows, the tokens are copied out, and those that stay are appended to what is before them.
    pub(super) fn stage_keep(
        &mut self,
        pass: &wgpu::ComputePass<'_>,
        id: SequenceId,
        count: usize,
        keep: &[u32],
    ) -> Result<ReadyKeep> {
        self.check_pass(pass)?;
        self.check_memory()?;
        self.ledger.prepare(self.gpu.uploads())?;
        self.check_finished()?;
        let live = self.sequences.live(id)?;
        let layer = self.numbers[0];
        if count > live.len {
            return Err(Error::TooFewTokens { layer, live: live.len, asked: count });
        }
        let whole = self.sequences.len(id)?;
        self.sequences.check_roll_back(id, whole - count + keep.len())?;
        let tail = [(live.start + live.len - count, count, live.pages)];
        let tail = RowLists::new(tail.into_iter());
        let from = self.gpu.uploads().upload(&tail.words)?;
        let limits = self.step_limits();
        let staged = self.sequences.plan_after(count, &[(id, keep.len())], limits)?;
        let growth = self.stage_growth(&staged, limits.fits)?;
        let row = &staged.rows[0];
        let plan = plan_kept(keep, row.old_len);
        let WritePlan::List(list) = &plan else { unreachable!("kept tokens are a list") };
        let target = RowLists::new([(row.start(), row.len(), row.pages())].into_iter());
        let mut words = target.words;
        let list_at = words.len();
        words.extend(&list.words);
        let to = self.gpu.uploads().upload(&words)?;
        let positions = Positions::List {
            named: list.named,
            gap: list.gap,
            at: to.offset / 4 + u32::try_from(list_at).unwrap_or(u32::MAX),
            stride: 0,
        };
        let lists = [(&from, &*tail.spans), (&to, &*target.spans)];
        let mut ready =
            ReadyKeep { staged, growth, call: Call::default(), dispatches: 0, moved: 0 };
        for at in 0..self.shapes.len() {
            self.keep_in(at, count, lists, positions, &mut ready)?;
        }
        ready.call.hold(vec![from.guard.clone(), to.guard.clone()]);
        Ok(ready)
    }

    /// Adds the dispatches of one layer.
    fn keep_in(
        &self,
        at: usize,
        count: usize,
        [(from, tail), (to, target)]: [(&Allocation, &[Span]); 2],
        positions: Positions,
        ready: &mut ReadyKeep,
    ) -> Result<()> {
        let (gpu, growth, shape) = (&self.gpu, ready.growth.as_ref(), self.shapes[at]);
        let (grow, grown) = self.stage_pool_copy(growth, at)?;
        let (store, pool) = self.grown(growth, at);
        let bytes = shape.bytes(1, count)?;
        let copy = Store::new(gpu, self.numbers[at], bytes)?;
        let view = |allocation: &Allocation, spans: &[Span]| {
            self.shaped_view(at, (store, pool), &spans.into(), allocation.clone(), None)
        };
        let collect = gpu.kernels().collect(&view(from, tail), 0..1, copy.bindings())?;
        let (copies, moved) = self.stage_page_copies(growth, at, &ready.staged)?;
        let kept = ready.staged.total;
        let target = Target { store, view: &view(to, target), positions, lists: Some(to) };
        let append = write_stored(gpu, &shape, (&copy, count), kept, target)?;
        let all = grow.into_iter().chain(collect).chain(copies).chain(append);
        for dispatch in all {
            ready.call.add(dispatch);
            ready.dispatches += 1;
        }
        ready.moved += grown + moved + bytes.iter().chain(&shape.bytes(1, kept)?).sum::<u64>();
        Ok(())
    }

    /// Makes it happen. Views of steps before show what is gone.
    pub(super) fn commit_keep(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        ready: ReadyKeep,
    ) -> Result<()> {
        let ReadyKeep { staged, growth, call, dispatches, moved } = ready;
        call.record(pass, &self.ledger)?;
        self.dispatches += dispatches;
        self.bytes_moved += moved;
        self.commit_growth(growth);
        self.peak_pages_used = self.peak_pages_used.max(staged.used() as u64);
        self.steps += 1;
        if let Some(latest) = &mut self.latest {
            latest.number = self.steps;
            latest.before.clear();
        }
        self.sequences.commit(staged);
        debug_assert!(self.sequences.is_sound(), "a recount of the pages agrees");
        Ok(())
    }
}
