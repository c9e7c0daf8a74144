//! `SmolLM2` in a browser tab, decoded by the engine in `../engine` with its K/V cache on the GPU.
//!
//! - `session.rs`: the sequences of a page: they are added, decoded together, forked, stopped, saved and loaded. Knows
//!   no browser.
//! - `state.rs`: what the page shows of them.
//! - `saved.rs`: a saved sequence with the text that it is of.
//! - `page.rs`: what `../page.js` calls; `source.rs`: the bytes of a model that the page has downloaded.

#![cfg_attr(not(target_arch = "wasm32"), forbid(unsafe_code))]

mod saved;
mod session;
mod state;

#[cfg(target_arch = "wasm32")]
mod page;
#[cfg(target_arch = "wasm32")]
mod source;

pub use session::{Session, Settings};
pub use state::{Sequence, State, Status};
