#!/usr/bin/env bash
# Trains on several machines: start it on each of them, in the same checkout, with the same arguments
# and settings. Arguments go to dist_graft train, e.g. on both of two machines
#   HEAD=node1 NODES=2 launch/multinode.sh --config launch/configs/quickstart.yaml
#
# What to change, or to set as an environment variable:
#   HEAD       name or address of one of the machines, which all can reach
#   PORT       a port of HEAD that is free and open between the machines (29500)
#   NODES      how many machines
#   PROCESSES  how many processes on each machine (all GPUs or cores): a network each, or one of
#              --runtime.replicas
#   RUN_DIR    folder of the run, on a disk that all machines share (runs/multinode)
#   JOB        tells this start from other jobs at the same HEAD and PORT (dist_graft)
#   PATIENCE   seconds to wait for the other machines (600)
#   ADDRESS    of this machine, where its host name does not lead to it
#   PYTHON     command that runs Python ($VENV/bin/python; VENV is .venv), e.g.
#              "apptainer exec --nv --bind $PWD dist_graft.sif python"
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   network interface, where there are several
# Each process's output is also kept in RUN_DIR/logs/JOB/HOST.
set -euo pipefail
cd "$(dirname "$0")/.."

RUN_DIR=${RUN_DIR:-runs/multinode}
JOB=${JOB:-dist_graft}
PATIENCE=${PATIENCE:-600}
read -ra python <<<"${PYTHON:-${VENV:-.venv}/bin/python}"
if ! type "${python[0]}" &>/dev/null; then
    echo "dist-graft: error: there is no ${python[0]} on $(hostname): launch/quickstart.sh makes .venv;" \
        "or set VENV or PYTHON" >&2
    exit 1
fi
exec "${python[@]}" -m dist_graft.population.runtime.torchrun \
    --nnodes="${NODES:?how many machines}" --nproc-per-node="${PROCESSES:-auto}" \
    --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?name of the first machine}:${PORT:-29500}" \
    --rdzv-id="$JOB" --rdzv-conf="join_timeout=$PATIENCE,read_timeout=$PATIENCE" \
    ${ADDRESS:+--local-addr="$ADDRESS"} \
    --log-dir="$RUN_DIR/logs/$JOB/${SLURMD_NODENAME:-$(hostname)}" --tee=3 \
    --log-line-prefix-template="[\${rank}] " \
    -m dist_graft train --run_dir "$RUN_DIR" "$@"
