#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds alambic with its GPU kernels and NCCL into build/cuda: compiled and linked on any machine, run only where there is a GPU.
# Tests with the label gpu run then; without a GPU they are reported as skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --cuda
export PATH="$PATH:$HOME/.cargo/bin"
cmake --preset cuda
cmake --build --preset cuda --target alambic nf4_cuda_check nccl_check train_check
build/cuda/cli/alambic --version >/dev/null  # it starts: every library it asks for is there
ctest --test-dir build/cuda -L gpu --output-on-failure
