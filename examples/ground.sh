#!/usr/bin/env bash
# Find what expressions describe, and draw the boxes.
#
#   examples/ground.sh [OUT]        (default: out/ground)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out/ground}
status=0
mmi ground "$here/ground.jsonl" --out "$out" --draw || status=$?
[ "$status" -eq 0 ] || [ "$status" -eq 3 ] # 3: for some expressions the model wrote no box, see errors.jsonl
jq -c '[.id, .box]' "$out/results.jsonl"
echo "open $out/index.html"
