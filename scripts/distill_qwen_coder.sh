#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A larger teacher: Qwen2.5-Coder-1.5B teaches Qwen2.5-Coder-0.5B, live, from a cache, and not at all, on the same tokens. Hours on
# two cores; TOKENS=40000 ends each run sooner (the cache is of the whole text). All under runs/qwen-coder. Run again, it goes on where it was, or shows the result.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
targets=alambic . scripts/build.sh
. scripts/fetch.sh
alambic=build/release/cli/alambic
here=runs/qwen-coder
mkdir -p "$here"
limit=(); [ -z "${TOKENS:-}" ] || limit=(--set "limits.max_tokens=$TOKENS")

fetch_qwen_coder_05
fetch_qwen_coder_15
fetch_debian_handbook
"$alambic" import "$QWEN_CODER_05_GGUF" "$here/student" --weights bf16
"$alambic" import "$QWEN_CODER_15_GGUF" "$here/teacher" --weights bf16
[ -e "$here/corpus" ] || python3 scripts/corpora.py handbook "$HANDBOOK_HTML" en-US "$here/corpus"
for part in train heldout; do
  "$alambic" prepare configs/handbook-prepare-english.yaml --set "tokenizer=$here/student" --set "output=$here/stores/$part" --set "sources.0.paths=[$here/corpus/$part]"
done
"$alambic" distill --cache configs/cache-qwen-coder.yaml
"$alambic" distill configs/distill-qwen-coder.yaml --resume --set distill.alpha=0 --set "output=$here/none" "${limit[@]}"
"$alambic" distill configs/distill-qwen-coder.yaml --resume --set "distill.teachers=[{cache: $here/cache}]" --set "output=$here/cached" "${limit[@]}"
"$alambic" distill configs/distill-qwen-coder.yaml --resume "${limit[@]}"
"$alambic" evaluate --model "$here/teacher" --store "$here/stores/heldout" --row-length 512 --max-tokens 20000
python3 scripts/teacher_table.py "$here"
