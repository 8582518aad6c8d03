#!/usr/bin/env bash
# Trains on this machine, with one process per GPU, or per core without GPUs. Arguments are passed to
# dist_graft train, e.g. launch/local.sh --config launch/configs/quickstart.yaml --run_dir runs/one
#
# Environment variables (default):
#   PROCESSES  number of processes (all GPUs or cores); each trains a network, or a replica of one
#              with --runtime.replicas
#   JOBS       number of networks: start each as an independent job (docs/jobs.md); they share the cores and
#              GPUs
#   PYTHON     command that runs Python ($VENV/bin/python; VENV is .venv)
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra python <<<"${PYTHON:-${VENV:-.venv}/bin/python}"
if ! type "${python[0]}" &>/dev/null; then
    echo "dist-graft: error: ${python[0]} not found on $(hostname): run launch/quickstart.sh to create .venv," \
        "or set VENV or PYTHON" >&2
    exit 1
fi
if [ -n "${JOBS:-}" ]; then
    count=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) cores=$(nproc) jobs=()
    IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((count - 1)))}"
    for ((network = 0; network < JOBS; network++)); do
        if [ "${#gpus[@]}" -gt 0 ]; then export CUDA_VISIBLE_DEVICES=${gpus[network % ${#gpus[@]}]}; fi
        "${python[@]}" -m dist_graft train --graft.exchange files --population.size "$JOBS" \
            --population.network "$network" --runtime.threads $((cores > JOBS ? cores / JOBS : 1)) "$@" &
        jobs+=($!)
    done
    trap 'kill -TERM "${jobs[@]}" 2>/dev/null' INT TERM
    status=0
    for job in "${jobs[@]}"; do
        while :; do
            ended=0
            wait "$job" || ended=$?
            # A signal ends the wait, not yet the job.
            if [ "$ended" -le 128 ] || ! kill -0 "$job" 2>/dev/null; then break; fi
        done
        if [ "$ended" -ne 0 ]; then status=$ended; fi
    done
    exit "$status"
fi
exec "${python[@]}" -m dist_graft.population.runtime.torchrun --standalone \
    --nproc-per-node="${PROCESSES:-auto}" -m dist_graft train "$@"
