//! What a model file says of its model: the dimensions, and what the architectures do differently.

use anyhow::{Context, Result, ensure};

use crate::gguf::GgufFile;

/// The dimensions of a model, and the choices of its architecture.
#[derive(Clone, Debug)]
pub struct Config {
    /// Layers.
    pub layers: usize,
    /// Elements of the residual stream.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// K/V heads: a divisor of `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements inside the feed-forward part.
    pub feed_forward: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// The longest sequence, in tokens.
    pub context: usize,
    /// Base of the rotary frequencies of global layers.
    pub rope_base: f64,
    /// Which elements of a head turn together.
    pub rope_pairs: RopePairs,
    /// The layers with a sliding window. None: all layers are global.
    pub local: Option<LocalLayers>,
    /// The epsilon of RMS norm.
    pub epsilon: f64,
    /// What embeddings are multiplied by.
    pub embedding_scale: f64,
    /// What the gate of the feed-forward part passes through.
    pub activation: Activation,
    /// Whether each query and key head is normalised before it turns.
    pub has_head_norms: bool,
    /// Whether the outputs of attention and of the feed-forward part are normalised before they are added to the
    /// residual stream.
    pub has_post_norms: bool,
}

/// Which elements of a head of `2 n` elements form the pairs of the rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// Elements `2 i` and `2 i + 1`.
    Neighbours,
    /// Elements `i` and `n + i`, as in GPT-NeoX.
    Halves,
}

/// The activation of the feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU in its approximation by tanh.
    Gelu,
}

/// Layers that attend to the last tokens only. Of every `period` layers the last one is global.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LocalLayers {
    /// Tokens that a query sees, its own included.
    pub window: usize,
    /// Layers from one global layer to the next.
    pub period: usize,
    /// Base of the rotary frequencies of these layers.
    pub rope_base: f64,
}

/// What an architecture does differently from others, beside the dimensions that each file states.
struct Architecture {
    /// The value of `general.architecture`, with which the file's keys begin.
    name: &'static str,
    rope_pairs: RopePairs,
    activation: Activation,
    has_head_norms: bool,
    has_post_norms: bool,
    /// Whether embeddings are multiplied by the root of their width.
    scales_embedding: bool,
    /// How often a layer is global, if the others have a window.
    period: Option<usize>,
}

const ARCHITECTURES: [Architecture; 2] = [
    Architecture {
        name: "llama",
        // In GGUF the rows of the projections are reordered, so that neighbours turn together.
        rope_pairs: RopePairs::Neighbours,
        activation: Activation::Silu,
        has_head_norms: false,
        has_post_norms: false,
        scales_embedding: false,
        period: None,
    },
    Architecture {
        name: "gemma3",
        rope_pairs: RopePairs::Halves,
        activation: Activation::Gelu,
        has_head_norms: true,
        has_post_norms: true,
        scales_embedding: true,
        period: Some(6),
    },
];

/// Base of the rotary frequencies if a file does not state one.
const ROPE_BASE: f64 = 10_000.0;

