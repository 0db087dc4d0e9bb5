#!/usr/bin/env bash
# The same stories by two processes at once, as two jobs of an array would do it; the last one to finish merges.
#
#   examples/story_shards.sh [OUT]        (default: out/story-shards)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out/story-shards}
for i in 1 2; do
  mmi story "$here/story.jsonl" --out "$out" --shard "$i/2" --threads 1 &
  jobs[i]=$!
done
for i in 1 2; do
  wait "${jobs[i]}"
done
cat "$out/results.jsonl"
