"""Training program with injected faults: one network fails in a given way at a given step.

    python faulty.py WAY NETWORK STEP ... -- train --run_dir RUN ...

Steps are counted from the start of the process. A checkpoint that is being written is awaited
before the fault. `lose` kills the process at the first step, from the given one on, at which a
complete checkpoint exists, without waiting. A file next to the run directory records that a fault
has happened, so that it does not happen again after a restart.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from dist_graft.__main__ import main

SLOW_SECONDS = 0.3
CHECKPOINT_SECONDS = 60.0


def fail(way: str, optimizer: torch.optim.Optimizer, run: Path) -> None:
    """Let this process fail in the given way."""
    if way == "raise":
        raise RuntimeError("injected")
    if way in ("kill", "lose"):
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if way == "vanish":
        run.rename(run.with_name("vanished"))
    if way == "exit":
        os._exit(3)
    if way in ("nan", "all-nan"):
        with torch.no_grad():
            next(iter(optimizer.param_groups[0]["params"])).fill_(math.nan)
    if way == "full":  # writes beyond this file size fail, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    if way == "space":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def wait_for_checkpoint() -> None:
    """Wait until this process has finished writing its checkpoint."""
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint "):
            thread.join(CHECKPOINT_SECONDS)
            assert not thread.is_alive(), f"{thread.name} did not end"


def is_due(way: str, steps: int, step: int, run: Path) -> bool:
    """Whether the fault should happen after so many steps."""
    if way == "lose":
        return steps >= step and any(run.glob("checkpoints/*/COMPLETE.json"))
    if steps == step:
        wait_for_checkpoint()
    return steps == step


def inject(way: str, network: int, step: int, run: Path, once: Path) -> None:
    """Register a fault after a step of this process, if it trains that network."""
    if int(os.environ.get("RANK", "0")) != network:
        return
    steps = 0

    def after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
        nonlocal steps
        steps += 1
        if way == "slow":
            time.sleep(SLOW_SECONDS)
        elif not once.exists() and is_due(way, steps, step, run):
            once.touch()
            fail(way, optimizer, run)

    register_optimizer_step_post_hook(after_step)


if __name__ == "__main__":
    split = sys.argv.index("--")
    faults, arguments = sys.argv[1:split], sys.argv[split + 1 :]
    run = Path(arguments[arguments.index("--run_dir") + 1])
    for number in range(0, len(faults), 3):
        way, network, step = faults[number : number + 3]
        once = run.with_name(f"{run.name}.{way}{number}")
        inject(way, int(network), int(step), run, once)
    sys.argv[1:] = arguments
    sys.exit(main())
