#!/usr/bin/env bash
# One manifest as three jobs of an array into one folder; the last one to finish merges. A scheduler would start the jobs
# on machines of their own, here they run one after another.
#
#   examples/array.sh [OUT]        (default: out/array)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out/array}
for i in 1 2 3; do
  mmi t2i "$here/t2i.jsonl" --out "$out" --shard "$i/3"
done
jq -r .image "$out/results.jsonl"
