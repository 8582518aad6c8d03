#!/usr/bin/env bash
# Trains two ResNet-20 on images that are included in the package. Takes about two minutes on two
# cores, plus the installation. Arguments are passed to dist_graft train, e.g. --epochs 20
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "$0")/environment.sh"
install ""

RUN_DIR=${RUN_DIR:-runs/quickstart}
dist-graft train --networks "${NETWORKS:-2}" \
    --config launch/configs/quickstart.yaml --run_dir "$RUN_DIR" "$@"
echo "The results are in $RUN_DIR: summary.json, and log.txt and metrics.jsonl of each network."
echo "To view them in TensorBoard: $VENV/bin/tensorboard --logdir $RUN_DIR"
