#!/usr/bin/env bash
# Everything that needs a CUDA device: tests, compute-sanitizer, benchmark. From the root of the repository:
#
#     kernels/gpu_check.sh OUTDIR [tests] [sanitize] [bench]        (default: all three, in this order)
#
# Logs and results go to OUTDIR. Each part has its own time limit and a failing part does not stop the later ones.
# BENCH_SECONDS, PEERS and PYTHON choose the benchmark's time, the folder of peers and the interpreter.
set -u
out=$(mkdir -p "${1:?usage: kernels/gpu_check.sh OUTDIR [tests] [sanitize] [bench]}" && cd "$1" && pwd)
shift
parts=${*:-tests sanitize bench}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=.:engine:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
summary=$out/summary.txt
: >"$summary"

say() { echo "$*" | tee -a "$summary"; }

# run NAME LIMIT COMMAND…: its output into NAME.log, one line of summary
run() {
  local name=$1 limit=$2 start=$SECONDS rc
  shift 2
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  rc=$?
  say "$name: exit $rc after $((SECONDS - start)) s$([ $rc -eq 124 ] && echo ' (time limit)')"
}

tests() {
  local workers=""
  "$python" -c 'import xdist' 2>/dev/null && workers="-n 6"
  # shellcheck disable=SC2086
  run tests 60 "$python" -m pytest -q tests/test_kernels_cuda.py -m gpu -p no:cacheprovider -W default -o addopts= \
    -o xfail_strict=false --durations=5 --junitxml="$out/tests.xml" $workers
  grep -E "^(FAILED|ERROR)|passed|failed|error" "$out/tests.log" | tail -20 | tee -a "$summary"
}

sanitize() {
  local only="" tool
  compute-sanitizer --help 2>/dev/null | grep -q -- '--kernel-name ' && only="--kernel-name kernel_substring=mmi_"
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    # shellcheck disable=SC2086
    run "$tool" 45 compute-sanitizer --tool $tool $only --error-exitcode 3 "$python" kernels/gpu_small.py &
  done
  wait
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  for tool in memcheck racecheck; do say "$tool: $(grep -E 'SUMMARY|Error|rror:' "$out/$tool.log" | tail -1)"; done
}

bench() {
  local seconds=${BENCH_SECONDS:-50}
  run bench $((seconds + 40)) "$python" kernels/gpu_bench.py "$out" --seconds "$seconds" --peers "${PEERS:-.peers}"
  tail -c 6000 "$out/bench.log"
}

for part in $parts; do "$part"; done
echo "== summary"
cat "$summary"
