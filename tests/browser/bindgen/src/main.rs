//! Writes the JavaScript that loads a WebAssembly module built by cargo, as the command line of wasm-bindgen does, of
//! the version that Cargo.lock names.
//!
//! ```sh
//! cargo run -p bindgen -- module.wasm folder
//! ```

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (module, folder) = args.next().zip(args.next()).context("usage: bindgen MODULE FOLDER")?;
    let mut bindgen = wasm_bindgen_cli_support::Bindgen::new();
    bindgen.input_path(&module).web(true)?.typescript(false);
    bindgen.generate(&folder).with_context(|| format!("{module} to {folder}"))
}
