#!/usr/bin/env bash
# Go on with a chat: the assistant's missing turn, in text and pictures.
#
#   examples/chat.sh [OUT]        (default: out/chat)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out/chat}
mmi story "$here/chat.jsonl" --free 2 --out "$out"
jq -c '.messages[-1]' "$out/results.jsonl"
