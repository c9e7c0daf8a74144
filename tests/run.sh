#!/usr/bin/env bash
# Runs all tests, on a machine that has Rust, Python with pip and a C linker. Gets a Vulkan driver and
# the models where they are missing.
#
# Usage: tests/run.sh [flags of cargo test]
#
# WGPU_BACKEND=vulkan|gl|... picks the backend, KV_DEVICE=best|immediates|baseline what is asked of the
# adapter, KV_HISTORIES=N the number of random histories, KV_TRACES=FOLDER further traces to replay.
# On GL pass "-- --test-threads=1": wgpu gives up on a context that another thread holds for long.
# KV_FUZZ_CASES=N sets how many damaged model files are tried, KV_FUZZ_SECONDS=N how long.
#
# KV_DEVICE=noop runs tests/conformance on wgpu's backend without a driver: all but the contents of
# tensors, which only kernels write. The tests of damaged model files never need a driver. The other tests need
# kernels or a driver's memory and take an adapter whatever KV_DEVICE says, so without a driver run
# KV_DEVICE=noop cargo test --test conformance, and cargo test -p decode --test model_files
set -euo pipefail
cd "$(dirname "$0")/.."
# Mesa complains where this is unset, as it is in containers.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}}

# All at once, and whatever the flags leave out: a build of the adapter's program alone has other features, and takes the
# time of everything below it once more.
cargo test --workspace --no-run
examples/decode/setup.sh --model smollm2 --model gemma3 --adapter "${CARGO_TARGET_DIR:-target}/debug/adapter"
cargo test --workspace "$@"
