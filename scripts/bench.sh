#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures alambic beside other people's programs: scripts/bench.sh [CASE...] [--json]; see bench/run.py, --help lists the cases.
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in *" --help "* | *" -h "*) exec python3 bench/run.py --help;; esac
{ # stdout is for results alone
  scripts/setup.sh --oracle
  targets="alambic alambic_bench" . scripts/build.sh
  . scripts/fetch.sh
  fetch_smollm2
  fetch_debian_handbook
} >&2
exec python3 bench/run.py "$@"
