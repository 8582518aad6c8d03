"""Self-test of `dist-graft doctor`: one round between two processes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time

_NETWORKS = 2


def run_selftest(backend: str, *, seconds: float) -> tuple[bool, str]:
    """Graft two networks in new processes and compare the result with `mix`.

    Args:
        backend: "gloo" (on the CPU) or "nccl" (on two GPUs).
        seconds: timeout, including the start of the processes.

    Returns: whether the test passed, and one line with the result or the error.
    """
    module = "dist_graft.population.runtime.selftest"
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, backend, f"{seconds:g}"],
            env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return False, f"the processes did not end within {seconds:g} s"
    lines = done.stdout.strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit status {done.returncode}"


def main(backend: str, seconds: float) -> None:
    """Start the two processes; the last line of output is the result."""
    from dist_graft.errors import DistGraftError
    from dist_graft.population.runtime.launch import launch

    try:
        results = launch(
            _graft_and_compare, backend, seconds, networks=_NETWORKS, start_method="fork"
        )
    except DistGraftError as error:
        sys.exit(str(error))
    print(results[0])


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
