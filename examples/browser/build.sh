#!/usr/bin/env bash
# Builds the page into a folder of its own, and prints that folder. Gets what is missing: a compiler for wasm32, and
# the model. wasm-opt makes the program smaller, if it is installed or WASM_OPT names it.
#
# Usage: examples/browser/build.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

out=target/browser/page
site=$out/site
mkdir -p "$site/pkg"
tests/browser/toolchain.sh build --profile web -p browser --target-dir target/browser/cargo >&2
module=target/browser/cargo/wasm32-unknown-unknown/web/browser.wasm
if [ "$module" -nt "$site/pkg/browser_bg.wasm" ]; then
  cargo run --quiet --profile quick -p bindgen -- "$module" "$out/pkg" >&2
  if [ -n "${WASM_OPT:=$(command -v wasm-opt || true)}" ]; then
    echo "Optimising the program ..." >&2
    # What the compiler uses, and nothing that browsers of today may lack.
    features=(bulk-memory multivalue mutable-globals nontrapping-float-to-int reference-types sign-ext)
    "$WASM_OPT" -Os "${features[@]/#/--enable-}" --strip-debug "$out/pkg/browser_bg.wasm" -o "$out/pkg/smaller.wasm"
    mv "$out/pkg/smaller.wasm" "$out/pkg/browser_bg.wasm"
  fi
  mv "$out"/pkg/* "$site/pkg/"
fi
cp examples/browser/{index.html,style.css,page.js} "$site/"

examples/decode/setup.sh --no-driver --model smollm2
ln -sfn "$PWD/examples/decode/model" "$site/model"
echo "$site"
