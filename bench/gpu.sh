#!/usr/bin/env bash
# `make gpu`: on a machine with a GPU, inside eight minutes and without internet: the tests of losses and kernels,
# compute-sanitizer on a few of them, the bench. Leaves one dated file in bench/results, which says how each of them went;
# what is red makes the exit status 1, but stops nothing: a machine with a GPU is rare.
# Needs torch, triton, transformers, pytest and hypothesis of that machine; takes pytest-xdist and nvidia-ml-py where they
# are, and cmake for the native library. Where the tree came without .git, COMMIT=... says which it is.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # the tests ask for deterministic algorithms
logs=build/gpu
mkdir -p "$logs"

"$PYTHON" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "make gpu: torch sees no GPU")'
rm -f "$logs"/*.json # an earlier run's
if command -v cmake >/dev/null; then
  "$PYTHON" setup.py --quiet build_ext --inplace || echo "make gpu: no native library: the CPU's tests of it will fail"
fi

# The bench's kernels are compiled beside the tests; both leave them in Triton's cache.
compiling=()
for D in 384 1024 2048 4096; do
  timeout 170 "$PYTHON" -m bench --device cuda --compile "$D" &
  compiling+=($!)
done

red=0
note() { # NAME LOG STATUS: the last line that says something, for the result file
  local text
  text=$(grep -vE '^[[:space:]]*$' "$2" | tail -n 1 | sed 's/^[ =]*//; s/[ =]*$//' || true)
  if [ "$3" -ne 0 ]; then red=1 text="RED, exit status $3: $text"; fi
  notes+=(--note "$1" "$text")
  echo "make gpu: $1: $text (${SECONDS} s)"
}

notes=()
many=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then many=(-n "$(($(nproc) < 16 ? ($(nproc) + 1) / 2 : 12))" --dist worksteal); fi
status=0
timeout --signal=INT --kill-after=10 170 "$PYTHON" -m pytest "${many[@]}" -p no:cacheprovider -rfE \
  tests/ops tests/test_losses.py tests/kernels tests/bench/test_{bench,compare,cost}.py \
  tests/train/test_cuda.py tests/model/test_attention.py \
  --ignore=tests/kernels/test_aot.py --ignore=tests/kernels/test_sanitizer.py --ignore=tests/ops/test_ranks.py \
  2>&1 | tee "$logs/tests.log" || status=$?
note tests "$logs/tests.log" "$status"

# Without torch's cache every tensor is an allocation of its own, whose ends memcheck knows.
export PATH="$PATH:/usr/local/cuda/bin"
small="(nothing-round and fresh and 0.02) or (stored and excluded)"
for tool in memcheck racecheck; do
  log="$logs/$tool.log" status=0
  if ! command -v compute-sanitizer >/dev/null; then
    echo "not run: there is no compute-sanitizer" >"$log"
  else
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 45 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -p no:cacheprovider tests/ops/test_cuda.py -k "$small" >"$log" 2>&1 || status=$?
    if grep -q "Device not supported" "$log"; then
      echo "not run: compute-sanitizer does not support this device or virtual machine" >>"$log"
      status=0
    elif [ "$status" -eq 124 ]; then
      echo "cut off after 45 s, without a finding so far" >>"$log"
      if ! grep -qE "Invalid|Race reported|Misaligned" "$log"; then status=0; fi
    fi
  fi
  note "$tool" "$log" "$status"
done

wait "${compiling[@]}" || echo "make gpu: not all kernels of the bench are compiled: it takes longer"
left=$((SECONDS < 425 ? 465 - SECONDS : 40)) # of eight minutes
timeout "$left" "$PYTHON" -m bench --device cuda --rounds 5 --minutes "$(((left - 30) * 10 / 6))e-2" \
  "${notes[@]}" --output_dir "$logs" || red=1
cp "$logs"/*.json bench/results/ || red=1
echo "make gpu: ${SECONDS} s; commit what is new in bench/results; its report is $logs/report.html"
exit "$red"
