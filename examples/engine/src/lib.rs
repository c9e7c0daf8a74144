//! A small inference engine for Llama and Gemma models in wgpu that keeps its K/V cache in `wgpu_kvcache`.
//!
//! Read `engine.rs` and `engine/step.rs` first: they use the cache. The rest is what a language model needs besides.
//! A model is read from anything that can be read and sought; what waits for the GPU is `async`. So the same sources
//! run in a program (`../decode`), which blocks on them, and in a browser (`../browser`), which must not. Files,
//! clocks and threads are the caller's.
//!
//! - `gguf.rs`: opens a model file and returns its keys and tensors; `format.rs`: how their numbers are stored in the
//!   file and on the GPU.
//! - `config.rs`: the dimensions of the file's model, and what its architecture does differently from others: a new
//!   architecture is a row of a table there.
//! - `model.rs`: uploads the weights; `weights.rs`: a matrix in textures.
//! - `tokenizer.rs`: text to token ids and back, from the file's own vocabulary; `chat.rs`: its chat template.
//! - `kernels.rs`: the compute pipelines of `../shaders/`: all kernels except attention.
//! - `buffers.rs` and `groups.rs`: working memory and bind groups, created once.
//! - `engine.rs`: one step of the model, one compute pass.
//! - `batch.rs`: sequences that are decoded together, and join and leave between steps.
//! - `answer.rs`: waits for the GPU.

mod answer;
mod batch;
mod buffers;
mod chat;
mod config;
mod engine;
mod format;
mod gguf;
mod groups;
mod kernels;
mod model;
mod tokenizer;
mod weights;

pub use answer::finished;
pub use batch::{Batch, BatchStep};
pub use chat::ChatTemplate;
pub use config::{Activation, Config, LocalLayers, RopePairs};
pub use engine::{Engine, Options, Piece, Rows};
pub use format::Format;
pub use gguf::GgufFile;
pub use model::Model;
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::Matrix;
