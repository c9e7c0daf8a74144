//! Which tokens a query sees, and how its scores are made: [`AttentionOptions`].

use crate::gpu::kernels::Has;
use crate::tensor::TensorView;
use crate::view::LayerView;

/// Which tokens [`Attention::record`](crate::Attention::record) lets a query see, and how it scores them.
///
/// Causal, with scores scaled by 1/√D, if nothing else is set. A score is made in this order:
///
/// 1. q·k times the [scale](Self::with_scale);
/// 2. bounded, as [`with_soft_cap`](Self::with_soft_cap) says;
/// 3. less the [slope](Self::with_alibi_slopes) of its head times the distance in tokens;
/// 4. plus the [mask](Self::with_mask)'s entry.
///
/// A token is seen if all of causality, window, row start, mask and bit mask let it be seen. No token that a query
/// does not see changes a bit of its result, whatever K and V hold there. A query that sees no token gives zeros.
/// What is not set costs nothing.
///
/// The queries are the latest Tq of a row's live tokens: query i's own token is len - Tq + i.
///
/// # Examples
///
/// ```
/// use wgpu_kvcache::AttentionOptions;
///
/// // A local layer of Gemma 2: each token sees itself and the 4095 before it, and scores lie within 50.
/// let local = AttentionOptions::default().with_window(4096).with_soft_cap(50.0);
/// // StreamingLLM: the first four tokens stay visible.
/// let streaming = AttentionOptions::default().with_window(1020).with_first_tokens(4);
/// # let _ = (local, streaming);
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use = "options do nothing until attention is recorded with them"]
pub struct AttentionOptions<'a> {
    pub(super) scale: Option<f32>,
    pub(super) is_causal: bool,
    pub(super) window: Option<usize>,
    pub(super) first_tokens: usize,
    pub(super) cap: Option<f32>,
    pub(super) slopes: Option<&'a [f32]>,
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) starts: Option<&'a [u32]>,
    pub(super) mask: Option<TensorView<'a>>,
    pub(super) bits: Option<BitMask<'a>>,
}

impl Default for AttentionOptions<'_> {
    fn default() -> Self {
        Self {
            scale: None,
            is_causal: true,
            window: None,
            first_tokens: 0,
            cap: None,
            slopes: None,
            sinks: None,
            starts: None,
            mask: None,
            bits: None,
        }
    }
}

impl<'a> AttentionOptions<'a> {
    /// Which masks, biases, sinks and row starts there are.
    pub(super) fn has(&self) -> Has {
        Has {
            mask: self.mask.is_some(),
            bits: self.bits.is_some(),
            slopes: self.slopes.is_some(),
            sinks: self.sinks.is_some(),
            starts: self.starts.is_some(),
        }
    }

    /// The same over a view: queries do not look past the window of its layer, of which earlier tokens are there only
    /// for the first queries of a chunk. Where all live tokens are in every query's window nothing is added.
    pub(super) fn over(self, view: &LayerView) -> Self {
        let of_layer = view.window.filter(|&window| self.is_causal && view.len > window);
        let window = self.window.into_iter().chain(of_layer).min();
        Self { window, ..self }
    }

    /// What scores are multiplied by; `None` for 1/√D.
    pub fn with_scale(self, scale: impl Into<Option<f32>>) -> Self {
        Self { scale: scale.into(), ..self }
    }

    /// A new token sees the tokens before it and itself; the last Tq live tokens are the new ones. The default.
    pub fn causal(self) -> Self {
        Self { is_causal: true, ..self }
    }

    /// Each new token sees all live ones, as in cross-attention.
    pub fn unmasked(self) -> Self {
        Self { is_causal: false, ..self }
    }

    /// Each query looks back on `tokens` tokens, its own included, and on no earlier ones. Earlier tokens are not
    /// read either. `None` for no window.
    pub fn with_window(self, tokens: impl Into<Option<usize>>) -> Self {
        Self { window: tokens.into(), ..self }
    }

    /// The first `tokens` live tokens of a row are seen whatever the window says (attention sinks of `StreamingLLM`:
    /// Xiao et al., 2023). Without a window this says nothing.
    pub fn with_first_tokens(self, tokens: usize) -> Self {
        Self { first_tokens: tokens, ..self }
    }

