#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: build, tests on the device, memory and race checks, timings.
# Needs a GPU, nvcc, torch >= 2.10, ninja, pytest and what the search imports but jsonargparse; no network. Within ten
# minutes on one H100.
#
#     benchmarks/gpu_check.sh [--dry-run]
#
# Writes benchmarks/results/<gpu>/<date>.json and a table of it, <date>.md, from <date>-{step,kernels,data}.json. Where
# a check fails the rest still runs; the exit status is then 1. What a whole latency table is worth, in as many minutes
# again: benchmarks/lut_accuracy.py --device cuda --batch 32 --builds 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry=${1:-}
[ -z "$dry" ] || [ "$dry" = --dry-run ] || { echo "usage: benchmarks/gpu_check.sh [--dry-run]"; exit 2; }
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
step=0
failed=()

run() { # run seconds "what it shows" command...
  step=$((step + 1))
  printf '\n== %d. %s (at most %d s)\n   %s\n' "$step" "$2" "$1" "${*:3}"
  [ -z "$dry" ] || return 0
  timeout "$1" "${@:3}" || failed+=("$step. $2")
}

if [ -z "$dry" ]; then
  gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
  results=benchmarks/results/$gpu
  mkdir -p "$results"
else
  results=benchmarks/results/GPU
fi
out=$results/$(date +%Y-%m-%d)

run 170 "the native module compiles for this GPU" env TFNAS_CUDA=1 "$python" setup.py build_ext --inplace
[ ${#failed[@]} -eq 0 ] || { echo "nothing else can run"; exit 1; }
run 20 "what can run here" "$python" -c \
  'import tfnas_ext; print(tfnas_ext.build_info(), *tfnas_ext.backend_report(), sep="\n")'
run 90 "engine, captured steps, sampler, timers and data on the device; fp64, fp32, tf32, bf16" "$python" -m pytest -q \
  tests/test_engine_gpu.py tests/test_sampling.py tests/test_timing_cuda.py tests/test_data_cuda.py
if command -v compute-sanitizer > /dev/null || [ -n "$dry" ]; then
  # Calls of CUDA that fail are not its business: torch and its libraries try some to learn what there is, and whatever
  # this package calls is checked. --kernel-name is of CUDA 12.3 and later.
  for tool in memcheck racecheck synccheck; do
    run 45 "$tool finds nothing" compute-sanitizer --tool "$tool" --kernel-name kns=tfnas --report-api-errors no \
      --error-exitcode 1 "$python" -m pytest -q -x tests/test_engine_gpu.py -k "fp32-0 or tf32-0 or bf16-0"
  done
else
  echo "compute-sanitizer is not on PATH: memory and race checks were left out"
  failed+=("compute-sanitizer")
fi
run 90 "steps against plain PyTorch; launches, waits, memory; another timer" \
  "$python" benchmarks/gpu_step.py --samples 10 --json "$out-step.json"
run 50 "each kernel against the bytes that it must move" \
  "$python" benchmarks/gpu_kernels.py --samples 5 --json "$out-kernels.json"
run 35 "images per second of the data layer" \
  "$python" benchmarks/data_loading.py --device cuda --workers 0 --seconds 2 --output "$out-data.json"
run 10 "one file and a table of all" "$python" benchmarks/gpu_summary.py "$out"
if [ ${#failed[@]} -gt 0 ]; then
  printf '\nfailed: %s' "${failed[@]}"
  echo
  exit 1
fi
[ -n "$dry" ] || echo "wrote $out.json and $out.md"
