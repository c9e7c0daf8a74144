//! A decoder on this crate gives what it gives in burn alone. One program for all, since burn tunes its kernels once in
//! a process.

mod beams;
mod kinds;
mod sequences;
#[expect(dead_code, reason = "the example uses the rest of the decoder")]
mod support;
