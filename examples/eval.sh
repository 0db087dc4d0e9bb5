#!/usr/bin/env bash
# Draw twenty scenes of the embedded world, caption them, and score the captions. About half a minute on a laptop.
#
#   examples/eval.sh [OUT]        (default: out/eval)
set -euo pipefail
out=${1:-out/eval}
mmi data make toon --out "$out/toon" --count 20
mmi caption "$out/toon/captions.jsonl" --out "$out/captions"
mmi eval "$out/captions" "$out/toon/captions.jsonl" --metric toon,cider
echo "open $out/captions/worst.html"
