#!/usr/bin/env bash
# Tests and measures dist_graft on the GPUs of this machine, in under eight minutes, from the checkout:
# nothing is installed or downloaded. See docs/gpu.md for the packages it needs.
#   launch/gpu_check.sh [OUT]
# writes summary.txt and gpu.json into OUT (gpu_check), beside the complete output of both parts.
#   PYTHON             program that runs Python with torch ($VENV/bin/python if it exists, or python3)
#   TEST_SECONDS       time limit of the tests (230); 0 skips them
#   BENCHMARK_SECONDS  time limit of the benchmarks (230); 0 skips them
# The exit status is 0 only if all tests passed and all parts of the benchmark ran; a part that fails or
# runs out of time does not end the others.
set -euo pipefail
out=$(realpath -m "${1:-gpu_check}")
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "$0")/environment.sh"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$([ -x "$VENV/bin/python" ] && echo "$VENV/bin/python" || echo python3)
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

fail() {
    echo "gpu_check: error: $1" >&2
    exit 2
}
gpus=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())") || fail "$PYTHON has no torch"
[ "$gpus" -gt 0 ] || fail "torch sees no GPU: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
"$PYTHON" -c "import jsonargparse, tensorboard, matplotlib, hypothesis, pytest, pytest_timeout" ||
    fail "a Python package is missing: see docs/gpu.md for how to install it"
mkdir -p "$out"
status=0

tests=${TEST_SECONDS:-230}
if [ "$tests" != 0 ]; then
    echo "pytest -m gpu, at most $tests s"
    command=("$PYTHON" -m pytest -m gpu -W default -q --junitxml="$out/tests.xml")
    command+=(tests/distributed tests/unit/data)
    if "$PYTHON" -c "import xdist" 2>/dev/null; then
        command+=(--numprocesses=auto --maxprocesses=8 --dist=loadgroup)
    fi
    # SIGINT: pytest still writes its report.
    timeout --signal=INT --kill-after=10 "$tests" "${command[@]}" >"$out/tests.log" 2>&1 || status=1
    tail -n 1 "$out/tests.log"
fi
benchmarks=${BENCHMARK_SECONDS:-230}
if [ "$benchmarks" != 0 ]; then
    echo "benchmarks/gpu.py, at most $benchmarks s"
    timeout --kill-after=10 "$((benchmarks + 10))" "$PYTHON" benchmarks/gpu.py \
        --seconds "$benchmarks" --json "$out/benchmarks.json" >"$out/benchmarks.log" 2>&1 || status=1
fi
"$PYTHON" tools/gpu_summary.py "$out" || status=1
exit "$status"
