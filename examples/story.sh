#!/usr/bin/env bash
# Fill in two stories of five frames with the embedded model, then show where to look. About a minute on a laptop.
#
#   examples/story.sh [OUT]        (default: out/story)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out/story}
mmi story "$here/story.jsonl" --out "$out"
echo "open $out/index.html"
