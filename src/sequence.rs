//! Names of sequences: [`SequenceId`].

/// The name of a sequence in a [`SequenceCache`](crate::SequenceCache). It stays valid while other sequences come
/// and go, and is never given to another one: the name of a removed sequence is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    /// Number of the cache, unique in the process: a name of another cache is an error, too.
    pub(crate) cache: u64,
    pub(crate) index: u32,
    /// How many sequences had the index before.
    pub(crate) generation: u32,
}

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.index, self.generation)
    }
}
