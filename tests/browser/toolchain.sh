#!/usr/bin/env bash
# Builds for wasm32: runs `cargo` with its arguments, and the target added to them.
#
# Usage: tests/browser/toolchain.sh build --release -p wgpu-kvcache --no-default-features --features webgpu
#
# With rustup's target (`rustup target add wasm32-unknown-unknown`) it uses that. Else, on Debian, it gets Debian's
# compiler and the sources of the standard library from the package mirror, unpacks them below the cache folder, and
# builds the library along. WASM_TOOLCHAIN=FOLDER names another folder for them.
set -euo pipefail

target=wasm32-unknown-unknown
# getrandom asks which source of random numbers to take in a browser.
export RUSTFLAGS="${RUSTFLAGS:-} --cfg getrandom_backend=\"wasm_js\""
# The tests replace the compiler's test runner, which stable compilers allow only so.
export RUSTC_BOOTSTRAP=1

if [ -d "$(rustc --print sysroot)/lib/rustlib/$target" ]; then
  exec cargo "$@" --target "$target"
fi

root=${WASM_TOOLCHAIN:-${XDG_CACHE_HOME:-$HOME/.cache}/wgpu-kvcache/wasm-toolchain}
if [ ! -e "$root/complete" ]; then
  if ! command -v apt-get >/dev/null; then
    echo "There is no compiler for $target: run 'rustup target add $target'" >&2
    exit 1
  fi
  echo "Getting Debian's compiler for $target into $root" >&2
  rm -rf "$root" && mkdir -p "$root/packages"
  # The lists may be missing or old.
  apt-get update -qq >/dev/null 2>&1 || true
  (
    cd "$root/packages"
    # What rustc-web of this Debian depends on: the standard library of its version, and its LLVM.
    depends=$(apt-cache depends rustc-web libstd-rust-web-dev | sed -n 's/^ *Depends: //p' | sort -u)
    library=$(grep -E '^libstd-rust-web-[0-9.]+$' <<<"$depends" | head -1)
    llvm=$(apt-cache depends "$library" rustc-web | sed -n 's/^ *Depends: \(libllvm[0-9]*\).*/\1/p' | sort -u | tail -1)
    apt-get download -qq rustc-web libstd-rust-web-dev "$library" rust-web-src "$llvm" "lld-${llvm#libllvm}" >&2
    for package in *.deb; do dpkg -x "$package" "$root"; done
  )
  rm -rf "$root/packages"
  touch "$root/complete"
fi
export RUSTC="$root/usr/bin/rustc"
llvm=$(ls -d "$root"/usr/lib/llvm-* | tail -1)
export LD_LIBRARY_PATH="$root/usr/lib:$root/usr/lib/x86_64-linux-gnu:$llvm/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER="$llvm/bin/wasm-ld"
exec cargo "$@" --target "$target" -Zbuild-std=std,panic_abort,test
