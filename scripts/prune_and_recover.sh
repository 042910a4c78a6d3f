#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a model to one that fits an edge device: SmolLM2-135M-Instruct is pruned to six tenths of its parameters, recovered on the same
# tokens once by the text alone and once with the model as its teacher, exported as GGUF and run by llama.cpp. All under runs/prune.
# Run again, it goes on where it was, or shows the result.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --oracle # llama.cpp
targets=alambic . scripts/build.sh
. scripts/fetch.sh
alambic=build/release/cli/alambic
here=runs/prune
mkdir -p "$here"

fetch_smollm2
fetch_debian_handbook
"$alambic" import "$SMOLLM2_GGUF" "$here/base"
[ -e "$here/corpus" ] || python3 scripts/corpora.py handbook "$HANDBOOK_HTML" en-US "$here/corpus"
"$alambic" prepare configs/handbook-prepare-english.yaml
"$alambic" prepare configs/handbook-prepare-english.yaml --set "output=$here/stores/heldout" --set "sources.0.paths=[$here/corpus/heldout]"
"$alambic" prune configs/prune-smollm2.yaml
for part in train heldout; do # with the student's own tokens
  "$alambic" prepare configs/handbook-prepare-english.yaml --set "tokenizer=$here/pruned" --set "output=$here/stores/student-$part" --set "sources.0.paths=[$here/corpus/$part]"
done
"$alambic" distill configs/recover-smollm2.yaml --resume --set distill.alpha=0 --set "output=$here/by-text"
"$alambic" distill configs/recover-smollm2.yaml --resume
.deps/oracle/bin/python scripts/recovery_table.py "$here"
