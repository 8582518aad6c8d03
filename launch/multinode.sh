#!/usr/bin/env bash
# Trains on several machines. Run it on each machine, in the same checkout, with the same arguments and
# settings. Arguments are passed to dist_graft train, e.g. on each of two machines
#   HEAD=node1 NODES=2 launch/multinode.sh --config launch/configs/quickstart.yaml
#
# Environment variables (default):
#   HEAD       name or address of one of the machines, reachable from all of them
#   PORT       free port on HEAD, open between the machines (29500)
#   NODES      number of machines
#   PROCESSES  number of processes on each machine (all GPUs or cores); each trains a network, or a
#              replica of one with --runtime.replicas
#   RUN_DIR    run directory, on a disk shared by all machines (runs/multinode)
#   JOB        unique id among the jobs that use the same HEAD and PORT (dist_graft)
#   JOIN_TIMEOUT  seconds to wait for the other machines (600)
#   ADDRESS    address of this machine, if its host name does not resolve to it
#   PYTHON     command that runs Python ($VENV/bin/python; VENV is .venv), e.g.
#              "apptainer exec --nv --bind $PWD dist_graft.sif python"
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   network interface, if there are several
# The output of each process is also written to RUN_DIR/logs/JOB/HOST.
set -euo pipefail
cd "$(dirname "$0")/.."

RUN_DIR=${RUN_DIR:-runs/multinode}
JOB=${JOB:-dist_graft}
JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}
read -ra python <<<"${PYTHON:-${VENV:-.venv}/bin/python}"
if ! type "${python[0]}" &>/dev/null; then
    echo "dist-graft: error: ${python[0]} not found on $(hostname): run launch/quickstart.sh to create .venv," \
        "or set VENV or PYTHON" >&2
    exit 1
fi
exec "${python[@]}" -m dist_graft.population.runtime.torchrun \
    --nnodes="${NODES:?number of machines}" --nproc-per-node="${PROCESSES:-auto}" \
    --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?name of one of the machines}:${PORT:-29500}" \
    --rdzv-id="$JOB" --rdzv-conf="join_timeout=$JOIN_TIMEOUT,read_timeout=$JOIN_TIMEOUT" \
    ${ADDRESS:+--local-addr="$ADDRESS"} \
    --log-dir="$RUN_DIR/logs/$JOB/${SLURMD_NODENAME:-$(hostname)}" --tee=3 \
    --log-line-prefix-template="[\${rank}] " \
    -m dist_graft train --run_dir "$RUN_DIR" "$@"
