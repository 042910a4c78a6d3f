#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# configs/adapt-language.yaml from start to end: the Debian handbook in Indonesian, held-out chapters, English replay.
# All under runs/adapt-language. Run again, it goes on where it was, or shows the result.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
targets=alambic . scripts/build.sh
. scripts/fetch.sh
alambic=build/release/cli/alambic
here=runs/adapt-language
mkdir -p "$here"

fetch_smollm2
fetch_debian_handbook
"$alambic" import "$SMOLLM2_GGUF" "$here/base"
for language in id-ID en-US; do
  [ -e "$here/corpus/$language" ] || python3 scripts/corpora.py handbook "$HANDBOOK_HTML" "$language" "$here/corpus/$language"
done
for pair in indonesian:id-ID english:en-US; do
  name=${pair%%:*} language=${pair##*:}
  "$alambic" prepare "configs/adapt-language-prepare-$name.yaml"
  "$alambic" prepare "configs/adapt-language-prepare-$name.yaml" --set "output=$here/stores/$name-heldout" \
    --set "sources.0.paths=[$here/corpus/$language/heldout]"
done
"$alambic" train configs/adapt-language.yaml --resume
"$alambic" merge "$here/run" "$here/merged" --base-name HuggingFaceTB/SmolLM2-135M-Instruct
python3 scripts/result_table.py "$here"
