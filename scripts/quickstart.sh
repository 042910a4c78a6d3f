#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job on real input, in a few minutes on two cores: imports SmolLM2-135M-Instruct from GGUF, prepares Ukrainian
# dialogues, trains a LoRA adapter, merges it into open weights and shows what changed. All under runs/quickstart.
# Run again, it goes on where it was, or shows the result.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
targets=alambic . scripts/build.sh
. scripts/fetch.sh
alambic=build/release/cli/alambic
here=runs/quickstart
mkdir -p "$here"

fetch_smollm2
fetch_chatterbot_corpus
"$alambic" import "$SMOLLM2_GGUF" "$here/base"
for language in ukrainian english; do
  [ -e "$here/corpus/$language" ] || python3 scripts/corpora.py dialogues .deps/chatterbot-corpus "$language" "$here/corpus/$language"
  "$alambic" prepare "configs/quickstart-prepare-$language.yaml"
  "$alambic" prepare "configs/quickstart-prepare-$language.yaml" --set "output=$here/stores/$language-heldout" \
    --set "sources.0.paths=[$here/corpus/$language/heldout.jsonl]"
done
"$alambic" train configs/quickstart-train.yaml --resume
"$alambic" merge "$here/run" "$here/merged" --base-name HuggingFaceTB/SmolLM2-135M-Instruct
python3 scripts/result_table.py "$here"
