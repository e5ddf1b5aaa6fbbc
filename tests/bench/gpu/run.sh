#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that a GPU is wanted for, in stages that run alone and in bounded time; one that fails
# does not stop the next ones.
#
#   tests/bench/gpu/run.sh [golden] [build] [smoke] [bench] [suite] [interop] [sanitize]    (all: none given)
#
# Where a command may take ten minutes and the machine may be gone after it, three of them, the most
# telling first, whose limits add up to less: `golden build smoke bench`, `build suite interop` (what is
# built is not built again), `build sanitize`.
#
# Needs nvcc, CMake, Ninja, a C++20 compiler and, for the Python of $PYTHON, torch, numpy, ml_dtypes,
# pytest, hypothesis, nanobind >= 3.1 and scikit-build-core; with pytest-xdist and pytest-timeout the
# suite goes on behind a test that hangs or breaks the CUDA context. What is missing may lie in a
# folder of $PYTHONPATH. Nothing is fetched.
#
# Results go to $OUT (default: build-gpu/results): log.txt, summary.txt, bench.txt, bench.jsonl and the
# golden vectors, sm_*.txt. $CUDA_ARCH is taken from the GPU unless it is set. With
# DRY_RUN=1 nothing needs a GPU: the build is for 90a and the benchmark runs tiny cases on the CPU.
set -uo pipefail
cd "$(dirname "$0")/../../.."
OUT=${OUT:-$PWD/build-gpu/results}
SITE=$PWD/build-gpu/site
DRY_RUN=${DRY_RUN:-0}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" build-gpu
HERE=$PWD/tests/bench/gpu
export PYTHONPATH=$SITE:$HERE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

arch_of_gpu() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
  case $capability in
    90) echo 90a ;;
    89) echo 89 ;;
    8?) echo 80 ;;
    10?) echo 100 ;;
    12?) echo 120 ;;
    *) echo "${capability:-90a}" ;;
  esac
}
ARCH=${CUDA_ARCH:-$(arch_of_gpu)}

stage_build() {
  $PYTHON -m pip list 2>/dev/null | grep -iE '^(nanobind|scikit.build.core|cmake|ninja|torch|numpy|ml.dtypes) '
  $PYTHON -m pip install -q --no-build-isolation --no-deps --no-index --upgrade --target "$SITE" . \
    -C build-dir="$PWD/build-gpu/wheel" -C cmake.define.QUIRE_CUDA=ON \
    -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$ARCH" &&
    $PYTHON -c 'import quire; print(quire.cuda_state()); [print(row) for row in quire.capabilities()]'
}

stage_golden() {
  nvcc -std=c++17 -gencode "arch=compute_$ARCH,code=sm_$ARCH" -Itests -Icuda -Icpp/include \
    tests/emulator/golden/record.cu -o build-gpu/record || return
  [ "$DRY_RUN" = 1 ] && return
  build-gpu/record >"$OUT/sm_${ARCH%a}.txt" && wc -l "$OUT/sm_${ARCH%a}.txt"
}

# One small call of every kernel: which of them hang or fail is said at the end.
stage_smoke() {
  $PYTHON "$HERE/steps.py" --silence 12 --seconds 70 "$HERE/sanitize.py" "$(device)"
}

device() { if [ "$DRY_RUN" = 1 ]; then echo cpu; else echo cuda; fi; }

# Interrupted in time, pytest still says what has failed.
run_pytest() { # seconds, arguments
  timeout -s INT -k 10 "$1" $PYTHON -m pytest "${@:2}" -p no:cacheprovider --tb=short -rfE
}

stage_suite() {
  local options=(-v --maxfail=25)
  $PYTHON -c 'import xdist, pytest_timeout' 2>/dev/null && options=(-p fresh_context -n 4
    --max-worker-restart=40 --timeout=40 --timeout-method=thread)
  QUIRE_TEST_DEVICE=$(device) run_pytest 230 tests/numeric -k "not isa" --durations=5 "${options[@]}"
}

stage_interop() { run_pytest 75 tests/interop/test_torch_cuda.py -v; }

stage_sanitize() {
  local status=0 tool
  [ "$DRY_RUN" = 1 ] && { $PYTHON "$HERE/sanitize.py" cpu; return; }
  for tool in memcheck racecheck synccheck; do
    echo "-- $tool"
    timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
      $PYTHON "$HERE/sanitize.py" cuda || status=1
  done
  return $status
}

stage_bench() {
  $PYTHON "$HERE/steps.py" --silence 30 --seconds "${BENCH_SECONDS:-190}" \
    "$HERE/bench.py" --device "$(device)" --out "$OUT" | tee "$OUT/bench.txt"
}

limit_of() { # seconds
  case $1 in
    golden) echo 45 ;;
    build) echo 210 ;;
    smoke) echo 85 ;;
    bench) echo $((${BENCH_SECONDS:-190} + 40)) ;;
    suite) echo 245 ;;
    sanitize) echo 315 ;;
    *) echo 90 ;;
  esac
}

if [ "${QUIRE_GPU_STAGE:-}" ]; then
  "stage_$QUIRE_GPU_STAGE"
  exit
fi

stages=("$@")
[ $# -eq 0 ] && stages=(golden build smoke bench suite interop sanitize)
summary=""
for stage in "${stages[@]}"; do
  if ! declare -F "stage_$stage" >/dev/null; then
    echo "run.sh: stage: expected golden, build, smoke, bench, suite, interop or sanitize, got $stage" >&2
    exit 2
  fi
  printf '\n== %s (%ss)\n' "$stage" "$SECONDS" | tee -a "$OUT/log.txt"
  QUIRE_GPU_STAGE=$stage timeout -k 5 "$(limit_of "$stage")" bash "$0" 2>&1 |
    tee -a "$OUT/log.txt" | tail -90
  status=${PIPESTATUS[0]}
  case $status in
    0) result=passed ;;
    124 | 137) result="ran out of its $(limit_of "$stage") s" ;;
    *) result="failed ($status)" ;;
  esac
  summary+="$stage: $result"$'\n'
done
printf '\n== done (%ss)\n%s\n' "$SECONDS" "$summary" | tee "$OUT/summary.txt"
! grep -q -v passed <<<"${summary%$'\n'}"
