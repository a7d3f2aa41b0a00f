#!/usr/bin/env bash
# `make gpu`: on a machine with a card, inside eight minutes and without internet: the tests of losses and kernels,
# compute-sanitizer on a few of them, the bench. Leaves one dated file in bench/results for git.
# Needs torch, triton, transformers, pytest and hypothesis of that machine; cmake if the native library is to be tested.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$PYTHON" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "make gpu: torch sees no GPU")'
if command -v cmake >/dev/null; then "$PYTHON" setup.py --quiet build_ext --inplace; fi

card=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
result="bench/results/$(date -u +%Y-%m-%d)-$card.json"

timeout 240 "$PYTHON" -m pytest tests/ops tests/test_losses.py tests/kernels
if command -v compute-sanitizer >/dev/null; then
  timeout 90 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$PYTHON" -m pytest tests/ops/test_cuda.py -k "minilm"
else
  echo "make gpu: no compute-sanitizer here, skipped"
fi
timeout 150 "$PYTHON" -m bench --device cuda --output "$result"
echo "make gpu: commit $result"
