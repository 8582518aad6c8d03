#!/usr/bin/env bash
# Trains on this machine, with one process per GPU, or per core without GPUs. Arguments are passed to
# dist_graft train, e.g. launch/local.sh --config launch/configs/quickstart.yaml --run_dir runs/one
#
# Environment variables (default):
#   PROCESSES  number of processes (all GPUs or cores); each trains a network, or a replica of one
#              with --runtime.replicas
#   PYTHON     command that runs Python ($VENV/bin/python; VENV is .venv)
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra python <<<"${PYTHON:-${VENV:-.venv}/bin/python}"
if ! type "${python[0]}" &>/dev/null; then
    echo "dist-graft: error: there is no ${python[0]} on $(hostname): launch/quickstart.sh makes .venv;" \
        "or set VENV or PYTHON" >&2
    exit 1
fi
exec "${python[@]}" -m dist_graft.population.runtime.torchrun --standalone \
    --nproc-per-node="${PROCESSES:-auto}" -m dist_graft train "$@"
