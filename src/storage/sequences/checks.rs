//! What a cache of sequences refuses before anything is recorded.

use super::SequenceLayers;
use crate::error::{Error, Result, SequenceError};
use crate::sequence::SequenceId;
use crate::storage::step::StepData;
use crate::storage::store::Shape;
use crate::tensor::TensorView;

impl SequenceLayers {
    pub(super) fn check_pass(&self, pass: &wgpu::ComputePass<'_>) -> Result<()> {
        self.gpu.handle().check_alive_for(pass)?;
        self.ledger.check_pass(pass)
    }

    pub(super) fn check_finished(&self) -> Result<()> {
        let updated = self.latest.as_ref().map_or(&[][..], |latest| &latest.updated);
        match updated.iter().position(|is_updated| !is_updated) {
            Some(at) => Err(SequenceError::StepUnfinished { layer: self.numbers[at] }.into()),
            None => Ok(()),
        }
    }

    pub(super) fn check_updated(&self, layer: usize) -> Result<()> {
        let updated = self.latest.as_ref().is_none_or(|latest| latest.updated[layer]);
        let layer = self.numbers[layer];
        if updated { Ok(()) } else { Err(SequenceError::StepUnfinished { layer }.into()) }
    }

    /// Refuses tokens of a sequence that the latest step has not written into all layers yet.
    pub(crate) fn check_written(&self, id: SequenceId, tokens: usize) -> Result<()> {
        let before = self.latest.iter().flat_map(|latest| &latest.before);
        match before.into_iter().find(|(its, _)| *its == id) {
            Some((_, len)) if tokens > *len => self.check_finished(),
            _ => Ok(()),
        }
    }

    pub(super) fn check_step(&self, step: &StepData) -> Result<()> {
        let [cache, number] = step.number;
        if cache != self.sequences.cache() {
            return Err(Error::Sequence(SequenceError::StaleStep {
                reason: "another cache planned it",
            }));
        }
        if self.latest.as_ref().is_none_or(|latest| latest.number != number) {
            let reason = "another one was planned since, or it was cancelled or reset";
            return Err(Error::Sequence(SequenceError::StaleStep { reason }));
        }
        Ok(())
    }

    pub(super) fn check_tensors(
        &self,
        step: &StepData,
        layer: usize,
        key: &TensorView<'_>,
        value: &TensorView<'_>,
    ) -> Result<Shape> {
        let shape = self.shapes[layer];
        if key.dtype != value.dtype {
            return Err(Error::WrongDType { what: "value", expected: key.dtype, got: value.dtype });
        }
        for (what, tensor) in [("key", key), ("value", value)] {
            self.storing.check_dtype(&shape, what, tensor.dtype)?;
            let [batch, _, tokens, _] = tensor.shape;
            if [batch, tokens] != [1, step.work.total] {
                let (tokens, shape) = (step.work.total, tensor.shape);
                return Err(Error::Sequence(SequenceError::StepTokens { tokens, shape }));
            }
        }
        let dims = [key.shape[1], key.shape[3], value.shape[1], value.shape[3]];
        if dims != [shape.heads, shape.key_dim, shape.heads, shape.value_dim] {
            return Err(Error::LayerShape {
                layer: self.numbers[layer],
                batch: 1,
                heads: shape.heads,
                key_dim: shape.key_dim,
                value_dim: shape.value_dim,
                key: key.shape,
                value: value.shape,
            });
        }
        Ok(shape)
    }
}
