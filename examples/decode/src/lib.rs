//! Generates text with the engine in `../engine`, for a program that may read files, block and look at the clock.
//!
//! - `blocking.rs`: the engine's calls, blocking until they complete.
//! - `known.rs`: the models that `../setup.sh` downloads, by name.
//! - `generate.rs`: the greedy loop and beam search.
//! - `serve.rs`: several prompts at once, in sequences that join and leave.
//! - `share.rs`: how much of a step the cache takes.

mod blocking;
mod generate;
mod known;
mod serve;
mod share;

pub use blocking::{Engine, load, open};
pub use engine::{
    Activation, ChatTemplate, Config, Format, GgufFile, LocalLayers, Matrix, Model, Options, Piece,
    RopePairs, Rows, TextStream, Tokenizer,
};
pub use generate::{Generation, Settings, beam_search, greedy};
pub use known::Known;
pub use serve::{Event, Request, Served, serve};
pub use share::{cache_share, sequences_share};
