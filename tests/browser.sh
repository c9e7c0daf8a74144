#!/usr/bin/env bash
# Runs the conformance tests in headless Chromium, on its WebGPU in software.
#
# Usage: tests/browser.sh [--histories N] [FILTER ...]
#
# A test runs if its name contains one of the filters. Gets what is missing: on Debian a compiler for wasm32
# (tests/browser/toolchain.sh) and Chromium; from npm playwright-core, which drives it. CHROMIUM=PATH names another
# Chromium.
set -euo pipefail
cd "$(dirname "$0")/.."

out=target/browser/conformance
mkdir -p "$out/site/traces"
log=$(mktemp)
tests/browser/toolchain.sh test --no-run --profile quick -p browser-tests --features browser --test browser \
  --target-dir target/browser/cargo 2>&1 | tee "$log"
module=$(sed -n 's/.*(\(target.*\/browser-[0-9a-f]*\.wasm\)).*/\1/p' "$log" | tail -1)
rm "$log"
cp "$module" "$out/conformance.wasm"
cargo run --quiet --profile quick -p bindgen -- "$out/conformance.wasm" "$out/site"
cp tests/browser/index.html "$out/site/"
cp tests/traces/*.json "$out/site/traces/"
(cd tests/traces && printf '[%s]\n' "$(ls ./*.json | sed 's/.*\///; s/.*/"&"/' | paste -sd,)") >"$out/site/traces.json"

tests/browser/driver.sh "$out"
cp tests/browser/{chromium,run}.mjs "$out/"
exec node "$out/run.mjs" "$out/site" "$@"
