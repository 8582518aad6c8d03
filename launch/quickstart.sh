#!/usr/bin/env bash
# Trains two ResNet-20 on the images that are shipped with the package; about two minutes on two
# cores, plus the installation. Arguments are passed on, e.g. launch/quickstart.sh --epochs 20
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "$0")/environment.sh"
install ""

RUN_DIR=${RUN_DIR:-runs/quickstart}
python -m dist_graft.population.runtime.torchrun --standalone --nproc-per-node="${NETWORKS:-2}" -m dist_graft train \
    --config launch/configs/quickstart.yaml --run_dir "$RUN_DIR" "$@"
echo "The run is in $RUN_DIR: summary.json, and for each network log.txt and metrics.jsonl."
echo "To watch it: $VENV/bin/tensorboard --logdir $RUN_DIR"
