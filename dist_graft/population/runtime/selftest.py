"""Self-test of `dist-graft doctor`: one round between two processes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_NETWORKS = 2
_EXIT_SECONDS = 10.0


def run_selftest(backend: str, *, seconds: float) -> tuple[bool, str]:
    """Graft two networks in new processes and compare the result with `mix`.

    Args:
        backend: "gloo" (on the CPU) or "nccl" (on two GPUs).
        seconds: timeout, including the start of the processes.

    Returns: whether the test passed, and one line with the result or the error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(_NETWORKS), "LOCAL_WORLD_SIZE": str(_NETWORKS)}
    environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    module = "dist_graft.population.runtime.selftest"
    command = [sys.executable, "-m", module, backend, f"{seconds:g}"]
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(_NETWORKS)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, file in enumerate(files):
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with file.open("wb") as output:
                    processes.append(
                        subprocess.Popen(
                            command,
                            env=environment | ranks,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                        )
                    )
            late = [rank for rank, process in enumerate(processes) if not _ends(process, deadline)]
        finally:
            for process in processes:
                process.kill()
                process.wait(_EXIT_SECONDS)
        outputs = [file.read_text(errors="replace").strip().splitlines() for file in files]
    if late:
        return False, f"process {late[0]} did not end within {seconds:g} s"
    for process, lines in zip(processes, outputs, strict=True):
        if process.returncode:
            return False, lines[-1] if lines else _cause(process.returncode)
    return True, outputs[0][-1]


def _ends(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether the process ends before the deadline."""
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _cause(status: int) -> str:
    if status < 0:
        return f"a process was killed by {signal.Signals(-status).name} and printed nothing"
    return f"a process exited with status {status} and printed nothing"


def main(backend: str, seconds: float) -> None:
    """Run one of the two processes; its last line of output is the result."""
    from dist_graft.errors import DistGraftError
    from dist_graft.population.runtime.process import die_with_launcher, leave

    die_with_launcher()
    try:
        print(_graft_and_compare(backend, seconds))
    except DistGraftError as error:
        print(" ".join(str(error).split()))
        leave(error.exit_status)
    leave(0)


def _graft_and_compare(backend: str, seconds: float) -> str:
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

    config = RuntimeConfig(
        device="cuda" if backend == "nccl" else "cpu",
        backend="nccl" if backend == "nccl" else "gloo",
        threads=1,
        timeout_seconds=seconds,
    )
    runtime = start(config, read_process_info())
    network = runtime.process.network
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
    seconds = time.monotonic() - began
    received = graft_tensors(models[network])
    is_equal = torch.equal if backend == "gloo" else torch.allclose
    wrong = [key for key in expected if not is_equal(expected[key], received[key])]
    runtime.shutdown()
    if wrong:
        raise DisagreementError(f"a round over {backend} differs from mix in {wrong[0]}")
    return f"a round took {1000 * seconds:.0f} ms and gave the expected weights"


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
