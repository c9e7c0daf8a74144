//! A small inference engine for Llama and Gemma models in wgpu that keeps its K/V cache in `wgpu_kvcache`.
//!
//! Read `engine.rs` and `engine/step.rs` first: they use the cache. The rest is what a language model needs besides.
//!
//! - `gguf.rs`: opens a model file and returns its keys and tensors; `format.rs`: how their numbers are stored in the
//!   file and on the GPU.
//! - `config.rs`: the dimensions of the file's model, and what its architecture does differently from others: a new
//!   architecture is a row of a table there.
//! - `model.rs`: uploads the weights; `weights.rs`: a matrix in textures.
//! - `known.rs`: the models that `../setup.sh` downloads, by name.
//! - `tokenizer.rs`: text to token ids and back, from the file's own vocabulary; `chat.rs`: its chat template.
//! - `kernels.rs`: the compute pipelines of `../shaders/`: all kernels except attention.
//! - `buffers.rs` and `groups.rs`: working memory and bind groups, created once.
//! - `engine.rs`: one step of the model, one compute pass.
//! - `generate.rs`: the greedy loop and beam search.
//! - `serve.rs`: several prompts at once, in sequences that join and leave.
//! - `share.rs`: how much of a step the cache takes.

mod buffers;
mod chat;
mod config;
mod engine;
mod format;
mod generate;
mod gguf;
mod groups;
mod kernels;
mod known;
mod model;
mod serve;
mod share;
mod tokenizer;
mod weights;

pub use chat::ChatTemplate;
pub use config::{Activation, Config, LocalLayers, RopePairs};
pub use engine::{Engine, Options, Piece, Rows};
pub use format::Format;
pub use generate::{Generation, Settings, beam_search, greedy};
pub use gguf::GgufFile;
pub use known::Known;
pub use model::Model;
pub use serve::{Event, Request, Served, serve};
pub use share::{cache_share, sequences_share};
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::Matrix;
