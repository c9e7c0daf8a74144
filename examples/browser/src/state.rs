//! What the page shows: a value that is written as JSON.

use serde::Serialize;

/// Whether a sequence goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It waits for its turn: as many as fit into a step are decoded.
    Waits,
    /// Its prompt is being prefilled.
    Prefills,
    /// It gets a token in each step.
    Decodes,
    /// It was stopped, or has all tokens that were asked for.
    Stopped,
    /// The model has ended it.
    Ended,
    /// It is as long as the cache allows.
    Full,
}

/// A sequence of the cache.
#[derive(Clone, Debug, Serialize)]
pub struct Sequence {
    /// What the page calls it.
    pub number: usize,
    /// The sequence that it was forked from.
    pub parent: Option<usize>,
    /// Whether it goes on.
    pub status: Status,
    /// Its prompt, as it was typed.
    pub prompt: String,
    /// The text after it.
    pub text: String,
    /// The ids of the prompt.
    pub prompt_ids: Vec<u32>,
    /// The ids of the text.
    pub ids: Vec<u32>,
    /// Tokens in the cache.
    pub length: usize,
    /// Its pages in the pool of a layer, oldest tokens first.
    pub pages: Vec<u32>,
}

/// All that the page shows of the cache.
#[derive(Clone, Debug, Serialize)]
pub struct State {
    /// The sequences, in the order in which they were added.
    pub sequences: Vec<Sequence>,
    /// Whether a step would do anything.
    pub is_busy: bool,
    /// The most tokens of a sequence.
    pub max_tokens: usize,
    /// Layers of the model, each with a pool of pages.
    pub layers: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// Bytes of K and V of a page, all layers together.
    pub page_bytes: u64,
    /// Pages that sequences refer to.
    pub pages_used: u64,
    /// Those of them that several refer to.
    pub pages_shared: u64,
    /// Other pages of the pool.
    pub pages_free: u64,
    /// Bytes of K and V allocated now.
    pub bytes_allocated: u64,
}
