//! What a layer keeps that looks back on a window. Pure host logic.

use crate::error::{Result, WindowError};

/// The window of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// Tokens that a query sees, its own included.
    pub(crate) tokens: usize,
    /// The most tokens of an update, where that is fixed.
    pub(crate) max_chunk: Option<usize>,
}

impl Window {
    /// Live tokens that the next query needs beside itself.
    pub(crate) fn needed(self) -> usize {
        self.tokens - 1
    }

    /// The most tokens that are live after an update of `chunk` tokens.
    pub(crate) fn most(self, chunk: usize) -> usize {
        self.needed().saturating_add(chunk)
    }

    /// The most live tokens, where a layer without a window would hold `whole` at most.
    pub(crate) fn bound(self, whole: usize) -> usize {
        whole.min(self.most(self.max_chunk.unwrap_or(whole)))
    }

    /// Tokens that are kept of `live` saved ones, of which `gone` before them were let go for a window: what the window
    /// needs, and more if the layer that was saved had kept more for its window, up to `bound`. One at least, since a
    /// layer without a token has no shape.
    #[cfg(feature = "safetensors")]
    pub(crate) fn kept_of_saved(self, [gone, live]: [usize; 2], bound: usize) -> usize {
        match gone == 0 || live > bound {
            true => live.min(self.needed().max(1)),
            false => live,
        }
    }

    /// Refuses an update that is longer than was said.
    pub(crate) fn check_chunk(self, layer: usize, tokens: usize) -> Result<()> {
        match self.max_chunk {
            Some(most) if tokens > most => {
                Err(WindowError::ChunkTooLong { layer, tokens, most, window: self.tokens }.into())
            }
            _ => Ok(()),
        }
    }

    /// Refuses a roll-back to `kept` tokens, of which `gone` were let go before `live` ones, if the next query would
    /// look back on some of those.
    pub(crate) fn check_roll_back(
        self,
        layer: usize,
        [gone, live]: [usize; 2],
        kept: usize,
    ) -> Result<()> {
        let all = gone.saturating_add(live);
        if gone == 0 || kept >= all || kept >= gone.saturating_add(self.needed()) {
            return Ok(());
        }
        let most = live.saturating_sub(self.needed());
        let asked = all - kept;
        Err(WindowError::PastWindow { layer, window: self.tokens, live, most, asked }.into())
    }
}

/// Tokens that were let go and would still be live without a window, after a crop to `most` tokens of `live` ones,
/// of which `gone` were let go before.
pub(crate) fn gone_after_crop([gone, live]: [usize; 2], most: usize) -> usize {
    gone.saturating_add(live).min(most) - live.min(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// Against a list of which tokens are there: a roll-back is right if all tokens that the next query sees are.
    #[test]
    fn a_roll_back_is_refused_if_and_only_if_the_next_query_would_miss_a_token() {
        for tokens in 1..6 {
            let window = Window { tokens, max_chunk: None };
            for gone in 0..8_usize {
                for live in 0..8 {
                    for kept in 0..=gone + live {
                        let first_seen = kept.saturating_sub(window.needed());
                        let is_right = kept == gone + live || first_seen >= gone;
                        let answer = window.check_roll_back(3, [gone, live], kept);
                        assert_eq!(answer.is_ok(), is_right, "{tokens} {gone} {live} {kept}");
                        if let Err(Error::Window(WindowError::PastWindow { most, .. })) = answer {
                            let least = gone + live - most;
                            assert_eq!(window.check_roll_back(3, [gone, live], least), Ok(()));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_chunk_is_as_long_as_was_said() {
        let window = Window { tokens: 4, max_chunk: Some(5) };
        assert_eq!((window.most(5), window.check_chunk(0, 5)), (8, Ok(())));
        let refused = WindowError::ChunkTooLong { layer: 2, tokens: 6, most: 5, window: 4 }.into();
        assert_eq!(window.check_chunk(2, 6), Err(refused));
    }
}
