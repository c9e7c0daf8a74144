//! What a cache of sequences refuses.

use crate::sequence::SequenceId;

/// What a [`SequenceCache`](crate::SequenceCache) refuses, beside what every cache does: the cause of an
/// [`Error::Sequence`](crate::Error::Sequence).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SequenceError {
    /// A name of a sequence that was removed, or that another cache gave.
    #[error(
        "this cache has no sequence {id}: it was removed or reset, or the name is of another cache; use names of sequences that are there"
    )]
    UnknownSequence {
        /// The name.
        id: SequenceId,
    },

    /// A fork behind the end of a sequence.
    #[error(
        "a fork at token {asked} was asked for, but sequence {id} has {len} live tokens; fork at {len} or before"
    )]
    ForkPastEnd {
        /// The sequence.
        id: SequenceId,
        /// Tokens that were asked for.
        asked: usize,
        /// Its live tokens.
        len: usize,
    },

    /// Token ids that are not those of a sequence's first tokens.
    #[error(
        "{tokens} token ids were given for sequence {id}, which has {len} live tokens and has dropped {dropped} before them; {}",
        if *dropped > 0 { "remember a prefix before a crop" } else { "give the ids of its first tokens, no more than it has" }
    )]
    PrefixTokens {
        /// The sequence.
        id: SequenceId,
        /// Ids that were given.
        tokens: usize,
        /// Its live tokens.
        len: usize,
        /// Tokens that crops have dropped.
        dropped: usize,
    },

    /// A cache of sequences without layers.
    #[error("a cache of sequences was asked for without a layer; give the shape of each layer")]
    NoLayers,

    /// A step without sequences.
    #[error("a step was planned for no sequence; plan one sequence at least, or skip the step")]
    EmptyStep,

    /// A step that has a sequence twice.
    #[error("sequence {id} is named twice in one step; name it once, with all its new tokens")]
    SequenceTwice {
        /// The sequence.
        id: SequenceId,
    },

    /// A step that adds nothing to a sequence.
    #[error(
        "sequence {id} gets no token in this step; leave it out, or give it one token at least"
    )]
    NoNewTokens {
        /// The sequence.
        id: SequenceId,
    },

    /// K and V that do not have the tokens of the step.
    #[error(
        "K and V must be packed, (1, H, tokens of the step, D), here with {tokens} tokens, but the shape is {shape:?}; hand in the new tokens of all sequences in the order of the step"
    )]
    StepTokens {
        /// New tokens of the step.
        tokens: usize,
        /// Shape of K or V, (B, H, T, D).
        shape: [usize; 4],
    },

    /// A step that is not the latest of its cache.
    #[error(
        "the step is not the latest of this cache: {reason}; use the step that plan_step() returned last"
    )]
    StaleStep {
        /// What happened to it.
        reason: &'static str,
    },

    /// A call that needs tokens of a step that has not updated all layers yet.
    #[error(
        "the latest step has not updated layer {layer} yet; update all layers of a step before its new tokens are read, forked or remembered and before the next step, or call cancel_step()"
    )]
    StepUnfinished {
        /// The first layer that misses.
        layer: usize,
    },
}
