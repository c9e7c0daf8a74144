#!/usr/bin/env bash
# Decodes a prompt with SmolLM2 or Gemma 3 on the GPU, on a machine that has Rust, Python with pip and a C linker.
# Gets a Vulkan driver and the model where they are missing.
#
# Usage: examples/decode/run.sh [prompt] [flags of the decode example, e.g. --beams 4]
#   examples/decode/run.sh "A prompt" --model gemma3          (smollm2 without --model, or the path of a GGUF file)
#   examples/decode/run.sh "A question" --chat                (as a message of a chat)
#   examples/decode/run.sh "A prompt" --key-format q8_0 --value-format q4_0    (K in 8 bits, V in 4; --dtype sets both)
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
model=
before=
for flag; do
  if [ "$before" = --model ]; then model=$flag; fi
  case "$flag" in --model=*) model=${flag#--model=} ;; esac
  before=$flag
done
flags=("$@")
if [ -z "$model" ]; then
  model=smollm2
  flags+=(--model "$model")
fi
# What is not the name of a model is the path of one, and nothing is downloaded.
setup=(--no-model)
case "$model" in smollm2 | gemma3) setup=(--model "$model") ;; esac
# A build from nothing takes minutes and shows its progress; later ones are silent.
quiet=()
decode=${CARGO_TARGET_DIR:-target}/quick/decode
if [ -x "$decode" ]; then quiet=(--quiet); fi
cargo build "${quiet[@]}" --profile quick -p decode
examples/decode/setup.sh "${setup[@]}" --profile quick
exec "$decode" "${prompt[@]}" "${flags[@]}"
