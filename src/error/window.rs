//! What layers with a window refuse: [`WindowError`].

/// What a cache refuses whose layers have [windows](crate::CacheOptions::with_windows), beside what every cache does:
/// the cause of an [`Error::Window`](crate::Error::Window).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// A window of no tokens.
    #[error(
        "layer {layer} is given a window of 0 tokens, but a query sees its own token at least; give a window of 1 or more, or None for a layer that keeps all"
    )]
    NoWindow {
        /// The layer.
        layer: usize,
    },

    /// An update of a layer with a window that is longer than the cache was made for.
    #[error(
        "{tokens} new tokens for layer {layer}, which looks back on a window of {window} tokens and has room for updates of {most}; write pieces of {most} tokens, or make the cache with_max_chunk({tokens})"
    )]
    ChunkTooLong {
        /// The layer.
        layer: usize,
        /// Tokens of the update.
        tokens: usize,
        /// The most tokens of an update.
        most: usize,
        /// The layer's window, in tokens.
        window: usize,
    },

    /// A roll-back after which the next token would look back on tokens that a layer has let go.
    #[error(
        "{asked} tokens cannot be rolled back in layer {layer}: it looks back on a window of {window} tokens and keeps {live} live ones, so at most {most} of the latest can go; roll back fewer, or reset() and write the text again"
    )]
    PastWindow {
        /// The layer.
        layer: usize,
        /// Its window, in tokens.
        window: usize,
        /// Its live tokens.
        live: usize,
        /// The most tokens that can be rolled back.
        most: usize,
        /// Tokens to roll back.
        asked: usize,
    },

    /// A crop to other lengths for each row, some of which reach into tokens that a layer has let go.
    #[error(
        "row 0 of layer {layer} would count {} tokens that its window of {window} has let go, and row {row} {}; of all rows it must be as many: crop each row to its live tokens or fewer (LayerView::row_len), or all of them to one length", let_go[0], let_go[1]
    )]
    RowsApart {
        /// The layer.
        layer: usize,
        /// Its window, in tokens.
        window: usize,
        /// The first row that differs from row 0.
        row: usize,
        /// Tokens that would count as live and are gone, of row 0 and of that row.
        let_go: [usize; 2],
    },
}
