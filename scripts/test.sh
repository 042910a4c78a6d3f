#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds alambic and runs its tests. `scripts/test.sh --oracle` also compares with other people's implementations.
# Further arguments go to ctest: scripts/test.sh -R TokenStore
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --oracle ]; then
  shift
  scripts/setup.sh --oracle
  . scripts/fetch.sh
  fetch_smollm2 # real weights, tokenizers and templates are compared as well
  fetch_gemma3
  choice=()
else
  scripts/setup.sh
  choice=(-LE oracle)
fi
. scripts/build.sh
# Several tests share the cores, so a thread that waits for others gives its core away instead of spinning.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
ctest --test-dir build/release --output-on-failure --timeout 1500 -j 2 "${choice[@]}" "$@"
