//! The start and length of each batch row. Pure host logic.

/// The live tokens of one row: token t lies at slot `start + t`, in a ring modulo its capacity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Span {
    /// Slot of the oldest live token.
    pub(crate) start: usize,
    /// Live tokens.
    pub(crate) len: usize,
}
