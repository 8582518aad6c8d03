#!/usr/bin/env bash
# Trains on this machine: one network a GPU, or a core when there is no GPU. Arguments go to
# dist_graft train, e.g. launch/local.sh --config launch/configs/quickstart.yaml --run_dir runs/one
#
# What to change, or to set as an environment variable:
#   PROCESSES  how many processes (all GPUs or cores): a network each, or one of --runtime.replicas
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
