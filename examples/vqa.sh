#!/usr/bin/env bash
# Answer questions about pictures, one of them with a solved example; then a dialogue whose options are ranked.
#
#   examples/vqa.sh [OUT]        (default: out/vqa)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out/vqa}
mmi vqa "$here/vqa.jsonl" --out "$out"
jq -r '[.id, .answer] | @tsv' "$out/results.jsonl"
mmi vqa "$here/dialogue.jsonl" --out "$out/dialogue"
jq -c '{id, answer, ranks}' "$out/dialogue/results.jsonl"
