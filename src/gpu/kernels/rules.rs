//! What selects the form of an attention kernel: which tokens queries see, and how scores are made.

/// What a query sees, and how scores are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) scale: f32,
    pub(crate) is_causal: bool,
    /// Tokens that a query looks back on, its own included, and the first tokens that it sees as well.
    pub(crate) window: Option<[usize; 2]>,
    pub(crate) cap: Option<f32>,
    pub(crate) has: Has,
}

impl Default for Rules {
    /// Causal, and nothing else. The scale is no matter of a kernel's form.
    fn default() -> Self {
        Self { scale: 1.0, is_causal: true, window: None, cap: None, has: Has::default() }
    }
}

impl Rules {
    /// Whether query rows of different tokens or heads may see different tokens.
    pub(super) fn differ(&self, tokens: usize) -> bool {
        let by_token = self.is_causal || self.window.is_some();
        by_token && tokens > 1 || self.has.mask || self.has.bits
    }

    /// The window as the kernel takes it: one without an end, where only the rows' starts matter.
    pub(super) fn window_words(&self) -> Option<[u32; 2]> {
        let narrow = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
        match self.window {
            // What a view holds is counted in 32 bits with room to spare.
            Some([window, first]) => Some([narrow(window), narrow(first).min(u32::MAX / 4)]),
            None => self.has.starts.then_some([u32::MAX, 0]),
        }
    }
}

/// Which masks, biases, sinks and row starts a call has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Has {
    pub(crate) mask: bool,
    pub(crate) bits: bool,
    pub(crate) slopes: bool,
    pub(crate) sinks: bool,
    pub(crate) starts: bool,
}

impl Has {
    pub(crate) fn any(self) -> bool {
        self != Self::default()
    }
}
