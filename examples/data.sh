#!/usr/bin/env bash
# Make data, check it, import a folder of pictures, and caption what was imported.
#
#   examples/data.sh [OUT]        (default: out/data)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out/data}
mmi data make toon --out "$out/toon" --split test --count 2
mmi data check "$out/toon/vqa.jsonl"
mmi data import folder "$here/images" --out "$out/imported"
mmi caption "$out/imported/manifest.jsonl" --limit 2 --out - | jq -r .caption
