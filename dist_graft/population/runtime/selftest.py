"""A round between two processes of this machine, to see whether its parts work together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

_NETWORKS = 2
_LEAVE_SECONDS = 10.0


def run_selftest(backend: str, *, seconds: float) -> tuple[bool, str]:
    """Let two new processes meet and graft, and compare the result with `mix`.

    Args:
        backend: gloo (on the CPU), or nccl (two GPUs).
        seconds: for all of it, starting the processes included; they are ended afterwards.

    Returns: whether it went well, and one line of what was seen, or why not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place |= {"WORLD_SIZE": str(_NETWORKS), "LOCAL_WORLD_SIZE": str(_NETWORKS)}
    place |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    command = [
        sys.executable,
        "-m",
        "dist_graft.population.runtime.selftest",
        backend,
        f"{seconds:g}",
    ]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(_NETWORKS)]
        ranks = []
        try:
            for rank, output in enumerate(outputs):
                mine = environment | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(_start(command, mine, output))
            late = [
                rank for rank, process in enumerate(ranks) if not _ended(process, began + seconds)
            ]
        finally:
            for process in ranks:
                process.kill()
                process.wait(_LEAVE_SECONDS)
        said = [output.read_text(errors="replace").strip().splitlines() for output in outputs]
    if late:
        return False, f"process {late[0]} did not end within {seconds:g} s"
    for process, lines in zip(ranks, said, strict=True):
        if process.returncode:
            return False, lines[-1] if lines else _cause(process.returncode)
    return True, said[0][-1]


def _start(
    command: list[str], environment: Mapping[str, str], output: Path
) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen(
            command, env=dict(environment), stdout=file, stderr=subprocess.STDOUT
        )


def _ended(process: subprocess.Popen[bytes], deadline: float) -> bool:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _cause(status: int) -> str:
    if status < 0:
        return f"a process was ended by {signal.Signals(-status).name} without a word"
    return f"a process ended with status {status} without a word"


def main(backend: str, seconds: float) -> None:
    """One of the two processes; its last line says what was seen."""
    from dist_graft.errors import DistGraftError
    from dist_graft.population.runtime.process import die_with_launcher, leave
    from dist_graft.population.runtime.process_info import read_process_info

    die_with_launcher()
    try:
        print(_meet_and_graft(read_process_info().network, backend, seconds))
    except DistGraftError as error:
        print(" ".join(str(error).split()))
        leave(error.exit_status)
    leave(0)


def _meet_and_graft(network: int, backend: str, seconds: float) -> str:
    import torch
    from torch import nn

    from dist_graft.config import RuntimeConfig
    from dist_graft.errors import DisagreementError
    from dist_graft.grafting.mixing import mix
    from dist_graft.grafting.rules.graft import Graft
    from dist_graft.grafting.units import graft_tensors, graft_units
    from dist_graft.population.grafter import Grafter
    from dist_graft.population.runtime.process_group import start
    from dist_graft.population.runtime.process_info import read_process_info

    device = "cuda" if backend == "nccl" else "cpu"
    config = RuntimeConfig(
        device=device,
        backend="nccl" if backend == "nccl" else "gloo",
        threads=1,
        timeout_seconds=seconds,
    )
    runtime = start(config, read_process_info())
    models = []
    for seed in range(_NETWORKS):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3)))
        models[-1].to(runtime.device)
    states = [graft_tensors(model) for model in models]
    rule, units = Graft(), graft_units(models[0])
    information = torch.stack([rule.measure(units, state) for state in states]).cpu()
    expected = mix(states, units, rule.decide(information, 0))[network]

    began = time.monotonic()
    Grafter(models[network], rule=rule, peers=runtime.peers).graft()
    took = time.monotonic() - began
    received = graft_tensors(models[network])
    same = torch.equal if backend == "gloo" else torch.allclose
    wrong = [key for key in expected if not same(expected[key], received[key])]
    runtime.shutdown()
    if wrong:
        raise DisagreementError(f"a round over {backend} gave other weights than mix in {wrong[0]}")
    return f"a round took {1000 * took:.0f} ms, and gave the weights that it must"


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
