#!/usr/bin/env bash
# Builds the page and serves it on this machine, for a browser with WebGPU: Chrome, Edge, Safari or Firefox of today.
# Needs Rust with `rustup target add wasm32-unknown-unknown`, or Debian, and Python with pip.
#
# Usage: examples/browser/run.sh [port]
set -euo pipefail
cd "$(dirname "$0")/../.."

port=${1:-8080}
site=$(examples/browser/build.sh)
echo "Open http://localhost:$port/ in a browser. Stop with Ctrl+C."
exec python3 -m http.server "$port" --bind 127.0.0.1 --directory "$site" 2> >(grep -v '"GET ' >&2)
