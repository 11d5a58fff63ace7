#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: build, tests on the device, memory and race checks, timings.
# Needs a GPU, nvcc and torch >= 2.10 with its test dependencies; no network. Within ten minutes on one H100.
#
#     benchmarks/gpu_check.sh [--dry-run]
#
# Writes benchmarks/results/<gpu>/<date>.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry=${1:-}
[ -z "$dry" ] || [ "$dry" = --dry-run ] || { echo "usage: benchmarks/gpu_check.sh [--dry-run]"; exit 2; }
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
step=0

run() { # run "what it shows" command...
  step=$((step + 1))
  printf '\n== %d. %s\n   %s\n' "$step" "$1" "${*:2}"
  [ -n "$dry" ] || "${@:2}"
}

if [ -z "$dry" ]; then
  gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
  results=benchmarks/results/$gpu
  mkdir -p "$results"
else
  results=benchmarks/results/GPU
fi
out=$results/$(date +%Y-%m-%d).json

run "the native module compiles for this GPU" env TFNAS_CUDA=1 "$python" setup.py build_ext --inplace
run "what can run here" "$python" -m tfnas info
run "engine, sampler, timers and data on the device" \
  "$python" -m pytest -q tests/test_engine_gpu.py tests/test_sampling.py tests/test_timing_cuda.py tests/test_data_cuda.py
if command -v compute-sanitizer > /dev/null || [ -n "$dry" ]; then
  for tool in memcheck racecheck synccheck; do
    run "$tool finds nothing" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -x tests/test_engine_gpu.py -k "plain_pytorch and (0 or 1)"
  done
else
  echo "compute-sanitizer is not on PATH: memory and race checks were left out"
fi
run "steps against plain PyTorch" "$python" benchmarks/gpu_step.py --samples 10 --json "$out"
[ -n "$dry" ] || echo "wrote $out"
