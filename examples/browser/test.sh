#!/usr/bin/env bash
# Drives the page in headless Chromium, on its WebGPU in software: a few minutes, most of them for compiling pipelines.
# Gets what is missing, as build.sh does; Chromium on Debian; playwright-core and wasm-opt from npm.
#
# Usage: examples/browser/test.sh [--screenshot FILE.png] [--frames]
#
# Frames are always measured and printed. With --frames, 99 of 100 must take less than 50 ms: on a machine that does
# nothing else.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=target/browser/page
mkdir -p "$out"
tests/browser/driver.sh "$out"
if [ -z "${WASM_OPT:=$(command -v wasm-opt || true)}" ]; then
  export WASM_OPT=$out/node_modules/.bin/wasm-opt
  if [ ! -x "$WASM_OPT" ]; then npm install --silent --no-fund --no-audit --prefix "$out" binaryen >/dev/null; fi
fi
site=$(examples/browser/build.sh)
cp tests/browser/chromium.mjs examples/browser/test.mjs "$out/"
exec node "$out/test.mjs" "$site" examples/decode/tests/reference/smollm2.json "$@"
