#!/usr/bin/env bash
# Draw pictures from semantic maps (PNG files of class numbers) and captions.
#
#   examples/seg2img.sh [OUT]        (default: out/seg2img)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out/seg2img}
mmi seg2img "$here/seg2img.jsonl" --out "$out"
echo "open $out/index.html"
