#!/usr/bin/env bash
# Draw pictures from text; then the best of four for every line of a text file, by the model's own captioning.
#
#   examples/t2i.sh [OUT]        (default: out/t2i)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out/t2i}
mmi t2i "$here/t2i.jsonl" --out "$out"
mmi t2i "$here/prompts.txt" --out "$out/best" --candidates 4 --rerank self --keep-all
jq -c '{image, candidate, scores}' "$out/best/results.jsonl"
