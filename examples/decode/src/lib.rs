//! A small Llama inference engine in wgpu that keeps its K/V cache in `wgpu_kvcache`.
//!
//! Read `engine.rs` first: it is the one file that uses the cache. The rest is what a language model needs besides.
//!
//! - `gguf.rs`: opens a model file and returns its keys and tensors; `format.rs`: how their numbers are stored in the
//!   file and on the GPU.
//! - `model.rs`: checks that the file is a Llama model that the kernels support, and uploads its weights;
//!   `weights.rs`: a matrix in textures.
//! - `tokenizer.rs`: text to token ids and back, from the file's own vocabulary.
//! - `kernels.rs`: the compute pipelines of `../shaders/`: all kernels except attention.
//! - `buffers.rs`: working memory and bind groups, created once.
//! - `engine.rs`: one step of the model, one compute pass.
//! - `generate.rs`: the greedy loop and beam search.
//! - `serve.rs`: several prompts at once, in sequences that join and leave.
//! - `share.rs`: how much of a step the cache takes.

mod buffers;
mod engine;
mod format;
mod generate;
mod gguf;
mod kernels;
mod model;
mod serve;
mod share;
mod tokenizer;
mod weights;

pub use engine::{Engine, Options, Piece, Rows};
pub use format::Format;
pub use generate::{Generation, Settings, beam_search, greedy};
pub use gguf::GgufFile;
pub use model::{Config, Model};
pub use serve::{Event, Request, Served, serve};
pub use share::{cache_share, sequences_share};
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::Matrix;
