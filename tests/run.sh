#!/usr/bin/env bash
# Runs all tests, on a machine that has Rust, Python with pip and a C linker. Gets a Vulkan driver and
# the model where they are missing.
#
# Usage: tests/run.sh [flags of cargo test]
#
# WGPU_BACKEND=vulkan|gl|... picks the backend, KV_DEVICE=best|immediates|baseline what is asked of the
# adapter, KV_HISTORIES=N the number of random histories, KV_TRACES=FOLDER further traces to replay.
set -euo pipefail
cd "$(dirname "$0")/.."
# Mesa complains where this is unset, as it is in containers.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}}

cargo build --example adapter
examples/decode/setup.sh
cargo test "$@"