    /// Scores become cap·tanh(score / cap), as in Gemma 2; `None` for no bound.
    pub fn with_soft_cap(self, cap: impl Into<Option<f32>>) -> Self {
        Self { cap: cap.into(), ..self }
    }

    /// `ALiBi`: a score falls by the slope of its query head for each token between (Press et al., 2021). A token
    /// behind the query's own, which only [`unmasked`](Self::unmasked) lets it see, gains as much. One slope for each
    /// of the Hq query heads.
    pub fn with_alibi_slopes(self, slopes: impl Into<Option<&'a [f32]>>) -> Self {
        Self { slopes: slopes.into(), ..self }
    }

    /// A learned sink logit for each of the Hq query heads, as in gpt-oss: it takes part in the softmax as the score of
    /// a token whose V is zero.
    pub fn with_sink_logits(self, logits: impl Into<Option<&'a [f32]>>) -> Self {
        Self { sinks: logits.into(), ..self }
    }

    /// The first live token of each batch row that its queries see, for rows that are padded on the left. Not for
    /// packed queries, whose sequences have starts of their own.
    pub fn with_row_starts(self, starts: impl Into<Option<&'a [u32]>>) -> Self {
        Self { starts: starts.into(), ..self }
    }

    /// Numbers added to the scores: f32, (B or 1, Hq or 1, Tq, M) with any strides. Column M - 1 is the latest live
    /// token of a row, and tokens before the latest M get nothing added; M may be less than the live tokens, or more. An entry
    /// of -1e38 or less hides the token. For packed queries Tq is the number of tokens of the step.
    pub fn with_mask(self, mask: impl Into<Option<TensorView<'a>>>) -> Self {
        Self { mask: mask.into(), ..self }
    }

    /// Which of the latest tokens a query sees, a bit each.
    pub fn with_bit_mask(self, mask: impl Into<Option<BitMask<'a>>>) -> Self {
        Self { bits: mask.into(), ..self }
    }
}

/// Which of the latest tokens of a row each query sees, a bit each, for
/// [`AttentionOptions::with_bit_mask`].
///
/// A buffer of u32 words, row-major [B or 1, Hq or 1, Tq, M / 32 rounded up]. Bit i of word w (bit 0 is the lowest) is
/// token 32 w + i of the latest M: 1 if the query sees it. Tokens before the latest M are not masked, so that a tree of drafted
/// tokens needs a mask over the new tokens alone.
///
/// # Examples
///
/// Token 0 has the two continuations 1 and 2, and token 3 follows 2:
///
/// ```
/// use wgpu_kvcache::BitMask;
///
/// let words = BitMask::words_of_tree(&[None, Some(0), Some(0), Some(2)]);
/// assert_eq!(words, [0b0001, 0b0011, 0b0101, 0b1101]);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BitMask<'a> {
    pub(super) buffer: &'a wgpu::Buffer,
    pub(super) offset: u64,
    pub(super) shape: [usize; 4],
}

impl<'a> BitMask<'a> {
    /// A mask of `shape` (B or 1, Hq or 1, Tq, M), whose words begin at the buffer's first byte. The call of attention
    /// checks the buffer, which needs [`wgpu::BufferUsages::STORAGE`].
    pub fn new(buffer: &'a wgpu::Buffer, shape: [usize; 4]) -> Self {
        Self { buffer, offset: 0, shape }
    }

    /// The same mask with its first word at byte `offset` of the buffer: a multiple of 4.
    #[must_use]
    pub fn with_offset(self, offset: u64) -> Self {
        Self { offset, ..self }
    }

    /// The words of a mask over a tree of new tokens, in which each token sees its ancestors and itself: the queries are the
    /// tokens of the tree, and M is their number. `parents[i]` is the parent of token i, before it, or `None`
    /// for a root. A parent that is not before its token is taken for a root.
    #[must_use]
    pub fn words_of_tree(parents: &[Option<usize>]) -> Vec<u32> {
        let words = parents.len().div_ceil(32);
        let mut rows: Vec<u32> = Vec::with_capacity(words * parents.len());
        for (token, parent) in parents.iter().enumerate() {
            let mut row = match parent.filter(|&parent| parent < token) {
                Some(parent) => rows[parent * words..][..words].to_vec(),
                None => vec![0; words],
            };
            row[token / 32] |= 1 << (token % 32);
            rows.extend(row);
        }
        rows
    }
}
