//! One sequence: the pages of its tokens.

/// Token t of a sequence is slot `start + t` of its pages, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Sequence {
    pub(super) pages: Vec<u32>,
    /// Slot of the oldest live token in the first page.
    pub(super) start: usize,
    /// Live tokens.
    pub(super) len: usize,
    /// Tokens before the live ones that are gone: dropped by crops, or let go for the window.
    pub(super) dropped: usize,
    /// Those of them that would be live without a window: the latest.
    pub(super) let_go: usize,
}

impl Sequence {
    /// Live tokens, and those that would be live without a window: what lengths are counted in.
    pub(super) fn whole_len(&self) -> usize {
        self.let_go.saturating_add(self.len)
    }

    /// Drops the last `tokens` live tokens. Returns the pages that go back.
    pub(super) fn drop_last(&mut self, tokens: usize, page_tokens: usize) -> Vec<u32> {
        if tokens == 0 {
            return Vec::new();
        }
        self.len -= tokens;
        let kept = pages_of(self.start, self.len, page_tokens);
        if kept == 0 {
            self.start = 0;
        }
        self.pages.split_off(kept)
    }

    /// Drops the first `tokens` live tokens. Returns the pages that go back.
    pub(super) fn drop_first(&mut self, tokens: usize, page_tokens: usize) -> Vec<u32> {
        if tokens == 0 {
            return Vec::new();
        }
        self.len -= tokens;
        self.dropped = self.dropped.saturating_add(tokens);
        let start = self.start + tokens;
        let gone = if self.len == 0 { self.pages.len() } else { start / page_tokens };
        self.start = if self.len == 0 { 0 } else { start % page_tokens };
        self.pages.drain(..gone).collect()
    }
}

/// Pages of `len` tokens, of which the oldest lies at slot `start` of the first page.
pub(super) fn pages_of(start: usize, len: usize, page_tokens: usize) -> usize {
    if len == 0 { 0 } else { start.saturating_add(len).div_ceil(page_tokens) }
}
