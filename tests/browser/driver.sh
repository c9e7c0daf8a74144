#!/usr/bin/env bash
# Gets what drives a browser, where it is missing: Chromium from Debian, and playwright-core from npm into a folder.
#
# Usage: tests/browser/driver.sh FOLDER
set -euo pipefail

if [ -z "${CHROMIUM:-}" ] && ! command -v chromium >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >/dev/null
  apt-get install -y -qq --no-install-recommends chromium >/dev/null
fi
if [ ! -d "$1/node_modules/playwright-core" ]; then
  npm install --silent --no-fund --no-audit --prefix "$1" playwright-core@1 >/dev/null
fi
