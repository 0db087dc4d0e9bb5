#!/usr/bin/env bash
# Describe pictures: one sentence each, then in detail as a table on stdout.
#
#   examples/caption.sh [OUT]        (default: out/caption)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out/caption}
mmi caption "$here/caption.jsonl" --out "$out"
mmi caption "$here/caption.jsonl" --style long --out - | jq -r '[.id, .caption] | @tsv'
echo "open $out/index.html"
