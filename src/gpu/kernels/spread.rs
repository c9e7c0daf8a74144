//! How attention spreads a head over the invocations of a workgroup.

use super::Unit;
use crate::view::LayerView;

/// How a head is spread over a workgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spread {
    pub(super) threads: u32,
    /// Threads along a head.
    pub(super) slices: u32,
    /// Fours of quads that a thread holds.
    pub(super) fours: u32,
    /// Whether a thread holds whole heads, and runs of tokens.
    pub(super) is_alone: bool,
}

impl Spread {
    /// A GPU has registers for a four of quads. A CPU holds more, if they are read as vectors: word by word
    /// the code would be long, and take long to compile.
    fn new(quads: u32, unit: Unit, is_cpu: bool) -> Self {
        if is_cpu && unit == Unit::Vector && quads <= 16 {
            let fours = quads.div_ceil(4).next_power_of_two();
            return Self { threads: 16, slices: 1, fours, is_alone: true };
        }
        // Long heads as well: with more slices too few lanes would be left to add up.
        let fours = if (is_cpu && unit == Unit::Vector) || quads > 128 { 2 } else { 1 };
        let slices = quads.div_ceil(4 * fours).next_power_of_two();
        Self { threads: 128, slices, fours, is_alone: false }
    }
}

/// Rounds of a workgroup's loop over tokens at most, those of loops in it included: Mesa's llvmpipe ends the
/// loops of an invocation without a word after 65,535 rounds, all of them counted together. The loops that
/// put lanes together take up to 1,500.
const MOST_ROUNDS: usize = 60_000;

impl Spread {
    /// Of heads of these many elements, of K and of V.
    pub(super) fn of(dims: [usize; 2], is_cpu: bool) -> Self {
        let most = dims[0].max(dims[1]).min(MOST_DIM);
        let quads = u32::try_from(most.div_ceil(4)).expect("a head is small");
        Self::new(quads, unit_of(dims), is_cpu)
    }

    /// Tokens of a split that a workgroup can go through.
    fn most_tokens(self) -> usize {
        let lanes = (self.threads / self.slices) as usize;
        if self.is_alone {
            lanes * MOST_ROUNDS
        } else {
            // The slices of a lane add up their scores in a loop of their own.
            4 * lanes * (MOST_ROUNDS / (1 + self.slices as usize))
        }
    }
}

/// What K and V of heads of these many elements are read in.
pub(super) fn unit_of(dims: [usize; 2]) -> Unit {
    let is_whole = dims.iter().all(|dim| dim % 4 == 0);
    if is_whole { Unit::Vector } else { Unit::Word }
}

/// The most tokens of a view that one workgroup can go through.
pub(crate) fn most_tokens(view: &LayerView, is_cpu: bool) -> usize {
    Spread::of([view.key_dim, view.value_dim], is_cpu).most_tokens()
}

/// Elements a head at most: what leaves four lanes or more for each part of a sum.
pub(crate) const MOST_DIM: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_of_any_size_is_spread_over_whole_parts() {
        for dim in 1..=MOST_DIM {
            for (unit, is_cpu) in
                Unit::ALL.into_iter().flat_map(|unit| [(unit, false), (unit, true)])
            {
                let quads = u32::try_from(dim.div_ceil(4)).expect("few");
                let Spread { threads, slices, fours, is_alone } = Spread::new(quads, unit, is_cpu);
                assert!(4 * fours * slices >= quads && [1, 2, 4].contains(&fours), "{dim}");
                assert!(!is_alone || slices == 1, "{dim}");
                // Each quad that is told has a thread or more to add it up.
                let told = if threads <= 32 { 16 } else { 4 } * slices;
                assert!(threads % told == 0 && slices.is_power_of_two(), "{dim}");
            }
        }
    }
}
