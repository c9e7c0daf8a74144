//! What one call of attention does: [`AttendOptions`].

use burn::tensor::Tensor;
use wgpu_kvcache::{AttentionOptions, CachePosition};

use crate::tensor::Order;

/// Where new tokens go, which tokens a query sees, and the order of the axes, for
/// [`BurnCache::attend`](crate::BurnCache::attend).
///
/// If nothing else is set: the tokens are appended, attention is causal with scores scaled by 1/√D, and tensors are
/// (B, H, T, D).
///
/// # Examples
///
/// ```
/// use wgpu_kvcache_burn::AttendOptions;
/// use wgpu_kvcache_burn::wgpu_kvcache::AttentionOptions;
///
/// // A local layer of Gemma 2, whose projections come as (B, T, H, D).
/// let attention = AttentionOptions::default().with_window(4096).with_soft_cap(50.0);
/// let options = AttendOptions::from(attention).bthd();
/// # let _ = options;
/// ```
#[derive(Clone, Debug)]
#[must_use = "options do nothing until attend is called with them"]
pub struct AttendOptions<'a> {
    pub(crate) attention: AttentionOptions<'a>,
    pub(crate) position: CachePosition<'a>,
    pub(crate) mask: Option<Tensor<4>>,
    pub(crate) order: Order,
}

impl Default for AttendOptions<'_> {
    fn default() -> Self {
        AttentionOptions::default().into()
    }
}

impl<'a> From<AttentionOptions<'a>> for AttendOptions<'a> {
    /// Scale, window, soft cap, slopes, sinks, row starts and bit masks of the cache's own options.
    fn from(attention: AttentionOptions<'a>) -> Self {
        Self { attention, position: CachePosition::Append, mask: None, order: Order::Bhtd }
    }
}

impl<'a> AttendOptions<'a> {
    /// Where the new tokens go: [`CachePosition::Append`] if nothing else is set. `PerRow` makes rows of different
    /// length.
    pub fn with_position(self, position: CachePosition<'a>) -> Self {
        Self { position, ..self }
    }

    /// Numbers added to the scores: f32, (B or 1, Hq or 1, Tq, M), in this order of axes always. Column M - 1 is the
    /// latest live token; see [`AttentionOptions::with_mask`]. An entry of -1e38 or less hides the token.
    pub fn with_mask(self, mask: Tensor<4>) -> Self {
        Self { mask: Some(mask), ..self }
    }

    /// Tensors, the result included, are (B, T, H, D), as a projection makes them with a reshape alone. Nothing is
    /// transposed.
    pub fn bthd(self) -> Self {
        Self { order: Order::Bthd, ..self }
    }
}