impl Config {
    /// Reads the dimensions, and refuses those that the kernels do not support.
    ///
    /// # Errors
    ///
    /// If the file is of another architecture, lacks a key, or has dimensions that are not supported.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let found = file.text("general.architecture")?;
        let names = ARCHITECTURES.map(|it| it.name).join(" and ");
        let architecture = ARCHITECTURES.iter().find(|it| it.name == found).with_context(|| {
            format!("the model has the architecture {found}; {names} are supported")
        })?;
        let key = |name: &str| format!("{found}.{name}");
        if let Some(scaling) = file.optional_text(&key("rope.scaling.type")) {
            ensure!(
                scaling == "none",
                "the model scales its positions ({scaling}), which is not supported"
            );
        }
        let width = file.count(&key("embedding_length"))?;
        let heads = file.count(&key("attention.head_count"))?;
        ensure!(heads > 0, "{found}.attention.head_count is 0");
        let local = architecture.period.map(|period| LocalLayers::from_gguf(file, found, period));
        let config = Self {
            layers: file.count(&key("block_count"))?,
            width,
            heads,
            kv_heads: file.optional_count(&key("attention.head_count_kv"))?.unwrap_or(heads),
            head_dim: file.optional_count(&key("attention.key_length"))?.unwrap_or(width / heads),
            feed_forward: file.count(&key("feed_forward_length"))?,
            vocabulary: file.texts("tokenizer.ggml.tokens")?.len(),
            context: file.count(&key("context_length"))?,
            rope_base: file.number(&key("rope.freq_base")).unwrap_or(ROPE_BASE),
            rope_pairs: architecture.rope_pairs,
            local: local.transpose()?,
            epsilon: file.number(&key("attention.layer_norm_rms_epsilon"))?,
            embedding_scale: if architecture.scales_embedding {
                f64::from(u32::try_from(width)?).sqrt()
            } else {
                1.0
            },
            activation: architecture.activation,
            has_head_norms: architecture.has_head_norms,
            has_post_norms: architecture.has_post_norms,
        };
        config.check(file, found)?;
        Ok(config)
    }

    /// Refuses dimensions that the kernels do not support.
    fn check(&self, file: &GgufFile, architecture: &str) -> Result<()> {
        let &Self { layers, width, heads, kv_heads, head_dim, feed_forward, vocabulary, .. } = self;
        ensure!(layers > 0, "the model has no layers");
        ensure!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "{heads} query heads cannot share {kv_heads} K/V heads"
        );
        ensure!(
            head_dim > 0 && head_dim <= 256 && head_dim.is_multiple_of(4),
            "a head of {head_dim} elements is not supported; it must be a multiple of 4 and at most 256"
        );
        ensure!(
            [width, feed_forward, vocabulary].iter().all(|&n| n > 0 && n.is_multiple_of(4)),
            "widths of {width} and {feed_forward} and {vocabulary} tokens: only multiples of 4 above 0 are supported"
        );
        ensure!(
            heads.checked_mul(head_dim).is_some(),
            "{heads} heads of {head_dim} elements are more than this machine can count; fetch the file again"
        );
        let local_base = self.local.map_or(ROPE_BASE, |local| local.rope_base);
        for (key, number, is_sane) in [
            ("rope.freq_base", self.rope_base, self.rope_base > 0.0),
            ("rope.freq_base_swa", local_base, local_base > 0.0),
            ("attention.layer_norm_rms_epsilon", self.epsilon, self.epsilon >= 0.0),
        ] {
            ensure!(
                is_sane && number.is_finite(),
                "{architecture}.{key} is {number}, which is not sane; fetch the file again"
            );
        }
        for key in ["rope.dimension_count", "attention.value_length"] {
            let found = file.optional_count(&format!("{architecture}.{key}"))?.unwrap_or(head_dim);
            ensure!(
                found == head_dim,
                "{architecture}.{key} is {found}; only {head_dim}, a whole head, is supported"
            );
        }
        Ok(())
    }

    /// How many tokens a query of a layer sees, its own included. None: all before it.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.local_at(layer).map(|local| local.window)
    }

    /// What a layer's window and rotary base come from, if it is a local layer.
    pub(crate) fn local_at(&self, layer: usize) -> Option<&LocalLayers> {
        self.local.as_ref().filter(|local| !(layer + 1).is_multiple_of(local.period))
    }
}

impl LocalLayers {
    fn from_gguf(file: &GgufFile, architecture: &str, period: usize) -> Result<Self> {
        let key = |name: &str| format!("{architecture}.attention.{name}");
        let window = file.count(&key("sliding_window"))?;
        ensure!(window > 0, "{architecture}.attention.sliding_window is 0; fetch the file again");
        let found = file.optional_count(&key("sliding_window_pattern"))?.unwrap_or(period);
        ensure!(found > 0, "{architecture}.attention.sliding_window_pattern is 0");
        let base = file.number(&format!("{architecture}.rope.freq_base_swa"));
        Ok(Self { window, period: found, rope_base: base.unwrap_or(ROPE_BASE) })
    }
}
