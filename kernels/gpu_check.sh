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
export CUPY_CACHE_DIR=${CUPY_CACHE_DIR:-${TMPDIR:-/tmp}/mmi-cupy-cache} # shared by all processes below
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
  run tests 150 "$python" -m pytest -q tests/test_kernels_cuda.py tests/test_graphs_cuda.py \
    tests/test_train_image_decoder.py -m gpu -p no:cacheprovider -W default -o addopts= \
    -o xfail_strict=false --durations=5 --junitxml="$out/tests.xml" $workers
  grep -E "^(FAILED|ERROR)|passed|failed|error" "$out/tests.log" | tail -20 | tee -a "$summary"
}

# One tool over our kernels alone, or over all where this version cannot choose.
sanitize_with() {
  local tool=$1 options="--report-api-errors no --error-exitcode 3"
  # shellcheck disable=SC2086
  run "$tool" 50 compute-sanitizer --tool "$tool" $options --kernel-name kernel_substring=mmi_ \
    "$python" kernels/gpu_small.py
  # shellcheck disable=SC2086
  grep -q SUMMARY "$out/$tool.log" || run "$tool" 50 compute-sanitizer --tool "$tool" $options \
    "$python" kernels/gpu_small.py
  say "$tool: $(grep -E 'SUMMARY|[Ee]rror:' "$out/$tool.log" | tail -1)"
}

sanitize() {
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitize_with memcheck &
  sanitize_with racecheck &
  wait
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

bench() {
  local seconds=${BENCH_SECONDS:-40}
  run bench $((seconds + 90)) "$python" kernels/gpu_bench.py "$out" --seconds "$seconds" --peers "${PEERS:-.peers}"
  tail -c 6000 "$out/bench.log"
}

# The tests and the sanitizer side by side, and the benchmark's kernels compiled meanwhile; the benchmark alone.
case " $parts " in *" bench "*)
  case " $parts " in *" tests "* | *" sanitize "*)
    timeout 60 "$python" kernels/gpu_bench.py "$out" --compile-only >"$out/compile.log" 2>&1 &
    ;;
  esac
  ;;
esac
for part in $parts; do [ "$part" = bench ] || "$part" & done
wait
case " $parts " in *" bench "*) bench ;; esac
echo "== summary"
cat "$summary"
