#!/usr/bin/env bash
# Decodes a prompt with SmolLM2 on the GPU, on a machine that has Rust, Python with pip and a C linker.
# Gets a Vulkan driver and the model where they are missing.
#
# Usage: examples/decode/run.sh [prompt] [flags of the decode example, e.g. --beams 4]
# Several prompts, served together:
#   examples/decode/run.sh "One prompt" --prompt "Another one" --system "What both begin with"
#   examples/decode/run.sh --prompts FILE --max-sequences 4    (a prompt a line)
set -euo pipefail
cd "$(dirname "$0")/../.."
# Mesa complains where this is unset, as it is in containers.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}}

prompt=()
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  prompt=(--prompt "$1")
  shift
fi
if [ ${#prompt[@]} -eq 0 ]; then
  prompt=(--prompt "The capital of France is")
  for flag; do
    case "$flag" in --prompt | --prompt=* | --prompts | --prompts=*) prompt=() ;; esac
  done
fi
# A build from nothing takes minutes and shows its progress; later ones are silent.
quiet=()
decode=${CARGO_TARGET_DIR:-target}/quick/decode
if [ -x "$decode" ]; then quiet=(--quiet); fi
cargo build "${quiet[@]}" --profile quick -p decode
examples/decode/setup.sh --profile quick
exec "$decode" \
  --model examples/decode/model/SmolLM2-135M-Instruct.Q4_1.gguf "${prompt[@]}" "$@"
