//! The forms of the attention kernels: what each of their pipeline constants is.

use super::rules::{Has, Rules};
use super::spread::Spread;
use super::variant::CONSTANTS;
use crate::dtype::DType;
use crate::format::Format;
use crate::layout::Layout;

/// The pipeline constants; those after the first [`PLAIN_CONSTANTS`] are of masks, biases, sinks and row starts.
pub(super) const CONSTANT_NAMES: [&str; 16] = [
    "threads",
    "fours",
    "is_alone",
    "masking",
    "has_rest",
    "is_pooled",
    "is_packed",
    "query_type",
    "output_type",
    "has_window",
    "has_cap",
    "has_mask",
    "has_bits",
    "has_slopes",
    "has_sinks",
    "has_starts",
];
pub(super) const PLAIN_CONSTANTS: usize = 11;

/// Those of the kernel in tiles.
pub(super) const TILE_CONSTANT_NAMES: [&str; 14] = [
    "threads",
    "tile_tokens",
    "masking",
    "has_rest",
    "is_pooled",
    "query_type",
    "output_type",
    "has_window",
    "has_cap",
    "has_mask",
    "has_bits",
    "has_slopes",
    "has_sinks",
    "has_starts",
];
pub(super) const PLAIN_TILE_CONSTANTS: usize = 9;

/// What a call needs of the kernel beside the spread of a head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub(super) is_pooled: bool,
    pub(super) is_packed: bool,
    /// Of q and of the output.
    pub(super) types: [DType; 2],
    pub(super) has_window: bool,
    pub(super) has_cap: bool,
    pub(super) has: Has,
}

impl Form {
    /// The constants of a kernel: its own first ones, then those that both kernels have, in the same order.
    fn constants(self, own: &[u32]) -> [u32; CONSTANTS] {
        let [query, output] = self.types.map(|dtype| Format::from(dtype).number());
        let Has { mask, bits, slopes, sinks, starts } = self.has;
        let flags = [self.has_window, self.has_cap, mask, bits, slopes, sinks, starts];
        let mut all = [0; CONSTANTS];
        let values = own.iter().copied().chain([query, output]).chain(flags.map(u32::from));
        all.iter_mut().zip(values).for_each(|(constant, value)| *constant = value);
        all
    }

    /// What calls will need whose q and output do not lie in one buffer.
    pub(super) fn ahead(layout: Layout, rules: &Rules, types: [DType; 2]) -> Self {
        Self {
            is_pooled: false,
            is_packed: layout == Layout::RaggedPaged,
            types,
            has_window: rules.window_words().is_some(),
            has_cap: rules.cap.is_some(),
            has: rules.has,
        }
    }
}

/// How V of a token that a row does not see is masked, as in the shader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Masking {
    AllRows = 0,
    SomeRounds = 1,
    EveryRound = 2,
}

pub(super) fn masking(is_cpu: bool, has_unseen: bool) -> Masking {
    match (is_cpu, has_unseen) {
        (false, _) => Masking::SomeRounds,
        (true, true) => Masking::EveryRound,
        (true, false) => Masking::AllRows,
    }
}

impl Spread {
    /// The pipeline constants.
    pub(super) fn constants(self, masking: Masking, key_dim: u32, form: Form) -> [u32; CONSTANTS] {
        let has_rest = 16 * self.fours * self.slices > key_dim;
        let own = [self.threads, self.fours, self.is_alone.into(), masking as u32, has_rest.into()];
        form.constants(&[&own[..], &[form.is_pooled.into(), form.is_packed.into()]].concat())
    }

    /// Those of the kernel in tiles of `tokens` tokens.
    pub(super) fn tile_constants(self, tokens: u32, key_dim: u32, form: Form) -> [u32; CONSTANTS] {
        let has_rest = 16 * self.slices > key_dim;
        let masking = Masking::SomeRounds as u32;
        form.constants(&[self.threads, tokens, masking, has_rest.into(), form.is_pooled.into()])
    }
}
