//! How attention spreads a head over the invocations of a workgroup.

use super::Unit;
use super::limits::TILES_BYTES;
use crate::view::LayerView;

/// Query rows of a workgroup or, of a kernel in tiles, of a team.
pub(crate) const ROWS: usize = 4;

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

/// How many query rows share the K and V that a workgroup reads: `shaders/attention_tiles.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    /// Query rows of a workgroup.
    pub(crate) rows: usize,
    /// Tokens that are in workgroup memory at once.
    pub(crate) tokens: u32,
}

impl Tiles {
    /// Quads that workgroup memory has for a tile, and the most tokens: with more, the last tile of a walk is mostly empty.
    const QUADS: u32 = 512;
    const MOST_TOKENS: u32 = 16;

    /// For `rows` query rows over heads of these many elements, of K and of V, on a device with this much workgroup memory.
    /// None on a CPU, whose caches keep what four rows have read for the next four; for fewer rows than make half a
    /// workgroup; and for heads of which four tokens do not fit.
    pub(crate) fn of(
        dims: [usize; 2],
        rows: usize,
        is_cpu: bool,
        workgroup_bytes: u32,
    ) -> Option<Self> {
        let quads: usize = dims.iter().map(|dim| dim.div_ceil(4)).sum();
        let fit = Self::QUADS / u32::try_from(quads).ok()? / 4 * 4;
        if is_cpu || fit == 0 || workgroup_bytes < TILES_BYTES {
            return None;
        }
        let Spread { threads, slices, .. } = Spread::of(dims, false);
        let all = ROWS * (threads / slices) as usize;
        let tiles = Self { rows: all, tokens: fit.min(Self::MOST_TOKENS) };
        (2 * rows >= all).then_some(tiles)
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

    /// A tile holds whole fours of tokens, all invocations belong to a team, and none of it depends on how many rows
    /// there are beyond a half workgroup of them.
    #[test]
    fn tiles_fit_into_workgroup_memory() {
        for key_dim in 1..=MOST_DIM {
            for value_dim in [1, 4, 64, 128, key_dim, 512] {
                let dims = [key_dim, value_dim];
                let quads: u32 =
                    dims.iter().map(|dim| u32::try_from(dim.div_ceil(4)).unwrap()).sum();
                let Some(Tiles { rows, tokens }) =
                    Tiles::of(dims, usize::MAX / 2, false, TILES_BYTES)
                else {
                    assert!(4 * quads > Tiles::QUADS, "{dims:?}");
                    continue;
                };
                assert!(tokens > 0 && tokens.is_multiple_of(4) && tokens * quads <= Tiles::QUADS);
                let Spread { threads, slices, fours, .. } = Spread::of(dims, false);
                assert_eq!((fours, rows), (1, ROWS * (threads / slices) as usize), "{dims:?}");
                assert!(Tiles::of(dims, rows / 2, false, TILES_BYTES).is_some());
                assert!(Tiles::of(dims, rows / 2 - 1, false, TILES_BYTES).is_none());
                assert!(Tiles::of(dims, rows, true, TILES_BYTES).is_none());
                assert!(Tiles::of(dims, rows, false, TILES_BYTES - 1).is_none());
            }
        }
    }
}
