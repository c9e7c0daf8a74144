//! How much memory a layer takes, in tokens or pages. Pure host logic, for the storage and for plans.

use crate::host::plan::grown_capacity;
use crate::host::window::Window;

/// Tokens of a first allocation: small, and still room for a few steps.
pub(crate) const LEAST_TOKENS: usize = 64;

/// How the memory of a ring comes to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Growth {
    /// Grows, up to `most` tokens; a layer's first allocation has room for `tokens` at least.
    Dynamic { tokens: usize, most: usize },
    /// Has room for this many tokens from the start, and never more.
    Static { tokens: usize },
}

impl Growth {
    /// That of a layer with a window, for an update of `count` tokens.
    pub(crate) fn of_window(self, window: Option<Window>, count: usize) -> Self {
        let Some(window) = window else { return self };
        match self {
            Self::Dynamic { tokens, most } => {
                Self::Dynamic { tokens, most: most.min(window.most(count)) }
            }
            Self::Static { tokens } => Self::Static { tokens: window.bound(tokens) },
        }
    }

    /// The capacity of new memory for `needed` tokens where there is room for `capacity` now (none at first) and for
    /// `fits` at most; `None` if that is too little. And the tokens that the memory must have room for.
    pub(crate) fn capacity(
        self,
        capacity: usize,
        needed: usize,
        fits: usize,
    ) -> (usize, Option<usize>) {
        match self {
            Self::Static { tokens } => (tokens, (tokens <= fits).then_some(tokens)),
            Self::Dynamic { tokens, most } => {
                let needed = needed.max(if capacity == 0 { tokens.min(most) } else { 0 });
                let fits = fits.min(most.max(needed));
                (needed, grown_capacity(capacity, needed, fits, LEAST_TOKENS))
            }
        }
    }
}

/// Pages for a pool that has `pool` of them and needs `needed`, where `fits` can be bound and `most`, if it is
/// bounded, may be used: made at once then, so that the buffers never change.
pub(crate) fn pool_pages(
    most: Option<usize>,
    page_tokens: usize,
    [pool, needed, fits]: [usize; 3],
) -> usize {
    match most {
        Some(most) => most.min(fits).max(needed),
        None => {
            let least = LEAST_TOKENS.div_ceil(page_tokens);
            grown_capacity(pool, needed, fits, least).unwrap_or(needed)
        }
    }
}

/// The same for layers of a window, whose sequences use few of the pages that there may be: the pool grows, up to `most`.
pub(crate) fn pool_pages_of(
    window: Option<Window>,
    most: Option<usize>,
    page_tokens: usize,
    [pool, needed, fits]: [usize; 3],
) -> usize {
    match window.and(most) {
        Some(most) => pool_pages(None, page_tokens, [pool, needed, fits.min(most).max(needed)]),
        None => pool_pages(most, page_tokens, [pool, needed, fits]),
    }
}

/// Pages that `rows` rows of a layer with a window use at most, for an update of `count` tokens.
pub(crate) fn pages_of_window(
    window: Option<Window>,
    page_tokens: usize,
    rows: usize,
    count: usize,
) -> usize {
    let row = |window: Window| {
        // The oldest live token may lie in the middle of a page.
        window.most(count).div_ceil(page_tokens).saturating_add(1)
    };
    window.map_or(usize::MAX, |window| row(window).saturating_mul(rows))
}
